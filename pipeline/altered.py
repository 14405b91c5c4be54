"""Pictures that a gallery with `ModelSpec.pixels` of 1 takes otherwise than people see them: counted, to be told.

A worker marks such an object before it writes its feature; the reducer, once the shard is published, counts the marks
of the shard's rows into `run/altered/NNNN.json`. That file is never written twice, so that neither a late duplicate nor
a kill counts an object again; and marks go with their shard's publishing, so that there are never many.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import layout
from pipeline.errors import FileDamaged
from pipeline.objects import read_lines
from pipeline.plans.plan import Plan, Segment
from pipeline.store import FORMAT, as_type, machine_faults, read_json, to_json, write_atomic

#: What can happen to a picture, and how that is told.
CLIPPED, GROUND, TURNED = "clipped", "ground", "turned"


@dataclass(frozen=True)
class Altered:
    """How many rows were made of pictures that came out otherwise than people see them.

    Attributes:
        clipped: of more than 8 bits a sample. ground: transparent, which was dropped. turned: TIFFs that were turned
            twice, or though they were to stay as they are stored.
        unknown_shards: published shards of which nobody counted, older ruijis having made them.
    """

    clipped: int = 0
    ground: int = 0
    turned: int = 0
    unknown_shards: int = 0

    def __str__(self) -> str:
        older = f" ({self.unknown_shards} shards from before this was counted not included)"
        return (
            f"pixels = 1: {self.clipped} images clipped, {self.ground} without their white ground, {self.turned} "
            f"turned wrongly{older if self.unknown_shards else ''}; a gallery of pixels = 2 has them right: enqueue "
            "into another --feature-dir, with no pixels = 1 in the .toml"
        )


def begin_marks(plan: Plan) -> None:
    """Say that altered pictures of this gallery are marked, so that shards without marks count as having none.

    Raises:
        MachineFault: the folder cannot be written.
    """
    folder = layout.marks_folder(plan.folder)
    with machine_faults(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


def mark(plan: Plan, path: str, kinds: Iterable[str]) -> None:
    """Mark an object as altered in these ways.

    Raises:
        MachineFault: the mark cannot be written.
    """
    for kind in kinds:
        write_atomic(layout.marks_folder(plan.folder) / layout.mark_name(path, kind), [b""])


def count_marks(plan: Plan, segment: Segment) -> None:
    """Count the marks of a published segment's rows, unless that was done; then remove them."""
    try:
        marks = set(os.listdir(layout.marks_folder(plan.folder)))
    except FileNotFoundError:
        return
    paths_file = layout.paths_file(plan.folder, segment.shard)
    paths = read_lines(paths_file) if paths_file.exists() else ()
    names = (layout.mark_name(path, kind) for path in paths for kind in (CLIPPED, GROUND, TURNED))
    own = [name for name in names if name in marks]
    counts = Counter(mark.rpartition(".")[2] for mark in own)
    write_atomic(
        layout.altered_file(plan.folder, segment.shard), [to_json({"format": FORMAT, **counts})], exclusive=True
    )
    for name in own:
        (layout.marks_folder(plan.folder) / name).unlink(missing_ok=True)


def drop_marks(plan: Plan) -> None:
    """Remove what late duplicates marked, of a plan of which all is published."""
    shutil.rmtree(layout.marks_folder(plan.folder), ignore_errors=True)


class AlteredReader:
    """Reads the counts again and again; remembers each shard's, which never change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, Altered] = {}

    def read(self, shards: Iterable[int]) -> Altered:
        """The sum over some published shards."""
        unknown, found = 0, []
        with suppress(FileNotFoundError):
            found = os.listdir(layout.altered_folder(self._folder))
        names = set(found)
        for shard in (wanted := list(shards)):
            path = layout.altered_file(self._folder, shard)
            if shard not in self._known and path.name in names:
                with suppress(FileNotFoundError, FileDamaged):
                    self._known[shard] = as_type(read_json(path), Altered, path)
            unknown += shard not in self._known
        known = [self._known[shard] for shard in wanted if shard in self._known]
        sums: Counter[str] = Counter()
        for counts in known:
            sums.update(asdict(counts))
        return Altered(sums[CLIPPED], sums[GROUND], sums[TURNED], unknown)
