// What all pages share: asking the service, the header, telling the person, and making elements.

export const element = (name) => document.getElementById(name);

export function make(kind, properties, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

export const plural = (count, one) => `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;

// An id percent-encoded, as it stands in addresses; a lone surrogate stands for a byte that is not UTF-8.
export function encodeId(id) {
  const parts = id.split(/([\udc80-\udcff])/u);
  return parts.map((part, n) => (n % 2 ? "%" + (part.charCodeAt(0) - 0xdc00).toString(16) : encodeURIComponent(part))).join("");
}

// An error that a person is told; `again`: the same can succeed later.
const trouble = (message, again) => Object.assign(new Error(message), { again });

// What comes of a request, or of reading its answer. An answer that breaks off, or that is a proxy's own page, is none.
export async function heard(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw trouble("The service does not answer. Is it running?", true);
  }
}

// An answer, which is no refusal; throws an Error whose message is for the person.
export async function get(path, options) {
  const answer = await heard(fetch(path, options));
  if (answer.ok) return answer;
  // The service itself sends there whoever asks for a page, and a page that lost its session asks for itself.
  if (answer.status === 401) location.reload();
  const { error } = await heard(answer.json());
  throw trouble(error, answer.status === 429 || answer.status >= 500);
}

// The answer's JSON, null if it has no body; throws as `get`.
export async function ask(path, options) {
  const answer = await get(path, options);
  return answer.status === 204 ? null : heard(answer.json());
}

export const send = (path, body) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// How the service stands, and the gallery that the address means: { health, gallery, about }; about is undefined if there
// is no gallery of that name that can be searched. Fills the header's choice of a gallery, and sets whether letters are keys.
export async function begin() {
  prepareLetters();
  const health = await ask("/healthz");
  const names = [...health.galleries.map((one) => one.name), ...health.coming, ...Object.keys(health.refused)].sort();
  const gallery = new URLSearchParams(location.search).get("gallery") ?? health.default ?? health.galleries[0]?.name ?? names[0];
  const about = health.galleries.find((one) => one.name === gallery);
  const chosen = element("gallery");
  chosen.replaceChildren(...names.map((name) => make("option", {}, name)));
  chosen.value = gallery;
  chosen.addEventListener("change", () => location.assign(`?gallery=${encodeURIComponent(chosen.value)}`));
  element("galleries").hidden = names.length < 2;
  if (gallery !== health.default) {
    for (const page of document.querySelectorAll("nav a")) page.search = `gallery=${encodeURIComponent(gallery)}`;
  }
  element("logout").hidden = !health.token;
  element("logout").addEventListener("click", async () => {
    await send("/logout", {});
    location.assign("/login");
  });
  if (health.coming.includes(gallery)) tell(`The gallery ${gallery} is still empty. The page Run shows how far its run is.`);
  else if (gallery in health.refused) tell(`The gallery ${gallery} cannot be opened: ${health.refused[gallery]}`, true);
  else if (!about) tell(`There is no gallery ${gallery}.`, true);
  return { health, gallery, about };
}

// Letters, digits and signs do what buttons do, unless that is switched off, as people who dictate need it. The browser
// remembers it for all pages.
export const isKey = (event) => event.key.length > 1 || !document.body.classList.contains("letterless");

function prepareLetters() {
  // A browser that keeps nothing for a page answers with an error.
  const kept = (use) => {
    try {
      return use(localStorage);
    } catch {
      return null;
    }
  };
  const draw = (work) => document.body.classList.toggle("letterless", !work);
  const works = kept((store) => store.getItem("letters")) !== "off";
  draw(works);
  // Only pages whose keys are letters have it.
  const box = document.querySelector("#letters");
  if (!box) return;
  box.checked = works;
  box.addEventListener("change", () => {
    draw(box.checked);
    kept((store) => store.setItem("letters", box.checked ? "on" : "off"));
  });
}

export function tell(text, failed = false) {
  const said = element("said");
  said.textContent = text;
  said.classList.toggle("failed", failed);
}

export const thumbnail = (where, encoded, size) =>
  `/thumbs/${encoded}?size=${size}&gallery=${encodeURIComponent(where.gallery)}`;

// The picture of an object, at 256 or 512 pixels; its name if the service has no pictures, or this one cannot be had.
export function picture(where, id, encoded, size = 256) {
  const name = () => make("span", { className: "tile" }, id);
  if (!where.health.media) return name();
  const shown = make("img", { className: "tile", alt: id, loading: "lazy" });
  if (size === 256) shown.srcset = `${thumbnail(where, encoded, 256)} 1x, ${thumbnail(where, encoded, 512)} 2x`;
  shown.src = thumbnail(where, encoded, size);
  shown.addEventListener("error", () => shown.replaceWith(name()), { once: true });
  return shown;
}
