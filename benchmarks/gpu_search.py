"""Search where torch multiplies, on a GPU or a CPU: `python -m benchmarks.gpu search`.

Against torch used plainly, which multiplies and sorts and decides nothing; against the rates at which the device reads
and multiplies; and against a brute force in float64, whose rows every way of ours must find.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.results import Figure
from benchmarks.search import LENGTH, SHARD_ROWS, TOP_K, in_memory, random_rows, ratio, share_same, timed
from pipeline.choices import Device
from search.arrays import Float32
from search.duplicates.groups import find_groups
from search.gallery.shards import Gallery
from search.options import Metric
from search.ranking.planner import Planner, Purpose
from search.ranking.rank import rank
from search.ranking.scan import Batch

QUERIES = (1, 10, 100, 1000, 4096)
THRESHOLD = 0.95
#: What torch used plainly takes at once: of rows in float64, and of pairs.
_BLOCK_ROWS, _PAIR_ROWS = 65_536, 8_192
#: Pairs that are planted, so that there is something to find.
_PLANTED = 1000


def figures(device: Device, small: int, large: int) -> Iterator[Figure]:
    """Searches of galleries of two sizes, and all pairs of the larger.

    Args:
        small, large: rows. What the GPU must reach is judged on CUDA only.
    """
    asked = random_rows(max(QUERIES), "clustered", seed=7)
    for rows in (small, large):
        gallery, features = _gallery(rows)
        yield from _searches(device, gallery, features, asked)
    yield from _pairs(device, gallery, features)


def _gallery(rows: int) -> tuple[Gallery, Float32]:
    seeds = range(0, rows, SHARD_ROWS)
    parts = [random_rows(min(SHARD_ROWS, rows - start), "clustered", seed=start) for start in seeds]
    features = np.concatenate(parts)
    planted = min(_PLANTED, rows // 4)
    features[-planted:] = features[:planted] * np.linspace(0.9, 1.1, planted, dtype=np.float32)[:, np.newaxis]
    gallery = in_memory(features)
    # Norms are a cache's, made once.
    print(f"{rows} rows, {sum(gallery.unusable_rows)} of them unusable", flush=True)
    return gallery, features


def _searches(device: Device, gallery: Gallery, features: Float32, asked: Float32) -> Iterator[Figure]:
    judged = device is Device.cuda
    units = torch.nn.functional.normalize(torch.from_numpy(features).to(device))
    rounded = units.bfloat16()
    stays = Planner(device, lasting=True)
    exact = _brute_force(units, features, asked)
    what_rows = f"{gallery.rows} rows"
    reading, multiplying = _reading(rounded), _multiplying(rounded)
    yield Figure(f"{what_rows}: bytes read by a sum", "GB/s", (reading / 1e9,), judged=False)
    yield Figure(f"{what_rows}: bfloat16 products", "TFLOP/s", (multiplying / 1e12,), judged=False)
    # A trial of few rows has few queries.
    for count in (count for count in QUERIES if count <= gallery.rows):
        queries = asked[:count]
        ours = partial(_ours, stays, gallery, queries)
        ways: dict[str, Callable[[], object]] = {
            "a process that stays": ours,
            "torch, float32": partial(_plainly, units, queries),
            "torch, bfloat16": partial(_plainly, rounded, queries),
        }
        once = Planner(device)
        if gallery.rows * count <= 10**9:
            ways["a command"] = partial(_ours, once, gallery, queries)
        taken = timed(ways, 5)
        what = f"{count} queries, {what_rows}"
        for name, seconds in taken.items():
            yield Figure(f"{what}: {name}", "ms", tuple(1000 * second for second in seconds), judged=False)
        yield ratio(f"{what}: torch, float32 / ours", taken["torch, float32"], taken["a process that stays"])
        yield ratio(f"{what}: torch, bfloat16 / ours", taken["torch, bfloat16"], taken["a process that stays"])
        mine = taken["a process that stays"]
        if count == 1:
            read = tuple(2 * features.size / second / reading for second in mine)
            large = judged and gallery.rows >= 1_000_000
            name = f"{what}: rows read / what the device reads"
            yield Figure(name, "x", read, at_least=0.8 if large else None, judged=large)
        else:
            done = tuple(2 * features.size * count / second / multiplying for second in mine)
            many = judged and count == max(QUERIES) and gallery.rows >= 1_000_000
            name = f"{what}: products / what the device multiplies"
            yield Figure(name, "x", done, at_least=0.5 if many else None, judged=many)
            # Without the host's part, which puts candidates together and decides them query by query.
            device_s = timed({"scan": _scan(stays, gallery, queries)}, 5)["scan"]
            done = tuple(2 * features.size * count / second / multiplying for second in device_s)
            yield Figure(f"{name}, candidates alone", "x", done, judged=False)
        checked = exact[:count]
        yield Figure(f"{what}: right ids", "share", (share_same(ours()[: len(checked)], checked),), at_least=1)
        plain = share_same(_plainly(rounded, queries)[: len(checked)], checked)
        yield Figure(f"{what}: right ids, torch, bfloat16", "share", (plain,), judged=False)
    if device is Device.cuda:
        yield Figure(f"{what_rows}: GPU memory, peak", "bytes", (torch.cuda.max_memory_allocated(),), judged=False)
        torch.cuda.empty_cache()


def _ours(planner: Planner, gallery: Gallery, queries: Float32) -> list[NDArray[np.int64]]:
    way = planner.way(gallery, Purpose.hits, len(queries))
    ranking = rank(gallery, queries, TOP_K, scan=planner.arithmetic(way).scan, queries_at_once=way.queries_at_once)
    return [np.array([hit.row for hit in hits]) for hits in ranking]


def _scan(planner: Planner, gallery: Gallery, queries: Float32) -> Callable[[], object]:
    """What finds candidates, with the cuts that it has at its end."""
    way = planner.way(gallery, Purpose.hits, len(queries))
    scan = planner.arithmetic(way).scan
    hits = rank(gallery, queries, TOP_K, scan=scan, queries_at_once=way.queries_at_once)
    cuts = np.array([one[-1].similarity for one in hits])
    parts = range(0, len(queries), way.queries_at_once)

    def run() -> None:
        for start in parts:
            some = slice(start, start + way.queries_at_once)
            for _ in scan(gallery, Batch(queries[some], TOP_K, Metric.cosine), cuts[some]):
                pass

    return run


def _plainly(rows: torch.Tensor, queries: Float32) -> NDArray[np.int64]:
    """The rows of the highest products, as anyone would write it."""
    units = torch.nn.functional.normalize(torch.from_numpy(queries).to(rows.device)).to(rows.dtype)
    # All products of a thousand queries and a million rows take 4 GB.
    found = [torch.topk(some @ rows.T, TOP_K).indices for some in units.split(1000)]
    rows_found: NDArray[np.int64] = torch.cat(found).cpu().numpy()
    return rows_found


def _brute_force(units: torch.Tensor, features: Float32, asked: Float32) -> NDArray[np.int64]:
    """int64[q, k]: the rows that float64 finds for the first hundred queries, on the device."""
    queries = torch.nn.functional.normalize(torch.from_numpy(asked[:100]).to(units.device).double())
    best = torch.empty((len(queries), 0), dtype=torch.float64, device=units.device)
    rows = torch.empty((len(queries), 0), dtype=torch.int64, device=units.device)
    for start in range(0, len(features), _BLOCK_ROWS):
        block = torch.from_numpy(features[start : start + _BLOCK_ROWS]).to(units.device).double()
        cosines = queries @ torch.nn.functional.normalize(block).T
        here = torch.arange(start, start + len(block), device=units.device).expand_as(cosines)
        best, order = torch.cat([best, cosines], 1).topk(TOP_K)
        rows = torch.cat([rows, here], 1).gather(1, order)
    exact: NDArray[np.int64] = rows.cpu().numpy()
    return exact


def _reading(rows: torch.Tensor) -> float:
    """Bytes per second."""
    taken = rows.numel() * rows.element_size()
    return float(taken) / _seconds(lambda: rows.view(-1).view(torch.int32).max(), rows)


def _multiplying(rows: torch.Tensor) -> float:
    """Products and sums per second, of bfloat16."""
    some = rows[: 8192 if rows.is_cuda else 2048]
    return float(2 * len(some) ** 2 * LENGTH) / _seconds(lambda: some @ some.T, rows)


def _seconds(work: Callable[[], object], rows: torch.Tensor) -> float:
    """Of one call, the shortest of some after the first."""
    work()
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        if rows.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _pairs(device: Device, gallery: Gallery, features: Float32) -> Iterator[Figure]:
    what = f"all pairs of {gallery.rows} rows"
    planner = Planner(device)
    way = planner.way(gallery, Purpose.pairs, gallery.rows)
    print(way, flush=True)
    start = time.perf_counter()
    groups = find_groups(gallery, THRESHOLD, arithmetic=planner.arithmetic(way))
    found = sum(1 for _ in groups)
    ours = time.perf_counter() - start
    rounded = torch.nn.functional.normalize(torch.from_numpy(features).to(device)).bfloat16()
    start = time.perf_counter()
    pairs = _plain_pairs(rounded)
    plain = time.perf_counter() - start
    large = device is Device.cuda and gallery.rows >= 1_000_000
    yield Figure(f"{what}: ours", "s", (ours,), at_most=15 if large else None, judged=large)
    yield Figure(f"{what}: torch, bfloat16, nothing decided", "s", (plain,), judged=False)
    yield Figure(f"{what}: torch / ours", "x", (plain / ours,), judged=False)
    rate = gallery.rows**2 * LENGTH / ours / _multiplying(rounded)
    yield Figure(f"{what}: products / what the device multiplies", "x", (rate,), judged=False)
    yield Figure(f"{what}: groups", "groups", (found,), at_least=min(_PLANTED, gallery.rows // 4))
    yield Figure(f"{what}: pairs that torch in bfloat16 finds", "pairs", (pairs,), judged=False)


def _plain_pairs(rows: torch.Tensor) -> int:
    found = 0
    parts = rows.split(_PAIR_ROWS if rows.is_cuda else 1024)
    for number, part in enumerate(parts):
        for other, others in enumerate(parts[number:]):
            near = (part @ others.T) >= THRESHOLD
            found += len((near.triu(1) if other == 0 else near).nonzero())
    return found
