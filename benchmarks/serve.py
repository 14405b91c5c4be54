"""The service against its limits and the article's own server, on this machine, in this run: `make bench-serve`.

    python -m benchmarks.serve [one | many | pictures | memory | groups | map] [--rows N]

`one` asks with one client, in turns with the same search in this process and with the article's server, which is
written here after its description: features in memory as one float32 array, the model warm, numpy. `many` loads the
service with `wrk`, which Debian has as a package. `groups` and `map` open the pages in Chromium. Ratios, errors, bytes,
memory, and the CPU time of the page's own script are judged; times and rates are reported.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import ruiji
from benchmarks import results
from benchmarks.data import DISTINCT, LARGE, REAL_MODEL, media_folder, need_shared, object_path
from benchmarks.results import Figure
from benchmarks.search import LENGTH, LIBRARIES, random_rows, write_shards
from pipeline.choices import ObjectIds
from pipeline.errors import UsageError
from pipeline.gallery import claim_gallery
from pipeline.model import load_model
from pipeline.objects import IdScheme
from pipeline.streams import note
from search.options import Metric
from tests.factories import tiny_model
from tests.search.galleries import write_shard

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BUILD = Path("build/serve")
TARGET = results.FOLDER / "serve.json"
ROUNDS, QUERIES, TOP_K = 5, 30, 10
CLIENTS, LOAD_S, ALONE_S = 32, 60, 20
PARTS = ["one", "many", "pictures", "memory", "groups", "map"]

#: What the article describes, as a server of the standard library.
ARTICLE_SERVER = """
import glob, json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
import numpy as np, onnxruntime as ort
folder, model, port = sys.argv[1:]
x = np.concatenate([np.load(f) for f in sorted(glob.glob(folder + '/*.features.npy'))])
ids = np.concatenate([np.load(f) for f in sorted(glob.glob(folder + '/*.object_ids.npy'))])
row_of = {name: row for row, name in enumerate(ids.tolist())}
session = ort.InferenceSession(model, providers=['CPUExecutionProvider'])
session.run(['feature_vector'], {'inputs:0': np.zeros((1, 224, 224, 3), np.float32)})

class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = 'HTTP/1.1', True, -1

    def do_GET(self):
        name = self.path.rpartition('/')[2]
        distances = np.linalg.norm(x - x[row_of[name]], axis=1)
        found = [{'objectId': str(ids[i]), 'distance': float(distances[i])} for i in np.argsort(distances)[1:11]]
        body = json.dumps({'queryObjectId': name, 'similarImages': found}).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

server = HTTPServer(('127.0.0.1', int(port)), Handler)
print('ready', flush=True)
server.serve_forever()
"""
#: What `wrk` asks for, one after the other, and what it tells at its end.
WRK = """
local paths, at = {}, 0
for line in io.lines(os.getenv("PATHS")) do paths[#paths + 1] = line end
function request() at = at % #paths + 1 ; return wrk.format("GET", paths[at]) end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('{"requests": %d, "seconds": %f, "p50": %f, "p95": %f, "errors": %d}\\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(95) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


class Client:
    """One connection that stays, and takes the time of each answer."""

    def __init__(self, port: int) -> None:
        """Connect when something is asked."""
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def get(self, path: str) -> Any:
        """The answer's JSON."""
        return self._asked("GET", path)

    def send(self, path: str, picture: bytes) -> Any:
        """Send a picture as a browser's form does."""
        head = b'--sep\r\nContent-Disposition: form-data; name="image"; filename="x.jpg"\r\n\r\n'
        headers = {"Origin": f"http://127.0.0.1:{self._connection.port}"}
        headers["Content-Type"] = "multipart/form-data; boundary=sep"
        return self._asked("POST", path, head + picture + b"\r\n--sep--\r\n", headers)

    def _asked(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
        self._connection.request(method, path, body, headers or {})
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {data[:200]!r}")
        return json.loads(data)

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


@contextmanager
def running(command: list[str], ready: str, log: Path) -> Iterator[int]:
    """A process that has said that it is ready; gives its id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        while not re.search(ready, log.read_text(), re.MULTILINE):
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def service(features: Path, port: int, *more: str) -> Iterator[int]:
    """The service, as a command starts it."""
    command = [sys.executable, "-m", "pipeline", "serve", "--feature-dir", str(features), "--port", str(port), *more]
    with running(command, " answers; ", BUILD / "service.log") as pid:
        yield pid


def milliseconds(ask: Callable[[str], object], names: list[str]) -> list[float]:
    """What each answer takes."""
    taken = []
    for name in names:
        begun = time.perf_counter()
        ask(name)
        taken.append(1000 * (time.perf_counter() - begun))
    return taken


def p95(values: list[float]) -> float:
    """The value that one in twenty exceeds."""
    return sorted(values)[int(0.95 * (len(values) - 1))]


def some(rng: np.random.Generator, rows: int, count: int) -> list[str]:
    """Ids of rows by chance."""
    return [f"{row:08d}.jpg" for row in rng.integers(0, rows, count)]


def one(folder: Path, rows: int) -> list[Figure]:
    """One client: the service, the same search in this process, the article's server, in turns."""
    gallery = ruiji.open_gallery(folder)
    gallery.warm_up()
    article = [sys.executable, "-c", ARTICLE_SERVER, str(folder), str(REAL_MODEL), "8792"]
    rng, taken = np.random.default_rng(0), dict[str, list[list[float]]]()
    with (
        service(folder, 8791),
        running(article, "ready", BUILD / "article.log"),
        closing(Client(8791)) as ours,
        closing(Client(8792)) as theirs,
    ):
        ways: dict[str, Callable[[str], object]] = {"the article's server": lambda name: theirs.get(f"/similar/{name}")}
        for metric in (Metric.euclidean, Metric.cosine):
            ways[f"in-process, {metric}"] = lambda name, metric=metric: gallery.search_ids(  # type: ignore[misc]
                name, top_k=TOP_K, metric=metric
            )
            ways[f"service, {metric}"] = lambda name, metric=metric: ours.get(  # type: ignore[misc]
                f"/similar/{name}?metric={metric}&k={TOP_K}"
            )
        for name, way in ways.items():
            milliseconds(way, some(rng, rows, 20))
            taken[name] = []
        for _ in range(ROUNDS):
            for name, way in ways.items():
                time.sleep(0.2)
                # Servers close connections on which nothing was asked for some seconds: the first answer has a new one.
                ours.close()
                theirs.close()
                way(some(rng, rows, 1)[0])
                taken[name].append(milliseconds(way, some(rng, rows, QUERIES)))
    medians = {name: [statistics.median(values) for values in rounds] for name, rounds in taken.items()}
    figures = []
    for metric in (Metric.euclidean, Metric.cosine):
        name = f"service, {metric}"
        tails = tuple(map(p95, taken[name]))
        figures += [
            Figure(f"{name}: p50", "ms", tuple(medians[name]), at_most=30, judged=False),
            Figure(f"{name}: p95", "ms", tails, at_most=60, judged=False),
            quotient(f"{name} / in-process", medians[name], medians[f"in-process, {metric}"], at_most=1.3),
        ]
    theirs_taken = medians["the article's server"]
    figures.append(Figure("the article's server: p50", "ms", tuple(theirs_taken), judged=False))
    against = (theirs_taken, medians["service, euclidean"])
    figures.append(quotient("the article's server / service, euclidean", *against, at_least=3))
    return figures


def quotient(
    name: str, above: list[float], below: list[float], at_least: float | None = None, at_most: float | None = None
) -> Figure:
    """Round by round."""
    return Figure(name, "x", tuple(a / b for a, b in zip(above, below, strict=True)), at_least, at_most)


def wrk(port: int, paths: list[str], clients: int, seconds: int) -> dict[str, float]:
    """Load with so many clients, each of which asks again once it is answered."""
    script, listed = BUILD / "wrk.lua", BUILD / "paths.txt"
    script.write_text(WRK)
    listed.write_text("\n".join(paths))
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--timeout", "60", "-s", str(script)]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}"],
        env={**os.environ, "PATHS": str(listed)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def many(folder: Path, rows: int) -> list[Figure]:
    """32 clients for a minute, beside one for a third of it."""
    rng, figures = np.random.default_rng(1), []
    with service(folder, 8791):
        for metric in (Metric.cosine, Metric.euclidean):
            paths = [f"/similar/{name}?metric={metric}&k={TOP_K}" for name in some(rng, rows, 20_000)]
            wrk(8791, paths, CLIENTS, 3)
            alone = wrk(8791, paths, 1, ALONE_S)
            loaded = wrk(8791, paths, CLIENTS, LOAD_S)
            rates = [told["requests"] / told["seconds"] for told in (loaded, alone)]
            name = f"{CLIENTS} clients for {LOAD_S} s, {metric}"
            figures += [
                Figure(f"{name}: errors", "", (loaded["errors"],), at_most=0),
                Figure(f"{name}: throughput", "1/s", (rates[0],), judged=False),
                Figure(f"{name}: throughput / one client's", "x", (rates[0] / rates[1],), at_least=4),
                Figure(f"{name}: p95 / one client's p50", "x", (loaded["p95"] / alone["p50"],), at_most=10),
            ]
    return figures


def pictures() -> list[Figure]:
    """Uploads, and small pictures that nobody has asked for yet."""
    need_shared()
    media, features = media_folder(LARGE, DISTINCT), BUILD / "pictures"
    paths = sorted(map(object_path, range(DISTINCT)))
    model, folder = load_model(REAL_MODEL), features / REAL_MODEL.stem
    claim_gallery(folder, model, IdScheme(ObjectIds.basename))
    write_shard(folder, 0, random_rows(len(paths), "clustered"), paths, model.fingerprint)
    names = [path.rpartition("/")[2] for path in paths]
    more = ("--media-dir", str(media), "--model", str(REAL_MODEL))
    beyond, rates = [], []
    with service(features, 8791, *more), closing(Client(8791)) as client:
        for number in range(ROUNDS + 1):
            chosen = paths[40 * number : 40 * number + 20]
            files = {path: (media / path).read_bytes() for path in chosen}
            by_picture = milliseconds(lambda path, files=files: client.send("/search", files[path]), chosen)  # type: ignore[misc]
            by_id = milliseconds(lambda name: client.get(f"/similar/{name}?metric=cosine"), names[:20])
            beyond.append(statistics.median(by_picture) - statistics.median(by_id))
        for number in range(3):
            rates.append(thumbnails_per_s(8791, names[800 * number : 800 * (number + 1)]))
    return [
        Figure("upload search, beyond a search by id", "ms", tuple(beyond[1:]), at_most=60, judged=False),
        Figure("thumbnails that are not kept yet", "1/s", tuple(rates), at_least=200, judged=False),
    ]


def thumbnails_per_s(port: int, names: list[str]) -> float:
    """Ask for each once, with eight clients; answers per second."""

    def ask(part: list[str]) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            for name in part:
                connection.request("GET", f"/thumbs/{name}")
                answer = connection.getresponse()
                if not answer.read().startswith(b"\xff\xd8"):
                    raise RuntimeError(f"no thumbnail of {name}: {answer.status}")

    begun = time.perf_counter()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, (names[first::8] for first in range(8))))
    return len(names) / (time.perf_counter() - begun)


def memory() -> list[Figure]:
    """What the service takes after 10,000 queries, beside after 1,000."""
    rows, folder = 10_000, BUILD / "memory" / "model"
    write_shards(folder, rows, "clustered")
    paths = [f"/similar/{name}?metric=cosine&k={TOP_K}" for name in some(np.random.default_rng(2), rows, 20_000)]
    with service(folder, 8791) as pid:
        asked, first = 0.0, None
        while asked < 10_000:
            asked += wrk(8791, paths, 8, 2)["requests"]
            if asked >= 1_000 and first is None:
                first, after = anonymous_mb(pid), asked
        grown = anonymous_mb(pid) - (first or 0)
    note(f"memory: after {after:.0f} and {asked:.0f} queries")
    return [Figure("memory after 10,000 queries, beyond after 1,000", "MB", (grown,), at_most=20)]


def anonymous_mb(pid: int) -> float:
    """Memory of a process beside mapped files."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@contextmanager
def chromium() -> Iterator["Browser"]:
    """The browser that the tests of the pages use.

    Raises:
        UsageError: there is none.
    """
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise UsageError("this part needs Chromium: run  make browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def groups(count: int) -> list[Figure]:
    """The page Clean up with so many groups of two, each time the first of a service that has just begun."""
    media, folder = media_folder(LARGE, 2 * count), BUILD / "groups" / "model"
    BUILD.mkdir(parents=True, exist_ok=True)
    # Short rows: all pairs are compared in seconds, and what a page shows of a group does not depend on it.
    model = load_model(tiny_model(BUILD / "groups.onnx", length=64))
    rng, shard = np.random.default_rng(3), 10_000
    claim_gallery(folder, model, IdScheme(ObjectIds.basename))
    for number, first in enumerate(range(0, 2 * count, shard)):
        rows = min(shard, 2 * count - first)
        near = np.repeat(rng.standard_normal((rows // 2, 64)), 2, axis=0) + 0.01 * rng.standard_normal((rows, 64))
        paths = [object_path(place) for place in range(first, first + rows)]
        write_shard(folder, number, near.astype(np.float32), paths, model.fingerprint)
    command = [sys.executable, "-m", "pipeline", "near-duplicates", "--feature-dir", str(folder.parent)]
    subprocess.run(command, check=True, capture_output=True)
    shown, cpu = [], []
    with chromium() as browser:
        for _ in range(3):
            with service(folder.parent, 8791, "--media-dir", str(media)) as pid, closing(browser.new_page()) as page:
                page.set_default_timeout(120_000)
                before, begun = cpu_s(pid), time.perf_counter()
                page.goto("http://127.0.0.1:8791/clean")
                page.wait_for_selector("#group:not([hidden])")
                shown.append(time.perf_counter() - begun)
                cpu.append(cpu_s(pid) - before)
                if f"of {count:,} groups" not in page.inner_text("#counts"):
                    raise RuntimeError(page.inner_text("#counts"))
    name = f"{count:,} groups: first page"
    return [
        Figure(name, "s", tuple(shown), at_most=1, judged=False),
        Figure(f"{name}, CPU of the service", "s", tuple(cpu), judged=False),
    ]


def cpu_s(pid: int) -> float:
    """CPU seconds that a process took so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def whole_map(folder: Path) -> list[Figure]:
    """The map: made by the command, shown by the page, and what its script takes while the view moves."""
    made = []
    for _ in range(3):
        for kept in (folder / "cache").rglob("map.*"):
            kept.unlink()
        begun = time.perf_counter()
        command = [sys.executable, "-m", "pipeline", "map", "--feature-dir", str(folder.parent)]
        subprocess.run(command, check=True, capture_output=True)
        made.append(time.perf_counter() - begun)
    weight, paint, shown = [], [], []
    with service(folder.parent, 8791), chromium() as browser:
        for _ in range(3):
            with closing(browser.new_context(viewport={"width": 1280, "height": 800})) as context:
                page = context.new_page()
                paint.append(seconds_to(page, "/", "first-contentful-paint"))
                shown.append(seconds_to(page, "/map", "map-shown"))
        frames, clock = moved(browser, page := browser.new_page(viewport={"width": 1280, "height": 800}))
        page.close()
        with closing(http.client.HTTPConnection("127.0.0.1", 8791)) as connection:
            for file in sorted(Path("serve/page").iterdir()):
                route = "" if file.stem == "index" else file.stem if file.suffix == ".html" else file.name
                connection.request("GET", f"/{route}")
                weight.append(len(connection.getresponse().read()))
    return [
        Figure("ruiji map", "s", tuple(made), at_most=3, judged=False),
        Figure("the map's page: until it is shown", "s", tuple(shown), at_most=3, judged=False),
        Figure("its script per frame: CPU, 95 % of frames below", "ms", (p95(frames),), at_most=8),
        Figure("its script per frame: CPU, median", "ms", (statistics.median(frames),), judged=False),
        Figure("frames while it moves", "1/s", (len(frames) / clock,), at_least=60, judged=False),
        Figure("first paint of the start page", "s", tuple(paint), at_most=1, judged=False),
        Figure("all pages without pictures", "kB", (sum(weight) / 1000,), at_most=150),
    ]


def seconds_to(page: "Page", route: str, entry: str) -> float:
    """Open a page; when the browser, or its script, noted something."""
    page.goto(f"http://127.0.0.1:8791{route}")
    # `wait_for_function` would need what the page's policy forbids.
    while not page.evaluate(f"performance.getEntriesByName('{entry}').length"):
        page.wait_for_timeout(50)
    found: float = page.evaluate(f"performance.getEntriesByName('{entry}')[0].startTime")
    return found / 1000


def moved(browser: "Browser", page: "Page") -> tuple[list[float], float]:
    """Move and zoom the map: milliseconds of CPU that the page's script takes for each frame, from a performance trace.

    Returns:
        The frames, and the seconds of all.
    """
    seconds_to(page, "/map", "map-shown")
    page.wait_for_timeout(1000)
    browser.start_tracing(page=page, categories=["devtools.timeline"])
    page.mouse.move(640, 300)
    page.mouse.down()
    for x, y in [(300, 300), (300, 600), (640, 600), (640, 300)]:
        page.mouse.move(x, y, steps=100)
    page.mouse.up()
    for step in [-20] * 100 + [20] * 100:
        page.mouse.wheel(0, step)
    events = json.loads(browser.stop_tracing())["traceEvents"]
    frames = [one for one in events if one["name"] == "FireAnimationFrame" and one["ph"] == "X"]
    return [one["tdur"] / 1000 for one in frames], (frames[-1]["ts"] - frames[0]["ts"]) / 1e6


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--rows", type=int, help="a trial with a smaller gallery, which saves nothing")
    given = parser.parse_args()
    wanted = given.part or PARTS
    if {"many", "memory"} & set(wanted) and shutil.which("wrk") is None:
        raise UsageError("wrk is missing: apt-get install wrk")
    rows, code = given.rows or 100_000, 0
    folder = BUILD / "features" / "model"
    shutil.rmtree(BUILD, ignore_errors=True)
    if {"one", "many", "map"} & set(wanted):
        write_shards(folder, rows, "clustered")
    parts: dict[str, Callable[[], list[Figure]]] = {
        "one": lambda: one(folder, rows),
        "many": lambda: many(folder, rows),
        "pictures": pictures,
        "memory": memory,
        "groups": lambda: groups(rows // 2),
        "map": lambda: whole_map(folder),
    }
    for part in wanted:
        load = os.getloadavg()[0]
        figures = parts[part]()
        figures.append(Figure("load of the machine before", "", (load,), judged=False))
        code |= results.show(f"{part}, {rows:,} rows of {LENGTH}" if part in ("one", "many", "map") else part, figures)
        if given.rows is None:
            results.save(TARGET, part, figures, (*LIBRARIES, "fastapi", "starlette", "uvicorn"))
    shutil.rmtree(BUILD, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        note(f"error: {error}")
        sys.exit(error.exit_code)
