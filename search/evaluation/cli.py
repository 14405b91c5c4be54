"""`ruiji evaluate`: retrieval metrics of a gallery. What it needs beyond typer is imported when it runs."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import layout
from pipeline.errors import UsageError
from pipeline.settings import MAX_PIXELS, Device, FeatureDir, MaxPixels, ModelFile, OptionalMediaDir
from pipeline.streams import exact_stdout, note, tell
from search.options import TOP_K

if TYPE_CHECKING:
    from search.arrays import Float64
    from search.evaluation.full_ranking import Products


class ReportFormat(StrEnum):
    """How an evaluation is written to stdout."""

    table = "table"
    json = "json"
    csv = "csv"


#: Hits of each query in a TREC run file, and queries on a sheet.
RUN_DEPTH = 1000
SHEET_QUERIES = 10

Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        help="Annotation CSV with data_type, img_name or img_path, and label; queries and gallery by data_type.",
    ),
]
LabelsFromFolder = Annotated[
    bool, typer.Option("--labels-from-folder", help="The label is the name of an image's folder; leave-one-out.")
]
LeaveOneOut = Annotated[
    bool, typer.Option("--leave-one-out", help="Every labelled object is a query against all the others.")
]
CameraColumn = Annotated[
    str | None,
    typer.Option("--camera-column", help="Leave out matches with the query's value here (the Market-1501 rule)."),
]
JunkLabels = Annotated[
    list[str] | None, typer.Option("--junk-label", help="Leave out rows with this label; can be given again.")
]
EvaluationDevice = Annotated[
    Device,
    typer.Option(
        "--device",
        envvar="RUIJI_DEVICE",
        help="cuda: scan with torch; cpu and auto: numpy. The scores are the same.",
    ),
]
Bootstrap = Annotated[int, typer.Option("--bootstrap", min=10, help="Samples behind the confidence interval.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")]
Format = Annotated[ReportFormat, typer.Option("--format", help="table for people; the others have every digit.")]
PerClass = Annotated[bool, typer.Option("--per-class", help="Also print each label in the table.")]
RunFile = Annotated[
    Path | None, typer.Option("--trec", help=f"Also write a TREC run file, the first {RUN_DEPTH} hits of each query.")
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="Also draw the CMC and precision-recall curves to this .png, .svg or .pdf."),
]
Sheet = Annotated[
    Path | None,
    typer.Option(
        "--sheet", help=f"Also draw the {SHEET_QUERIES} worst queries to this .jpg or .png; needs --media-dir."
    ),
]
IncludeStale = Annotated[bool, typer.Option("--include-stale", help="Also use objects that left the object list.")]


def register(app: typer.Typer) -> None:
    """Add `evaluate` to the root command."""
    app.command()(evaluate)


def evaluate(
    feature_dir: FeatureDir,
    model_path: ModelFile,
    labels: Labels = None,
    labels_from_folder: LabelsFromFolder = False,
    leave_one_out: LeaveOneOut = False,
    camera_column: CameraColumn = None,
    junk_label: JunkLabels = None,
    device: EvaluationDevice = Device.auto,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    output_format: Format = ReportFormat.table,
    per_class: PerClass = False,
    trec: RunFile = None,
    plot: Plot = None,
    sheet: Sheet = None,
    media_dir: OptionalMediaDir = None,
    include_stale: IncludeStale = False,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Measure how well a gallery is searched, by labels: CMC, mAP and others over the full exact rankings.

    Queries and gallery are objects of the same shards. Only the name of the model is used, to find its gallery.
    """
    if (labels is None) != labels_from_folder:
        raise UsageError("say what the objects show: with --labels FILE or with --labels-from-folder, not both")
    if labels_from_folder and camera_column:
        raise UsageError("--camera-column is a column of a --labels file")
    if plot is not None:
        from search.evaluation.plots import check_plot

        check_plot(plot)
    if sheet is not None:
        from search.views.sheet import check_target

        if media_dir is None:
            raise UsageError("--sheet shows pictures: say where they are with --media-dir")
        check_target(sheet, SHEET_QUERIES, TOP_K)

    from pipeline.targets import check_targets
    from search.evaluation import protocol, report, scores
    from search.evaluation.full_ranking import full_ranking
    from search.gallery.opening import open_gallery
    from search.labels import read_annotations

    folder = layout.gallery_folder(feature_dir, model_path)
    read = [labels, model_path, layout.toml_file(model_path)]
    check_targets({"--trec": trec, "--plot": plot, "--sheet": sheet}, read, media_dir, folder)
    gallery = open_gallery(folder, include_stale)
    junk = frozenset(junk_label or ())
    if labels is None:
        setup = protocol.from_folders(gallery, junk)
    else:
        setup = protocol.from_annotations(
            gallery,
            read_annotations(labels),
            leave_one_out=leave_one_out,
            camera_column=camera_column,
            junk_labels=junk,
        )
    make_products = _make_products(device)
    answers = full_ranking(gallery, setup.task, RUN_DEPTH if trec else 0, make_products=make_products)
    if trec is not None:
        answers = report.write_run(trec, gallery, setup.task, answers)
    scored = scores.score(answers)
    evaluation = report.Evaluation(
        str(folder), setup, scored, scored.summarise(bootstrap, seed), scores.by_class(setup, scored), bootstrap, seed
    )
    if output_format is ReportFormat.table:
        for line in report.as_table(evaluation, per_class):
            tell(line)
    elif output_format is ReportFormat.json:
        print(report.as_json(evaluation), file=exact_stdout())
    else:
        print(report.as_csv(evaluation), end="", file=exact_stdout())
    if plot is not None:
        from search.evaluation.plots import draw_curves

        draw_curves(plot, scored)
    missing = 0
    if sheet is not None and media_dir is not None:
        missing = report.draw_worst(sheet, gallery, evaluation, SHEET_QUERIES, TOP_K, media_dir, max_pixels)
    for target in (trec, plot, sheet):
        if target is not None:
            pictures = f" ({missing} pictures could not be opened)" if target is sheet and missing else ""
            note(f"written: {target}{pictures}")


def _make_products(device: Device) -> "Callable[[Float64], Products] | None":
    if device is not Device.cuda:
        return None
    try:
        from search.evaluation.full_ranking_torch import torch_products
    except ImportError as error:
        raise UsageError(
            f"--device cuda scans with torch, which cannot be imported ({error}); set up with make setup ACCEL=gpu, "
            "or use --device cpu"
        ) from None
    return torch_products("cuda")
