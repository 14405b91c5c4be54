"""The four files of MNIST: taken from a folder or downloaded, checked, and read.

Where they can be downloaded and what their contents must be stands in `mirrors.toml`.
"""

import gzip
import hashlib
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RuijiError

MIRRORS = Path(__file__).with_name("mirrors.toml")
SIDE: Final = 28
_PARTS: Final = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
#: A mirror that says nothing for so long is given up.
_TIMEOUT_S: Final = 30


class DataError(RuijiError):
    """The data cannot be had, or is not MNIST."""


@dataclass(frozen=True)
class Digits:
    """Images of one part of MNIST, in its order.

    Attributes:
        pixels: uint8[n, 28, 28], 0 is paper and 255 is ink.
        labels: int64[n], 0 to 9.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def fetch(target: Path, source: Path | None = None, mirrors: Path = MIRRORS) -> None:
    """Put the four files into a folder, as `<name>.gz`; those that are there and right stay.

    Args:
        source: a folder that has them, named `<name>.gz` or `<name>`; without it they are downloaded.
        mirrors: TOML with `mirrors`, the addresses to try in their order, and `[sha256]` of each unpacked file.

    Raises:
        DataError: a file is in no place with the right content; says what each place answered.
    """
    configuration = tomllib.loads(mirrors.read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    for name, digest in configuration["sha256"].items():
        path = target / f"{name}.gz"
        if path.is_file() and _digest(path.read_bytes()) == digest:
            continue
        packed = _from_folder(source, name, digest) if source else _download(configuration["mirrors"], name, digest)
        part = path.with_suffix(".part")
        part.write_bytes(packed)
        part.replace(path)


def load(folder: Path, part: str) -> Digits:
    """Read one part of MNIST from the files that `fetch` left.

    Args:
        part: `train` (60,000 images) or `test` (10,000).

    Raises:
        DataError: a file is missing or has another form.
    """
    name, count = _PARTS[part]
    pixels = _read_idx(folder / f"{name}-images-idx3-ubyte.gz", (count, SIDE, SIDE))
    labels = _read_idx(folder / f"{name}-labels-idx1-ubyte.gz", (count,))
    return Digits(pixels, labels.astype(np.int64))


def _digest(packed: bytes) -> str:
    """sha256 of what a gzip file holds: how it was packed does not matter; empty if it is none."""
    try:
        return hashlib.sha256(gzip.decompress(packed)).hexdigest()
    except (OSError, EOFError):
        return ""


def _from_folder(source: Path, name: str, digest: str) -> bytes:
    packed, plain = source / f"{name}.gz", source / name
    if packed.is_file():
        content = packed.read_bytes()
    elif plain.is_file():
        # mtime 0: the same content gives the same bytes.
        content = gzip.compress(plain.read_bytes(), mtime=0)
    else:
        raise DataError(f"there is neither {packed} nor {plain}; give the folder of the four MNIST files")
    if _digest(content) != digest:
        raise DataError(f"{name} in {source} is not MNIST's: its content has another sha256 than the one expected")
    return content


def _download(mirrors: list[str], name: str, digest: str) -> bytes:
    answers = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}.gz"
        try:
            # The addresses are this project's own configuration, not input.
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
                content: bytes = answer.read()
        except (urllib.error.URLError, OSError) as error:
            answers.append(f"{url}: {getattr(error, 'reason', error)}")
            continue
        if _digest(content) == digest:
            return content
        answers.append(f"{url}: its content has another sha256 than the one expected")
    raise DataError(
        f"{name}.gz could not be downloaded ({'; '.join(answers) or 'no mirror is configured'}); "
        "give a folder that has the four files"
    )


def _read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read an idx file of bytes: 0 0 8 (unsigned bytes), the number of dimensions, each as big-endian int32, data."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); get it again") from None
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, dtype=">i4").tobytes()
    if not content.startswith(header) or len(content) != len(header) + int(np.prod(shape)):
        raise DataError(f"{path} is no idx file of bytes with the shape {list(shape)}; get it again")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)
