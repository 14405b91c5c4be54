"""Queries and gallery drawn from MNIST's test set and written as PNG files, as in the article but seeded.

MEDIA_DIR/query/<label>_<index>.png      28 x 28 pixels, grey; index is the image's place in the test set
MEDIA_DIR/gallery/<label>_<index>.png
MEDIA_DIR/objects.txt                    all of them, sorted by bytes
MEDIA_DIR/anno.csv                       data_type,img_name,img_path,label,id
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from examples.mnist.data import DataError, Digits

COLUMNS = ("data_type", "img_name", "img_path", "label", "id")


def draw(digits: Digits, media_dir: Path, queries: int, gallery: int, seed: int) -> None:
    """Draw and write; the same arguments give the same bytes. No image is in both.

    Args:
        media_dir: a folder of its own for this draw.

    Raises:
        DataError: more images are wanted than there are.
    """
    if queries + gallery > len(digits.labels):
        raise DataError(f"{queries} queries and {gallery} gallery images are more than {len(digits.labels)}")
    order = np.random.default_rng(seed).permutation(len(digits.labels))[: queries + gallery]
    rows = []
    for place, index in enumerate(order.tolist()):
        kind = "query" if place < queries else "gallery"
        label = int(digits.labels[index])
        name = f"{label}_{index}.png"
        path = media_dir / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.pixels[index]).save(path)
        rows.append((kind, name, f"{kind}/{name}", label, index))
    # Names are ASCII, where the order of characters is the order of bytes.
    listed = sorted(row[2] for row in rows)
    (media_dir / "objects.txt").write_text("".join(f"{path}\n" for path in listed), encoding="utf-8", newline="\n")
    with (media_dir / "anno.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
