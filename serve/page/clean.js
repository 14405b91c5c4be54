// Clean up: groups of near-duplicates one after the other, decided by keyboard, mouse or finger.
//
// What is decided leaves the page at once and is sent behind its back, several decisions together. What the service does
// not record comes back, with the reason. Each decision says what it has seen: what somebody else has decided meanwhile is
// never overruled by one who does not know of it, nor is anything decided about another picture of the same name. The address says what is shown: ?threshold=0.95&keep=oldest&show=skipped.

import { ask, begin, element, encodeId, isKey, make, picture, plural, send, tell, thumbnail } from "/common.js";
import { compare } from "/compare.js";
import { openListing, prepareListing } from "/listing.js";

const [threshold, keep, prefix, show] = ["threshold", "keep", "prefix", "show"].map(element);
const [contains, identical] = ["contains", "identical"].map(element);
const fields = { threshold, keep, prefix, show, contains, identical };
// Groups that are fetched at once and can be accepted at once; pictures that are drawn at first, and then at a time, because
// a tab with all of 20,000 stands still; and names in a line.
const AT_ONCE = 100;
const [DRAWN, MORE] = [24, 240];
const NAMED = 20;
const SHOWN_BESIDE = 4;

let where = null;
// The open groups that are fetched, by name: { name, members, reason, see_also, keeps, seen }; keeps says which members
// stay, seen how many decisions there were when they were fetched, or when what was decided about them here was recorded.
let groups = [];
let at = 0;
let here = 0;
let next = null;
let open = 0;
let total = 0;
// Groups that were passed over, because none of their files is there.
let gone = 0;
let decided = 0;
let frees = 0;
// Steps back, the last one last: the groups that were decided together.
let done = [];
let outbox = [];
let sending = false;
let asked = 0;
let fetching = null;

function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let n = 0;
  while (bytes >= 1000 && n < units.length - 1) (bytes /= 1000), n++;
  return `${n && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[n]}`;
}

function time(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} minutes` : `${(minutes / 60).toFixed(1)} hours`;
}

// ------------------------------------------------------------------------------------------------ asking the service

const ofGallery = () => `gallery=${encodeURIComponent(where.gallery)}`;

// Why nobody can look at the files; empty if somebody can.
function blind() {
  if (!where.health.media) return "start the service with --media-dir";
  return where.about?.paths ? "" : "this gallery has no gallery.json and does not know paths";
}

// As `ruiji duplicates --keep` takes it; a folder may have a comma in its name.
function rules() {
  if (keep.value !== "path") return keep.value;
  const folder = prefix.value.trim();
  return folder ? `"path=${folder.replaceAll('"', '""')}",pixels,bytes` : "pixels,bytes";
}

function question(after) {
  const parts = new URLSearchParams({ gallery: where.gallery, threshold: threshold.value, after, count: AT_ONCE });
  if (!blind()) parts.set("keep", rules());
  if (show.value === "skipped") parts.set("skipped", "true");
  if (contains.value.trim()) parts.set("contains", contains.value.trim());
  if (identical.checked) parts.set("identical", "true");
  return `/duplicates?${parts}`;
}

function take(found) {
  next = found.next;
  gone += found.gone;
  groups.push(...fetched(found));
}

// If nothing is known of the files, the first one is a choice like any other.
const fetched = (found) => found.groups.map((group) => ({ ...group, seen: found.seen, keeps: group.members.map((_, n) => n === 0) }));

// Begin anew: with other groups, or after something went wrong.
async function load() {
  const turn = ++asked;
  await sent();
  const isOld = () => turn !== asked;
  for (const part of ["notice", "group", "following", "decided"]) element(part).hidden = true;
  tell("Loading…");
  try {
    const stand = await ask(`/decisions/status?${ofGallery()}`);
    if (isOld()) return;
    decided = stand.decided;
    frees = stand.frees_bytes;
    if (show.value === "decided") {
      done = [];
      element("decisions").replaceChildren();
      tell("");
      await loadDecisions(0);
      return;
    }
    const found = await ask(question(-1));
    if (isOld()) return;
    tell("");
    if (found.comparison.state !== "ready") return drawComparison(found.comparison, turn);
    groups = [];
    done = [];
    at = 0;
    gone = 0;
    take(found);
    open = found.open;
    total = found.total;
    if (gone) tell(leftOut());
    else if (blind()) tell(`There are no pictures to show, and sizes are not known: ${blind()}.`);
    else if (found.open && !decided) tell("Nothing is deleted here: what you decide makes a list of files to remove.");
    draw();
  } catch (error) {
    if (!isOld()) fail(error.message, "Try again", load);
  }
}

const leftOut = () => `${plural(gone, "group")} left out: none of the files is there. ruiji run takes removed files off the list.`;

async function fetchMore() {
  if (next === null || fetching) return fetching;
  const turn = asked;
  fetching = (async () => {
    let came = false;
    try {
      const found = await ask(question(next));
      came = turn === asked && found.comparison.state === "ready";
      if (came) take(found);
    } catch (error) {
      tell(error.message, true);
    } finally {
      fetching = null;
    }
    // Else nothing asks for more before the next step of the person.
    if (came) drawFollowing();
  })();
  return fetching;
}

// ----------------------------------------------------------------------------------------------- what is not there yet

function notice(title, text, act, run) {
  const isNews = element("notice").hidden || element("notice-title").textContent !== title;
  element("notice-title").textContent = title;
  element("notice-text").textContent = text;
  element("compared").hidden = true;
  element("left").textContent = "";
  element("act").hidden = !act;
  element("act").textContent = act ?? "";
  element("act").disabled = false;
  element("act").onclick = () => {
    element("act").disabled = true;
    run();
  };
  element("notice").hidden = false;
  if (isNews) goTo("notice-title");
  drawStanding();
}

// Where keys decide, and what a screen reader reads next. Who changes an option with the keyboard stays there.
function goTo(heading) {
  if (!element("tools").querySelector(":not([type=text], [type=search]):focus-visible")) element(heading).focus({ preventScroll: true });
}

function fail(message, act, run) {
  tell("");
  notice("That did not work", message, act, run);
}

function drawComparison(comparison, turn) {
  const { state, done: compared, total: all, seconds } = comparison;
  const part = all ? compared / all : 0;
  if (state === "running") {
    notice("Comparing all pictures…", "You can close this page: it goes on. What is compared stays compared.", "Stop", async () => {
      await send("/duplicates/stop", {}).catch((error) => tell(error.message, true));
      load();
    });
    element("left").textContent = all ? `${Math.floor(100 * part)} %${seconds === null ? "" : `, about ${time(seconds)} left`}` : "Starting…";
    setTimeout(() => turn === asked && watch(turn), 1000);
  } else {
    const failed = state === "failed";
    const title = failed ? "The comparison ended early" : part > 0 ? "Some pictures are not compared yet" : "Find near-duplicates";
    const fresh =
      `${plural(where.about.objects, "picture")} will be compared with each other. This is done once; later, only new ones are compared. ` +
      "Then you choose which of the look-alikes to keep. ruiji deletes nothing.";
    notice(title, failed ? comparison.error : fresh, failed || part > 0 ? "Go on" : "Find near-duplicates", async () => {
      try {
        await send(`/duplicates/compare?threshold=${threshold.value}&${ofGallery()}`, {});
        if (turn === asked) watch(turn);
      } catch (error) {
        fail(error.message, "Try again", load);
      }
    });
  }
  element("compared").hidden = state !== "running" && part === 0;
  if (all) element("compared").value = part;
  else element("compared").removeAttribute("value");
}

async function watch(turn) {
  try {
    const found = await ask(question(-1));
    if (turn !== asked) return;
    if (found.comparison.state === "ready") load();
    else drawComparison(found.comparison, turn);
  } catch (error) {
    if (turn === asked) fail(error.message, "Try again", load);
  }
}

// ----------------------------------------------------------------------------------------------------- drawing groups

function draw() {
  drawStanding();
  element("notice").hidden = true;
  at = Math.max(0, Math.min(at, groups.length - 1));
  element("group").hidden = !groups.length;
  if (groups.length) {
    here = 0;
    drawGroup();
  } else if (next !== null) {
    // All of what was fetched is decided, or gone. If no more came, beginning anew tells why.
    const [turn, before] = [asked, next];
    tell("Loading…");
    fetchMore().then(() => turn === asked && (next === before ? load() : (tell(gone ? leftOut() : ""), draw())));
  } else if (gone && open) {
    tell("");
    notice("No group has files any more", leftOut());
  } else if (open) {
    notice("No group is like that", `${plural(open, "other group")} open. Clear the path, or show more than identical files.`);
  } else if (decided) {
    notice("All groups are decided", "Download the list of files to remove. Or look for pictures that are less alike.", "List to remove…", openListing);
  } else {
    notice("No near-duplicates", `No two pictures are as alike as ${threshold.value}. Look for pictures that are less alike.`);
  }
  drawFollowing();
}

function drawStanding() {
  const listed = show.value === "decided";
  const all = decided + open;
  element("standing").hidden = !all;
  element("progress").hidden = listed;
  element("progress").max = all || 1;
  element("progress").value = decided;
  const freed = frees === null || !decided ? "" : ` · ${size(Math.max(0, frees))} would be freed`;
  const part = listed ? plural(decided, "group") : `${decided.toLocaleString("en")} of ${plural(all, "group")}`;
  element("counts").textContent = `${part} decided${freed}`;
  element("undo").disabled = !done.length;
  element("list").disabled = blind() || !decided;
  element("list").title = blind() ? `Needs the files: ${blind()}` : "";
}

function facts(member) {
  const parts = [];
  if (member.there === false) parts.push("the file is gone");
  if (member.width) parts.push(`${member.width.toLocaleString("en")} × ${member.height.toLocaleString("en")}`);
  if (member.bytes !== null) parts.push(size(member.bytes));
  if (member.format) parts.push(member.format);
  if (member.modified) parts.push(member.modified.slice(0, 10));
  return parts.join(" · ");
}

function likeness(group, n) {
  const member = group.members[n];
  if (member.same_file_as) return `the same file as ${member.same_file_as}, under another name`;
  if (member.identical_to) return `identical to ${member.identical_to}`;
  if (n === 0) return group.reason ? `Best: ${group.reason}` : "";
  const rounded = member.similarity.toFixed(3);
  return rounded === "1.000" ? "all but identical" : `${rounded} alike`;
}

function drawGroup() {
  const group = groups[at];
  const place = ` of ${plural(total, decided ? "open group" : "group")}`;
  element("about").replaceChildren(
    `Group ${(at + 1).toLocaleString("en")}`, make("span", { className: "faint" }, `${place} · ${plural(group.members.length, "picture")}`),
  );
  const drawn = group.members.slice(0, group.drawn ?? DRAWN);
  const cards = drawn.map((member, n) => {
    const encoded = encodeId(member.object_id);
    const shot = make("button", { type: "button", className: "shot" }, picture(where, member.object_id, encoded, 512));
    shot.addEventListener("click", () => keepOnly(n));
    const drop = make("button", { type: "button" });
    drop.addEventListener("click", () => toggle(n));
    const mark = make("span", { className: "mark" });
    const path = make("span", { className: "path" }, member.path ?? member.object_id);
    const fact = make("span", { className: "fact" });
    return make("li", {}, shot, mark, fact, path, make("span", { className: "facts" }, facts(member)), make("div", { className: "card-keys" }, drop));
  });
  if (drawn.length < group.members.length) {
    const left = group.members.length - drawn.length;
    const more = make("button", { type: "button" }, `Show ${Math.min(left, MORE)} more of ${left.toLocaleString("en")}`);
    more.addEventListener("click", () => ((group.drawn = drawn.length + MORE), drawGroup()));
    cards.push(make("li", {}, more));
  }
  element("members").replaceChildren(...cards);
  const also = group.see_also.map((one) => `${one.path ?? one.object_id} (${one.similarity.toFixed(3)})`);
  element("also").textContent = also.length ? `Also like one of these, but not like all: ${also.join(", ")}` : "";
  drawMarks();
  goTo("about");
}

function drawMarks() {
  const group = groups[at];
  [...element("members").children].forEach((card, n) => {
    if (!group.members[n] || !card.querySelector(".shot")) return;
    const stays = group.keeps[n];
    const id = group.members[n].object_id;
    card.classList.toggle("kept", stays);
    card.classList.toggle("here", n === here);
    card.querySelector(".shot").ariaPressed = String(stays);
    card.querySelector(".shot").ariaLabel = `Keep only ${id}`;
    card.querySelector(".mark").textContent = stays ? "Keep" : "Remove";
    card.querySelector(".fact").textContent = likeness(group, n);
    const drop = card.querySelector(".card-keys button");
    drop.textContent = stays ? "Remove it" : "Keep it too";
    drop.ariaLabel = `${drop.textContent}: ${id}`;
  });
  const kept = group.keeps.filter(Boolean).length;
  const gone = group.keeps.length - kept;
  element("accept").firstElementChild.textContent = gone ? `Keep ${kept}, remove ${gone.toLocaleString("en")}` : "Keep all";
  element("accept").disabled = !kept;
  element("compare").disabled = group.members.length < 2;
  element("previous").disabled = at === 0;
  element("next").disabled = at >= groups.length - 1 && next === null;
}

function few(members, keeps) {
  const tiles = members.slice(0, SHOWN_BESIDE).map((member, n) => {
    const tile = picture(where, member.object_id, encodeId(member.object_id));
    tile.classList.toggle("kept", keeps(n));
    if (tile.src) {
      tile.srcset = "";
      tile.src = thumbnail(where, encodeId(member.object_id), 128);
    }
    return tile;
  });
  return make("span", { className: "few" }, ...tiles);
}

const shown = () => groups.slice(at, at + AT_ONCE);

function drawFollowing() {
  const after = shown().slice(1);
  element("following").hidden = !after.length;
  element("following-title").textContent = `Then ${after.length === 1 ? "this one" : `these ${after.length}`}`;
  element("accept-all").firstElementChild.textContent = `Accept all ${after.length + 1} choices`;
  // A row is made once, so that its pictures are not asked for after every key.
  element("queue").replaceChildren(...after.map((group) => (group.row ??= queueRow(group))));
  if (groups.length - at < AT_ONCE) fetchMore();
}

function queueRow(group) {
  const one = make(
    "button", { type: "button" }, few(group.members, (n) => group.keeps[n]),
    make("span", { className: "words" }, make("b", {}, `Keep ${group.members[group.keeps.indexOf(true)]?.object_id ?? "none"}`), summary(group)),
  );
  one.addEventListener("click", () => go(groups.indexOf(group)));
  return make("li", {}, one);
}

function summary(group) {
  const gone = group.keeps.filter((stays) => !stays).length;
  return [group.reason, `remove ${gone.toLocaleString("en")}`, freedBy(group) ? size(freedBy(group)) : ""].filter(Boolean).join(" · ");
}

const freedBy = (group) =>
  group.members.reduce((sum, member, n) => (group.keeps[n] || member.same_file_as ? sum : sum + (member.bytes ?? 0)), 0);

// ------------------------------------------------------------------------------------------------------ what is chosen

function mark(change) {
  if (element("group").hidden) return;
  change(groups[at].keeps);
  groups[at].row = null;
  drawMarks();
}

function keepOnly(n) {
  here = n;
  mark((keeps) => keeps.fill(false).splice(n, 1, true));
  goTo("about");
}

function toggle(n) {
  here = n;
  mark((keeps) => (keeps[n] = !keeps[n]));
  goTo("about");
}

function point(step) {
  const drawn = element("members").querySelectorAll(".shot");
  here = Math.min(Math.max(0, here + step), drawn.length - 1);
  drawMarks();
  drawn[here].scrollIntoView({ block: "nearest" });
}

async function go(place) {
  if (place >= groups.length) await fetchMore();
  if (place < 0 || place >= groups.length) return;
  at = place;
  draw();
  scrollTo({ top: 0 });
}

async function compareHere() {
  const { members, keeps } = groups[at];
  const left = Math.max(0, keeps.indexOf(true));
  const right = here !== left ? here : members.findIndex((_, n) => n !== left);
  const side = (n) => ({
    id: members[n].object_id, encoded: encodeId(members[n].object_id), facts: [keeps[n] ? "Keep" : "Remove", likeness(groups[at], n), facts(members[n])].filter(Boolean),
  });
  await compare(where, side(left), side(right), `${members[left].object_id} and ${members[right].object_id}`);
  goTo("about");
}

// ---------------------------------------------------------------------------------------------------------- decisions

const ids = (group) => group.members.map((member) => member.object_id);
const shownOf = (group) => group.members.map(({ object_id, sha256 }) => ({ object_id, sha256 }));

// What is sent for a group of which some pictures stay and the others go.
function decisionsOf(group) {
  const stay = ids(group).filter((_, n) => group.keeps[n]);
  const go = ids(group).filter((_, n) => !group.keeps[n]);
  if (!go.length) return [{ decision: "different", objects: stay }];
  const [first, ...more] = stay;
  // The last line about a pair counts: what goes, goes for the first one.
  const apart = more.map((one) => ({ decision: "different", objects: [one, ...go] }));
  if (more.length) apart.push({ decision: "different", objects: stay });
  return [...apart, { decision: "same", keep: first, remove: go }];
}

function decide(some, decisions, freed) {
  if (!some.length) return;
  const taken = new Set(some);
  const before = groups.slice(0, at).filter((group) => taken.has(group)).length;
  groups = groups.filter((group) => !taken.has(group));
  at -= before;
  const step = { groups: some, freed: freed ? some.reduce((sum, group) => sum + freedBy(group), 0) : 0 };
  done.push(step);
  count(step, 1);
  post(step, some.flatMap((group) => decisions(group).map((line) => ({ group, line }))), 1);
  tell("");
  draw();
}

function count(step, way) {
  decided += way * step.groups.length;
  open -= way * step.groups.length;
  total -= way * step.groups.length;
  if (frees !== null) frees += way * step.freed;
}

function putBack(step) {
  const back = new Set(step.groups.map((group) => group.name));
  groups = [...groups.filter((group) => !back.has(group.name)), ...step.groups].sort((one, other) => one.name - other.name);
  at = groups.indexOf(step.groups[0]);
}

function undo() {
  const step = done.pop();
  if (!step) return tell("There is nothing to undo here. Show what is decided to undo what you decided before.");
  putBack(step);
  count(step, -1);
  post(step, step.groups.map((group) => ({ group, line: { decision: "undo", objects: ids(group) } })), -1);
  tell(step.groups.length === 1 ? "Undone." : `${plural(step.groups.length, "group")} undone.`);
  draw();
}

function post(step, decisions, way) {
  outbox.push({ step, decisions, way });
  flush();
}

async function flush() {
  if (sending) return;
  sending = true;
  let refused = null;
  while (outbox.length) {
    const together = [];
    let lines = [];
    // A step is sent whole, so that it is recorded or comes back as one.
    while (outbox.length && (!lines.length || lines.length + outbox[0].decisions.length <= 1000)) {
      const one = outbox.shift();
      together.push(one);
      lines = lines.concat(one.decisions);
    }
    try {
      const decisions = lines.map(({ group, line }) => ({ ...line, members: shownOf(group), seen: group.seen }));
      const said = await send(`/decisions?${ofGallery()}`, { decisions });
      for (const { group } of lines) group.seen = said.seen;
      if (said.warnings.length) tell([...new Set(said.warnings)].slice(0, 3).join(" "));
    } catch (error) {
      refused = { error, steps: [...together, ...outbox] };
      takeBack(refused);
      outbox = [];
    }
  }
  sending = false;
  // Somebody else has decided about one of them, or it is another picture: what is here is not how it stands.
  if (refused && !refused.error.again) await lookAgain(refused.steps.flatMap(({ step }) => step.groups));
  if (refused) tell(`Not recorded: ${refused.error.message}`, true);
}

// What is not recorded is as it was before; the last of it first.
function takeBack({ error, steps }) {
  for (const { step, way } of [...steps].reverse()) {
    count(step, -way);
    if (way > 0) {
      done = done.filter((one) => one !== step);
      putBack(step);
    } else {
      groups = groups.filter((group) => !step.groups.includes(group));
      if (error.again) done.push(step);
    }
  }
  draw();
}

// Fetch some groups anew, and those between them; what was chosen stays, unless a group has other members now.
async function lookAgain(some) {
  const turn = asked;
  const [first, last] = [Math.min, Math.max].map((least) => least(...some.map((group) => group.name)));
  try {
    const stand = await ask(`/decisions/status?${ofGallery()}`);
    let found = { next: first - 1 };
    let fresh = [];
    while (found.next !== null && found.next < last) {
      found = await ask(question(found.next));
      fresh = fresh.concat(fetched(found));
    }
    if (turn !== asked) return;
    [decided, frees, open, total] = [stand.decided, stand.frees_bytes, found.open, found.total];
    const [looked, before] = [groups[at]?.name, new Map(groups.map((group) => [group.name, group]))];
    for (const group of fresh) {
      const known = before.get(group.name);
      const stays = new Map(known?.members.map((member, n) => [member.object_id, known.keeps[n]]));
      const same = stays.size === group.members.length && group.members.every((member) => stays.has(member.object_id));
      if (same) group.keeps = group.members.map((member) => stays.get(member.object_id));
    }
    const others = groups.filter((group) => group.name < first || group.name > last);
    groups = [...others, ...fresh.filter((group) => group.name <= last)].sort((one, other) => one.name - other.name);
    at = Math.max(0, groups.findIndex((group) => group.name >= looked));
    draw();
  } catch (error) {
    if (turn === asked) fail(error.message, "Try again", load);
  }
}

// Once all is recorded, or has come back.
async function sent() {
  while (sending || outbox.length) await new Promise((soon) => setTimeout(soon, 30));
}

const current = () => (element("group").hidden ? [] : [groups[at]]);
const accept = () => decide(current().filter((group) => group.keeps.includes(true)), decisionsOf, true);
const different = () => decide(current(), (group) => [{ decision: "different", objects: ids(group) }]);
const skip = () => decide(current(), (group) => [{ decision: "skip", objects: ids(group) }]);
const acceptAll = () => decide(shown().filter((group) => group.keeps.includes(true)), decisionsOf, true);

// ------------------------------------------------------------------------------------------------- what is decided

const WORDS = { same: "One is kept", different: "Not duplicates", skip: "Skipped" };

async function loadDecisions(first) {
  const found = await ask(`/decisions?first=${first}&count=${AT_ONCE}&${ofGallery()}`);
  for (const one of found.decisions) element("decisions").append(decisionRow(one, found.seen));
  element("more").hidden = found.next === null;
  element("more").onclick = () => loadDecisions(found.next).catch((error) => tell(error.message, true));
  element("decided").hidden = !found.total;
  if (!found.total) notice("Nothing is decided yet", "What you decide about groups is listed here, and can be undone.");
  drawStanding();
}

function decisionRow(one, seen) {
  const known = one.objects.filter((object) => object.object_id !== null);
  const names = one.objects.map((object) => (object.path ?? object.object_id) + (object.gallery ? " in another gallery" : ""));
  if (names.length > NAMED) names.splice(NAMED, Infinity, `${(one.objects.length - NAMED).toLocaleString("en")} more`);
  const said = one.decision === "same" ? `Keep ${names[0]}, remove ${names.slice(1).join(", ")}` : names.join(", ");
  const button = make("button", { type: "button", disabled: known.length < 2 }, "Undo");
  button.ariaLabel = `Undo: ${said}`;
  const row = make(
    "li", {}, few(known, (n) => one.decision === "same" && known[n] === one.objects[0]),
    make("span", { className: "words" }, make("b", {}, WORDS[one.decision]), said), button,
  );
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      const objects = known.map((object) => object.object_id);
      await send(`/decisions?${ofGallery()}`, { decisions: [{ decision: "undo", objects, seen }] });
      (row.nextElementSibling ?? row.previousElementSibling)?.querySelector("button").focus();
      row.remove();
      const stand = await ask(`/decisions/status?${ofGallery()}`);
      decided = stand.decided;
      frees = stand.frees_bytes;
      drawStanding();
      tell("Undone. The group is open again.");
    } catch (error) {
      button.disabled = false;
      // Somebody else has decided otherwise: the list is not how it stands.
      if (!error.again) await load();
      tell(error.message, true);
    }
  });
  return row;
}

// -------------------------------------------------------------------------------------------------- keys and the start

const KEYS = {
  Enter: accept, d: different, s: skip, z: undo, c: () => current().length && compareHere(),
  n: () => go(at + 1), p: () => go(at - 1), ArrowRight: () => point(1), ArrowLeft: () => point(-1),
  k: () => keepOnly(here), x: () => toggle(here),
};

const GOING = ["n", "p", "ArrowRight", "ArrowLeft"];

addEventListener("keydown", (event) => {
  if (!isKey(event) || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  // Fields and buttons have keys of their own.
  const own = event.target.closest("input, select, textarea") || (event.target.closest("button, a") && [" ", "Enter"].includes(event.key));
  if (own) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const digit = /^[1-9]$/.test(key) ? Number(key) - 1 : null;
  let act = KEYS[key];
  if (key === "Enter" && event.shiftKey) act = acceptAll;
  if (digit !== null && digit < (groups[at]?.members.length ?? 0)) act = () => keepOnly(digit);
  if (!act || (element("group").hidden && act !== undo)) return;
  event.preventDefault();
  // A key that is held down decides once: nobody has seen what comes next.
  if (!event.repeat || GOING.includes(key)) act();
});

const acts = { accept, different, skip, undo, compare: compareHere, previous: () => go(at - 1), next: () => go(at + 1), list: openListing };
for (const [name, act] of Object.entries(acts)) document.getElementById(name).addEventListener("click", act);
element("accept-all").addEventListener("click", acceptAll);
element("tools").addEventListener("submit", (event) => event.preventDefault());
addEventListener("beforeunload", (event) => (sending || outbox.length) && event.preventDefault());

function change() {
  const parts = new URLSearchParams(new URLSearchParams(location.search).has("gallery") ? { gallery: where.gallery } : {});
  for (const [name, field] of Object.entries(fields)) {
    const value = field.type === "checkbox" ? String(field.checked) : field.value;
    const usual = field.type === "checkbox" ? "false" : field.options ? field.options[0].value : field.defaultValue;
    if (value !== usual) parts.set(name, value);
  }
  history.replaceState(null, "", `?${parts}`);
  drawFields();
  load();
}

function drawFields() {
  threshold.nextElementSibling.textContent = Number(threshold.value).toFixed(2);
  keep.disabled = prefix.disabled = !where || blind();
  element("of-folder").hidden = keep.value !== "path";
  for (const label of ["of-paths", "of-bytes"]) element(label).hidden = show.value === "decided";
}

for (const field of Object.values(fields)) field.addEventListener("change", change);
threshold.addEventListener("input", drawFields);

// On a telephone the pictures come first.
element("options").open = matchMedia("(min-width: 641px)").matches;
try {
  tell("Loading…");
  for (const [name, value] of new URLSearchParams(location.search)) {
    if (fields[name]?.type === "checkbox") fields[name].checked = value === "true";
    else if (fields[name]) fields[name].value = value;
  }
  where = await begin();
  prepareListing(where.gallery, sent);
  element("options").hidden = !where.about;
  drawFields();
  if (where.about) await load();
} catch (error) {
  tell(error.message, true);
}
