// Map: the whole gallery on one plane, pictures where there is room for them, and what a person draws round.
//
// The address says where one looks: ?x=0.1&y=-0.2&zoom=4&projection=pca&gallery=NAME. Points know only their gallery rows;
// the objects of those that are looked at are asked for, with the key of the rows, so that a gallery that has changed
// is noticed.

import { ask, begin, element, encodeId, get, heard, isKey, make, picture, tell, thumbnail } from "/common.js";
import { download } from "/download.js";
import { Dots, Plane } from "/plane.js";

const [stage, surface, layer, outline, preview] = ["stage", "surface", "pictures", "outline", "preview"].map(element);
const [panel, heading, note, list] = ["panel", "heading", "note", "list"].map(element);
const [lasso, shown, projection, making] = ["lasso", "shown", "projection", "making"].map(element);
const [view, exporting, clearing] = ["view", "export", "clear"].map(element);

// Objects that one request may ask for; the most that a list shows; squares with a picture, of many and of few objects.
const [ASKED, LISTED, SQUARES, FEW_SQUARES] = [1000, 60, 500, 120];
// A picture's part of its square, and what two may cover of each other.
const [PART, COVER] = [0.78, 0.9];
// How far the view goes in: pixels of a unit of the plane.
const MOST_SCALE = 4e7;

const dots = new Dots(element("dots"));
let where = null;
let plane = null;
let rowsKey = "";
// The plane's place in the middle of the stage, and CSS pixels of a unit of the plane.
const seen = { x: 0, y: 0, scale: 1 };
// Of the stage, and of what the controls take of it, in CSS pixels.
let [width, height, above] = [1, 1, 0];

// Drawing: at most once a frame.

let asked = false;
function draw() {
  if (asked || !plane) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    performance.mark("map-frame");
    dots.draw(plane, seen.x, seen.y, seen.scale);
    movePictures();
    performance.measure("map-frame", "map-frame");
  });
}

function paint() {
  const style = getComputedStyle(document.documentElement);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const rgb = (name) => style.getPropertyValue(name).trim().match(/[\da-f]{2}/gi).map((part) => parseInt(part, 16));
  dots.paint(rgb("--accent"), dark ? [238, 246, 255] : [4, 24, 66], rgb("--selected"));
  draw();
}

// Everything fits below the controls.
function wholeScale() {
  const room = (length, half) => (half ? (length / 2 - Math.min(48, length * 0.1)) / half : Infinity);
  const scale = Math.min(room(width, plane.halfWidth), room(height - above, plane.halfHeight));
  return Number.isFinite(scale) ? scale : Math.min(width, height) / 2;
}

function look(x, y, scale) {
  const least = wholeScale() / 4;
  seen.scale = Math.min(MOST_SCALE, Math.max(least, scale));
  seen.x = Math.min(1.2, Math.max(-1.2, x));
  seen.y = Math.min(1.2, Math.max(-1.2, y));
  preview.hidden = true;
  layer.classList.add("moving");
  draw();
  settle();
}

// The place that is at a pixel of the stage stays there.
function zoom(factor, px = width / 2, py = height / 2) {
  const [x, y] = place(px, py);
  const scale = Math.min(MOST_SCALE, Math.max(wholeScale() / 4, seen.scale * factor));
  look(x - (px - width / 2) / scale, y - (py - height / 2) / scale, scale);
}

const move = (px, py) => look(seen.x + px / seen.scale, seen.y + py / seen.scale, seen.scale);
const place = (px, py) => [seen.x + (px - width / 2) / seen.scale, seen.y + (py - height / 2) / seen.scale];
const showAll = () => look(0, -above / 2 / wholeScale(), wholeScale());
const bounds = () => [...place(0, 0), ...place(width, height)];

// What takes longer than a frame has: now and then while the view moves, and when it rests.

let [resting, between] = [0, 0];
function settle() {
  clearTimeout(resting);
  resting = setTimeout(() => {
    clearTimeout(between);
    between = 0;
    layer.classList.remove("moving");
    choosePictures();
    listObjects();
    remember();
  }, 200);
  between ||= setTimeout(() => {
    between = 0;
    choosePictures();
  }, 150);
}

function remember() {
  const address = new URL(location.href);
  const digits = (value) => String(Number(value.toPrecision(7)));
  address.searchParams.set("x", digits(seen.x));
  address.searchParams.set("y", digits(seen.y));
  address.searchParams.set("zoom", digits(seen.scale / wholeScale()));
  history.replaceState(null, "", address);
}

// Objects by gallery row, asked for when they are looked at.

const objects = new Map();
let again = null;

// Whether they are known now; else a person was told why not.
async function lookUp(rows) {
  const missing = rows.filter((row) => !objects.has(row));
  const key = rowsKey;
  try {
    for (let from = 0; from < missing.length; from += ASKED) {
      const some = missing.slice(from, from + ASKED);
      const path = `/map/objects?rows_key=${key}&rows=${some.join()}&gallery=${encodeURIComponent(where.gallery)}`;
      const found = await ask(path);
      if (key !== rowsKey) return false;
      // Those that left the list since have none.
      for (const row of some) objects.set(row, null);
      for (const one of found.objects) objects.set(one.row, { ...one, encoded: encodeId(one.object_id) });
    }
    return true;
  } catch (error) {
    if (key !== rowsKey) return false;
    if (!error.message.includes("load the map again")) tell(error.message, true);
    else again ??= load("The gallery has changed; the map was loaded again.").finally(() => (again = null));
    return false;
  }
}

const findAddress = (one) => `/?id=${one.encoded}${where.gallery === where.health.default ? "" : `&gallery=${encodeURIComponent(where.gallery)}`}`;

// Pictures lie on a layer of their own, which moves and grows with the plane. A level is a doubling of the scale; within
// it squares of the plane, and so the pictures, stay the same.

let level = null;
const placed = new Map();
let choosing = 0;

function movePictures() {
  if (!level) return;
  const grown = seen.scale / level.scale;
  const x = (level.x - seen.x) * seen.scale + width / 2;
  const y = (level.y - seen.y) * seen.scale + height / 2;
  layer.style.transform = `translate(${x}px, ${y}px) scale(${grown})`;
}

async function choosePictures() {
  const turn = ++choosing;
  if (!where.health.media || shown.ariaPressed !== "true" || !plane.count) return dropPictures(new Set());
  const squares = Math.min(SQUARES, Math.max(FEW_SQUARES, plane.count / 2));
  const size = Math.max(36, Math.sqrt((width * height) / squares));
  // Everything in view is a level's beginning.
  const scale = wholeScale() * 2 ** Math.floor(Math.log2(seen.scale / wholeScale()) + 1e-6);
  const [left, top, right, bottom] = bounds();
  const wanted = plane.representatives(left, top, right, bottom, size / scale, (size * PART * COVER) / scale);
  if (!(await lookUp(wanted.map((n) => plane.rows[n])))) return;
  if (turn !== choosing) return;
  const far = level && Math.max(Math.abs(level.x - seen.x), Math.abs(level.y - seen.y)) * scale > 1e5;
  if (!level || level.scale !== scale || far) {
    level = { x: seen.x, y: seen.y, scale };
    for (const [n, shownOne] of placed) put(shownOne, n, size);
    movePictures();
  }
  dropPictures(new Set(wanted));
  for (const n of wanted) {
    const one = objects.get(plane.rows[n]);
    if (placed.has(n) || !one) continue;
    const shownOne = make("a", { href: findAddress(one), tabIndex: -1, draggable: false, title: one.object_id });
    const image = make("img", { alt: "", draggable: false, src: thumbnail(where, one.encoded, devicePixelRatio > 1.3 ? 256 : 128) });
    image.addEventListener("load", () => image.classList.add("here"));
    shownOne.append(image);
    put(shownOne, n, size);
    shownOne.classList.toggle("selected", plane.selected[n] === 1);
    placed.set(n, shownOne);
    layer.append(shownOne);
  }
}

function put(shownOne, n, size) {
  const side = size * PART;
  const x = (plane.xs[n] - level.x) * level.scale - side / 2;
  const y = (plane.ys[n] - level.y) * level.scale - side / 2;
  shownOne.style.width = shownOne.style.height = `${side}px`;
  shownOne.style.transform = `translate(${x}px, ${y}px)`;
}

function dropPictures(kept) {
  for (const [n, shownOne] of placed) {
    if (kept.has(n)) continue;
    // Else it would still be loaded.
    shownOne.firstChild.removeAttribute("src");
    shownOne.remove();
    placed.delete(n);
  }
}

// The panel: what is selected, or else what is in view.

let listing = 0;
async function listObjects() {
  const turn = ++listing;
  const selecting = plane.selectedCount > 0;
  const points = selecting ? selection() : plane.inside(...bounds());
  heading.textContent = `${points.length.toLocaleString()} ${selecting ? "selected" : "in view"}`;
  view.hidden = selecting;
  view.disabled = !points.length;
  exporting.hidden = clearing.hidden = !selecting;
  // Spread over all of them, because what lies side by side looks alike.
  const some = Array.from({ length: Math.min(LISTED, points.length) }, (_, n) => points[Math.floor((n * points.length) / Math.min(LISTED, points.length))]);
  note.textContent = points.length > some.length ? `${some.length} of them, spread evenly:` : "";
  if (!(await lookUp(some.map((n) => plane.rows[n])))) return;
  if (turn !== listing) return;
  const found = some.map((n) => objects.get(plane.rows[n])).filter(Boolean);
  list.replaceChildren(
    ...found.map((one) => {
      const title = make("span", { className: "name", title: one.path ?? one.object_id }, one.object_id);
      return make("li", {}, make("a", { href: findAddress(one) }, picture(where, one.object_id, one.encoded, 128), title));
    }),
  );
}

function selection() {
  const found = new Uint32Array(plane.selectedCount);
  let count = 0;
  for (let n = 0; n < plane.count; n++) if (plane.selected[n]) found[count++] = n;
  return found;
}

function select(points) {
  plane.select(points);
  for (const [n, shownOne] of placed) shownOne.classList.toggle("selected", plane.selected[n] === 1);
  setLasso(false);
  tell(points.length ? "" : "Nothing lies there.");
  draw();
  listObjects();
}

async function exportList() {
  const rows = Array.from(selection(), (n) => plane.rows[n]).sort((one, other) => one - other);
  exporting.disabled = true;
  let known = true;
  for (let from = 0; known && from < rows.length; from += ASKED) {
    tell(`${from.toLocaleString()} of ${rows.length.toLocaleString()} objects…`);
    known = await lookUp(rows.slice(from, from + ASKED));
  }
  exporting.disabled = false;
  if (!known) return;
  const found = rows.map((row) => objects.get(row)).filter(Boolean);
  download([["object_id", "path"], ...found.map((one) => [one.object_id, one.path])], "selected.csv");
  tell("");
}

// Pointers: one moves or draws round, two zoom; the wheel zooms.

const pointers = new Map();
let pressed = null;
let drawn = null;

const here = (event) => {
  const box = stage.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

stage.addEventListener("pointerdown", (event) => {
  if (!plane || event.button !== 0 || event.target.closest(".controls")) return;
  pointers.set(event.pointerId, here(event));
  if (pointers.size === 1) {
    pressed = { at: here(event), moved: false };
    drawn = lasso.ariaPressed === "true" || event.shiftKey ? [here(event)] : null;
    // Its click would open it, and text would be selected.
    if (drawn) event.preventDefault();
  } else {
    endDrawing();
  }
});

stage.addEventListener("pointermove", (event) => {
  if (!pointers.has(event.pointerId)) return plane && event.pointerType === "mouse" && hover(event);
  const [x, y] = here(event);
  const [beforeX, beforeY] = pointers.get(event.pointerId);
  if (!pressed.moved && Math.hypot(x - pressed.at[0], y - pressed.at[1]) < 4) return;
  if (!pressed.moved) {
    pressed.moved = true;
    for (const pointer of pointers.keys()) stage.setPointerCapture(pointer);
    stage.classList.add(drawn ? "drawing" : "dragged");
  }
  if (drawn) {
    drawn.push([x, y]);
    outline.firstElementChild.setAttribute("d", `M${drawn.map((one) => one.map(Math.round).join(" ")).join("L")}Z`);
  } else if (pointers.size === 1) {
    move(beforeX - x, beforeY - y);
  } else {
    const [otherX, otherY] = [...pointers].find(([id]) => id !== event.pointerId)[1];
    const before = Math.hypot(beforeX - otherX, beforeY - otherY) || 1;
    move((beforeX - x) / 2, (beforeY - y) / 2);
    zoom(Math.hypot(x - otherX, y - otherY) / before, (x + otherX) / 2, (y + otherY) / 2);
  }
  pointers.set(event.pointerId, [x, y]);
});

function endDrawing() {
  drawn = null;
  outline.firstElementChild.setAttribute("d", "");
  stage.classList.toggle("drawing", lasso.ariaPressed === "true");
}

function release(event) {
  if (!pointers.delete(event.pointerId) || pointers.size) return;
  stage.classList.remove("dragged");
  const round = drawn;
  endDrawing();
  if (event.type === "pointercancel") return;
  if (round && pressed.moved && round.length > 2) select(plane.within(round.map(([x, y]) => place(x, y))));
  else if (!pressed.moved && !round && event.target === surface) open(...here(event), event);
}
stage.addEventListener("pointerup", release);
stage.addEventListener("pointercancel", release);
stage.addEventListener("dragstart", (event) => event.preventDefault());
// What was moved was not clicked.
stage.addEventListener("click", (event) => pressed?.moved && event.target.closest(".pictures") && event.preventDefault(), true);

stage.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    if (!plane) return;
    const lines = event.deltaMode === 1 ? 24 : event.deltaMode === 2 ? 400 : 1;
    // A pinch on a touchpad comes as a wheel with Ctrl, in small steps.
    zoom(2 ** (-event.deltaY * lines * (event.ctrlKey ? 0.012 : 0.0025)), ...here(event));
  },
  { passive: false },
);

// A dot: what it is, and a click opens it.

let hovering = 0;
const touched = (px, py, reach) => plane.nearest(...place(px, py), reach / seen.scale);

function hover(event) {
  clearTimeout(hovering);
  const n = event.target === surface ? touched(...here(event), 8) : -1;
  stage.classList.toggle("near", n >= 0);
  if (n < 0) return (preview.hidden = true);
  hovering = setTimeout(async () => {
    if (!(await lookUp([plane.rows[n]]))) return;
    const one = objects.get(plane.rows[n]);
    if (!one || touched(...here(event), 8) !== n) return;
    preview.replaceChildren(picture(where, one.object_id, one.encoded), make("span", { className: "name" }, one.object_id));
    preview.hidden = false;
    const [x, y] = here(event);
    const [boxWidth, boxHeight] = [preview.offsetWidth, preview.offsetHeight];
    const left = x + 16 + boxWidth > width ? x - 16 - boxWidth : x + 16;
    preview.style.transform = `translate(${left}px, ${Math.max(8, Math.min(height - boxHeight - 8, y - boxHeight / 2))}px)`;
  }, 60);
}
stage.addEventListener("pointerleave", () => {
  clearTimeout(hovering);
  preview.hidden = true;
});

async function open(px, py, event) {
  const n = touched(px, py, event.pointerType === "mouse" ? 8 : 16);
  if (n < 0) return;
  if (!(await lookUp([plane.rows[n]]))) return;
  const one = objects.get(plane.rows[n]);
  if (one) location.assign(findAddress(one));
}

// Keys.

const KEYS = {
  ArrowLeft: () => move(-width / 6, 0),
  ArrowRight: () => move(width / 6, 0),
  ArrowUp: () => move(0, -height / 6),
  ArrowDown: () => move(0, height / 6),
  "+": () => zoom(1.5),
  "=": () => zoom(1.5),
  "-": () => zoom(1 / 1.5),
  0: showAll,
  p: () => shown.click(),
  s: () => lasso.click(),
  v: () => select(plane.inside(...bounds())),
  Escape: () => (lasso.ariaPressed === "true" ? setLasso(false) : select([])),
};

document.addEventListener("keydown", (event) => {
  if (!plane?.count || !isKey(event) || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input")) return;
  // Arrows scroll the list when that has the focus.
  if (event.key.startsWith("Arrow") && event.target.closest("#panel")) return;
  const does = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!does) return;
  event.preventDefault();
  does();
});

function setLasso(on) {
  lasso.ariaPressed = on;
  stage.classList.toggle("drawing", on);
  tell(on ? "Draw round what you want." : "");
}

element("nearer").addEventListener("click", () => zoom(2));
element("farther").addEventListener("click", () => zoom(0.5));
element("whole").addEventListener("click", showAll);
lasso.addEventListener("click", () => setLasso(lasso.ariaPressed !== "true"));
shown.addEventListener("click", () => {
  shown.ariaPressed = shown.ariaPressed !== "true";
  choosePictures();
});
view.addEventListener("click", () => select(plane.inside(...bounds())));
exporting.addEventListener("click", exportList);
clearing.addEventListener("click", () => select([]));
projection.addEventListener("change", () => {
  const address = new URL(location.href);
  for (const name of ["x", "y", "zoom"]) address.searchParams.delete(name);
  address.searchParams.set("projection", projection.value);
  location.assign(address);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

// Loading.

async function points() {
  const parameters = new URLSearchParams({ gallery: where.gallery });
  const chosen = new URLSearchParams(location.search).get("projection");
  if (chosen) parameters.set("projection", chosen);
  for (;;) {
    const answer = await get(`/map/points?${parameters}`);
    if (answer.status === 200) return answer;
    const body = await heard(answer.json());
    making.hidden = false;
    if (body.total) [making.max, making.value] = [body.total, body.done];
    tell(body.total ? `Making the map: ${Math.floor((100 * body.done) / body.total)} %` : "Making the map…");
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
}

async function load(why = "") {
  tell("Loading…");
  const answer = await points();
  making.hidden = true;
  dropPictures(new Set());
  objects.clear();
  level = null;
  plane = new Plane(await heard(answer.arrayBuffer()));
  rowsKey = answer.headers.get("x-ruiji-rows");
  projection.value = answer.headers.get("x-ruiji-projection");
  // UMAP is what comes if nothing is asked for and it is kept.
  element("projections").hidden = projection.value === "pca" && !new URLSearchParams(location.search).has("projection");
  const unplaced = Number(answer.headers.get("x-ruiji-unplaced"));
  if (!plane.count) {
    plane = null;
    return tell(unplaced ? "None of the objects can be ranked, so there is no map." : "The gallery has no objects.", true);
  }
  element("controls").hidden = panel.hidden = false;
  shown.hidden = !where.health.media;
  resize();
  tell(unplaced ? `${unplaced.toLocaleString()} objects cannot be ranked and are not on the map.` : why);
  performance.mark("map-shown");
}

function resize() {
  const before = plane && width > 1 ? seen.scale / wholeScale() : null;
  [width, height, above] = [stage.clientWidth, stage.clientHeight, element("controls").offsetHeight];
  if (!plane || !width || !height) return;
  dots.resize(width, height);
  const asked = new URLSearchParams(location.search);
  const [x, y, zoomed] = ["x", "y", "zoom"].map((name) => (asked.has(name) ? Number(asked.get(name)) : NaN));
  if (before !== null && started) look(seen.x, seen.y, before * wholeScale());
  else if (Number.isFinite(x) && Number.isFinite(y) && zoomed > 0) look(x, y, zoomed * wholeScale());
  else showAll();
  started = true;
}
let started = false;

async function start() {
  where = await begin();
  if (!where.about) return;
  await load();
  new ResizeObserver(resize).observe(stage);
}

paint();
start().catch((error) => {
  making.hidden = true;
  tell(error.message, true);
});
