// Two pictures side by side, or in turn in one place, in a dialog.

import { isKey, make, picture } from "/common.js";

// What a caller gives: where = { health, gallery }; each side = { id, encoded, facts } or, for a picture that is no object,
// { id, source, facts }; facts are lines below the picture. Returns when the dialog is closed.
export function compare(where, left, right, title) {
  const side = (one) => {
    const shown = one.source ? make("img", { className: "tile", alt: one.id, src: one.source }) : picture(where, one.id, one.encoded, 512);
    return make("figure", {}, shown, make("figcaption", {}, make("strong", {}, one.id), ...one.facts.map((fact) => make("div", {}, fact))));
  };
  const sides = [side(left), side(right)];
  const pair = make("div", { className: "pair" }, ...sides);
  const swap = make("button", { type: "button", hidden: true }, "Other picture");
  const flicker = make("button", { type: "button", ariaPressed: "false" }, "In one place");
  const close = make("button", { type: "button" }, "Close");
  const heading = make("h2", { id: "compared" }, title);
  const dialog = make("dialog", {}, make("header", {}, heading, swap, flicker, close), pair);
  dialog.setAttribute("aria-labelledby", "compared");

  let shown = 0;
  const draw = (together) => {
    pair.classList.toggle("flicker", !together);
    flicker.ariaPressed = String(!together);
    swap.hidden = together;
    // So that the space bar swaps.
    (together ? flicker : swap).focus();
    sides.forEach((one, n) => (one.hidden = !together && n !== shown));
  };
  const turn = () => {
    shown = 1 - shown;
    draw(false);
  };
  swap.addEventListener("click", turn);
  flicker.addEventListener("click", () => draw(flicker.ariaPressed === "true"));
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    // What else the page does with keys has to wait.
    event.stopPropagation();
    if (event.key === "f" && isKey(event)) flicker.click();
  });
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => (dialog.remove(), done())));
}
