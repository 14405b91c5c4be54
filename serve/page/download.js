// A table as a file that the browser saves.

import { make } from "/common.js";

// rows: arrays of values, the header first. Names that are not UTF-8 are written with the bytes that they have.
export function download(rows, name) {
  const text = rows.map((row) => row.map(quoted).join(",") + "\r\n").join("");
  const parts = text.split(/([\udc80-\udcff])/u).map((part, n) => (n % 2 ? new Uint8Array([part.charCodeAt(0) - 0xdc00]) : part));
  const address = URL.createObjectURL(new Blob(parts, { type: "text/csv" }));
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function quoted(value) {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
