"""Pictures that a gallery with `ModelSpec.pixels` of 1 takes otherwise than people see them: counted, to be told.

A worker marks such an object before it writes its feature; the reducer, once the shard is published, counts the marks
of the shard's rows into `run/altered/NNNN.json`. That file is never written twice, so that neither a late duplicate nor
a kill counts an object again; and marks go with their shard's publishing, so that there are never many.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import FileDamaged
from pipeline.objects import read_lines
from pipeline.plan import Plan, Segment
from pipeline.store import FORMAT, as_type, machine_faults, read_json, shard_file, to_json, write_atomic

#: What can happen to a picture, and how that is told.
CLIPPED, GROUND, TURNED = "clipped", "ground", "turned"
_FOLDER, _MARKS = "altered", "marks"


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
    folder = _marks(plan.folder)
    with machine_faults(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


def mark(plan: Plan, path: str, kinds: Iterable[str]) -> None:
    """Mark an object as altered in these ways.

    Raises:
        MachineFault: the mark cannot be written.
    """
    for kind in kinds:
        write_atomic(_marks(plan.folder) / f"{_name(path)}.{kind}", [b""])


def count_marks(plan: Plan, segment: Segment) -> None:
    """Count the marks of a published segment's rows, unless that was done; then remove them."""
    try:
        marks = set(os.listdir(_marks(plan.folder)))
    except FileNotFoundError:
        return
    paths_file = shard_file(plan.folder, segment.shard, "paths.txt")
    names = [_name(path) for path in read_lines(paths_file)] if paths_file.exists() else []
    own = [f"{name}.{kind}" for name in names for kind in (CLIPPED, GROUND, TURNED) if f"{name}.{kind}" in marks]
    counts = Counter(mark.rpartition(".")[2] for mark in own)
    write_atomic(_counted(plan.folder, segment.shard), [to_json({"format": FORMAT, **counts})], exclusive=True)
    for name in own:
        (_marks(plan.folder) / name).unlink(missing_ok=True)


def drop_marks(plan: Plan) -> None:
    """Remove what late duplicates marked, of a plan of which all is published."""
    shutil.rmtree(_marks(plan.folder), ignore_errors=True)


class AlteredReader:
    """Reads the counts again and again; remembers each shard's, which never change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, Altered] = {}

    def read(self, shards: Iterable[int]) -> Altered:
        """The sum over some published shards."""
        unknown, found = 0, []
        with suppress(FileNotFoundError):
            found = os.listdir(self._folder / "run" / _FOLDER)
        names = set(found)
        for shard in (wanted := list(shards)):
            path = _counted(self._folder, shard)
            if shard not in self._known and path.name in names:
                with suppress(FileNotFoundError, FileDamaged):
                    self._known[shard] = as_type(read_json(path), Altered, path)
            unknown += shard not in self._known
        known = [self._known[shard] for shard in wanted if shard in self._known]
        sums: Counter[str] = Counter()
        for counts in known:
            sums.update(asdict(counts))
        return Altered(sums[CLIPPED], sums[GROUND], sums[TURNED], unknown)


def _marks(folder: Path) -> Path:
    return folder / "run" / _FOLDER / _MARKS


def _counted(folder: Path, shard: int) -> Path:
    return folder / "run" / _FOLDER / f"{shard:04d}.json"


def _name(path: str) -> str:
    return hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
