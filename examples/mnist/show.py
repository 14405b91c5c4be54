"""What the article shows: a ranking with labels, how often each label is there, a scatter plot; and a sheet."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.settings import MAX_PIXELS
from search.gallery.opening import open_gallery
from search.labels import read_annotations
from search.views.sheet import SheetHit, SheetLine, write_sheet

if TYPE_CHECKING:
    from examples.mnist.train import Epoch


@dataclass(frozen=True)
class Found:
    """One row of a ranking; `dist` is the angle to the query in radians."""

    dist: float
    similarity: float
    label: str
    img_path: str


def table(query_label: str, found: Sequence[Found], rows: int) -> Iterator[str]:
    """The article's table of the first rows, and how often each label stands in the whole ranking."""
    yield f"Query Image Label: {query_label}"
    yield ""
    yield "Search Result"
    width = max(len(one.img_path) for one in found[:rows])
    yield f"{'':>4}{'dist':>10}  {'label':>5}  {'img_path':>{width}}"
    for number, one in enumerate(found[:rows]):
        yield f"{number:<4}{one.dist:>10.6f}  {one.label:>5}  {one.img_path:>{width}}"
    yield ""
    yield "Labels in the gallery"
    for label, count in Counter(one.label for one in found).most_common():
        yield f"{label}  {count:>5}" + ("  # <- this" if label == query_label else "")


def sheet(target: Path, media_dir: Path, query: str, query_label: str, found: Sequence[Found]) -> None:
    """A query and its hits with green and red borders."""
    hits = [SheetHit(Path(one.img_path).name, media_dir / one.img_path, one.similarity, one.label) for one in found]
    write_sheet(target, [SheetLine(media_dir / query, tuple(hits), query_label)], MAX_PIXELS)


def scatter(target: Path, gallery_dir: Path, annotations: Path) -> None:
    """Draw the features of length 2 of all objects, a color a label."""
    gallery, labels = open_gallery(gallery_dir), read_annotations(annotations)
    features = np.concatenate([shard.features for shard in gallery.shards])
    shown = np.array([labels.label(gallery.object_id(row), gallery.path(row)) for row in range(gallery.rows)])
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    for label in sorted(set(shown.tolist())):
        some = features[shown == label]
        axes.scatter(some[:, 0], some[:, 1], s=3, label=label, color=f"C{label}")
    axes.set_aspect("equal")
    axes.set_title(f"2-d features of {len(features)} test images")
    axes.legend(title="label", markerscale=4, loc="upper right")
    figure.savefig(target, dpi=120)


def curve(target: Path, epochs: "Sequence[Epoch]") -> None:
    """Draw a training curve."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    number = [one.epoch for one in epochs]
    left.plot(number, [one.loss for one in epochs], marker=".")
    left.set(title="loss", xlabel="epoch")
    right.plot(number, [one.rank_1 for one in epochs], marker=".", label="rank-1")
    right.plot(number, [one.mean_average_precision for one in epochs], marker=".", label="mAP")
    right.set(title="held back training images", xlabel="epoch")
    right.legend()
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(target, dpi=120)
