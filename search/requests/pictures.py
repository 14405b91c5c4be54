"""What people look at: sheets and pages of the answers, checked before any work and drawn after it."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import layout
from pipeline.errors import UsageError
from pipeline.streams import counted
from search.requests.selection import Say, Selection

if TYPE_CHECKING:
    from search.answers import Answer
    from search.duplicates.groups import Group, Member
    from search.labels import Annotations
    from search.views.sheet import SheetLine


def check_pictures(
    sheet: Path | None, html: Path | None, media_dir: Path | None, queries: int = 0, top_k: int = 0, objects: int = 0
) -> None:
    """Check that a sheet and a page can be drawn.

    Args:
        objects: in the gallery.

    Raises:
        UsageError: there are no pictures to show, or too many, or a file has another ending.
    """
    for option, target in (("--sheet", sheet), ("--html", html)):
        if target is not None and media_dir is None:
            raise UsageError(f"{option} shows the pictures of the hits: say where they are with --media-dir")
    if sheet is not None:
        from search.views.sheet import check_target

        check_target(sheet, queries, top_k)
    if html is not None:
        from search.views.page import check_page

        check_page(queries, top_k, objects)


def check_picture_targets(
    selection: Selection,
    targets: dict[str, Path | None],
    media_dir: Path | None,
    inputs: Iterable[Path | None],
    queries: Iterable[Path] = (),
) -> None:
    """Check that the targets overwrite nothing by a slip.

    Args:
        targets: option to its file; None if it is not given.
        inputs: files that are read; those of the model are added.
        queries: as they were given; of the folders among them.

    Raises:
        UsageError, RuijiError: as `pipeline.targets.check_targets`.
    """
    if not any(targets.values()):
        return
    from pipeline.targets import check_targets

    path = selection.model_path
    model = [] if path is None else [path, layout.toml_file(path)]
    folders = [query for query in queries if query.is_dir()]
    check_targets(targets, [*inputs, *model], media_dir, selection.folder, folders)


def answer_lines(answers: "Sequence[Answer]", annotations: "Annotations | None", media_dir: Path) -> "list[SheetLine]":
    """A line for each answer.

    Raises:
        UsageError: lines of the annotations contradict each other.
    """
    from search.views.output import printable
    from search.views.sheet import SheetHit, SheetLine

    lines = []
    for answer in answers:
        labels = answer.labels or (None,) * len(answer.hits)
        hits = [
            SheetHit(hit.object_id, None if hit.path is None else media_dir / hit.path, hit.similarity, label)
            for hit, label in zip(answer.hits, labels, strict=True)
        ]
        query = answer.query
        label = None
        if annotations is not None and query.object_id is not None:
            label = annotations.label(query.object_id, query.path)
        elif annotations is not None and query.path is not None:
            # From outside the media folder nothing is known of it: that a line has its file name says nothing.
            label = annotations.picture_label(query.path)
        name = printable(query.name if query.words is not None else Path(query.name).name)
        lines.append(SheetLine(query.picture, tuple(hits), label, name, words=query.words is not None))
    return lines


def group_lines(
    groups: "Iterable[Group]",
    annotations: "Annotations | None",
    media_dir: Path,
    reference_media: Path | None = None,
) -> "list[SheetLine]":
    """A line for each of the first groups.

    Args:
        reference_media: where the pictures of the reference are, if groups have any.

    Raises:
        UsageError: lines of the annotations contradict each other.
    """
    from search.views.sheet import GROUP_HITS, GROUP_LINES, SheetHit, SheetLine

    lines = []
    for group in itertools.islice(groups, GROUP_LINES):
        labels = [
            None if annotations is None or member.reference else annotations.label(member.object_id, member.path)
            for member in group.members
        ]
        first, *rest = (
            SheetHit(_called(member), _picture(member, media_dir, reference_media), member.similarity, label)
            for member, label in zip(group.members[: GROUP_HITS + 1], labels, strict=False)
        )
        lines.append(SheetLine(first.picture, tuple(rest), first.label, first.object_id))
    return lines


def _called(member: "Member") -> str:
    return f"reference: {member.object_id}" if member.reference else member.object_id


def _picture(member: "Member", media_dir: Path, reference_media: Path | None) -> Path | None:
    folder = reference_media if member.reference else media_dir
    return None if folder is None or member.path is None else folder / member.path


def draw_sheet(
    sheet: Path, lines: "Sequence[SheetLine]", max_pixels: int, say: Say, shown: str = "", role: str = "query"
) -> None:
    """Write a sheet and say so.

    Args:
        shown: said of it.
        role: what the picture at the left is called.

    Raises:
        RuijiError: it cannot be written.
    """
    from search.views.sheet import write_sheet

    _say_written(f"sheet: {sheet}{shown}", write_sheet(sheet, list(lines), max_pixels, role), say)


def draw_page(html: Path, lines: "Sequence[SheetLine]", max_pixels: int, say: Say) -> None:
    """Write a page and say so.

    Raises:
        RuijiError: it cannot be written.
    """
    from search.views.page import write_page

    about = f"{len(lines)} queries" if len(lines) > 1 else f"query: {lines[0].name}"
    _say_written(f"page: {html}", write_page(html, "ruiji search", about, list(lines), max_pixels), say)


def _say_written(text: str, missing: int, say: Say) -> None:
    say(text + (f" ({counted(missing, 'picture')} could not be opened)" if missing else ""))
