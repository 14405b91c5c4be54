"""How answers are written to stdout: tables for people, every digit in a stable order for machines."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline.streams import as_argument, counted, csv_writer, exact_stdout, shown, to_json
from search.options import GroupFormat, OutputFormat
from search.views.table import aligned

if TYPE_CHECKING:
    from search.answers import Answer
    from search.duplicates.groups import Group, Member

#: Of what leads out of a group a table shows so many.
_SEE_ALSO = 5
#: A hit as it is written, keys in the order of the columns.
Row: TypeAlias = dict[str, "int | float | str | None"]

#: Columns of a CSV about groups of which a rule chose the member to keep, about decisions, and about matches in the
#: reference, which is kept.
CHOSEN, DECIDED = ("decision", "bytes", "width", "height", "reason"), ("decision", "time")
MATCHED = ("decision", "reason")

_LEFT = {"gallery", "object_id", "path", "identical_to", "label", "turned"}


def printable(text: str) -> str:
    """A name as text of UTF-8: file names need not be that, JSON and CSV have to be."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_answers(answers: "Sequence[Answer]", form: OutputFormat, media_dir: Path | None, null: bool) -> None:
    """Write the hits of every query.

    Args:
        answers: at least one.
        null: with `paths`, end each by a null character instead of a new line.
    """
    found = [(printable(one.query.name), _hit_rows(one)) for one in answers]
    if form is OutputFormat.table:
        for line in _query_tables(found):
            print(line)
    elif form is OutputFormat.json:
        _write_json([{"query": query, "hits": rows} for query, rows in found])
    elif form is OutputFormat.jsonl:
        _write_json_lines({"query": query, **row} for query, rows in found for row in rows)
    elif form is OutputFormat.csv:
        columns = list(_hit_columns(found))
        _write_csv(("query", *columns), ({"query": query, **row} for query, rows in found for row in rows))
    else:
        _write_paths((row["path"] for _, rows in found for row in rows), media_dir, null)


def _hit_rows(answer: "Answer") -> list[Row]:
    """Hits as rows; with a column for labels if they are known."""
    rows: list[Row] = []
    for rank, hit in enumerate(answer.hits, 1):
        row: Row = {
            "rank": rank,
            "object_id": hit.object_id,
            "path": hit.path,
            "similarity": hit.similarity,
            "distance": hit.distance,
        }
        if hit.others is not None:
            row["others"] = hit.others
        if answer.labels is not None:
            row["label"] = answer.labels[rank - 1]
        rows.append(row)
    return rows


def _hit_columns(found: "Sequence[tuple[str, list[Row]]]") -> tuple[str, ...]:
    """The columns of the hits, even if there is none."""
    first = next((row for _, rows in found for row in rows), None)
    return ("rank", "object_id", "path", "similarity", "distance") if first is None else tuple(first)


def write_groups(
    groups: "Iterable[Group]",
    form: GroupFormat,
    media_dir: Path | None,
    null: bool,
    more: Sequence[str] = (),
    reference_media: Path | None = None,
    galleries: bool = False,
    seen: int = 0,
) -> None:
    """Write groups of near-duplicates, each as soon as it comes.

    Args:
        seen: how many decisions there were when they were found; JSON has it.
        reference_media: what paths of the reference begin with.
        galleries: whether a CSV says of which gallery each member is; the other formats do if a group is of two.
        more: columns of a CSV that these groups have besides, see `CHOSEN` and `DECIDED`.
        null: with `paths`, end each by a null character instead of a new line; nothing is then between groups, because
            `xargs -0` would take it for one more path.
    """
    if form is GroupFormat.json:
        _write_json_list(_group_object(group, seen) for group in groups)
    elif form is GroupFormat.jsonl:
        _write_json_lines(_group_object(group, seen) for group in groups)
    elif form is GroupFormat.csv:
        columns = (
            "group",
            *(("gallery",) if galleries else ()),
            "object_id",
            "path",
            "similarity",
            "least_similarity",
            "identical_to",
            "turned",
            "sha256",
            *more,
        )
        _write_csv(columns, (row for group in groups for row in _csv_rows(group, columns)))
    elif form is GroupFormat.table:
        for place, group in enumerate(groups):
            print(f"{chr(10) if place else ''}{_heading(group)}")
            rows = _group_rows(group)
            for line in _table(_table_columns(rows), rows):
                print(line)
            if group.reason is not None:
                kept = group.members[group.kept]
                print(shown(f"keep {kept.object_id}{' of the reference' * kept.reference}: {group.reason}"))
            for other in group.see_also[:_SEE_ALSO]:
                where = f"group {other.group}, " if other.group is not None else ""
                print(f"see also {where}{shown(other.object_id)}: {other.similarity:.6f} to {shown(other.member)}")
            if len(group.see_also) > _SEE_ALSO:
                print(f"and {len(group.see_also) - _SEE_ALSO} more; --format json has all")
    else:
        for place, group in enumerate(groups):
            if place and not null:
                print()
            places = ((reference_media if one.reference else media_dir, one.path) for one in group.members)
            _write_paths((path if folder is None else folder / str(path) for folder, path in places), None, null)


def _heading(group: "Group") -> str:
    objects = counted(len(group.members), "object")
    if group.decision is not None:
        return f"decision {group.number}: {group.decision}, {group.time}: {objects}"
    least = "" if group.least_similarity is None else f", least similarity {group.least_similarity:.6f}"
    return f"group {group.number}: {objects}, {counted(group.pairs, 'pair')}{least}"


def _group_rows(group: "Group") -> list[Row]:
    """A group's members as rows, the first one first; with what is known of their files if one is to be kept."""
    rows: list[Row] = []
    two = any(member.reference for member in group.members)
    chosen = any(member.facts for member in group.members)
    for member in group.members:
        row: Row = {} if not two else {"gallery": "reference" if member.reference else "own"}
        row |= {"object_id": member.object_id, "path": member.path, "similarity": member.similarity}
        row["identical_to"] = member.identical_to
        row["turned"] = member.turned
        row["sha256"] = None if member.digest is None else member.digest.hex()
        if chosen:
            facts = member.facts
            row["bytes"] = None if facts is None else facts.bytes
            row["width"] = None if facts is None else facts.width
            row["height"] = None if facts is None else facts.height
        rows.append(row)
    return rows


def _table_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """What people read of a group's members."""
    empty = {name for name in ("identical_to", "turned") if all(row[name] is None for row in rows)}
    return tuple(name for name in rows[0] if name != "sha256" and name not in empty)


def _csv_rows(group: "Group", columns: Sequence[str]) -> Iterator[Row]:
    of_group: Row = {
        "group": group.number,
        "least_similarity": group.least_similarity,
        "decision": group.decision,
        "reason": group.reason,
        "time": group.time,
    }
    one_is_kept = group.reason is not None or group.decision == "same"
    for place, (member, row) in enumerate(zip(group.members, _group_rows(group), strict=True)):
        said = "keep" if place == group.kept else None if member.reference else "remove"
        decision: Row = {"decision": said} if one_is_kept else {}
        every = {"gallery": "own", **of_group, **row, **decision}
        yield {column: every[column] for column in columns}


def _group_object(group: "Group", seen: int) -> dict[str, object]:
    """A group as JSON has it; one that is decided, or could be, as `ruiji duplicates decide` reads it."""
    value: dict[str, object] = {"group": group.number, "seen": seen}
    if group.reason is not None or group.decision == "same":
        remove = [one.object_id for one in group.to_remove]
        value |= {"decision": "same", "keep": _named(group.members[group.kept]), "remove": remove}
    elif group.decision is not None:
        value |= {"decision": group.decision, "objects": [_named(one) for one in group.members]}
    if group.decision is not None:
        return {**value, "time": group.time, "members": _group_rows(group)}
    if group.reason is not None:
        value["reason"] = group.reason
    see_also = [
        {
            "group": other.group,
            "member": other.member,
            "object_id": other.object_id,
            "path": other.path,
            "similarity": other.similarity,
            "pairs": other.pairs,
        }
        for other in group.see_also
    ]
    return {
        **value,
        "pairs": group.pairs,
        "least_similarity": group.least_similarity,
        "members": _group_rows(group),
        "see_also": see_also,
    }


def _named(member: "Member") -> str | dict[str, str]:
    """As `ruiji duplicates decide` reads it: an id of the reference could be one of the gallery too."""
    return {"reference": member.object_id} if member.reference else member.object_id


def _write_json_list(values: Iterable[object]) -> None:
    """As `_write_json` writes a list of them, one after the other."""
    out = exact_stdout()
    between = "[\n"
    for value in values:
        # No line of JSON ends within a string.
        print(between + " " + to_json(value, indent=1).replace("\n", "\n "), end="", file=out)
        between = ",\n"
    print("[]" if between == "[\n" else "\n]", file=out)


def _write_json(value: object) -> None:
    print(to_json(value, indent=1), file=exact_stdout())


def _write_json_lines(values: Iterator[Mapping[str, object]]) -> None:
    out = exact_stdout()
    for value in values:
        print(to_json(value), file=out)


def _write_csv(columns: Sequence[str], rows: Iterator[Mapping[str, object]]) -> None:
    write_row = csv_writer(exact_stdout())
    write_row(columns)
    for row in rows:
        write_row(row[column] for column in columns)


def _write_paths(paths: Iterator[object], media_dir: Path | None, null: bool) -> None:
    out = exact_stdout()
    for path in paths:
        whole = path if media_dir is None else media_dir / str(path)
        print(as_argument(whole), end="\0" if null else "\n", file=out)


def _query_tables(found: "Sequence[tuple[str, list[Row]]]") -> Iterator[str]:
    columns = _hit_columns(found)
    for number, (query, rows) in enumerate(found):
        if len(found) > 1:
            yield f"{chr(10) if number else ''}query: {shown(query)}"
        yield from _table(columns, rows)


def _table(columns: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    lines = [tuple(columns), *(tuple(_cell(row[column]) for column in columns) for row in rows)]
    return aligned(lines, {number for number, column in enumerate(columns) if column not in _LEFT})


def _cell(value: "int | float | str | None") -> str:
    if value is None:
        return "-"
    return f"{value:.6f}" if isinstance(value, float) else shown(value)
