"""`ruiji evaluate`: retrieval metrics of a gallery. What it needs beyond typer is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.arguments import Commands, Panel
from pipeline.choices import Device
from pipeline.settings import MAX_PIXELS, FeatureDir, MaxPixels, ModelFile, OptionalMediaDir
from pipeline.streams import counted, exact_stdout, note, tell
from search.options import RUN_DEPTH, SHEET_QUERIES, ReportFormat

Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="A CSV with img_path or img_name, label, and data_type, which says query or gallery.",
    ),
]
LabelsFromFolder = Annotated[
    bool, typer.Option("--labels-from-folder", help="Take the name of an image's folder as its label; leave-one-out.")
]
LeaveOneOut = Annotated[
    bool, typer.Option("--leave-one-out", help="Search with every labelled object in all the others.")
]
CameraColumn = Annotated[
    str | None,
    typer.Option(
        "--camera-column",
        metavar="COLUMN",
        help="Leave out matches that have the query's value in this column (the Market-1501 rule).",
    ),
]
JunkLabels = Annotated[
    list[str] | None, typer.Option("--junk-label", metavar="LABEL", help="Leave out rows with this label. Repeatable.")
]
EvaluationDevice = Annotated[
    Device,
    typer.Option(
        "--device",
        envvar="RUIJI_DEVICE",
        help="cuda scans with torch, cpu and auto with numpy. The scores are the same.",
    ),
]
Bootstrap = Annotated[
    int, typer.Option("--bootstrap", min=10, metavar="N", help="Samples for the confidence intervals.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of these samples.")]
Format = Annotated[ReportFormat, typer.Option("--format", help="table is for people; the others have every digit.")]
PerClass = Annotated[bool, typer.Option("--per-class", help="Also print each label's scores in the table.")]
RunFile = Annotated[
    Path | None,
    typer.Option("--trec", metavar="FILE", help=f"Also write the first {RUN_DEPTH} hits of each query as a TREC run."),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="Also draw the CMC and precision-recall curves, into this .png, .svg or .pdf."
    ),
]
Sheet = Annotated[
    Path | None,
    typer.Option(
        "--sheet",
        metavar="FILE",
        help=f"Also draw the {SHEET_QUERIES} worst queries, into this .jpg or .png; needs --media-dir.",
    ),
]
IncludeStale = Annotated[bool, typer.Option("--include-stale", help="Also use objects that are no longer on the list.")]


def register(app: Commands) -> None:
    """Add `evaluate` to the root command."""
    examples = [
        "ruiji evaluate --labels anno.csv --per-class",
        "ruiji evaluate --labels-from-folder --sheet worst.jpg --plot curves.png",
        "ruiji evaluate --labels anno.csv --format json --trec run.txt",
    ]
    app.command(panel=Panel.search, examples=examples)(evaluate)


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
    """Measure by labels how well a gallery is searched.

    CMC, mAP and other metrics over the full exact rankings. Queries and gallery are objects of the same shards. Of the
    model only the name is used, to find its gallery.
    """
    from search.evaluation import report
    from search.requests.evaluate import EvaluateRequest, draw
    from search.requests.evaluate import evaluate as measure

    request = EvaluateRequest(
        feature_dir=feature_dir,
        model_path=model_path,
        labels=labels,
        labels_from_folder=labels_from_folder,
        leave_one_out=leave_one_out,
        camera_column=camera_column,
        junk_labels=frozenset(junk_label or ()),
        device=device,
        samples=bootstrap,
        seed=seed,
        include_stale=include_stale,
        trec=trec,
        plot=plot,
        sheet=sheet,
        media_dir=media_dir,
        max_pixels=max_pixels,
    )
    gallery, evaluation = measure(request)
    if output_format is ReportFormat.table:
        for line in report.as_table(evaluation, per_class):
            tell(line)
    elif output_format is ReportFormat.json:
        print(report.as_json(evaluation), file=exact_stdout())
    else:
        print(report.as_csv(evaluation), end="", file=exact_stdout())
    missing = draw(request, gallery, evaluation)
    for target in (trec, plot, sheet):
        if target is not None:
            pictures = f" ({counted(missing, 'picture')} could not be opened)" if target is sheet and missing else ""
            note(f"written: {target}{pictures}")
