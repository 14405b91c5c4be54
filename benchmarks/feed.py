"""Whether ruiji feeds an accelerator: its own CPU per image, beside decoding and the model, and what it keeps up with.

    make bench PART=feed

No image is decoded and no model runs. A decoder that sleeps without the interpreter's lock stands for a core that
decodes, and an encoder that sleeps stands for a GPU; so two cores can stand for many. All else is ruiji as it is:
messages, reading, digests, features, shards. What is left of the CPU time is ruiji's own.

`python -m benchmarks.feed IMAGES_PER_S FILE` is one such embed process; the benchmark starts it.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import BUILD, FEATURE_LENGTH, link_objects, no_op_model, object_list, scratch
from benchmarks.pipeline import ruiji, wait_until
from benchmarks.processes import command_line, descendants, tree_cpu_s
from benchmarks.results import Figure
from pipeline.choices import Device, Role
from pipeline.model import Model
from pipeline.settings import CUDA_WINDOW_SEGMENTS
from pipeline.spec import ModelSpec
from pipeline.status import StatusReader
from pipeline.worker_settings import WorkerSettings

_T = TypeVar("_T")

#: The pretended encoder of one GPU, all processes together.
ENCODER_IMAGES_PER_S = 12_000.0
#: How long the pretended decoding of one image sleeps.
DECODE_S = 0.0028
#: CPU of decoding and resizing one photo of 500 x 375.
PHOTO_MS = 1.4
#: What ruiji's own CPU may be.
OWN_MS = 0.30
#: Decoding threads of a process, about.
_THREADS = 3
_REDUCERS = 2
#: A photo of 500 x 375 at quality 90 has about as many bytes. They are never decoded.
_FILE_BYTES, _DISTINCT = 45_000, 400
_SIDE = 224
#: As an encoder on CUDA has.
CUDA_BATCH_IMAGES = 64
#: From linux/prctl.h; in ns.
_PR_SET_TIMERSLACK = 29
_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Run:
    """What one run gave.

    Attributes:
        images_per_s: from the enqueue to the last shard.
        own_ms: CPU milliseconds per image of all processes, without what pretending took.
        parts: of that, by what the processes do.
        pretended_ms: CPU milliseconds per image of pretending.
    """

    images_per_s: float
    own_ms: float
    parts: dict[str, float]
    pretended_ms: float


def feed(images: int, rounds: int) -> list[Figure]:
    """Own CPU and how much of what the decoders allow gets through, with several embed processes and with one.

    Args:
        images: of each run; a multiple of a shard's rows.
    """
    first = _run(images, _CORES, _THREADS)
    # As many as allow half of what these cores give at the own CPU that they have just now, and no more.
    decoders = max(2, int(0.5 * _CORES * 1000 / first.own_ms * DECODE_S))
    several = max(2, decoders // _THREADS)
    threads = max(1, decoders // several)
    allowed = min(several * threads / DECODE_S, ENCODER_IMAGES_PER_S)
    runs: dict[int, list[Run]] = {several: [], 1: []}
    for number in range(rounds):
        for processes in [several, 1] if number % 2 == 0 else [1, several]:
            run = _run(images, processes, several * threads // processes)
            runs[processes].append(run)
            told = ", ".join(f"{name} {ms:.3f}" for name, ms in run.parts.items())
            print(
                f"  {processes} processes: {run.images_per_s:.0f} of {allowed:.0f} images/s, own CPU "
                f"{run.own_ms:.3f} ms ({told}), pretending {run.pretended_ms:.3f}",
                file=sys.stderr,
            )
    own = tuple(run.own_ms for run in runs[several])
    figures = [
        Figure("own CPU beside decoding and the model", "ms/image", own, at_most=OWN_MS, judged=False),
        *(
            Figure(f"own CPU: {part}", "ms/image", tuple(run.parts[part] for run in runs[several]))
            for part in runs[several][0].parts
        ),
        # Of a long run the enqueuer publishes only the first segments, the reducers all that follow.
        Figure("one enqueuer, by its CPU", "images/s", tuple(1000 / run.parts["enqueuer"] for run in runs[several])),
        Figure("one reducer, by its CPU", "images/s", tuple(1000 / run.parts["reducers"] for run in runs[several])),
        Figure("CPU of pretending, not counted", "ms/image", tuple(run.pretended_ms for run in runs[several])),
        Figure("own CPU, one embed process", "ms/image", tuple(run.own_ms for run in runs[1])),
        Figure(
            f"16 / ({PHOTO_MS} ms + own CPU), by calculation", "images/s", tuple(16e3 / (PHOTO_MS + ms) for ms in own)
        ),
    ]
    for processes, bound in ((several, 0.85), (1, None)):
        rates = tuple(run.images_per_s for run in runs[processes])
        name = f"{processes} embed process{'es' if processes > 1 else ''}"
        shares = tuple(rate / allowed for rate in rates)
        figures.append(Figure(f"{name}: rate / what {several * threads} decoders allow", "x", shares, at_least=bound))
        figures.append(Figure(f"{name}: rate", "images/s", rates))
    return figures


def _run(images: int, processes: int, threads: int) -> Run:
    media, listed = _media(images), object_list(images)
    model = no_op_model((_SIDE, _SIDE))
    with scratch("feed", in_memory=True) as work, ruiji(media, model, work, threads=str(threads)) as running:
        client = running.start_redis()
        told = {"RUIJI_REDIS_URL": running.redis_url, "RUIJI_WINDOW_SEGMENTS": str(CUDA_WINDOW_SEGMENTS)}
        for number in range(processes):
            spent = work / f"pretended-{number}.json"
            arguments = (str(ENCODER_IMAGES_PER_S / processes), str(spent))
            variables = {**told, "RUIJI_IN_HAND": str(work / f"in-hand-{number}")}
            running.start(*arguments, module="benchmarks.feed", log="embed", **variables)
        for _ in range(_REDUCERS):
            running.start("worker-process", "--role", "reduce", **told)
        reader = StatusReader(running.gallery, client)
        wait_until(lambda: len(reader.read().workers) >= processes + _REDUCERS, "the workers", running.check)
        before, total, started = _by_role(), tree_cpu_s(), time.perf_counter()
        running.enqueue(listed)
        wait_until(running.finished, "the last shard", running.check)
        wall, total, after = time.perf_counter() - started, tree_cpu_s() - total, _by_role()
        # They write what they spent when they end.
        running.stop()
        pretended = sum(json.loads(path.read_text()) for path in work.glob("pretended-*.json"))
    parts = {name: 1000 * (after[name] - before[name]) / images for name in before}
    # Of the processes that have ended, all but the enqueuer were there before.
    parts["enqueuer"] = 1000 * total / images - sum(parts.values())
    parts["embed processes"] -= 1000 * pretended / images
    return Run(images / wall, 1000 * (total - pretended) / images, parts, 1000 * pretended / images)


def _by_role() -> dict[str, float]:
    """CPU seconds so far of the processes that stay."""
    spent = {"embed processes": 0.0, "reducers": 0.0, "Redis": 0.0}
    for pid, process in descendants().items():
        command = command_line(pid)
        name = (
            "embed processes"
            if "benchmarks.feed" in command
            else "reducers"
            if "--role reduce" in command
            else "Redis"
            if "redis" in command or "valkey" in command
            else None
        )
        if name is not None:
            spent[name] += process.cpu_s + process.reaped_s
    return spent


def _media(images: int) -> Path:
    """A media folder with files as long as photos, in which no decoder looks."""
    folder, files = BUILD / "media-feed", BUILD / "files-feed"
    files.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(_DISTINCT):
        path = files / f"{number:05d}.jpg"
        if not path.exists():
            path.write_bytes(random.bytes(_FILE_BYTES))
    link_objects(folder, images, lambda number: files / f"{number % _DISTINCT:05d}.jpg")
    return folder


# One embed process that pretends.


class _Pretended:
    """Stands for decoding and for a model on a GPU, and counts the CPU time that this takes."""

    def __init__(self, images_per_s: float) -> None:
        self._images_per_s = images_per_s
        random = np.random.default_rng(0)
        self._pixels = random.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
        self._features = random.standard_normal((CUDA_BATCH_IMAGES, FEATURE_LENGTH), dtype=np.float32)
        self._lock = threading.Lock()
        #: CPU seconds so far.
        self.spent_s = 0.0

    def decode(
        self, file: BinaryIO, spec: ModelSpec, max_pixels: int, altered: list[str], room: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """In place of `workers.decode.images.decode`: pixels where they belong, and a sleep."""
        self._counted(DECODE_S, partial(np.copyto, room, self._pixels))
        return room

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """In place of `Encoder.encode`: new features, and a sleep."""
        return self._counted(len(pixels) / self._images_per_s, self._features[: len(pixels)].copy)

    def _counted(self, seconds: float, make: Callable[[], _T]) -> _T:
        """Take as long as said, making included: what pretending takes besides would look like ruiji's doing."""
        before, until = time.thread_time(), time.monotonic() + seconds
        made = make()
        time.sleep(max(0.0, until - time.monotonic()))
        spent_s = time.thread_time() - before
        with self._lock:
            self.spent_s += spent_s
        return made


class _Encoder:
    """What the worker knows of `workers.encoder.Encoder`, on a pretended GPU."""

    def __init__(self, pretended: _Pretended, model: Model) -> None:
        self.model, self.device = model, Device.cuda
        self.batch_images = self.run_images = CUDA_BATCH_IMAGES
        self.turn, self.encode = threading.Lock(), pretended.encode

    def prove(self) -> None:
        """Nothing to prove."""


def _embed_process(images_per_s: float, spent: Path) -> int:
    """Work as one embed process does, and write at the end what pretending took, in s."""
    from pipeline.logs import set_up
    from workers import encoder, process
    from workers.decode import images

    # The system lets a sleeper lie up to 50 us longer; its threads inherit it.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    pretended = _Pretended(images_per_s)
    images.decode = pretended.decode  # type: ignore[assignment]
    encoder.Encoder = lambda model, *_: _Encoder(pretended, model)  # type: ignore[assignment, misc]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    told = WorkerSettings.from_environment(os.environ)
    set_up(told.log_format)
    code = process.run_process(Role.embed, told)
    spent.write_text(json.dumps(pretended.spent_s))
    return code


if __name__ == "__main__":
    sys.exit(_embed_process(float(sys.argv[1]), Path(sys.argv[2])))
