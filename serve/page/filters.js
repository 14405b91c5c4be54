// Filters of a page: conditions as `ruiji search --where` takes them, shown as chips, added in a dialog.

import { ask, make } from "/common.js";

const PATH = "path";
// These name the picture; the path stands for them.
const NAMES = ["img_path", "img_name"];

// Shows the conditions in a box, with a button that adds one if there is something to filter by.
// change(conditions) is called with the new ones.
export function drawFilters(box, about, columns, conditions, change) {
  const chips = conditions.map((condition) => {
    const remove = make("button", { type: "button", className: "chip" }, said(condition), make("span", { ariaHidden: "true" }, "×"));
    remove.setAttribute("aria-label", `Remove the filter: ${said(condition)}`);
    remove.addEventListener("click", () => change(conditions.filter((one) => one !== condition)));
    return remove;
  });
  const choices = columns.filter(({ name }) => !NAMES.includes(name));
  if (about.paths) choices.unshift({ name: PATH, values: null });
  const walking = box.contains(document.activeElement);
  box.replaceChildren(...chips);
  if (choices.length) {
    const add = make("button", { type: "button" }, "Add a filter");
    add.addEventListener("click", async () => {
      await choose(choices, (condition) => change([...new Set([...conditions, condition])]));
      // The button that opened it may have been drawn anew.
      box.lastElementChild.focus();
    });
    box.append(add);
  }
  // What was pressed is not there any more.
  if (walking) box.lastElementChild?.focus();
}

function said(condition) {
  const [, column, not, value] = condition.match(/^([^=!]+)(!?)=(.*)$/s) ?? [null, condition, "", ""];
  if (column === PATH) return `path ${not ? "does not begin" : "begins"} with ${value}`;
  return `${column} is ${not ? "not " : ""}${value || "empty"}`;
}

// Returns when the dialog is closed.
function choose(choices, add) {
  const column = make("select", {}, ...choices.map(({ name }) => make("option", { value: name }, name)));
  const relation = make("select");
  const value = make("span", { className: "value" });
  const form = make("form", { method: "dialog", className: "toolbar" });
  const fields = [["Column", column], ["Relation", relation]];
  for (const [name, field] of fields) field.setAttribute("aria-label", name);
  const fill = () => {
    const { name, values } = choices[column.selectedIndex];
    const path = name === PATH;
    relation.replaceChildren(
      make("option", { value: "=" }, path ? "begins with" : "is"),
      make("option", { value: "!=" }, path ? "does not begin with" : "is not"),
    );
    const field = values
      ? make("select", { name: "value" }, ...values.map((one) => make("option", { value: one }, one || "(empty)")))
      : make("input", { name: "value", type: "text", required: path, placeholder: path ? "2024/" : "" });
    field.setAttribute("aria-label", "Value");
    value.replaceChildren(field);
  };
  column.addEventListener("change", fill);
  fill();
  const cancel = make("button", { type: "button" }, "Cancel");
  form.append(column, relation, value, make("button", { className: "first" }, "Add"), cancel);
  const dialog = make("dialog", { className: "small" }, make("header", {}, make("h2", { id: "filtering" }, "Show only pictures whose")), form);
  dialog.setAttribute("aria-labelledby", "filtering");
  cancel.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  form.addEventListener("submit", () => add(`${column.value}${relation.value}${value.firstChild.value}`));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => (dialog.remove(), done())));
}

// What objects can be filtered by, besides their path.
export const loadColumns = async () => (await ask("/columns")).columns;
