"""Search against its limits and its peers, on this machine, in this run: `make bench-search`, or one part of it.

    python -m benchmarks.search [resident | million | commands | near-duplicates | groups | copies | turned]
        [--rows N]

Every figure is the median over rounds in which the ways take turns, each after a warm-up. A figure of ours is named by
who takes that way: `command`, or the `Python API` after `warm_up()`. In `resident` what they find is compared with a
float64 brute force as well: a way of ours that finds other rows fails the run, faiss' share is only reported. `copies`
and `turned` count what is found, the other parts look at time and memory only. Galleries are made under build/search
and removed.
"""

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import ruiji
from benchmarks import results
from benchmarks.data import REAL_MODEL, SHARED
from benchmarks.results import Figure
from pipeline.choices import Device, ObjectIds
from pipeline.gallery import claim_gallery
from pipeline.model import Model, load_model
from pipeline.objects import IdScheme
from pipeline.settings import MAX_PIXELS
from search.duplicates.groups import find_groups
from search.duplicates.linkage import Rules
from search.duplicates.turned import TurnedCopies
from search.gallery.opening import open_gallery
from search.gallery.shards import Gallery, Shard
from search.options import Linkage
from search.queries import embed_images, embed_pictures, load_encoder
from search.ranking.arithmetic import PASS_ROWS, TILE_ROWS
from search.ranking.planner import Question, bfloat16_units, choose_way, look_at_machine
from search.ranking.rank import rank
from tests.factories import tiny_model
from tests.search.galleries import write_shard

LENGTH, TOP_K, ROUNDS, SHARD_ROWS = 1280, 20, 5, 10_000
_REST_S = 0.2
BUILD = Path("build/search")
TARGET = results.FOLDER / "search.json"
LIBRARIES = ("numpy", "torch", "faiss-cpu", "onnxruntime", "pillow")

#: The article's way, kept as it does it: all shards into memory, normalised, ranked.
ARTICLE_BY_FEATURE = """
import glob, sys
import numpy as np
x = np.concatenate([np.load(f) for f in sorted(glob.glob(sys.argv[1] + '/*.features.npy'))])
ids = np.concatenate([np.load(f) for f in sorted(glob.glob(sys.argv[1] + '/*.object_ids.npy'))])
x /= np.linalg.norm(x, axis=1, keepdims=True)
row = int(np.flatnonzero(ids == sys.argv[2])[0])
similarity = x @ x[row]
for i in np.argsort(-similarity)[:10]:
    print(ids[i], similarity[i])
"""
#: The same with torch, as its later parts have it.
ARTICLE_WITH_TORCH = """
import glob, sys
import numpy as np, torch
x = torch.from_numpy(np.concatenate([np.load(f) for f in sorted(glob.glob(sys.argv[1] + '/*.features.npy'))]))
ids = np.concatenate([np.load(f) for f in sorted(glob.glob(sys.argv[1] + '/*.object_ids.npy'))])
x = torch.nn.functional.normalize(x)
found = torch.topk(x @ x[int(np.flatnonzero(ids == sys.argv[2])[0])], 10)
for similarity, i in zip(found.values.tolist(), found.indices.tolist()):
    print(ids[i], similarity)
"""
#: The article's own search: the model, then shard after shard by Euclidean distance, then a merge.
ARTICLE_BY_IMAGE = """
import glob, sys
import numpy as np, onnxruntime as ort
from PIL import Image
session = ort.InferenceSession(sys.argv[2], providers=['CPUExecutionProvider'])
image = Image.open(sys.argv[3]).convert('RGB').resize((224, 224))
query = session.run(['feature_vector'], {'inputs:0': np.array([image], dtype=np.float32) / 255})[0][0]
found = []
for f in sorted(glob.glob(sys.argv[1] + '/*.features.npy')):
    x, ids = np.load(f), np.load(f.replace('.features.npy', '.object_ids.npy'))
    distances = np.linalg.norm(x - query, axis=1)
    order = np.argsort(distances)[:10]
    found += zip(distances[order], ids[order])
for distance, name in sorted(found)[:10]:
    print(name, distance)
"""


def random_rows(rows: int, kind: str, seed: int = 0) -> NDArray[np.float32]:
    """float32[rows, d]: normal, of each row a near-duplicate, or clustered as features of photos are.

    Those are a 96-d mixture through a ReLU layer.
    """
    rng = np.random.default_rng([seed, rows])
    if kind == "random":
        return rng.standard_normal((rows, LENGTH), dtype=np.float32)
    if kind == "pairs":
        base = np.repeat(random_rows(-(-rows // 2), "random", seed), 2, axis=0)[:rows]
        near: NDArray[np.float32] = base + np.float32(0.05) * rng.standard_normal(base.shape, dtype=np.float32)
        return near
    shared = np.random.default_rng(1)
    centers = shared.standard_normal((1000, 96), dtype=np.float32)
    layer = shared.standard_normal((96, LENGTH), dtype=np.float32) / np.float32(96**0.5)
    latent = centers[rng.integers(0, 1000, rows)] + 0.5 * rng.standard_normal((rows, 96), dtype=np.float32)
    made: NDArray[np.float32] = np.maximum(latent @ layer, 0)
    return made


def timed(ways: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of every round of every way, in turns.

    Each call comes after a rest: the libraries' threads spin for a while after their work, and would slow down whoever
    comes next, faiss most of all.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            time.sleep(_REST_S)
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return taken


def ratio(name: str, above: list[float], below: list[float], **bounds: float | bool) -> Figure:
    """How many times longer `above` took, round by round."""
    return Figure(name, "x", tuple(a / b for a, b in zip(above, below, strict=True)), **bounds)  # type: ignore[arg-type]


def milliseconds(name: str, taken: list[float]) -> Figure:
    """An absolute time, reported only."""
    return Figure(name, "ms", tuple(1000 * second for second in taken), judged=False)


def in_memory(features: NDArray[np.float32]) -> Gallery:
    """A gallery of one array, in shards of the usual size."""
    ids = np.array([f"{row:08d}.jpg" for row in range(len(features))])
    starts = range(0, len(features), SHARD_ROWS)
    shards = [
        Shard(f"{start // SHARD_ROWS:04d}", features[start : start + SHARD_ROWS], ids[start : start + SHARD_ROWS])
        for start in starts
    ]
    return Gallery(features.shape[1], tuple(shards))


def read_once(features: NDArray[np.float32]) -> object:
    """Go through every byte with both cores: nothing here does it sooner than torch's sum."""
    import torch

    return torch.from_numpy(features).view(-1).sum()


def bfloat16_products(features: NDArray[np.float32], queries: NDArray[np.float32]) -> Callable[[], object]:
    """All products of rows and queries with torch, in pieces that stay in the cache; nothing looks at them."""
    import torch

    rows, others = torch.from_numpy(features).bfloat16(), torch.from_numpy(queries).bfloat16().T
    return lambda: [(piece @ others)[0, 0] for piece in rows.split(2048)]


def by_api(gallery: ruiji.Gallery, queries: NDArray[np.float32]) -> Callable[[], list[NDArray[np.int64]]]:
    """The rows that `search_vectors` of the Python API finds."""
    return lambda: [
        np.array([hit.row for hit in one.hits]) for one in gallery.search_vectors(queries, top_k=TOP_K).queries
    ]


def by_command(gallery: Gallery, queries: NDArray[np.float32]) -> Callable[[], list[NDArray[np.int64]]]:
    """The rows that a command finds on its way, which begins without torch; without the time of its start."""
    machine = replace(look_at_machine(Device.auto), torch_loaded=False)
    way = choose_way(Question(gallery.rows, gallery.length, len(queries), coded=gallery.coded), machine)
    print(f"a command with {len(queries)} queries: {way}", file=sys.stderr)
    scan = way.arithmetic().scan
    return lambda: [np.array([hit.row for hit in hits]) for hits in rank(gallery, queries, TOP_K, scan=scan)]


@contextmanager
def galleries(rows: int, kind: str) -> Iterator[dict[str, ruiji.Gallery]]:
    """A gallery on the disk, opened and warmed up as a process that stays does it: before `ruiji index`, and after."""
    folder = BUILD / "features" / "model"
    with removed(BUILD):
        write_shards(folder, rows, kind)
        plain = ruiji.open_gallery(folder)
        plain.warm_up()
        # Asked before there are codes, it goes on without.
        plain.search_vectors(random_rows(1, kind), top_k=1)
        subprocess.run(command_line("index", folder), check=True, capture_output=True)
        indexed = ruiji.open_gallery(folder)
        indexed.warm_up()
        yield {"Python API": plain, "Python API, indexed": indexed}


def has_matrix_units() -> bool:
    """Whether the bounds on many queries apply here."""
    units = bfloat16_units()
    return units is not None and units.matrix


def brute_force(features: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64[q, k]: the rows that float64 finds, ordered by cosine, then row; float32's rounding misplaces some."""
    units = queries.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    found, scores = np.empty((len(units), 0), np.int64), np.empty((len(units), 0))
    for start in range(0, len(features), SHARD_ROWS):
        block = features[start : start + SHARD_ROWS].astype(np.float64)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        rows = np.broadcast_to(np.arange(start, start + len(block)), (len(units), len(block)))
        found, scores = np.hstack([found, rows]), np.hstack([scores, units @ block.T])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K]
        found, scores = np.take_along_axis(found, best, axis=1), np.take_along_axis(scores, best, axis=1)
    return found


def share_same(mine: list[NDArray[np.int64]] | NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """Share of queries with the same set of rows."""
    return statistics.mean(float(set(a.tolist()) == set(b.tolist())) for a, b in zip(mine, exact, strict=True))


def resident(rows: int) -> Iterator[Figure]:
    """One to a thousand queries in a process that stays, with a gallery that is in memory."""
    import faiss

    # The bounds on many queries come from AMX: without matrix units bfloat16 is twice as fast as float32, or slower.
    judged = has_matrix_units()
    # Many first: in a process that stays, rows that were rounded for them serve the few as well.
    bounds = {1000: 6.0, 100: 6.0, 10: 8.0, 1: 1.7}
    for kind in ("random", "clustered"):
        with galleries(rows, kind) as warm:
            gallery = open_gallery(BUILD / "features" / "model")
            features = np.concatenate([shard.features for shard in gallery.shards])
            index = faiss.IndexFlatIP(LENGTH)
            index.add(features / np.linalg.norm(features, axis=1, keepdims=True))
            asked = random_rows(1000, kind, seed=7)
            exact = brute_force(features, asked)
            for count, bound in bounds.items():
                queries = asked[:count]
                units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
                ours: dict[str, Callable[[], list[NDArray[np.int64]]]] = {
                    **{name: by_api(one, queries) for name, one in warm.items()},
                    "command": by_command(gallery, queries),
                }
                ways: dict[str, Callable[[], object]] = {**ours, "faiss": partial(index.search, units, TOP_K)}
                if count == 1:
                    ways["read"] = partial(read_once, features)
                if count == 1000 and judged:
                    ways["products"] = bfloat16_products(features, queries)
                taken = timed(ways, 3 if count == 1000 else 9)
                what = f"{count} queries, {rows} {kind}"
                for name in (*ours, "faiss"):
                    yield milliseconds(f"{what}: {name}", taken[name])
                theirs = share_same(index.search(units, TOP_K)[1], exact[:count])
                yield Figure(f"{what}: right ids, faiss", "share", (theirs,), judged=False)
                for name, way in ours.items():
                    # What is judged is the best that is offered for the work.
                    best = name == "Python API, indexed" and (judged or count == 1)
                    yield ratio(
                        f"{what}: IndexFlatIP / {name}", taken["faiss"], taken[name], at_least=bound, judged=best
                    )
                    yield Figure(f"{what}: right ids, {name}", "share", (share_same(way(), exact[:count]),), at_least=1)
                if "products" in ways:
                    yield milliseconds(f"{what}: bfloat16 products alone", taken["products"])
                    for name in warm:
                        yield ratio(
                            f"{what}: bfloat16 products / {name}",
                            taken["products"],
                            taken[name],
                            at_least=0.5,
                            judged=name == "Python API, indexed",
                        )
                if count == 1:
                    yield milliseconds(f"{what}: reading once", taken["read"])
                    for name, least in (("Python API, indexed", 0.9), ("Python API", 0.7)):
                        yield ratio(f"{what}: reading once / {name}", taken["read"], taken[name], at_least=least)


def million(rows: int) -> Iterator[Figure]:
    """Ten times as many rows; and the memory that one query takes."""
    import faiss

    for kind in ("random", "clustered"):
        with galleries(rows, kind) as warm:
            folder = BUILD / "features" / "model"
            gallery = open_gallery(folder)
            asked = random_rows(100, kind, seed=7)
            for count, bound in ((1, 1.7), (100, 2.5)):
                queries = asked[:count]
                units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
                ways: dict[str, Callable[[], object]] = {
                    **{name: by_api(one, queries) for name, one in warm.items()},
                    "faiss.knn": partial(flat, faiss, gallery, units),
                }
                taken = timed(ways, 3)
                what = f"{count} queries, {rows} {kind}"
                for name, times in taken.items():
                    yield milliseconds(f"{what}: {name}", times)
                for name in warm:
                    best = name == "Python API, indexed"
                    yield ratio(
                        f"{what}: faiss.knn / {name}", taken["faiss.knn"], taken[name], at_least=bound, judged=best
                    )
            peak = anonymous_peak(search_by_id(folder, "00000042.jpg"))
            yield Figure(f"one query as a command, {rows} {kind}: peak anonymous memory", "MB", (peak,), at_most=600)


def flat(faiss: object, gallery: Gallery, units: NDArray[np.float32]) -> None:
    """Faiss' flat search on the mapped shards themselves: an index would hold a second copy of 5 GB.

    The shards' hits are not merged, and rows not scaled to length 1, which is in faiss' favour.
    """
    for shard in gallery.shards:
        faiss.knn(units, shard.features, TOP_K, metric=0)  # type: ignore[attr-defined]


def commands(rows: int) -> Iterator[Figure]:
    """What a user waits for: whole commands, by id and by picture, against the article's scripts."""
    folder = BUILD / "features" / REAL_MODEL.stem
    with removed(BUILD):
        write_shards(folder, rows, "clustered")
        subprocess.run(command_line("index", folder), check=True, capture_output=True)
        name = "00000042.jpg"
        mine = search_by_id(folder, name)
        ways: dict[str, Callable[[], object]] = {
            "ours": partial(run, mine),
            "numpy": partial(run, [sys.executable, "-c", ARTICLE_BY_FEATURE, str(folder), name]),
            "torch": partial(run, [sys.executable, "-c", ARTICLE_WITH_TORCH, str(folder), name]),
        }
        cold_ways = {key: evicted(folder, way) for key, way in ways.items()}
        for state, taken, bound in (("warm", timed(ways), 8.0), ("cold files", timed(cold_ways), 4.0)):
            for key, label in (("ours", "ours"), ("numpy", "the article's way"), ("torch", "the same with torch")):
                yield milliseconds(f"by id, {rows} rows, {state}: {label}", taken[key])
            yield ratio(
                f"by id, {state}: the article's way with torch / ours", taken["torch"], taken["ours"], at_least=bound
            )
            yield ratio(f"by id, {state}: the article's way with numpy / ours", taken["numpy"], taken["ours"])
        if REAL_MODEL.is_file():
            image = next((SHARED / "photos" / "object").rglob("*.jpg"))
            by_image = command_line("search", folder, str(image))
            own = [sys.executable, "-c", ARTICLE_BY_IMAGE, str(folder), str(REAL_MODEL), str(image)]
            taken = timed({"ours": lambda: run(by_image), "article": lambda: run(own)})
            yield milliseconds(f"by picture, {rows} rows, warm: ours", taken["ours"])
            yield milliseconds(f"by picture, {rows} rows, warm: the article's own search", taken["article"])
            yield ratio(
                "by picture, warm: ours / the article's own search", taken["ours"], taken["article"], at_most=0.6
            )


def _alike() -> Iterator[Figure]:
    """What rows that are all alike, as of blank pages, take beside as many random ones."""
    rows, length = 20_000, 256
    rng = np.random.default_rng(0)
    random = rng.standard_normal((rows, length), dtype=np.float32)
    same = np.repeat(random[:1], rows, axis=0)
    last_bit = same.copy()
    last_bit.view(np.uint32)[np.arange(rows), rng.integers(0, length, rows)] ^= 1
    clusters = (random[rng.integers(0, 10, rows)] + np.float32(0.05) * random).astype(np.float32)
    kinds = {"random": random, "same": same, "all but one bit": last_bit, "ten clusters": clusters}
    taken = timed({name: partial(_groups, in_memory(kind)) for name, kind in kinds.items()}, 3)
    for name in list(kinds)[1:]:
        yield ratio(f"near-duplicates, {rows} rows, {name} / random", taken[name], taken["random"], at_most=3)


def _groups(gallery: Gallery) -> None:
    list(find_groups(gallery, 0.95))


def near_duplicates(rows: int) -> Iterator[Figure]:
    """All pairs once, against the rate at which this machine multiplies the same tiles."""
    import torch

    panel = random_rows(PASS_ROWS, "clustered")
    tile = panel[:TILE_ROWS]
    bfloat16 = bfloat16_units() is not None

    def multiply(rows: NDArray[np.float32]) -> Callable[[], object]:
        if not bfloat16:
            return lambda: rows @ tile.T
        halves = [torch.from_numpy(some).bfloat16() for some in (rows, tile)]
        return lambda: halves[0] @ halves[1].T

    # A large product spends time on fresh memory, a small one on threads: the faster one counts.
    sides = {"large": panel, "small": tile}
    products = timed({name: multiply(rows) for name, rows in sides.items()}, 5)
    rate = max(2 * len(sides[name]) * len(tile) * LENGTH / statistics.median(all_s) for name, all_s in products.items())
    folder = BUILD / "features" / "model"
    with removed(BUILD):
        write_shards(folder, rows, "clustered")
        subprocess.run(command_line("index", folder), check=True, capture_output=True)
        start = time.perf_counter()
        peak = anonymous_peak(command_line("near-duplicates", folder, "--format", "jsonl"), every_s=0.02)
        taken = time.perf_counter() - start
    counted = rows * (rows - 1) * LENGTH / taken
    yield Figure(f"near-duplicates, {rows} clustered, the whole command", "s", (taken,), judged=False)
    kind = "bfloat16" if bfloat16 else "float32"
    yield Figure(f"near-duplicates: rate of its pairs / rate of {kind} products", "x", (counted / rate,), at_least=0.7)
    yield from _alike()
    yield Figure("near-duplicates: peak anonymous memory", "MB", (peak,), at_most=1000)


def groups(rows: int) -> Iterator[Figure]:
    """How soon the first of many groups is printed if their pairs are kept, and what memory all of them take."""
    folder = BUILD / "features" / "model"
    with removed(BUILD):
        write_shards(folder, rows, "pairs")
        command = command_line("near-duplicates", folder, "--format", "jsonl")
        subprocess.run(command, check=True, capture_output=True)
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                assert process.stdout is not None
                process.stdout.readline()
                taken.append(time.perf_counter() - start)
                found = 1 + sum(1 for _ in process.stdout)
        if found != rows // 2:
            raise RuntimeError(f"{found} groups instead of {rows // 2}")
        peak = anonymous_peak(command)
    yield Figure(
        f"near-duplicates, {rows // 2} groups of pairs that are kept: first line", "s", tuple(taken), at_most=2
    )
    yield Figure("the same: peak anonymous memory", "MB", (peak,), at_most=300)


def copies(photos: int) -> Iterator[Figure]:
    """How many altered copies of real photos are found as near-duplicates, and how many groups are wrong.

    Each photo with its copies should be one group; a copy is found where it shares a group with its photo, a pair of
    objects in one group is right where both come from one photo.
    """
    if not REAL_MODEL.is_file():
        return
    originals = [SHARED / "photos" / line for line in (SHARED / "photos" / "objects.txt").read_text().splitlines()]
    model = load_model(REAL_MODEL)
    with removed(BUILD):
        images = list(altered(originals[:photos], BUILD / "copies"))
        features = embed_images(
            [path for _, _, path in images], model, load_encoder(model, Device.cpu), MAX_PIXELS
        ).features
    for threshold, linkage in itertools.product((0.95, 0.9, 0.8), Linkage):
        what = f"copies at {threshold}, {linkage}"
        groups = find_groups(in_memory(features), threshold, Rules(linkage))
        group_of = {member.row: number for number, group in enumerate(groups) for member in group.members}
        row_of = {(photo, kind): row for row, (photo, kind, _) in enumerate(images)}
        for kind in ALTERATIONS:
            found = [
                group_of.get(row_of[photo, kind], -1) == group_of.get(row_of[photo, "original"], -2)
                for photo in range(photos)
            ]
            yield Figure(f"{what}: {kind} found", "share", (statistics.mean(found),), judged=False)
        inside = [[images[member.row][0] for member in group.members] for group in groups]
        right = sum(sources.count(one) - 1 for sources in inside for one in sources)
        pairs = sum(len(sources) * (len(sources) - 1) for sources in inside)
        yield Figure(
            f"{what}: pairs in one group that are right",
            "share",
            (right / pairs,),
            judged=False,
        )


def turned(photos: int) -> Iterator[Figure]:
    """How many turned copies are found of photos whose upright copy is, and what looking for them takes.

    All copies are re-encoded. For each position a gallery has the photos, their upright and their turned copies.
    """
    if not REAL_MODEL.is_file():
        return
    originals = [SHARED / "photos" / line for line in (SHARED / "photos" / "objects.txt").read_text().splitlines()]
    model, media = load_model(REAL_MODEL), BUILD / "media"
    encoder = load_encoder(model, Device.cpu)
    embed = partial(embed_images, model=model, encoder=encoder, max_pixels=MAX_PIXELS)
    again = partial(embed_pictures, model=model, encoder=encoder, max_pixels=MAX_PIXELS)

    def looking(gallery: Gallery) -> TurnedCopies:
        return TurnedCopies(gallery, media, again, model.spec.exif_orientation, MAX_PIXELS, print)

    upright, found, right, pairs = 0, 0, 0, 0
    with removed(BUILD):
        names = list(_photos_and_copies(originals[:photos], media))
        features = [embed([media / name for name in some]).features for some in names]
        taken: dict[str, list[float]] = {"extraction": [], "looking": [], "looking again": []}
        paths = [media / name for name in names[0]]
        for _ in range(ROUNDS + 1):
            gallery = _gallery_of(names[0], features[0], model)
            find = partial(looking(gallery).find, np.arange(photos), 0.9)
            for what, way in {"extraction": partial(embed, paths), "looking": find, "looking again": find}.items():
                start = time.process_time()
                way()  # type: ignore[operator]
                taken[what].append(time.process_time() - start)
        for some, made in zip(names[2:], features[2:], strict=True):
            gallery = _gallery_of([*names[0], *names[1], *some], np.concatenate([*features[:2], made]), model)
            groups = find_groups(gallery, 0.9, Rules(Linkage.single), turned=looking(gallery))
            group_of = {member.row: number for number, group in enumerate(groups) for member in group.members}
            shown = [row for row in range(photos) if group_of.get(row, -1) == group_of.get(photos + row, -2)]
            upright += len(shown)
            found += sum(group_of[row] == group_of.get(2 * photos + row) for row in shown)
            for group in groups:
                of = [member.row % photos for member in group.members]
                right += sum(of.count(one) - 1 for one in of)
                pairs += len(of) * (len(of) - 1)
    what = f"turned copies of {photos} photos at 0.9, single"
    yield Figure(f"{what}: upright copies found", "share", (upright / photos / len(names[2:]),), judged=False)
    yield Figure(f"{what}: found, of those whose upright copy is", "share", (found / upright,), at_least=0.95)
    yield Figure(f"{what}: pairs in one group that are right", "share", (right / pairs,), at_least=1)
    # The first round loads libraries.
    first, rest = taken["looking"][0], {name: rounds[1:] for name, rounds in taken.items()}
    share = "CPU time of looking at the pictures / of extraction"
    yield ratio(f"{what}: {share}", rest["looking"], rest["extraction"], at_most=0.2)
    yield ratio(f"{what}: {share}, in the first round", [first], rest["extraction"][:1], judged=False)
    yield ratio(f"{what}: {share}, hashes kept", rest["looking again"], rest["extraction"], judged=False)


def _photos_and_copies(originals: list[Path], media: Path) -> Iterator[list[str]]:
    """Names of the photos, of upright copies, and of copies in each other position, all of which are written here."""
    media.mkdir(parents=True)
    positions = {"photo": None, "upright": None} | {turn.name.lower(): turn for turn in Image.Transpose}
    for name, turn in positions.items():
        targets = [media / f"{name}-{path.name}" for path in originals]
        for path, target in zip(originals, targets, strict=True):
            if name == "photo":
                shutil.copy(path, target)
                continue
            with Image.open(path) as photo:
                copy = photo.convert("RGB") if turn is None else photo.convert("RGB").transpose(turn)
                copy.save(target, "JPEG", quality=40)
        yield [target.name for target in targets]


def _gallery_of(names: list[str], features: NDArray[np.float32], model: Model) -> Gallery:
    """A new gallery of some pictures, of which nothing is kept yet."""
    folder = BUILD / "features" / model.path.stem
    shutil.rmtree(folder, ignore_errors=True)
    claim_gallery(folder, model, IdScheme(ObjectIds.basename))
    write_shard(folder, 0, features, names, model.fingerprint)
    return open_gallery(folder)


ALTERATIONS = ("re-encoded", "scaled", "cropped", "watermarked")


def altered(originals: list[Path], folder: Path) -> Iterator[tuple[int, str, Path]]:
    """(number of the photo, kind, file) of every photo and its copies, which are made here."""
    folder.mkdir(parents=True)
    for number, path in enumerate(originals):
        yield number, "original", path
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        width, height = photo.size
        made = {
            "re-encoded": photo,
            "scaled": photo.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.LANCZOS),
            "cropped": photo.crop((width // 20, height // 20, width - width // 20, height - height // 20)),
            "watermarked": photo.copy(),
        }
        mark = ImageDraw.Draw(made["watermarked"])
        mark.text((width * 0.55, height * 0.85), "© example", fill="white", font=ImageFont.load_default(height // 12))
        for kind, copy in made.items():
            target = folder / f"{number}-{kind}.jpg"
            copy.save(target, quality=40 if kind == "re-encoded" else 85)
            yield number, kind, target


def write_shards(folder: Path, rows: int, kind: str) -> None:
    """A recorded gallery on disk, made shard by shard of the usual size."""
    # Any model of that length serves if no picture is embedded.
    stand_in = BUILD / f"{folder.name}.onnx"
    model = load_model(REAL_MODEL if REAL_MODEL.is_file() else tiny_model(stand_in, length=LENGTH))
    claim_gallery(folder, model, IdScheme(ObjectIds.basename))
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        features = random_rows(min(SHARD_ROWS, rows - start), kind, seed=number)
        paths = [f"object/{row:08d}.jpg" for row in range(start, start + len(features))]
        write_shard(folder, number, features, paths, model.fingerprint)


def command_line(command: str, folder: Path, *more: str) -> list[str]:
    """A command line on a gallery."""
    model = REAL_MODEL.with_name(f"{folder.name}.onnx")
    return [
        sys.executable,
        "-m",
        "pipeline",
        command,
        "--feature-dir",
        str(folder.parent),
        "--model",
        str(model),
        *more,
    ]


def search_by_id(folder: Path, name: str) -> list[str]:
    """The command for a query by a gallery object."""
    return [sys.executable, "-m", "pipeline", "search", "--feature-dir", str(folder), "--id", name]


def run(command: list[str]) -> None:
    """Run to the end; its output is not wanted."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def evicted(folder: Path, way: Callable[[], object]) -> Callable[[], object]:
    """The same, with the gallery's files out of the page cache; taking them out counts, and takes microseconds."""

    def cold() -> object:
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        return way()

    return cold


def anonymous_peak(command: list[str], every_s: float = 0.001) -> float:
    """The most anonymous memory of a command, in MB, looked at again and again."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    done = threading.Event()
    while process.poll() is None and not done.wait(every_s):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
    if process.wait():
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return peak / 1024


@contextmanager
def removed(folder: Path) -> Iterator[None]:
    """The folder is gone afterwards, whatever happens."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


PARTS: dict[str, tuple[Callable[[int], Iterator[Figure]], int]] = {
    "resident": (resident, 100_000),
    "million": (million, 1_000_000),
    "commands": (commands, 100_000),
    "near-duplicates": (near_duplicates, 100_000),
    "groups": (groups, 100_000),
    "copies": (copies, 250),
    "turned": (turned, 250),
}


def main() -> None:
    """The command line; exit code 1 where a judged figure falls short."""
    parser = argparse.ArgumentParser(description="Search against its limits and its peers.")
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--rows", type=int, help="other than the usual number; nothing is saved then")
    given = parser.parse_args()
    code = 0
    for name in [given.part] if given.part else PARTS:
        measure, rows = PARTS[name]
        print(f"{name} …", file=sys.stderr)
        figures = list(measure(given.rows or rows))
        code |= results.show(name, figures)
        if given.rows is None:
            results.save(TARGET, name, figures, LIBRARIES)
    sys.exit(code)


if __name__ == "__main__":
    main()
