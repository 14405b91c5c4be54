// The list of files that can go, in a dialog of the page Clean up.

import { ask, element, get, make, plural } from "/common.js";

// Once, when the gallery is known. sent() ends when all decisions are recorded.
export function prepareListing(gallery, sent) {
  element("close").addEventListener("click", () => element("listing").close());
  element("wanted").addEventListener("submit", (event) => (event.preventDefault(), download(gallery, sent)));
}

export function openListing() {
  element("act").disabled = false;
  element("read").textContent = "";
  element("listing").showModal();
}

async function download(gallery, sent) {
  const form = element("format").value;
  const which = element("which").value;
  const wanted = new URLSearchParams({ gallery, list: which, format: form === "null" ? "paths" : form });
  if (form === "null") wanted.set("null", "true");
  const say = (text, failed = false) => ((element("read").textContent = text), element("read").classList.toggle("failed", failed));
  element("download").disabled = true;
  try {
    say("Reading the files…");
    await sent();
    const answer = await get(`/decisions/files?${wanted}`);
    const end = form === "null" ? 0 : 10;
    const parts = [];
    let lines = form === "csv" ? -1 : 0;
    const reader = answer.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      parts.push(part.value);
      for (const byte of part.value) lines += byte === end;
      say(`Reading the files… ${plural(Math.max(0, lines), "file")} listed`);
    }
    const link = make("a", { href: URL.createObjectURL(new Blob(parts)), download: answer.headers.get("content-disposition").match(/"(.*)"/)[1] });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    const stand = await ask(`/decisions/status?gallery=${encodeURIComponent(gallery)}`);
    const said = [`${plural(lines, "file")} listed.`];
    if (which === "remove") {
      if (stand.to_remove > lines) said.push(`${plural(stand.to_remove - lines, "file")} left out: choose “left out” for the reasons.`);
      if (stand.gone) said.push(`${plural(stand.gone, "file")} ${stand.gone === 1 ? "is" : "are"} gone already.`);
    }
    say(said.join(" "));
  } catch (error) {
    say(error instanceof TypeError ? "The list broke off; it is not complete. Try again." : error.message, true);
  }
  element("download").disabled = false;
}
