"""What the benchmarks work on: JPEGs cut from real photos, media folders, a model that costs nothing.

Made once, deterministically, below `build/bench`, which git ignores.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pipeline.errors import UsageError

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "bench"
#: A file system in memory, as Linux has one.
MEMORY = Path("/dev/shm")  # noqa: S108
#: The photos and models of the development machines; they are in no repository.
SHARED = Path(os.environ.get("BENCHMARK_DATA", ROOT.parent / "shared" / "data"))

#: The article's model in full, with random weights: for cost and shape only.
MODEL = SHARED / "models" / "mobilenet_v3_large_100_224_RANDOM_WEIGHTS.onnx"
#: One with weights that mean something, for what depends on the features' values.
REAL_MODEL = SHARED / "models" / "mobilenet_v3_large_100_224_feature_vector.onnx"
#: The article's images; a file of this size has about 45 kB at this quality.
LARGE, SMALL = (500, 375), (64, 64)
#: 12 megapixels, as a camera or a telephone makes them.
CAMERA = (4000, 3000)
JPEG_QUALITY = 90
#: Pictures that differ; longer lists link to them. 110 MB, so that all stay in the page cache.
DISTINCT = 2400
FEATURE_LENGTH = 1280


def need_shared() -> None:
    """Stop where the photos and models are not at hand.

    Raises:
        UsageError: with exit code 2.
    """
    if not MODEL.exists():
        raise UsageError(
            f"this benchmark needs the development photos and models in {SHARED}, which are not here; "
            "BENCHMARK_DATA says where they are"
        )


def media_folder(size: tuple[int, int], count: int) -> Path:
    """A media folder with `count` JPEGs of one size in the article's layout; longer ones contain shorter ones.

    Args:
        size: width and height in pixels.

    Raises:
        UsageError: there are no photos to cut them from.
    """
    need_shared()
    pictures = _pictures(size)
    folder = BUILD / f"media-{size[0]}x{size[1]}"
    link_objects(folder, count, lambda number: pictures / f"{number % DISTINCT:05d}.jpg")
    return folder


def link_objects(folder: Path, count: int, file_of: Callable[[int], Path]) -> None:
    """Make `folder` a media folder with at least so many objects, each a link to a file."""
    marker = folder / ".count"
    present = int(marker.read_text()) if marker.exists() else 0
    for number in range(present, count):
        path = folder / object_path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(file_of(number), path)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(str(max(present, count)))


def object_path(number: int) -> str:
    """The path of one object, as in the article: two nested folders and a sha1."""
    name = hashlib.sha1(str(number).encode(), usedforsecurity=False).hexdigest()
    return f"object/{name[0:2]}/{name[2:4]}/{name}.jpg"


def object_list(count: int) -> Path:
    """A sorted object list of the first `count` objects."""
    path = BUILD / f"objects-{count}.txt"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in sorted(map(object_path, range(count)))))
    return path


def _pictures(size: tuple[int, int]) -> Path:
    folder = BUILD / f"pictures-{size[0]}x{size[1]}"
    if folder.exists():
        return folder
    scratch = folder.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    photos = sorted((SHARED / "photos" / "object").rglob("*.jpg"))
    for number in range(DISTINCT):
        with Image.open(photos[number % len(photos)]) as photo:
            box = _crop(photo.size, size, np.random.default_rng(number))
            cut = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS, box=box)
        cut.save(scratch / f"{number:05d}.jpg", quality=JPEG_QUALITY)
    scratch.rename(folder)
    return folder


def enlarged_photos(folder: Path, size: tuple[int, int], count: int) -> Iterator[Path]:
    """Real photos, enlarged to `size`; real ones of that size would have more detail."""
    for path in sorted((SHARED / "photos" / "object").rglob("*.jpg"))[:count]:
        with Image.open(path) as photo:
            photo.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(folder / path.name, quality=JPEG_QUALITY)
        yield folder / path.name


def _crop(
    photo: tuple[int, int], size: tuple[int, int], random: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box of the wanted shape somewhere in the photo, 60 to 100 % of the largest that fits."""
    scale = min(photo[0] / size[0], photo[1] / size[1]) * random.uniform(0.6, 1.0)
    width, height = size[0] * scale, size[1] * scale
    left, top = random.uniform(0, photo[0] - width), random.uniform(0, photo[1] - height)
    return left, top, left + width, top + height


def warm(media: Path, listed: Path) -> None:
    """Read all images once, so that every peer finds them in the page cache."""
    seen: set[int] = set()
    for line in listed.read_text().splitlines():
        with (media / line).open("rb", buffering=0) as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode not in seen:
                seen.add(inode)
                file.read()


def no_op_model(size: tuple[int, int] = SMALL) -> Path:
    """An ONNX graph from RGB to 1280 values that costs next to nothing: mean color times a matrix."""
    path = BUILD / f"no_op-{size[0]}x{size[1]}.onnx"
    if not path.exists():
        weights = np.random.default_rng(0).normal(size=(3, FEATURE_LENGTH)).astype(np.float32)
        shape = ["n", size[1], size[0], 3]
        graph = helper.make_graph(
            [
                helper.make_node("ReduceMean", ["inputs:0"], ["color"], axes=[1, 2], keepdims=0),
                helper.make_node("MatMul", ["color", "weights"], ["feature_vector"]),
            ],
            "no_op",
            [helper.make_tensor_value_info("inputs:0", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("feature_vector", TensorProto.FLOAT, ["n", FEATURE_LENGTH])],
            [numpy_helper.from_array(weights, "weights")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        BUILD.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
    return path


@contextmanager
def scratch(name: str, *, in_memory: bool = False) -> Iterator[Path]:
    """An empty folder on the same disk as the data, or in memory where that can be had; removed afterwards."""
    folder = (MEMORY if in_memory and MEMORY.is_dir() else BUILD) / "scratch" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
