"""The 1,797 handwritten digits inside scikit-learn as PNG files in ruiji's layout, with a fixed split.

    python -m examples.digits.images MEDIA_DIR

makes

    MEDIA_DIR/<split>/<aa>/<bb>/<40 hex digits>.png     8 x 8 pixels, grey; split is train, gallery or query
    MEDIA_DIR/objects.txt                               the gallery only, sorted by bytes
    MEDIA_DIR/labels.csv                                data_type,img_name,img_path,label,id of all three splits

The split is by index alone. The first 597 images train, the later ones are held out; of these 1,200, twenty of each
digit, evenly spaced, are queries and the other 1,000 are the gallery. Scikit-learn keeps the order of the original
file. Its 13 writers are not named in it, but if each one's digits stand together, as is commonly assumed, then
all but at most one of the held-out hands were never seen in training.
"""

import argparse
import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SPLITS: Final = ("train", "gallery", "query")
#: Images with a smaller index train; leaves a round 1,200 to search with.
TRAIN_IMAGES: Final = 597
QUERIES_PER_DIGIT: Final = 20
#: The brightest value of the data set: how many of 4 x 4 pixels were inked.
_BRIGHTEST: Final = 16


@dataclass(frozen=True)
class Digits:
    """Images of one data set or split, in the data set's order.

    Attributes:
        pixels: uint8[n, 8, 8], 0 is paper and 255 is ink.
        labels: int64[n], 0 to 9.
        indices: int64[n], the position in scikit-learn's array.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]

    def take(self, indices: NDArray[np.int64]) -> "Digits":
        """The images with these positions."""
        return Digits(self.pixels[indices], self.labels[indices], self.indices[indices])


def load_splits() -> dict[str, Digits]:
    """All digits, as `{"train": 597, "gallery": 1000, "query": 200}` images.

    Raises:
        ValueError: the data set is another than the one that the split was made for, or one image
            stands in it twice, so that a held-out image may have been trained on.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    # Whole numbers all the way: the same bytes on every machine.
    pixels = ((data.images.astype(np.int64) * 255 + _BRIGHTEST // 2) // _BRIGHTEST).astype(np.uint8)
    labels = data.target.astype(np.int64)
    if pixels.shape != (1797, 8, 8) or labels.shape != (1797,):
        raise ValueError(f"scikit-learn's digits are {pixels.shape}, expected (1797, 8, 8)")
    if len(np.unique(pixels.reshape(len(pixels), -1), axis=0)) != len(pixels):
        raise ValueError("two of scikit-learn's digits are the same image; the split must keep them together")
    everything = Digits(pixels, labels, np.arange(len(pixels)))
    return {name: everything.take(indices) for name, indices in split_indices(labels).items()}


def split_indices(labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Which image is in which split.

    Args:
        labels: int64[n], in the data set's order.

    Returns:
        int64 positions in ascending order for each of `SPLITS`; disjoint, and together all of them.
    """
    positions = np.arange(len(labels))
    held_out = positions[TRAIN_IMAGES:]
    queries = []
    for digit in range(10):
        of_digit = held_out[labels[held_out] == digit]
        queries.append(of_digit[np.arange(QUERIES_PER_DIGIT) * len(of_digit) // QUERIES_PER_DIGIT])
    query = np.sort(np.concatenate(queries))
    return {"train": positions[:TRAIN_IMAGES], "gallery": np.setdiff1d(held_out, query), "query": query}


def object_name(pixels: NDArray[np.uint8], index: int) -> str:
    """The file name of one image: `<sha1 of its pixels and its position>.png`.

    Args:
        pixels: uint8[8, 8].
    """
    return hashlib.sha1(pixels.tobytes() + b"%d" % index, usedforsecurity=False).hexdigest() + ".png"


def write_images(media_dir: Path) -> dict[str, int]:
    """Write all images, the gallery's object list and the labels; files of the same name are replaced.

    Returns:
        How many images each split has.
    """
    rows: list[dict[str, str]] = []
    splits = load_splits()
    for split, digits in splits.items():
        for pixels, label, index in zip(digits.pixels, digits.labels, digits.indices, strict=True):
            name = object_name(pixels, int(index))
            path = f"{split}/{name[0:2]}/{name[2:4]}/{name}"
            target = media_dir / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_png(pixels))
            rows.append(
                {
                    "data_type": split,
                    "img_name": name,
                    "img_path": path,
                    "label": str(label),
                    "id": name.removesuffix(".png"),
                }
            )
    # Names are ASCII, where the order of characters is the order of bytes.
    gallery = sorted(row["img_path"] for row in rows if row["data_type"] == "gallery")
    (media_dir / "objects.txt").write_text("".join(f"{path}\n" for path in gallery), encoding="utf-8", newline="\n")
    with (media_dir / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return {split: len(digits.labels) for split, digits in splits.items()}


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as PNG files.")
    parser.add_argument("media_dir", type=Path, metavar="MEDIA_DIR")
    counts = write_images(parser.parse_args().media_dir)
    print(", ".join(f"{count} {split}" for split, count in counts.items()))


if __name__ == "__main__":
    main()
