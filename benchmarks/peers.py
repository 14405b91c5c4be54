"""What ruiji is measured against: each peer turns a list of images into feature files, as well as it can.

`python -m benchmarks.peers PEER MEDIA LIST OUTPUT`; all use the same model, images and preprocessing.
"""

import multiprocessing
import os
import random
import sys
from ctypes import c_int
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import PIL.Image
from numpy.typing import NDArray

from benchmarks.data import FEATURE_LENGTH, MODEL
from pipeline.model import load_model
from pipeline.npy import npy_header
from pipeline.settings import SHARD_ROWS
from workers.decode.resize import resize
from workers.graph import PIXELS_INPUT, taking_pixels

#: Of a DataLoader's batches.
_BATCH_IMAGES = 8


def nested(output: Path, object_id: str) -> Path:
    """Where an object's feature goes, as in the article."""
    return output / object_id[0:2] / object_id[2:4] / f"{object_id}.npy"


def _session(threads: int, source: bytes | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    return onnxruntime.InferenceSession(source or str(MODEL), options, providers=["CPUExecutionProvider"])


def _infer(session: onnxruntime.InferenceSession, images: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(session.run(["feature_vector"], {"inputs:0": images})[0])


def _scaled(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.divide(pixels, 255, dtype=np.float32)


def _pixels(path: Path) -> NDArray[np.uint8]:
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((224, 224)))


def article(media: Path, listed: Path, output: Path, threads: int = 0) -> None:
    """The article's script, step by step: shuffled list, skip what exists, one image at a time, two lines told.

    Several of these at once are its way to use several cores. Its `np.expand_dim` is mended.

    Args:
        threads: of ONNX Runtime; 0: its default, one per core.
    """
    image_paths = [media / line for line in listed.read_text().splitlines()]
    random.shuffle(image_paths)
    session = _session(threads)
    for image_path in image_paths:
        print(image_path)
        feature_path = nested(output, image_path.name)
        print(feature_path)
        if feature_path.exists():
            print("skip")
            continue
        image = PIL.Image.open(image_path).convert("RGB").resize((224, 224))
        feature = _infer(session, np.expand_dims(np.array(image, dtype=np.float32) / 255, 0))[0]
        feature_path.parent.mkdir(parents=True, exist_ok=True)
        np.save(feature_path, feature)


def bare_loop(media: Path, listed: Path, output: Path) -> None:
    """The best loop without a queue: a process a core, one thread each, whole files by rename, then shards.

    It has ruiji's quicker graph and compiled resizing too, so that what is left between the two is the queue and what
    comes with it.
    """
    lines = listed.read_text().splitlines()
    counter = multiprocessing.Value(c_int, 0)
    processes = [
        multiprocessing.Process(target=_bare_worker, args=(media, lines, output, counter))
        for _ in os.sched_getaffinity(0)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(1)
    for number, start in enumerate(range(0, len(lines), SHARD_ROWS)):
        _shard(output, number, [line.rpartition("/")[2] for line in lines[start : start + SHARD_ROWS]])


def _bare_worker(media: Path, lines: list[str], output: Path, counter: "Synchronized[int]") -> None:
    import simplejpeg

    session = _session(1, taking_pixels(load_model(MODEL), always=True))
    root, target, header = str(media), str(output), npy_header("<f4", (FEATURE_LENGTH,))
    made: set[str] = set()
    while True:
        # Few enough that both processes end together.
        with counter:
            start = counter.value
            counter.value += 16
        if start >= len(lines):
            return
        for line in lines[start : start + 16]:
            with open(f"{root}/{line}", "rb", buffering=0) as file:
                pixels = simplejpeg.decode_jpeg(file.read(), "RGBA")
            small = resize(pixels, (224, 224), (0, 0, 224, 224), "bicubic")
            assert small is not None
            (feature,) = session.run(["feature_vector"], {PIXELS_INPUT: small[np.newaxis]})
            object_id = line.rpartition("/")[2]
            folder = f"{target}/{object_id[0:2]}/{object_id[2:4]}"
            if folder not in made:
                os.makedirs(folder, exist_ok=True)
                made.add(folder)
            with open(f"{folder}/.{object_id}", "wb", buffering=0) as file:
                file.write(header + feature.tobytes())
            os.rename(f"{folder}/.{object_id}", f"{folder}/{object_id}.npy")


def _shard(output: Path, number: int, object_ids: list[str]) -> None:
    features = np.stack([np.load(nested(output, object_id)) for object_id in object_ids])
    for name, array in (("features", features), ("object_ids", np.array(object_ids))):
        with open(output / f"{number:04d}.{name}.npy", "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    for object_id in object_ids:
        nested(output, object_id).unlink()


class _RayExtractor:
    """One actor: reads, decodes, infers and writes a batch; fused, which was faster than a stage each."""

    def __init__(self, output: str) -> None:
        self._output = Path(output)
        self._session = _session(1)

    def __call__(self, rows: dict[str, NDArray[np.str_]]) -> dict[str, NDArray[np.str_]]:
        for path in map(Path, rows["item"]):
            feature = _infer(self._session, _scaled(_pixels(path)[np.newaxis]))[0]
            target = nested(self._output, path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, feature)
        return rows


def ray_data(media: Path, listed: Path, output: Path) -> None:
    """Ray Data: `map_batches` over a pool of one actor a core, warmed with a first, small pass."""
    import ray

    cores = len(os.sched_getaffinity(0))
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = [str(media / line) for line in listed.read_text().splitlines()]
    warm_up = output.with_name(output.name + "-warm")
    for target, items in ((warm_up, paths[:64]), (output, paths)):
        dataset = ray.data.from_items(items, override_num_blocks=max(cores, len(items) // 256))
        done = dataset.map_batches(
            _RayExtractor,
            fn_constructor_args=(str(target),),
            batch_size=32,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=cores),
        )
        for _ in done.iter_batches(batch_size=256):
            pass
    ray.shutdown()


class _Images:
    """A map-style torch dataset: (pixels, number)."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[NDArray[np.uint8], int]:
        return _pixels(self._paths[number]), number


def _collate(items: list[tuple[NDArray[np.uint8], int]]) -> tuple[Any, list[int]]:
    import torch

    return torch.from_numpy(np.stack([pixels for pixels, _ in items])), [number for _, number in items]


def data_loader(media: Path, listed: Path, output: Path) -> None:
    """A torch DataLoader: worker processes decode, this process infers and writes."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    paths = [media / line for line in listed.read_text().splitlines()]
    session = _session(1)
    loader = DataLoader(
        _Images(paths),
        batch_size=_BATCH_IMAGES,
        num_workers=max(1, len(os.sched_getaffinity(0)) - 1),
        collate_fn=_collate,
    )
    for pixels, numbers in loader:
        features = _infer(session, _scaled(pixels.numpy()))
        for number, feature in zip(numbers, features, strict=True):
            target = nested(output, paths[number].name)
            target.parent.mkdir(parents=True, exist_ok=True)
            np.save(target, feature)


def main(arguments: list[str]) -> None:
    """Run one peer."""
    peer, *paths = arguments
    media, listed, output = map(Path, paths)
    peers = {
        "article": article,
        "article-tuned": lambda media, listed, output: article(media, listed, output, threads=1),
        "bare": bare_loop,
        "ray": ray_data,
        "data-loader": data_loader,
    }
    peers[peer](media, listed, output)


if __name__ == "__main__":
    main(sys.argv[1:])
