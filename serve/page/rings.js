// The rings: a query in the middle, and its hits around it, the more similar the nearer, none on another.

import { make, thumbnail } from "/common.js";

// Of a hit the diameter is 1; so far are the middles of two at least, and so large is the query.
const APART = 1.08;
const MIDDLE = 0.95;
const GOLDEN = Math.PI * (3 - Math.sqrt(5));
// CSS pixels that a hit has at least, and all of them.
const LEAST_PX = 40;
const LEAST_HIGH_PX = 460;
export const MOST = 150;

// Where hits stand, [{ x, y, radius }], nearest first. The radius is linear in the distance as long as there is room, and
// never smaller than that of a hit before: who is further out is less similar.
export function places(distances) {
  const first = MIDDLE + 0.5 + APART - 1;
  const span = Math.sqrt(first * first + 0.5 * distances.length) - first;
  const [nearest, range] = [distances[0], distances.at(-1) - distances[0]];
  const found = [];
  let radius = first;
  distances.forEach((distance, n) => {
    radius = Math.max(radius, first + (range > 0 ? (span * (distance - nearest)) / range : 0));
    let angle;
    while ((angle = freeAngle(found, radius, n * GOLDEN)) === null) radius += 0.04;
    found.push({ x: radius * Math.sin(angle), y: -radius * Math.cos(angle), radius, angle });
  });
  return found;
}

// The angle nearest to one that is wanted at which a hit of this radius touches no other; null: there is none.
function freeAngle(found, radius, wanted) {
  const taken = [];
  for (const other of found) {
    // A little more than apart, because sines are rounded.
    const cosine = (radius ** 2 + other.radius ** 2 - (APART + 1e-6) ** 2) / (2 * radius * other.radius);
    if (cosine < 1) taken.push([other.angle, Math.acos(Math.max(-1, cosine))]);
  }
  const free = (angle) => taken.every(([other, half]) => between(angle, other) >= half - 1e-9);
  if (free(wanted)) return wanted;
  let best = null;
  for (const [other, half] of taken) {
    for (const angle of [other - half, other + half]) {
      if ((best === null || between(angle, wanted) < between(best, wanted)) && free(angle)) best = angle;
    }
  }
  return best;
}

function between(one, other) {
  const turned = Math.abs(one - other) % (2 * Math.PI);
  return Math.min(turned, 2 * Math.PI - turned);
}

// Circles that say how similar what is inside is: [{ similarity, radius }]. Hits of at least that similarity are inside.
export function guides(similarities, spots) {
  const [most, least] = [similarities[0], similarities.at(-1)];
  const step = [0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001].findLast((one) => (most - least) / one <= 5) ?? 0.2;
  const found = [];
  for (let n = Math.floor(most / step); n * step > least; n--) {
    const similarity = n * step;
    const after = similarities.findIndex((one) => one < similarity);
    if (after < 1) continue;
    const part = (similarities[after - 1] - similarity) / (similarities[after - 1] - similarities[after]);
    const [inner, outer] = [spots[after - 1].radius, spots[after].radius];
    found.push({ similarity, radius: inner + part * (outer - inner) });
  }
  return found.map((one) => ({ ...one, text: one.similarity.toFixed(step < 0.01 ? 3 : 2) }));
}

function draw(kind, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The angle of a circle at which its label is furthest from all hits.
function roomiest(radius, spots) {
  const angles = Array.from({ length: 48 }, (_, n) => (n * Math.PI) / 24);
  const room = (angle) => {
    const [x, y] = [radius * Math.sin(angle), -radius * Math.cos(angle)];
    return Math.min(...spots.map((spot) => Math.hypot(spot.x - x, spot.y - y)));
  };
  return angles.reduce((best, angle) => (room(angle) > room(best) ? angle : best));
}

// Draws them into a box. where = { health, gallery }; query = { name, source } (source: of its picture, or null); hits as the
// service gives them, with `encoded` and `href`; point(hit) is called with what is pointed at.
export function drawRings(box, where, query, hits, point) {
  const spots = places(hits.map((hit) => hit.distance));
  const reach = spots.at(-1).radius + 0.5 + 0.25;
  const across = 2 * reach;
  // As large as what is left of the window.
  const high = innerHeight - box.getBoundingClientRect().top - scrollY - 12;
  const size = Math.max(Math.min(box.clientWidth, Math.max(high, LEAST_HIGH_PX)), across * LEAST_PX);
  const pixels = (size / across) * devicePixelRatio;
  const svg = draw("svg", { viewBox: `${-reach} ${-reach} ${across} ${across}`, role: "group", "aria-label": "Rings" });
  svg.style.width = svg.style.height = `${size}px`;
  svg.append(
    draw("defs", {}, draw("clipPath", { id: "round", clipPathUnits: "objectBoundingBox" }, draw("circle", { cx: 0.5, cy: 0.5, r: 0.5 }))),
  );
  const lines = guides(hits.map((hit) => hit.similarity), spots);
  svg.append(...lines.map(({ radius }) => draw("circle", { r: radius, class: "ring" })));

  const round = (x, y, radius, source, name) => {
    const ground = draw("circle", { cx: x, cy: y, r: radius, class: "ground" });
    if (source === null) return [ground, ...words(x, y, radius, name)];
    const place = { x: x - radius, y: y - radius, width: 2 * radius, height: 2 * radius };
    const image = draw("image", { ...place, href: source, preserveAspectRatio: "xMidYMid slice", "clip-path": "url(#round)" });
    image.addEventListener("error", () => image.replaceWith(...words(x, y, radius, name)), { once: true });
    return [ground, image, draw("circle", { cx: x, cy: y, r: radius, class: "edge" })];
  };
  svg.append(draw("g", { role: "img", "aria-label": `Query: ${query.name}`, class: "query" }, ...round(0, 0, MIDDLE, query.source, query.name)));

  hits.forEach((hit, n) => {
    const { x, y } = spots[n];
    const source = where.health.media ? thumbnail(where, hit.encoded, pixels > 128 ? 256 : 128) : null;
    const label = `${hit.rank}, similarity ${hit.similarity.toFixed(3)}, ${hit.objectId}`;
    const link = draw("a", { href: hit.href, "aria-label": label, "data-rank": hit.rank }, ...round(x, y, 0.5, source, hit.objectId));
    link.addEventListener("pointerenter", () => point(hit));
    link.addEventListener("focus", () => point(hit));
    svg.append(link);
  });
  for (const { radius, text } of lines) {
    const angle = roomiest(radius, spots);
    svg.append(draw("text", { x: radius * Math.sin(angle), y: -radius * Math.cos(angle), class: "scale" }, text));
  }
  box.replaceChildren(svg);
  box.scrollTo((size - box.clientWidth) / 2, 0);
}

// A name in a circle, on up to three lines of so many characters.
function words(x, y, radius, name) {
  const room = Math.round(9 * radius + 3);
  const lines = name.match(new RegExp(`.{1,${room}}`, "gsu")) ?? [""];
  const shown = lines.length > 3 ? [lines[0], "…", lines.at(-1)] : lines;
  return shown.map((line, n) => draw("text", { x, y: y + (n - (shown.length - 1) / 2) * 0.2, class: "label" }, line));
}

export const emptyHint = () => make("p", { className: "name" }, "Point at a picture to see it larger.");
