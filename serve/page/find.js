// Find: a picture, words or an object, its look-alikes, and each of these as the next query.
//
// The address says what is shown: ?id=ID or ?text=WORDS, and view, k, min, collapse, where (several), gallery. An id stands
// there percent-encoded, and is never decoded here, because names of files need not be UTF-8. A picture that was sent is
// ?picture=KEY, and is kept here for as long as the page is open.

import { ask, begin, element, encodeId, make, picture, plural, tell, thumbnail } from "/common.js";
import { compare } from "/compare.js";
import { download } from "/download.js";
import { drawFilters, loadColumns } from "/filters.js";
import { MOST, drawRings, emptyHint } from "/rings.js";

const [query, hits, sky, pointed] = ["query", "hits", "sky", "pointed"].map(element);
const [file, words, count, least, collapse] = ["file", "words", "count", "least", "collapse"].map(element);
const COUNTS = [5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000];
// As `ruiji near-duplicates` takes it.
const NEAR_IDENTICAL = "0.95";
const pictures = new Map();
let where = null;
let columns = [];
// What the service answered last, and to what; so that only the view changes if only that is asked for.
let last = { key: null };
// What was begun with, so that going back there shows the same.
let begun = { key: null };
let asking = null;

function wanted() {
  const asked = new URLSearchParams(location.search);
  return {
    id: location.search.match(/[?&]id=([^&]*)/)?.[1],
    text: asked.get("text") ?? undefined,
    picture: asked.get("picture") ?? undefined,
    k: asked.get("k") ?? "30",
    min: asked.get("min") ?? "0",
    collapse: asked.get("collapse") ?? "",
    where: asked.getAll("where"),
    view: asked.get("view") === "rings" ? "rings" : "grid",
  };
}

function address(changed) {
  const now = { ...wanted(), ...changed };
  const parts = [];
  if (now.id !== undefined) parts.push(`id=${now.id}`);
  if (now.text !== undefined) parts.push(`text=${encodeURIComponent(now.text)}`);
  if (now.picture !== undefined) parts.push(`picture=${encodeURIComponent(now.picture)}`);
  if (now.k !== "30") parts.push(`k=${encodeURIComponent(now.k)}`);
  if (now.min !== "0") parts.push(`min=${encodeURIComponent(now.min)}`);
  if (now.collapse) parts.push(`collapse=${encodeURIComponent(now.collapse)}`);
  parts.push(...now.where.map((one) => `where=${encodeURIComponent(one)}`));
  if (now.view !== "grid") parts.push(`view=${now.view}`);
  if (where.gallery !== where.health.default) parts.push(`gallery=${encodeURIComponent(where.gallery)}`);
  return parts.length ? `/?${parts.join("&")}` : "/";
}

// No query.
const NONE = { id: undefined, text: undefined, picture: undefined };

// Another address: a step that the browser can go back.
function go(to) {
  history.pushState(null, "", to);
  scrollTo(0, 0);
  show();
}

// The same query, shown otherwise: no step of its own, or a slider would make hundreds.
function change(changed) {
  history.replaceState(null, "", address(changed));
  show();
}

const isQuery = (now) => now.id !== undefined || now.text !== undefined || now.picture !== undefined;

async function show() {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const now = wanted();
  setControls(now);
  try {
    const asked = isQuery(now) ? await answer(now, signal) : await beginnings(now, signal);
    if (signal.aborted) return;
    element("again").hidden = true;
    // Who goes on from one of these links with the keyboard does so among the new ones.
    const walking = document.querySelector(":is(#query, #hits, #sky) a:focus-visible") !== null;
    if (isQuery(now)) drawAnswer(now, asked);
    else drawBeginnings(now, asked);
    if (walking) document.querySelector("#hits a, #sky a")?.focus({ preventScroll: true });
  } catch (error) {
    if (error.name === "AbortError") return;
    clear();
    element("again").hidden = !error.again;
    tell(error.message, true);
  } finally {
    if (!signal.aborted) element("results").ariaBusy = "false";
  }
}

function setControls(now) {
  file.value = "";
  words.value = now.text ?? "";
  const place = COUNTS.findLastIndex((one) => one <= Number(now.k));
  count.value = Math.max(0, place);
  count.nextElementSibling.textContent = now.k;
  least.value = now.min;
  least.nextElementSibling.textContent = Number(now.min) === 0 ? "any" : Number(now.min).toFixed(2);
  collapse.checked = now.collapse !== "";
  for (const view of ["grid", "rings"]) element(view).ariaPressed = String(now.view === view);
  drawFilters(element("filters"), where.about, columns, now.where, (conditions) => go(address({ where: conditions })));
  element("view").hidden = !isQuery(now);
}

// Asks once for what was not asked last; what is shown meanwhile is what was there before.
async function once(key, load) {
  if (last.key === key) return last;
  if (last.key !== null) element("results").ariaBusy = "true";
  else tell("Searching…");
  last = { ...(await load()), key };
  return last;
}

function answer(now, signal) {
  const sent = now.picture === undefined ? undefined : pictures.get(now.picture);
  if (now.picture !== undefined && !sent) {
    throw new Error("The picture that was searched with is gone with the page that had it. Choose it again.");
  }
  const parameters = new URLSearchParams({ metric: "cosine", k: now.k, gallery: where.gallery });
  if (now.min !== "0") parameters.set("min_similarity", now.min);
  if (now.collapse) parameters.set("collapse", now.collapse);
  for (const condition of now.where) parameters.append("where", condition);
  return once(`${now.id}\n${now.text}\n${now.picture}\n${parameters}`, async () => {
    if (sent) await checkReadable(sent);
    if (now.id !== undefined) {
      const gallery = encodeURIComponent(where.gallery);
      const [found, object] = await Promise.all([
        ask(`/similar/${now.id}?${parameters}`, { signal }),
        ask(`/objects/${now.id}?gallery=${gallery}`, { signal }),
      ]);
      return { found, name: found.queryObjectId, object };
    }
    const body = new FormData();
    if (sent) body.append("image", sent);
    else body.append("text", now.text);
    const found = await ask(`/search?${parameters}`, { method: "POST", body, signal });
    return { found, name: sent ? sent.name || "pasted picture" : `“${now.text}”`, sent };
  });
}

// A folder, or a file that was changed or removed since, would end the request as if nobody answered.
async function checkReadable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error(`${file.name} cannot be read: it is a folder, or was changed or removed. Choose a picture again.`);
  }
}

// Some objects to begin with.
function beginnings(now, signal) {
  const parameters = new URLSearchParams({ count: 24, gallery: where.gallery });
  for (const condition of now.where) parameters.append("where", condition);
  return once(`begin\n${parameters}`, async () => {
    if (begun.key !== String(parameters)) begun = { key: String(parameters), ...(await ask(`/sample?${parameters}`, { signal })) };
    return begun;
  });
}

function clear() {
  last = { key: null };
  query.hidden = sky.hidden = pointed.hidden = true;
  hits.replaceChildren();
  element("download").disabled = true;
}

function drawBeginnings(now, { objects, total }) {
  document.title = "Find · ruiji";
  query.hidden = sky.hidden = pointed.hidden = true;
  hits.hidden = false;
  hits.replaceChildren(
    ...objects.map((one) => {
      const encoded = encodeId(one.object_id);
      const name = one.annotations?.label ? [make("span", { className: "fact" }, one.annotations.label)] : [];
      return make("li", {}, link({ id: encoded }, picture(where, one.object_id, encoded), ...name, title(one.path ?? one.object_id)));
    }),
  );
  const { about, health } = where;
  const choose = matchMedia("(hover: none)").matches ? "choose a picture" : "drop a picture on this page, paste or choose one";
  const ways = [about.pictures && choose, about.words && "describe one in words"];
  const how = ways.filter(Boolean).join(", ");
  const first = how ? `${how[0].toUpperCase()}${how.slice(1)}, or begin` : "Begin";
  const missing = [
    !about.pictures && "To search with pictures, start the service with --model.",
    !health.media && "To see pictures instead of names, start it with --media-dir.",
  ];
  const none = now.where.length ? "No picture meets these conditions." : "The gallery has no pictures yet.";
  const number = now.where.length ? `${total.toLocaleString("en")} of ${plural(about.objects, "picture")}` : plural(total, "picture");
  const some = `${number}. ${first} with one of these.`;
  tell([objects.length ? some : none, ...missing.filter(Boolean)].join(" "));
}

function drawAnswer(now, { found, name, sent, object }) {
  document.title = `${name} · ruiji`;
  // Of the picture that was sent; the one before is not needed any more.
  if (sent && last.source === undefined) last.source = URL.createObjectURL(sent);
  drawQuery(now, name, object);
  const all = found.similarImages.map((hit) => ({ ...hit, encoded: encodeId(hit.objectId) }));
  for (const hit of all) hit.href = address({ ...NONE, id: hit.encoded });
  const rings = now.view === "rings";
  hits.hidden = rings || !all.length;
  sky.hidden = pointed.hidden = !rings || !all.length;
  element("download").disabled = !all.length;
  hits.replaceChildren(...(rings ? [] : all.map((hit) => tile(now, hit))));
  if (rings && all.length) {
    const source = last.source ?? (object && where.health.media ? thumbnail(where, now.id, 256) : null);
    pointed.replaceChildren(emptyHint());
    drawRings(sky, where, { name, source }, all.slice(0, MOST), (hit) => pointAt(now, hit));
  } else {
    sky.replaceChildren();
  }
  const number = `${all.length} look-alike${all.length === 1 ? "" : "s"}, the most similar first (1 is the same)`;
  const shown = rings && all.length > MOST ? `${number}; the rings show the ${MOST} nearest` : number;
  tell([all.length ? shown : whyNone(now), found.note].filter(Boolean).join("; "));
}

function whyNone(now) {
  if (now.min !== "0") return "Nothing is as similar as that. Lower “Alike from” to see more.";
  return now.where.length ? "No other picture meets these conditions." : "There is no other picture.";
}

function drawQuery(now, name, object) {
  const facts = [];
  const folder = object?.path ? folders(now, object.path, name) : [];
  if (folder.length) facts.push(make("p", { className: "name" }, ...folder));
  const known = Object.entries(object?.annotations ?? {}).filter(([column, value]) => value && !["img_path", "img_name", "id"].includes(column));
  if (known.length) facts.push(make("p", { className: "name" }, known.map(([column, value]) => `${column}: ${value}`).join(" · ")));
  const shown = last.source
    ? make("img", { className: "tile", alt: name, src: last.source })
    : object && picture(where, name, now.id);
  // A picture that was sent may be one that browsers do not show.
  if (last.source) shown.addEventListener("error", () => shown.replaceWith(make("span", { className: "tile" }, name)), { once: true });
  query.classList.toggle("plain", now.view === "rings");
  query.replaceChildren(...(shown ? [shown] : []), make("div", {}, make("h2", {}, name), ...facts));
  query.hidden = false;
}

// A path whose folders are filters; without the file's name if the heading has it already.
function folders(now, path, heading) {
  const parts = path.split("/");
  return parts.flatMap((part, n) => {
    if (n === parts.length - 1) return heading.endsWith(part) ? [] : [part];
    const condition = `path=${parts.slice(0, n + 1).join("/")}/`;
    const only = make("a", { href: address({ where: [...new Set([...now.where, condition])] }), title: "Only this folder" }, part);
    return [only, " / "];
  });
}

function link(changed, ...children) {
  return make("a", { href: address({ ...NONE, ...changed }) }, ...children);
}

const title = (name) => make("span", { className: "name", title: name }, name);

function tile(now, hit) {
  const others = hit.others ? make("span", { className: "others", title: `${hit.others} more are near-identical` }, `+${hit.others}`) : "";
  const fact = make("span", { className: "fact" }, make("b", {}, `${hit.rank} · ${hit.similarity.toFixed(3)}`), others);
  const label = hit.label ? [make("span", { className: "name" }, hit.label)] : [];
  const shown = link({ id: hit.encoded }, picture(where, hit.objectId, hit.encoded), fact, ...label, title(hit.path ?? hit.objectId));
  return make("li", {}, shown, ...comparing(now, hit));
}

// A button that compares a hit with the query; none if the query is no picture, or none can be shown.
function comparing(now, hit, shown = "") {
  if (now.text !== undefined || !where.health.media) return [];
  const button = make("button", { type: "button", className: "compare", title: "Compare with the query" }, shown);
  button.setAttribute("aria-label", `Compare with ${hit.objectId}`);
  button.addEventListener("click", () => {
    const similarity = `similarity ${hit.similarity.toFixed(4)}`;
    const left = { id: last.name, encoded: now.id, source: last.source, facts: [last.object?.path ?? "the query"] };
    compare(where, left, { id: hit.objectId, encoded: hit.encoded, facts: [hit.path ?? "", `rank ${hit.rank}, ${similarity}`] }, `Compare: ${similarity}`);
  });
  return [button];
}

function pointAt(now, hit) {
  const fact = make("b", { className: "fact" }, `${hit.rank} · ${hit.similarity.toFixed(3)}`);
  const label = hit.label ? [make("p", { className: "name" }, hit.label)] : [];
  pointed.replaceChildren(picture(where, hit.objectId, hit.encoded), fact, ...label, title(hit.path ?? hit.objectId), ...comparing(now, hit, "Compare"));
}

function search(sent) {
  if (!where?.about?.pictures) return tell("To search with pictures, start the service with --model.", true);
  const key = Date.now().toString(36);
  pictures.set(key, sent);
  go(address({ ...NONE, picture: key }));
}

async function random() {
  const parameters = new URLSearchParams({ count: 1, gallery: where.gallery });
  for (const condition of wanted().where) parameters.append("where", condition);
  try {
    const { objects } = await ask(`/sample?${parameters}`);
    if (objects.length) go(address({ ...NONE, id: encodeId(objects[0].object_id) }));
    else tell("No picture meets these conditions.", true);
  } catch (error) {
    tell(error.message, true);
  }
}

function saveList() {
  const { found, name } = last;
  const labelled = found.similarImages.some((hit) => hit.label !== null);
  const collapsed = found.similarImages.some((hit) => hit.others !== null);
  const rest = ["similarity", "distance", ...(labelled ? ["label"] : []), ...(collapsed ? ["others"] : [])];
  const rows = found.similarImages.map((hit) => [name, hit.rank, hit.objectId, hit.path, ...rest.map((key) => hit[key])]);
  download([["query", "rank", "object_id", "path", ...rest], ...rows], "look-alikes.csv");
}

// Arrows go from hit to hit: in a grid also up and down, in the rings outwards and inwards.
function step(event) {
  const links = [...document.querySelectorAll("#hits a, #sky a")];
  const here = links.indexOf(document.activeElement);
  if (here < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const box = links[here].getBoundingClientRect();
  const across = links.findIndex((one) => one.getBoundingClientRect().top > links[0].getBoundingClientRect().top + box.height / 2);
  const row = hits.hidden ? 1 : across < 0 ? links.length : across;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row }[event.key];
  if (steps === undefined) return;
  event.preventDefault();
  links[here + steps]?.focus();
}

let soon = 0;
function changeSoon(changed) {
  clearTimeout(soon);
  soon = setTimeout(() => change(changed), 150);
}

function listen() {
  for (const box of [hits, sky, query]) {
    box.addEventListener("click", (event) => {
      const to = event.target.closest("a");
      if (!to || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      // A link of the rings has an address of its own kind.
      go(to.getAttribute("href"));
    });
    box.addEventListener("keydown", step);
  }
  element("random").addEventListener("click", random);
  element("download").addEventListener("click", saveList);
  element("again").addEventListener("click", show);
  element("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (words.value.trim()) go(address({ ...NONE, text: words.value.trim() }));
  });
  element("view").addEventListener("submit", (event) => event.preventDefault());
  for (const view of ["grid", "rings"]) element(view).addEventListener("click", () => change({ view }));
  file.addEventListener("change", () => file.files.length && search(file.files[0]));
  count.addEventListener("input", () => {
    count.nextElementSibling.textContent = COUNTS[count.value];
    changeSoon({ k: String(COUNTS[count.value]) });
  });
  least.addEventListener("input", () => {
    least.nextElementSibling.textContent = Number(least.value) === 0 ? "any" : Number(least.value).toFixed(2);
    changeSoon({ min: least.value });
  });
  collapse.addEventListener("change", () => change({ collapse: collapse.checked ? NEAR_IDENTICAL : "" }));
  addEventListener("popstate", show);
  addEventListener("resize", () => !sky.hidden && changeSoon({}));
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    const { files } = event.dataTransfer;
    if (!files.length) return;
    event.preventDefault();
    if (files.length > 1) tell("Drop one picture: there is one answer.", true);
    else search(files[0]);
  });
  addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (pasted) search(pasted);
  });
}

try {
  tell("Loading…");
  where = await begin();
  if (where.about) {
    element("choose").hidden = !where.about.pictures;
    element("wording").hidden = !where.about.words;
    if (!where.about.pictures) words.placeholder = "Describe a picture";
    count.max = COUNTS.length - 1;
    columns = await loadColumns();
    listen();
    // Not sooner: what is typed and sent before anybody listens would be lost.
    element("ask").hidden = false;
    await show();
  }
} catch (error) {
  tell(error.message, true);
}
