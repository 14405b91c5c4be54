// Run: how the run of a gallery stands, live; what its workers do; what failed, and trying that again.
//
// The service sends an event at each change. The browser connects again by itself when the connection is lost, and here
// it is opened anew if the browser gives it up.

import { ask, begin, element, encodeId, make, picture, send, tell } from "/common.js";

const [bar, figures, workers, failures] = ["bar", "figures", "workers", "failures"].map(element);
// Failed objects at a time; milliseconds over which the rate is taken, between looks at the clock, and before a new try.
const PART = 48, RATE_MS = 30_000, CLOCK_MS = 2_000, AGAIN_MS = 3_000;
let where = null;
let gallery = "";
let run = null;
let seen = [];
let first = 0;
let shownFailures = "";
let asking = 0;

const number = (value) => value.toLocaleString("en");
const sentence = (text) => text[0].toUpperCase() + text.slice(1);
const objects = (count) => `${number(count)} ${count === 1 ? "object" : "objects"}`;

function listen() {
  const source = new EventSource(`/runs/events?${gallery}`);
  source.addEventListener("message", (event) => take(JSON.parse(event.data)));
  source.addEventListener("late", () => {
    element("progress").classList.add("stale");
    tell("Redis or the disk does not answer. Trying again…", true);
    element("beside").textContent = "These are the last figures that are known.";
    run = null;
  });
  source.addEventListener("unknown", (event) => unknown(JSON.parse(event.data).error));
  source.addEventListener("error", async () => {
    element("progress").classList.add("stale");
    tell("The service does not answer. Trying again…", true);
    if (source.readyState !== EventSource.CLOSED) return;
    // Refused, for example because the session is over, or given up: an ordinary request tells which.
    source.close();
    try {
      await ask(`/runs?${gallery}`);
    } catch (error) {
      tell(error.message, true);
    }
    setTimeout(listen, AGAIN_MS);
  });
}

function unknown(why) {
  run = null;
  tell("No run is known here.");
  element("beside").textContent = `${sentence(why)}. This page goes on by itself when there is something to show.`;
  for (const part of ["progress", "working", "failing"]) element(part).hidden = true;
}

function take(told) {
  run = told;
  const { status } = run;
  const through = status.done + status.failed;
  // Another plan, or objects that are tried again: what was measured before is over.
  if (seen.length && (seen.at(-1).through > through || seen.at(-1).plan !== status.plan)) seen = [];
  seen.push({ at: performance.now(), through, plan: status.plan });
  while (seen.length > 2 && seen[1].at < performance.now() - RATE_MS) seen.shift();
  draw();
  const failed = `${status.failed} ${status.plan} ${first}`;
  if (failed !== shownFailures) {
    shownFailures = failed;
    showFailures();
  }
}

// Images per second: over the last half minute, or as the workers say for want of that.
function rate() {
  if (run.status.plan === null) return 0;
  const [from, to] = [seen[0], seen.at(-1)];
  const seconds = (performance.now() - from.at) / 1000;
  if (seconds > 5 && to.through > from.through) return (to.through - from.through) / seconds;
  return run.status.workers.reduce((sum, worker) => sum + worker.images_per_s, 0);
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86_400)} days`;
}

// What is the matter, and what can be done: [headline, more, whether something is wrong].
function headline() {
  const { status, without_redis: without } = run;
  const left = status.pending + status.running;
  const counted = without === null ? "" : `Counted from the disk (${without}).`;
  if (run.redis_lost && status.plan !== null) {
    const more = "What is done is counted from the disk. The run goes on by itself when Redis is back.";
    return ["Redis does not answer: the run waits for it.", `${more} ${sentence(without)}.`, true];
  }
  if (status.starting) return ["The run is starting: no object list was accepted yet.", counted];
  if (status.stopped !== null) return ["The run was stopped.", `${status.stopped} ${counted}`, true];
  if (status.plan !== null) {
    if (without !== null) return ["The run is not finished.", `${counted} Whether anyone works on it is not known. ruiji run continues it.`];
    if (!status.workers.length) return ["Nobody is at work.", "Objects are waiting for a worker: start one with ruiji worker, or make up.", true];
    return ["The run is going on.", ""];
  }
  if (left) return ["The run is not finished.", `Nothing is planned for ${objects(left)}: ruiji run, or ruiji enqueue, plans them. ${counted}`];
  if (status.failed) {
    // With Redis there is a button.
    const again = without === null ? "" : " ruiji retry and then ruiji run try them again.";
    return [`The run is finished; ${number(status.failed)} of ${number(status.objects)} objects failed.`, counted + again];
  }
  return [`The run is finished: all ${number(status.objects)} objects are in the gallery.`, ""];
}

function draw() {
  if (run === null) return;
  const { status } = run;
  const [said, beside, wrong] = headline();
  if (element("said").textContent !== said) tell(said, wrong);
  element("beside").textContent = beside;
  element("progress").classList.remove("stale");
  element("progress").hidden = status.starting;
  const all = Math.max(1, status.objects);
  [status.done, status.failed, status.running].forEach((part, n) => (bar.children[n].style.width = `${(100 * part) / all}%`));
  bar.setAttribute("aria-valuemax", status.objects);
  bar.setAttribute("aria-valuenow", status.done + status.failed);
  const left = status.pending + status.running;
  const speed = run.redis_lost ? 0 : rate();
  const percent = Math.floor((100 * (status.done + status.failed)) / all);
  bar.setAttribute("aria-valuetext", `${percent} %, ${number(left)} objects left`);
  document.title = left ? `${percent} % · Run · ruiji` : "Run · ruiji";
  const facts = [["done", "Done", number(status.done)], ["failed", "Failed", number(status.failed)]];
  if (status.plan !== null && run.without_redis === null) facts.push(["running", "In hand", number(status.running)]);
  facts.push(["", "Pending", number(status.pending)], ["", "Objects", number(status.objects)]);
  if (speed > 0) facts.push(["", "Per second", speed < 10 ? speed.toFixed(1) : number(Math.round(speed))]);
  if (speed > 0 && left) facts.push(["", "Time left", `about ${duration(left / speed)}`]);
  if (status.stale) facts.push(["", "Not on the list any more", number(status.stale)]);
  figures.replaceChildren(
    ...facts.map(([kind, name, value]) => make("div", { className: kind }, make("dt", {}, name), make("dd", {}, value))),
  );
  element("working").hidden = !status.workers.length;
  workers.replaceChildren(...status.workers.map(worker));
  element("retry").hidden = status.plan !== null || run.without_redis !== null || !where.health.media;
}

function worker(one) {
  // What it waits for is why it does nothing.
  const waits = one.state.startsWith("waiting");
  const state =
    one.state === "idle" ? (one.role === "embed" ? "idle: no images are left for it" : "idle: no shard is ready") : one.state;
  const facts = [make("b", {}, `${one.role} ${one.host}:${one.pid} on ${one.device}`), make("span", { className: waits ? "state waits" : "state" }, state)];
  if (one.role === "embed") {
    facts.push(make("small", {}, `${number(one.images)} images, ${number(one.failed)} failed, ${one.images_per_s} per second`));
  }
  if (one.images) {
    const split = Object.entries(one.ms_per_image).filter(([, ms]) => ms > 0).map(([stage, ms]) => `${stage} ${ms}`);
    if (split.length) facts.push(make("small", {}, `ms per image: ${split.join(", ")}`));
  }
  return make("li", {}, ...facts);
}

async function showFailures() {
  const mine = ++asking;
  let found;
  try {
    found = await ask(`/failures?first=${first}&count=${PART}&${gallery}`);
  } catch (error) {
    // Of a gallery that ruiji did not make no failures are known; then its run is not known either, which is told.
    if (run !== null) tell(error.message, true);
    return;
  }
  if (mine !== asking) return;
  if (first && first >= found.total) {
    first = 0;
    return showFailures();
  }
  element("failing").hidden = !found.total && !element("retried").textContent;
  element("failed").textContent = found.total ? `${number(found.total)} failed ${found.total === 1 ? "object" : "objects"}` : "No failed objects";
  failures.replaceChildren(
    ...found.failures.map((one) =>
      make(
        "li",
        {},
        picture(where, one.object_id, encodeId(one.object_id)),
        make("span", { className: "fact" }, one.reason),
        make("span", { className: "name", title: one.path }, one.path),
        make("span", { className: "why" }, one.message),
      ),
    ),
  );
  element("pages").hidden = found.total <= PART;
  element("part").textContent = `${number(first + 1)} to ${number(Math.min(first + PART, found.total))} of ${number(found.total)}`;
  element("before").disabled = first === 0;
  element("after").disabled = found.next === null;
  if (!found.total) element("retry").hidden = true;
  // The list is read less often than the count.
  if (run !== null && found.total !== run.status.failed) setTimeout(() => mine === asking && showFailures(), AGAIN_MS);
}

function turn(by) {
  first = Math.max(0, first + by);
  showFailures();
}

async function retry() {
  const retried = element("retried");
  const said = (text, failed = false) => {
    retried.textContent = text;
    retried.classList.toggle("failed", failed);
  };
  element("retry").disabled = true;
  said("Asking…");
  try {
    const { objects: again } = await send(`/retry?${gallery}`, {});
    said(again ? `${objects(again)} ${again === 1 ? "is" : "are"} tried again.` : "None is left to be tried again.");
  } catch (error) {
    said(error.message, true);
  }
  element("retry").disabled = false;
}

element("before").addEventListener("click", () => turn(-PART));
element("after").addEventListener("click", () => turn(PART));
element("retry").addEventListener("click", retry);
try {
  tell("Loading…");
  where = await begin();
  gallery = `gallery=${encodeURIComponent(where.gallery)}`;
  tell("Loading…");
  listen();
  setInterval(draw, CLOCK_MS);
} catch (error) {
  tell(error.message, true);
}
