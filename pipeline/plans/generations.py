"""Generations: every object list that was accepted, numbered, and the plan that it opened.

    run/generations/000007.json    the commit: the list in figures, the plan's id or null, the name of what was made
    run/made/<name>/               what was made for it, whole before the commit: plan.json, todo.txt, stale/

The highest number counts. Whoever wants to open a plan or to accept a list first reads the current number, then looks
at all that decides the plan, makes everything ready, and links the next number's file. link(2) gives a name to one of
many, and a number is never used again: so its success proves that nothing was committed since the look. There is no
other lock; a killed enqueue leaves a folder below `run/made` that nobody names.
"""

import hashlib
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.errors import FileDamaged, GalleryMismatch
from pipeline.store import read_json, sync_folder, to_json, write_atomic

#: Version of the files in `run/`; the first had one open plan under a fixed name, and no generations.
RUN_FORMAT = 2

_MADE = re.compile(r"[0-9a-f]{16}")
_PLAN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class ListState:
    """An accepted object list against the shards there are.

    Attributes:
        digest, lines: of the list.
        stale: rows of objects that are not on it; stale_failed: failed objects that are not on it.
        remade: shards that were lost and had objects that are not on it; their rows are known once they are made.
        marks: digest of the files that say which rows these are.
    """

    digest: str
    lines: int
    stale: int
    stale_failed: int
    remade: tuple[int, ...] = ()
    marks: str = ""


@dataclass(frozen=True)
class Generation:
    """What was committed last.

    Attributes:
        number: 0: nothing, or what ruiji left before it had generations.
        made: name of its folder below `run/made`.
        plan_id: of the plan that it opened, which may be closed by now; None if nothing was to do.
        objects: None if no list was accepted yet, or the generation before was damaged (`pipeline.plans.mending`).
    """

    folder: Path
    number: int = 0
    made: str = ""
    plan_id: str | None = None
    objects: ListState | None = None

    @property
    def made_folder(self) -> Path:
        """What was made for this generation."""
        return layout.made_folder(self.folder) / self.made

    @property
    def marks_folder(self) -> Path:
        """Which rows are stale."""
        return layout.stale_folder(self.made_folder) if self.number else layout.first_stale_folder(self.folder)


@dataclass(frozen=True)
class Marks:
    """What is no longer on the object list.

    Attributes:
        bits: by shard, `numpy.packbits` of a bool[rows].
        ids: by shard that is made again, the object ids.
        failed: ids of failed objects.
    """

    bits: dict[int, bytes]
    ids: dict[int, frozenset[str]]
    failed: frozenset[str]


def is_plan_id(value: object) -> bool:
    """Whether this can be a plan's id; nothing else may become part of a file name."""
    return isinstance(value, str) and _PLAN_ID.fullmatch(value) is not None


def current(folder: Path) -> Generation:
    """What was committed last.

    Raises:
        FileDamaged: its file is damaged. GalleryMismatch: a newer ruiji wrote it.
    """
    number = last_number(folder)
    return _before(folder) if number is None else read_generation(folder, number)


def last_number(folder: Path) -> int | None:
    """The number of what was committed last; None before the first."""
    try:
        names = [path.name for path in layout.generations_folder(folder).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        names = []
    numbers = (layout.generation_number(name) for name in names)
    return max((number for number in numbers if number is not None), default=None)


def read_generation(folder: Path, number: int) -> Generation:
    """One that was committed, from 1.

    Raises:
        FileNotFoundError: it was not. FileDamaged: its file is damaged. GalleryMismatch: a newer ruiji wrote it.
    """
    path = layout.generation_file(folder, number)
    advice = (
        "it says what was accepted last. ruiji enqueue (or ruiji run) with the object list accepts that anew, and "
        "nothing that is done is lost"
    )
    try:
        value = read_json(path, RUN_FORMAT)
    except FileDamaged as error:
        raise FileDamaged(f"{error}; {advice}") from None
    try:
        made, plan_id = value["made"], value["plan"]
        if not _MADE.fullmatch(made) or not (plan_id is None or is_plan_id(plan_id)):
            raise ValueError
        objects = None if value["list"] is None and plan_id is None else _list_state(value["list"])
        return Generation(folder, number, made, plan_id, objects)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FileDamaged(f"{path} is damaged; {advice}") from None


def _before(folder: Path) -> Generation:
    """What a ruiji without generations left."""
    plan_id = objects = None
    path = layout.first_plan_file(folder)
    try:
        value = read_json(path, RUN_FORMAT)
        if value["format"] == 1:
            plan_id = value["plan_id"]
            if not is_plan_id(plan_id):
                raise GalleryMismatch(f"{path} is damaged: it has no plan's id; restore it from a copy")
        path = layout.first_list_file(folder)
        objects = _list_state(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (KeyError, TypeError, ValueError, AttributeError):
        raise GalleryMismatch(f"{path} is damaged; move it away and run ruiji enqueue") from None
    return Generation(folder, plan_id=plan_id, objects=objects)


def _list_state(value: dict[str, Any]) -> ListState:
    counts = {name: value[name] for name in ("lines", "stale", "stale_failed")}
    remade, digest, marks = value.get("remade", []), value["digest"], value.get("marks", "")
    if any(type(count) is not int or count < 0 for count in [*counts.values(), *remade]):
        raise ValueError
    if not isinstance(digest, str) or not isinstance(marks, str):
        raise TypeError
    return ListState(digest=digest, remade=tuple(remade), marks=marks, **counts)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A folder of its own below `run/made`; it goes when the block ends, unless it was committed."""
    name = secrets.token_hex(8)
    path = layout.made_folder(folder) / name
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        if current(folder).made != name:
            shutil.rmtree(path, ignore_errors=True)


def commit(after: Generation, made: Path, plan_id: str | None, objects: ListState | None) -> bool:
    """Make this the generation that follows another; durable when this returns.

    Args:
        made: its folder, from `making`, synced.
        objects: None: none is known, and everybody refuses the gallery until one is accepted.

    Returns:
        False if another enqueue was first: nothing that was looked at counts any more.

    Raises:
        MachineFault: the folder cannot be written.
    """
    folder = after.folder
    path = layout.generation_file(folder, after.number + 1)
    path.parent.mkdir(exist_ok=True)
    note_format(folder)
    state = None if objects is None else asdict(objects)
    value = {"format": RUN_FORMAT, "list": state, "made": made.name, "plan": plan_id}
    if not write_atomic(path, [to_json(value)], exclusive=True, sync=True):
        return False
    sync_folder(path.parent)
    # The figures and marks of the list before serve nobody now; a closed plan's todo list has a place of its own.
    if after.made:
        shutil.rmtree(after.made_folder, ignore_errors=True)
    return True


def note_format(folder: Path) -> None:
    """Leave the note by which a ruiji without generations refuses the gallery, in the place of its open plan."""
    path = layout.first_plan_file(folder)
    try:
        if read_json(path, RUN_FORMAT)["format"] == RUN_FORMAT:
            return
    except FileNotFoundError:
        pass
    write_atomic(path, [to_json({"format": RUN_FORMAT, "see": "generations"})])


def write_marks(
    made: Path,
    stale: dict[int, bytes],
    ids: dict[int, list[str]],
    failed: list[str],
    digest: str,
    lines: int,
    rows: int,
) -> ListState:
    """Write which rows are stale, for a generation to come.

    Args:
        stale, ids, failed: as in `Marks`.
        digest, lines: of the list.
        rows: how many rows `stale` marks.
    """
    folder = layout.stale_folder(made)
    for shard, bits in stale.items():
        write_atomic(layout.stale_bits_file(folder, shard), [bits], sync=True)
    for shard, object_ids in ids.items():
        write_atomic(layout.stale_ids_file(folder, shard), [_lines(object_ids)], sync=True)
    if failed:
        write_atomic(layout.stale_failed_file(folder), [_lines(failed)], sync=True)
    return ListState(digest, lines, rows, len(failed), tuple(sorted(ids)), marks_digest(folder))


def _lines(object_ids: list[str]) -> bytes:
    return "".join(f"{object_id}\n" for object_id in object_ids).encode()


def marks_digest(folder: Path) -> str:
    """sha256 (hex) over names and bytes of a folder of marks; empty if the next generation removes it just now."""
    try:
        return _digest(_mark_files(folder))
    except FileNotFoundError:
        return ""


def _digest(files: Iterable[tuple[str, bytes]]) -> str:
    total = hashlib.sha256()
    for name, data in files:
        total.update(f"{name} {len(data)}\n".encode())
        total.update(data)
    return total.hexdigest()


def _mark_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if layout.is_stale_file(path.name):
            yield path.name, path.read_bytes()


def read_marks(folder: Path) -> tuple[Generation, Marks]:
    """The current generation and its marks, of one moment.

    Raises:
        GalleryMismatch: the marks are damaged or lost, or no list is known.
    """
    while True:
        now = current(folder)
        if now.number and now.objects is None:
            raise GalleryMismatch(
                f"which objects belong to {folder} is not known since {layout.generation_file(folder, now.number - 1)} "
                "was damaged; run ruiji enqueue (or ruiji run) with the object list"
            )
        files: list[tuple[str, bytes]] = []
        with suppress(FileNotFoundError):  # The next generation removes them.
            files += _mark_files(now.marks_folder)
        whole = now.objects is None or not now.objects.marks or now.objects.marks == _digest(files)
        if current(folder).number != now.number:
            continue
        with suppress(UnicodeDecodeError):
            if whole:
                return now, _marks(files)
        raise GalleryMismatch(
            f"{now.marks_folder}, which says what is no longer on the object list, is damaged; "
            "run ruiji enqueue (or ruiji run) with the list, which writes it again"
        )


def _marks(files: list[tuple[str, bytes]]) -> Marks:
    bits: dict[int, bytes] = {}
    ids: dict[int, frozenset[str]] = {}
    failed: frozenset[str] = frozenset()
    for name, data in files:
        if (shard := layout.bits_shard(name)) is not None:
            bits[shard] = data
        elif (shard := layout.ids_shard(name)) is not None:
            ids[shard] = frozenset(data.decode().split("\n")[:-1])
        else:
            failed = frozenset(data.decode().split("\n")[:-1])
    return Marks(bits, ids, failed)
