// Find: a picture or an object, its look-alikes, and each of these as the next query.
//
// The address says what is shown: ?id=ID&k=30&min=0.5&gallery=NAME. An id stands there percent-encoded, and is never
// decoded here, because names of files need not be UTF-8. A picture that was sent has no address; it is kept here for as
// long as the page is open.

import { ask, begin, element, encodeId, make, picture, tell } from "/common.js";

const [query, hits] = ["query", "hits"].map(element);
const [file, count, least] = ["file", "count", "least"].map(element);
const pictures = [];
let where = null;
let asking = null;

function wanted() {
  const asked = new URLSearchParams(location.search);
  return {
    id: location.search.match(/[?&]id=([^&]*)/)?.[1],
    picture: history.state?.picture,
    k: asked.get("k") ?? "30",
    min: asked.get("min") ?? "-1",
  };
}

function address(changed) {
  const { id, k, min } = { ...wanted(), ...changed };
  const parts = [];
  if (id !== undefined) parts.push(`id=${id}`);
  if (k !== "30") parts.push(`k=${k}`);
  if (Number(min) > -1) parts.push(`min=${min}`);
  if (where.gallery !== where.health.default) parts.push(`gallery=${encodeURIComponent(where.gallery)}`);
  return parts.length ? `/?${parts.join("&")}` : "/";
}

function go(changed, state = null) {
  history.pushState(state, "", address(changed));
  show();
}

function link(object, ...children) {
  const shown = make("a", { href: address({ id: object }) }, ...children);
  shown.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go({ id: object });
  });
  return shown;
}

async function show() {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const now = wanted();
  file.value = "";
  count.value = now.k;
  least.value = now.min;
  least.nextElementSibling.textContent = Number(now.min) > -1 ? Number(now.min).toFixed(2) : "any";
  const { about } = where;
  query.hidden = true;
  hits.replaceChildren();
  const sent = now.picture === undefined ? undefined : pictures[now.picture];
  if (now.id === undefined && sent === undefined) {
    document.title = "Find · ruiji";
    const gone = now.picture !== undefined ? "The picture that was searched with is gone with the page that had it. " : "";
    const how = about.pictures ? "Drop, paste or choose a picture, or begin" : "Begin";
    const without = about.pictures ? "" : " To search with pictures, start the service with --model.";
    return tell(`${gone}${about.objects.toLocaleString()} objects. ${how} with a random object.${without}`);
  }
  tell("Searching…");
  const parameters = new URLSearchParams({ metric: "cosine", k: now.k, gallery: where.gallery });
  if (Number(now.min) > -1) parameters.set("min_similarity", now.min);
  try {
    let found;
    if (sent) {
      const body = new FormData();
      body.append("image", sent);
      found = await ask(`/search?${parameters}`, { method: "POST", body, signal });
    } else {
      found = await ask(`/similar/${now.id}?${parameters}`, { signal });
    }
    draw(found, sent, now);
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message, true);
  }
}

function draw(found, sent, now) {
  const name = sent ? sent.name || "pasted picture" : found.queryObjectId;
  document.title = `${name} · ruiji`;
  let shown;
  if (sent) {
    shown = make("img", { className: "tile", alt: name, src: URL.createObjectURL(sent) });
    shown.addEventListener("load", () => URL.revokeObjectURL(shown.src), { once: true });
    shown.addEventListener("error", () => shown.replaceWith(make("span", { className: "tile" }, name)), { once: true });
  } else {
    shown = picture(where, name, now.id);
  }
  query.replaceChildren(shown, make("figcaption", {}, name));
  query.hidden = false;
  tell(found.similarImages.length ? `${found.similarImages.length} look-alikes` : "Nothing is as similar as that.");
  hits.replaceChildren(
    ...found.similarImages.map((hit) => {
      const encoded = encodeId(hit.objectId);
      const fact = make("b", { className: "fact" }, `${hit.rank} · ${hit.similarity.toFixed(3)}`);
      const title = make("span", { className: "name", title: hit.path ?? hit.objectId }, hit.objectId);
      return make("li", {}, link(encoded, picture(where, hit.objectId, encoded), fact, title));
    }),
  );
}

function search(sent) {
  if (element("choose").hidden) return tell("To search with pictures, start the service with --model.", true);
  pictures.push(sent);
  go({ id: undefined }, { picture: pictures.length - 1 });
}

async function random() {
  const { about, gallery } = where;
  try {
    // A few rows, because those of objects that left the list are not listed.
    const first = Math.floor(Math.random() * about.rows);
    const found = await ask(`/objects?first=${first}&count=50&gallery=${encodeURIComponent(gallery)}`);
    if (found.objects.length) go({ id: encodeId(found.objects[0].object_id) });
    else tell("There was no object; try again.", true);
  } catch (error) {
    tell(error.message, true);
  }
}

// What changes how the same query is shown keeps the picture that was sent.
const change = (changed) => go(changed, history.state);

element("random").addEventListener("click", random);
element("tools").addEventListener("submit", (event) => event.preventDefault());
file.addEventListener("change", () => file.files.length && search(file.files[0]));
count.addEventListener("change", () => change({ k: count.value }));
least.addEventListener("input", () => (least.nextElementSibling.textContent = Number(least.value).toFixed(2)));
least.addEventListener("change", () => change({ min: least.value }));
addEventListener("popstate", show);
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const dropped = event.dataTransfer.files[0];
  if (dropped) search(dropped);
  else tell("That was no file. Save the picture and drop its file.", true);
});
addEventListener("paste", (event) => {
  const pasted = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (pasted) search(pasted);
});

try {
  tell("Loading…");
  where = await begin();
  element("choose").hidden = !where.about?.pictures;
  if (where.about) await show();
} catch (error) {
  tell(error.message, true);
}
