"""An evaluation in words and files: table, JSON, CSV, a TREC run, and a sheet of the worst queries."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.streams import counted, csv_writer, shown, to_json
from pipeline.targets import writing
from search.evaluation.full_ranking import Placed, Task, full_ranking
from search.evaluation.metrics import METRICS
from search.evaluation.protocol import Protocol
from search.evaluation.scores import ClassScores, Scores, Summary
from search.gallery.shards import Gallery
from search.views.sheet import SheetHit, SheetLine, write_sheet
from search.views.table import aligned

NO_MATCH = "no match in the gallery"
_CSV_COLUMNS = (
    "label", "queries", "metric", "value", "low", "high", "lowest", "expected", "highest"
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """All that is reported.

    Attributes:
        summaries: metric key → its summary.
        samples, seed: of the bootstrap behind the intervals.
    """

    gallery: str
    protocol: Protocol
    scores: Scores
    summaries: dict[str, Summary]
    classes: list[ClassScores]
    samples: int
    seed: int

    @property
    def excluded(self) -> Counter[str]:
        """Reason → queries that have no scores."""
        return +(self.protocol.excluded + Counter({NO_MATCH: self.scores.unmatched}))


def as_table(evaluation: Evaluation, per_class: bool) -> Iterator[str]:
    """Lines for people."""
    protocol, scores = evaluation.protocol, evaluation.scores
    valid = len(scores.queries)
    yield f"gallery   {evaluation.gallery}"
    yield f"protocol  {protocol.name}, cosine, ties by object id; a query is never its own match"
    yield f"queries   {protocol.queries}, {valid} valid" + _reasons("excluded", evaluation.excluded)
    yield f"ranked    {counted(len(protocol.task.candidates), 'object')}" + _reasons("left out", protocol.left_out)
    yield ""
    rows = [("metric", "value", "95 % interval", "convention")]
    for metric in METRICS:
        one = evaluation.summaries[metric.key]
        rows.append((metric.name, f"{one.value:.4f}", f"{one.low:.4f} - {one.high:.4f}", metric.convention))
    yield from _aligned(rows, right=(1, 2))
    yield f"intervals: percentile bootstrap over queries, {evaluation.samples} samples, seed {evaluation.seed}"
    touched = [(metric.name, evaluation.summaries[metric.key]) for metric in METRICS]
    touched = [(name, one) for name, one in touched if one.lowest != one.highest]
    if touched:
        yield ""
        queries = counted(scores.tied, "query has", "queries have")
        yield f"{queries} matches and others at exactly the same similarity; by how these ties fall:"
        yield from _aligned(
            [
                ("metric", "minimum", "expected", "maximum"),
                *((name, f"{one.lowest:.4f}", f"{one.expected:.4f}", f"{one.highest:.4f}") for name, one in touched),
            ],
            right=(1, 2, 3),
        )
    if per_class:
        shown = [i for i, metric in enumerate(METRICS) if metric.key in ("rank_1", "map", "minp", "r_precision")]
        yield ""
        yield from _aligned(
            [
                ("label", "queries", *(METRICS[i].name for i in shown)),
                *((one.label, str(one.queries), *(f"{one.means[i]:.4f}" for i in shown)) for one in evaluation.classes),
            ],
            right=(1, *range(2, 2 + len(shown))),
        )


def as_json(evaluation: Evaluation) -> str:
    """Everything, with every digit."""
    protocol = evaluation.protocol
    value: dict[str, Any] = {
        "gallery": evaluation.gallery,
        "protocol": protocol.name,
        "queries": {
            "given": protocol.queries,
            "valid": len(evaluation.scores.queries),
            "excluded": dict(evaluation.excluded),
            "tied": evaluation.scores.tied,
        },
        "ranked": {"objects": len(protocol.task.candidates), "left_out": dict(protocol.left_out)},
        "bootstrap": {"samples": evaluation.samples, "seed": evaluation.seed},
        "metrics": {
            metric.key: {**asdict(evaluation.summaries[metric.key]), "convention": metric.convention}
            for metric in METRICS
        },
        "classes": [{"label": one.label, "queries": one.queries, **_means(one)} for one in evaluation.classes],
    }
    return to_json(value, indent=1)


def as_csv(evaluation: Evaluation) -> str:
    """One line a metric, first of all queries (an empty label), then of each label, which have only `value`."""
    text = io.StringIO()
    write_row = csv_writer(text)

    def write(**values: object) -> None:
        write_row(values.get(column, "") for column in _CSV_COLUMNS)

    write_row(_CSV_COLUMNS)
    valid = len(evaluation.scores.queries)
    for key, one in evaluation.summaries.items():
        write(label="", queries=valid, metric=key, **asdict(one))
    for label in evaluation.classes:
        for key, value in _means(label).items():
            write(label=label.label, queries=label.queries, metric=key, value=value)
    return text.getvalue()


def _means(one: ClassScores) -> dict[str, float]:
    return {metric.key: float(mean) for metric, mean in zip(METRICS, one.means, strict=True)}


def _reasons(what: str, counts: Counter[str]) -> str:
    return f"; {what}: " + ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) if counts else ""


def _aligned(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> Iterator[str]:
    return aligned([tuple(map(shown, row)) for row in rows], right)


def write_run(target: Path, gallery: Gallery, task: Task, answers: Iterator[Placed]) -> Iterator[Placed]:
    """Write each answer's first rows to a TREC run file (`query Q0 object rank similarity tag`) as it passes.

    Raises:
        UsageError: an object id has white space, which the format cannot have.
        RuijiError: the file cannot be written.
    """

    def name(row: int) -> str:
        object_id = gallery.object_id(row)
        if len(object_id.split()) != 1:
            raise UsageError(f"a TREC run file cannot name the object {object_id!r}: its id has white space")
        return object_id

    with writing(target) as binary, io.TextIOWrapper(binary, encoding="utf-8", newline="\n") as file:
        for answer in answers:
            query = name(int(task.queries[answer.query]))
            hits = zip(answer.top.tolist(), answer.similarities.tolist(), strict=True)
            file.writelines(
                f"{query} Q0 {name(row)} {rank} {similarity!r} ruiji\n"
                for rank, (row, similarity) in enumerate(hits, 1)
            )
            yield answer


def draw_worst(
    target: Path, gallery: Gallery, evaluation: Evaluation, queries: int, hits: int, media_dir: Path, max_pixels: int
) -> int:
    """Draw the queries with the lowest average precision and their first hits, the worst on top.

    Hits have a green border if they match and a red one if not.

    Returns:
        How many pictures could not be opened.

    Raises:
        UsageError: the gallery does not know paths.
        RuijiError: the file cannot be written.
    """
    task = evaluation.protocol.task
    labels = dict(zip(task.candidates.tolist(), task.labels.tolist(), strict=True))

    def picture(row: int) -> Path:
        path = gallery.path(row)
        if path is None:
            raise UsageError("this gallery has no gallery.json and does not know paths: no sheet can be drawn")
        return media_dir / path

    worst = task.only(evaluation.scores.worst(queries))
    lines = []
    for answer in full_ranking(gallery, worst, hits):
        found = [
            SheetHit(gallery.object_id(row), picture(row), similarity, evaluation.protocol.labels[labels[row]])
            for row, similarity in zip(answer.top.tolist(), answer.similarities.tolist(), strict=True)
        ]
        label = evaluation.protocol.labels[worst.query_labels[answer.query]]
        lines.append(SheetLine(picture(int(worst.queries[answer.query])), tuple(found), label))
    return write_sheet(target, lines, max_pixels)
