// What all pages share: asking the service, telling the person, and making elements.

export const element = (name) => document.getElementById(name);

// An id percent-encoded, as it stands in addresses; a lone surrogate stands for a byte that is not UTF-8.
export function encodeId(id) {
  const parts = id.split(/([\udc80-\udcff])/u);
  return parts.map((part, n) => (n % 2 ? "%" + (part.charCodeAt(0) - 0xdc00).toString(16) : encodeURIComponent(part))).join("");
}

// The answer's JSON; throws an Error whose message is for the person.
export async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service does not answer. Is it running?");
  }
  if (answer.status === 401) location.assign("/login");
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

// How the service stands: its galleries, the default one, whether it has pictures.
export const loadHealth = () => ask("/healthz");

export function tell(text, failed = false) {
  const said = element("said");
  said.textContent = text;
  said.className = failed ? "failed" : "";
}

export function make(kind, properties, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

// The picture of an object, or its name if there are no pictures.
export function picture(health, id, encoded, gallery) {
  if (!health.media) return make("span", { className: "tile" }, id);
  const thumbnail = (size) => `/thumbs/${encoded}?size=${size}&gallery=${encodeURIComponent(gallery)}`;
  return make("img", {
    className: "tile", alt: id, loading: "lazy", src: thumbnail(256), srcset: `${thumbnail(256)} 1x, ${thumbnail(512)} 2x`,
  });
}
