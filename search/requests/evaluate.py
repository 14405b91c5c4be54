"""The plain function under `ruiji evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline import layout
from pipeline.choices import Device
from pipeline.errors import UsageError
from pipeline.settings import MAX_PIXELS
from search.evaluation import protocol, report, scores
from search.evaluation.full_ranking import full_ranking
from search.gallery.opening import open_gallery
from search.gallery.shards import Gallery
from search.labels import read_annotations
from search.options import RUN_DEPTH, SHEET_QUERIES, TOP_K
from search.ranking.planner import Planner, Purpose


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Which gallery is measured, by which labels.

    Attributes:
        model_path: its name is the gallery's; the file need not exist.
        labels: an annotation CSV; None: with `labels_from_folder`.
        labels_from_folder: the label is the name of an image's folder; leave-one-out.
        leave_one_out: every labelled object is a query against all the others.
        camera_column: matches with the query's value in this column are left out.
        junk_labels: rows with these are left out.
        device: where rows are multiplied; changes speed, never the scores.
        samples, seed: of the bootstrap behind the confidence intervals.
        include_stale: also objects that left the object list.
        trec, plot, sheet: files that are written, checked before any work.
        media_dir: where the pictures of the gallery are.
        max_pixels: pictures with more are not decoded.

    Raises:
        UsageError: there are no labels, or labels of two kinds.
    """

    feature_dir: Path
    model_path: Path
    labels: Path | None = None
    labels_from_folder: bool = False
    leave_one_out: bool = False
    camera_column: str | None = None
    junk_labels: frozenset[str] = frozenset()
    device: Device = Device.auto
    samples: int = 1000
    seed: int = 0
    include_stale: bool = False
    trec: Path | None = None
    plot: Path | None = None
    sheet: Path | None = None
    media_dir: Path | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if (self.labels is None) != self.labels_from_folder:
            raise UsageError("give either --labels FILE or --labels-from-folder")
        if self.labels_from_folder and self.camera_column:
            raise UsageError("--camera-column is a column of a --labels file")


def evaluate(request: EvaluateRequest) -> tuple[Gallery, report.Evaluation]:
    """Measure how well a gallery is searched, over the full exact rankings; a TREC run is written on the way.

    Returns:
        The gallery, and what is reported of it.

    Raises:
        UsageError: the request contradicts itself or what is on the disk, or nothing can be measured.
        GalleryMismatch, ShardCorrupt: as `open_gallery`.
        RuijiError: the run file cannot be written.
    """
    folder = _check(request)
    gallery = open_gallery(folder, request.include_stale)
    if request.labels is None:
        setup = protocol.from_folders(gallery, request.junk_labels)
    else:
        setup = protocol.from_annotations(
            gallery,
            read_annotations(request.labels),
            leave_one_out=request.leave_one_out,
            camera_column=request.camera_column,
            junk_labels=request.junk_labels,
        )
    depth = RUN_DEPTH if request.trec else 0
    planner = Planner(request.device)
    arithmetic = planner.arithmetic(planner.way(gallery, Purpose.places, len(setup.task.queries)))
    answers = full_ranking(gallery, setup.task, depth, arithmetic=arithmetic)
    if request.trec is not None:
        answers = report.write_run(request.trec, gallery, setup.task, answers)
    scored = scores.score(answers)
    summaries, classes = scored.summarise(request.samples, request.seed), scores.by_class(setup, scored)
    return gallery, report.Evaluation(str(folder), setup, scored, summaries, classes, request.samples, request.seed)


def draw(request: EvaluateRequest, gallery: Gallery, evaluation: report.Evaluation) -> int:
    """Draw the curves and the worst queries, if they are wanted.

    Returns:
        How many pictures could not be opened.

    Raises:
        UsageError: the gallery does not know paths, for a sheet.
        RuijiError: a file cannot be written.
    """
    if request.plot is not None:
        from search.evaluation.plots import draw_curves

        draw_curves(request.plot, evaluation.scores)
    if request.sheet is None or request.media_dir is None:
        return 0
    return report.draw_worst(
        request.sheet, gallery, evaluation, SHEET_QUERIES, TOP_K, request.media_dir, request.max_pixels
    )


def _check(request: EvaluateRequest) -> Path:
    """Check, before any work, all files that are written; returns the gallery's folder."""
    from pipeline.targets import check_targets

    folder = layout.gallery_folder(request.feature_dir, request.model_path)
    targets = {"--trec": request.trec, "--plot": request.plot, "--sheet": request.sheet}
    read = [request.labels, request.model_path, layout.toml_file(request.model_path)]
    check_targets(targets, read, request.media_dir, folder)
    if request.plot is not None:
        from search.evaluation.plots import check_plot

        check_plot(request.plot)
    if request.sheet is not None:
        from search.views.sheet import check_target

        if request.media_dir is None:
            raise UsageError("--sheet shows pictures: say where they are with --media-dir")
        check_target(request.sheet, SHEET_QUERIES, TOP_K)
    return folder
