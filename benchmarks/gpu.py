"""Where a GPU's time goes: every stage alone, then the whole pipeline against the slowest of them.

`python -m benchmarks.gpu [--images N]` runs on a CPU as well, and says what stays unmeasured there.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import FEATURE_LENGTH, LARGE, MODEL, media_folder, need_shared, object_list, scratch, warm
from benchmarks.pipeline import ruiji
from benchmarks.processes import Watch, adopt_orphans
from benchmarks.results import FOLDER, Figure, save, show
from pipeline.errors import UsageError
from pipeline.model import load_model
from pipeline.settings import MAX_PIXELS
from pipeline.store import write_feature
from workers.encoder import Encoder
from workers.images import load_pixels

#: The article's list, and the time that it may take here; the article took 15 minutes.
ARTICLE_IMAGES, ARTICLE_TARGET_S = 100_381, 45.0
BATCHES = (1, 8, 32, 64, 128, 256)
LIBRARIES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "celery", "redis")
#: Of a stage alone: images, and how many a process takes at once.
_STAGE_IMAGES, _CHUNK = 2_048, 64
CORES = len(os.sched_getaffinity(0))


def _cpu_s() -> float:
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def _timed(images: int, work: Callable[[], object]) -> tuple[float, float]:
    """(images/s, CPU ms/image) of a stage, its ended child processes included."""
    wall, cpu = time.perf_counter(), _cpu_s()
    work()
    wall, cpu = time.perf_counter() - wall, _cpu_s() - cpu
    return images / wall, 1000 * cpu / images


def _on_all_cores(task: Callable[[list[int]], None], images: int) -> None:
    chunks = [list(range(start, min(start + _CHUNK, images))) for start in range(0, images, _CHUNK)]
    # Not forked: CUDA does not survive that.
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        list(pool.map(task, chunks))


def _decode(media: Path, paths: list[str], numbers: Iterable[int]) -> None:
    spec = load_model(MODEL).spec
    for number in numbers:
        load_pixels(media / paths[number], spec, MAX_PIXELS)


def _write(folder: Path, numbers: Iterable[int]) -> None:
    feature = np.ones(FEATURE_LENGTH, np.float32)
    for number in numbers:
        write_feature(folder / f"{number % 256:02x}" / f"{number}.npy", feature)


def stages(device: str, media: Path, paths: list[str]) -> tuple[list[Figure], float]:
    """Each stage alone; returns the figures and the rate that their sum allows.

    That is the smaller of the encoder's best rate and of what the cores can decode, encode and write.
    """
    count = min(_STAGE_IMAGES, len(paths))
    figures: list[Figure] = []

    def add(name: str, rate: float, cpu_ms: float) -> float:
        figures.extend([Figure(f"{name}: rate", "images/s", (rate,)), Figure(f"{name}: CPU", "ms/image", (cpu_ms,))])
        return cpu_ms

    # Start-up of the processes is in these two: with thousands of images it is little.
    cpu_ms = add("decode, all cores", *_timed(count, lambda: _on_all_cores(partial(_decode, media, paths), count)))
    with scratch("gpu-write") as folder:
        cpu_ms += add("write, all cores", *_timed(count, lambda: _on_all_cores(partial(_write, folder), count)))
    model = load_model(MODEL)
    pixels = np.stack([load_pixels(media / path, model.spec, MAX_PIXELS) for path in paths[: max(BATCHES)]])
    best = (0.0, 0.0)
    for batch in BATCHES:
        encoder = Encoder(model, device, 1 if device == "cpu" else CORES, batch)
        encoder.encode(pixels[:batch])
        repeats = max(1, (256 if device == "cpu" else 16_384) // batch)
        images = repeats * min(batch, len(pixels))
        timed = _timed(images, partial(_repeat, partial(encoder.encode, pixels[:batch]), repeats))
        add(f"encode, batch {batch}", *timed)
        best = max(best, timed)
    if device == "cuda":
        add("host to device, batch 64", *_host_to_device(pixels[:64]))
    # One encoder thread here; where the CPU encodes, all cores share that too.
    allowed = 1000 * CORES / (cpu_ms + best[1])
    return figures, min(allowed, best[0]) if device == "cuda" else allowed


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def _host_to_device(pixels: NDArray[np.uint8]) -> tuple[float, float]:
    import onnxruntime

    repeats = 200
    copy = partial(onnxruntime.OrtValue.ortvalue_from_numpy, pixels, "cuda", 0)
    copy()
    return _timed(repeats * len(pixels), partial(_repeat, copy, repeats))


def whole(device: str, media: Path, count: int, allowed: float) -> list[Figure]:
    """The whole pipeline, with the features it gave against the CPU's."""
    memory: list[float] = []
    listed = object_list(count)
    with scratch("gpu") as work, ruiji(media, MODEL, work, device=device) as running:
        watch = Watch()
        client = running.start_redis()
        running.start_workers(client, 2)
        started = time.perf_counter()
        running.enqueue(listed)
        window = watch.follow(running.gallery, count, running.finished, lambda: memory.extend(_gpu_memory_bytes()))
        seconds = time.perf_counter() - started
        features = np.load(running.gallery / "0000.features.npy", mmap_mode="r")[:256].astype(np.float64)
    model = load_model(MODEL)
    paths = listed.read_text().splitlines()[: len(features)]
    pixels = np.stack([load_pixels(media / path, model.spec, MAX_PIXELS) for path in paths])
    reference = Encoder(model, "cpu", CORES).encode(pixels).astype(np.float64)
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(reference, axis=1)
    cosine = float((np.einsum("nd,nd->n", features, reference) / norms).min())
    figures = [
        Figure("whole pipeline / what its stages allow", "x", (window.images_per_s / allowed,), at_least=0.85),
        Figure("whole pipeline: rate", "images/s", (window.images_per_s,)),
        Figure("whole pipeline: CPU", "ms/image", (window.cpu_ms,)),
        Figure("features / CPU's features: least cosine", "", (cosine,), at_least=0.9999),
    ]
    if device == "cuda":
        figures.append(Figure("GPU memory, peak", "bytes", (max(memory),)))
        if count == ARTICLE_IMAGES:
            name = f"{count} JPEGs, enqueue to last shard"
            figures.append(Figure(name, "s", (seconds,), at_most=ARTICLE_TARGET_S, judged=False))
    return figures


def _gpu_memory_bytes() -> list[float]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return [sum(float(mebibytes) * 2**20 for mebibytes in used)]


def main() -> int:
    """Measure, save under the device's name, and show."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--images", type=int, help=f"of the whole run; default: {ARTICLE_IMAGES}, on a CPU 4000")
    options = parser.parse_args()
    adopt_orphans()
    try:
        need_shared()
        device = Encoder(load_model(MODEL)).device
        count = options.images or (ARTICLE_IMAGES if device == "cuda" else 4_000)
        media, listed = media_folder(LARGE, count), object_list(count)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    warm(media, listed)
    figures, allowed = stages(device, media, listed.read_text().splitlines())
    figures += whole(device, media, count, allowed)
    save(FOLDER / "gpu.json", device, figures, LIBRARIES)
    code = show(f"on {device}", figures)
    if device == "cpu":
        print(
            "no GPU here. Unmeasured: the encoder's rate on one, host to device, GPU memory, "
            f"{ARTICLE_IMAGES} JPEGs in {ARTICLE_TARGET_S:g} s, and the features' cosine to the CPU's",
            file=sys.stderr,
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
