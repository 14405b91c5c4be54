"""`ruiji search`, `near-duplicates`, `index` and `gallery info`.

What they need beyond the standard library and typer is imported when they run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.arguments import Commands
from pipeline.errors import EXIT_EMPTY, EXIT_INCOMPLETE, UsageError
from pipeline.settings import MAX_PIXELS, Device, FeatureDir, MaxPixels, OptionalMediaDir, model_file
from pipeline.streams import exact_stdout, note, tell, to_json
from search.evaluation import cli as evaluation_cli
from search.options import THRESHOLD, TOP_K, GroupFormat, Metric, OutputFormat

if TYPE_CHECKING:
    from search.views.sheet import SheetLine

Images = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="IMAGE",
        help="What to find look-alikes of: pictures, folders, lists of pictures (.txt, or .csv with img_path), "
        "- for a list on stdin (of lines, or as find -print0 writes it).",
    ),
]
GalleryModel = Annotated[
    Path | None,
    typer.Option(
        "--model",
        envvar="RUIJI_MODEL",
        callback=model_file,
        help="The ONNX model: its name is the gallery's. The file itself is only needed for pictures; without it "
        "FEATURE_DIR is the gallery or has one.",
    ),
]
Ids = Annotated[
    list[str] | None,
    typer.Option("--id", help="Search with an object of the gallery; no model is needed. Repeatable."),
]
Features = Annotated[
    list[Path] | None,
    typer.Option("--feature", help="Search with the features in a .npy file, one or a row for each. Repeatable."),
]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Hits per query.")]
MinSimilarity = Annotated[
    float | None, typer.Option("--min-similarity", min=-1.0, max=1.0, help="Leave out hits below this cosine.")
]
ExcludeSelf = Annotated[
    bool | None,
    typer.Option(
        "--exclude-self/--include-self",
        help="Whether a query that is an object of the gallery is kept out of its own hits; for pictures "
        "--exclude-self needs --media-dir.  [default: out for --id, in for pictures]",
        show_default=False,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        help="CSV with what is known about the objects: a header, img_path or img_name, label, and any other columns.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        help="Only search objects with COLUMN=VALUE (or COLUMN!=VALUE) in the --labels, or path=PREFIX. Repeatable: "
        "values of one column are alternatives, different columns must all hold.",
    ),
]
MetricOption = Annotated[
    Metric,
    typer.Option(
        "--metric",
        help="The order. cosine and angle: the same order, distance is the angle in radians; "
        "euclidean: between raw features.",
    ),
]
SearchDevice = Annotated[
    Device,
    typer.Option(
        "--device",
        envvar="RUIJI_DEVICE",
        help="cuda: embed and rank on CUDA, the ranking with torch; cpu: numpy, or torch where it is faster. auto is "
        "cpu. The ranking is the same.",
    ),
]
Format = Annotated[
    OutputFormat,
    typer.Option("--format", help="table for people; the others have every digit. paths: one path a line."),
]
GroupFormatOption = Annotated[
    GroupFormat,
    typer.Option("--format", help="paths: one path a line, an empty line between groups (nothing with -0)."),
]
Null = Annotated[
    bool, typer.Option("--null", "-0", help="With --format paths: end each path by a null character, for xargs -0.")
]
Sheet = Annotated[
    Path | None,
    typer.Option("--sheet", help="Also draw the hits to this .jpg or .png; needs --media-dir."),
]
Page = Annotated[
    Path | None,
    typer.Option("--html", help="Also write the hits as one page with the pictures inside; needs --media-dir."),
]
IncludeStale = Annotated[bool, typer.Option("--include-stale", help="Also search objects that left the object list.")]
FailIfEmpty = Annotated[bool, typer.Option("--fail-if-empty", help="Exit code 5 where nothing is found.")]
Explain = Annotated[bool, typer.Option("--explain", help="Say on stderr which way the search takes, and why.")]

gallery_app = Commands(help="Look at galleries.")


def register(app: typer.Typer) -> None:
    """Add the commands to the root command."""
    app.command()(search)
    app.command("near-duplicates")(near_duplicates)
    app.command()(index)
    app.add_typer(gallery_app, name="gallery")
    evaluation_cli.register(app)


def search(
    feature_dir: FeatureDir,
    images: Images = None,
    model_path: GalleryModel = None,
    media_dir: OptionalMediaDir = None,
    ids: Ids = None,
    features: Features = None,
    top_k: TopK = TOP_K,
    metric: MetricOption = Metric.cosine,
    min_similarity: MinSimilarity = None,
    exclude_self: ExcludeSelf = None,
    labels: Labels = None,
    where: Where = None,
    device: SearchDevice = Device.auto,
    output_format: Format = OutputFormat.table,
    null: Null = False,
    sheet: Sheet = None,
    html: Page = None,
    include_stale: IncludeStale = False,
    fail_if_empty: FailIfEmpty = False,
    explain: Explain = False,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Rank a gallery's objects by how much they look like each query; exact, ties by object id.

    Exit code 3: some of the pictures could not be read; the others were searched with.
    """
    from search.requests.search import SearchRequest
    from search.requests.search import search as answer
    from search.requests.selection import Selection

    paths_wanted = output_format is OutputFormat.paths
    request = SearchRequest(
        selection=Selection(
            feature_dir=feature_dir,
            model_path=model_path,
            labels=labels,
            where=tuple(where or ()),
            include_stale=include_stale,
            need_paths=paths_wanted,
        ),
        images=tuple(images or ()),
        ids=tuple(ids or ()),
        features=tuple(features or ()),
        media_dir=media_dir,
        top_k=top_k,
        metric=metric,
        min_similarity=min_similarity,
        exclude_self=exclude_self,
        device=device,
        sheet=sheet,
        html=html,
        max_pixels=max_pixels,
        explain=explain,
    )
    _check_null(null, paths_wanted)
    result = answer(request, note)
    from search.views.output import write_answers

    write_answers(result.answers, output_format, media_dir, null)
    _draw(sheet, html, result.lines, max_pixels)
    if result.failures:
        raise typer.Exit(EXIT_INCOMPLETE)
    if not any(one.hits for one in result.answers):
        note("nothing found")
        raise typer.Exit(EXIT_EMPTY if fail_if_empty else 0)


def near_duplicates(
    feature_dir: FeatureDir,
    model_path: GalleryModel = None,
    media_dir: OptionalMediaDir = None,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, max=1.0, help="The least cosine of a pair.")
    ] = THRESHOLD,
    labels: Labels = None,
    where: Where = None,
    device: SearchDevice = Device.auto,
    output_format: GroupFormatOption = GroupFormat.table,
    null: Null = False,
    sheet: Sheet = None,
    include_stale: IncludeStale = False,
    fail_if_empty: FailIfEmpty = False,
    explain: Explain = False,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Find all groups of near-identical objects of a gallery; exact, each pair compared once.

    A group is everything that is connected by pairs at or above the threshold. The similarity of each member is that
    to the group's first, which comes first in the object list.
    """
    from pipeline.progress import show_steps
    from search.requests.near_duplicates import NearDuplicatesRequest
    from search.requests.near_duplicates import near_duplicates as find
    from search.requests.selection import Selection
    from search.views.output import write_groups

    paths_wanted = output_format is GroupFormat.paths
    request = NearDuplicatesRequest(
        selection=Selection(
            feature_dir=feature_dir,
            model_path=model_path,
            labels=labels,
            where=tuple(where or ()),
            include_stale=include_stale,
            need_paths=paths_wanted,
        ),
        threshold=threshold,
        media_dir=media_dir,
        device=device,
        sheet=sheet,
        explain=explain,
    )
    _check_null(null, paths_wanted)
    found = find(request, note, show_steps)
    groups = found.groups
    write_groups(groups, output_format, media_dir, null)
    extra = sum(len(group.members) - 1 for group in groups)
    note(f"{len(groups)} groups; {extra} objects beside the first of their group")
    if sheet is not None:
        from search.requests.pictures import draw_sheet

        shown = "" if len(found.lines) == len(groups) else f" with the first {len(found.lines)} of {len(groups)} groups"
        draw_sheet(sheet, found.lines, max_pixels, note, shown, "first")
    if not groups and fail_if_empty:
        raise typer.Exit(EXIT_EMPTY)


def index(feature_dir: FeatureDir, model_path: GalleryModel = None) -> None:
    """Prepare a gallery for quick searches: keep the norms, and the rows in 8 bits, a quarter of the features' size.

    Where the features are not in memory, a search with up to 64 queries then reads only these, and the rows that it
    has to decide between. They lie in the gallery's folder cache, which can be deleted; only what is missing or damaged
    is made.
    """
    from pipeline.progress import show_steps
    from search.gallery.opening import find_gallery
    from search.requests.index import index as keep

    done = keep(find_gallery(feature_dir, model_path), show_steps)
    note(f"{done.objects} objects in {done.shards} shards; {done.unusable} cannot be ranked")


@gallery_app.command()
def info(
    feature_dir: FeatureDir,
    model_path: GalleryModel = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a gallery has: objects, shards, length, fingerprint, size, failed objects, rows that cannot be ranked."""
    from search.gallery.opening import describe_gallery, find_gallery

    facts = describe_gallery(find_gallery(feature_dir, model_path))
    if as_json:
        print(to_json(facts), file=exact_stdout())
        return
    for name, value in facts.items():
        tell(f"{name:<15} {'-' if value is None else f'{value:,}' if isinstance(value, int) else value}")


def _check_null(null: bool, paths: bool) -> None:
    if null and not paths:
        raise UsageError("-0 ends paths: it needs --format paths")


def _draw(sheet: Path | None, html: Path | None, lines: "Sequence[SheetLine]", max_pixels: int) -> None:
    """Write what people look at."""
    if sheet is None and html is None:
        return
    from search.requests.pictures import draw_page, draw_sheet

    if sheet is not None:
        draw_sheet(sheet, lines, max_pixels, note)
    if html is not None:
        draw_page(html, lines, max_pixels, note)
