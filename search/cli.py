"""`ruiji search`, `near-duplicates`, `index` and `gallery info`.

What they need beyond the standard library and typer is imported when they run.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import layout
from pipeline.arguments import Commands
from pipeline.errors import EXIT_EMPTY, EXIT_INCOMPLETE, UsageError
from pipeline.settings import MAX_PIXELS, Device, FeatureDir, MaxPixels, OptionalMediaDir
from pipeline.streams import exact_stdout, note, tell, to_json
from search.evaluation import cli as evaluation_cli
from search.options import THRESHOLD, TOP_K, GroupFormat, Metric, OutputFormat

if TYPE_CHECKING:
    from search.filters import Condition
    from search.gallery.shards import Gallery
    from search.labels import Annotations
    from search.near_duplicates import Group
    from search.queries import Query
    from search.ranking.rank import Hit
    from search.views.output import Row
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
    from search.queries import (
        embed_images,
        feature_queries,
        gallery_queries,
        image_files,
        image_queries,
        query_encoder,
    )

    if not (images or ids or features):
        raise UsageError("nothing to search with: give pictures (or folders, lists, -), --id or --feature")
    _check_null(null, output_format is OutputFormat.paths)
    _check_pictures(sheet, html, media_dir)
    if exclude_self and features:
        raise UsageError("--exclude-self: no object is known that a --feature is of; search with --id, or leave it out")
    if exclude_self and images and media_dir is None:
        raise UsageError(
            "--exclude-self knows the object of a picture by its path in the media folder: say where that is with "
            "--media-dir"
        )
    files = image_files(images or [], sys.stdin, media_dir)
    read = [labels, *(images or []), *files, *(features or [])]
    _check_targets({"--sheet": sheet, "--html": html}, feature_dir, model_path, media_dir, read, images)
    conditions, annotations = _read_filters(where, labels)
    whole = _open(feature_dir, model_path, include_stale, output_format is OutputFormat.paths)
    queries = gallery_queries(whole, ids or [], media_dir) + feature_queries(features or [], whole.length)
    _check_pictures(sheet, html, media_dir, len(queries) + len(files), top_k, whole.rows)
    loading = None
    if files:
        if model_path is None:
            raise UsageError("searching with pictures needs the model that made the gallery: give it as --model")
        loading = query_encoder(model_path, whole, "cuda" if device is Device.cuda else "cpu")
    # While the model is loaded, all that comes after it is made ready.
    from search.filters import apply_conditions
    from search.views.output import hit_rows, printable, write_hits

    importlib.import_module("search.ranking.planner")
    gallery = apply_conditions(whole, conditions, annotations)
    _say_unusable(gallery)
    failed = False
    if loading is not None:
        embedded = embed_images(files, *loading, max_pixels)
        _say_other_versions(whole)
        for image, reason in embedded.failures:
            note(f"{image}: {reason}; left out")
            failed = True
        queries += image_queries(embedded, whole, media_dir)

    found = []
    for query, hits in zip(queries, _rank(gallery, queries, top_k, metric, exclude_self, device, explain), strict=True):
        kept = hits if min_similarity is None else [hit for hit in hits if hit.similarity >= min_similarity]
        known = None if annotations is None else [annotations.label(hit.object_id, hit.path) for hit in kept]
        found.append((printable(query.name), hit_rows(kept, known)))
    lines = []
    if media_dir is not None and not (sheet is None and html is None):
        # Before hits are written: labels that contradict each other are refused, and then nothing else is said.
        lines = [_line(query, rows, annotations, media_dir) for query, (_, rows) in zip(queries, found, strict=True)]
    write_hits(found, output_format, media_dir, null)
    _show(sheet, html, lines, max_pixels)
    if failed:
        raise typer.Exit(EXIT_INCOMPLETE)
    if not any(rows for _, rows in found):
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
    from search.filters import apply_conditions
    from search.near_duplicates import find_groups
    from search.ranking.planner import choose_multiply
    from search.views.output import write_groups

    if threshold == 0:
        raise UsageError("--threshold must be above 0")
    _check_null(null, output_format is GroupFormat.paths)
    _check_pictures(sheet, None, media_dir)
    _check_targets({"--sheet": sheet}, feature_dir, model_path, media_dir, [labels])
    conditions, annotations = _read_filters(where, labels)
    whole = _open(feature_dir, model_path, include_stale, output_format is GroupFormat.paths)
    gallery = apply_conditions(whole, conditions, annotations)
    _say_unusable(gallery)
    multiply, why = choose_multiply(gallery, device)
    if explain:
        note(f"plan: {why}")
    with show_steps("pairs") as progress:
        groups = find_groups(gallery, threshold, multiply, progress)
    lines = [] if sheet is None or media_dir is None else _group_lines(groups, annotations, media_dir)
    write_groups(groups, output_format, media_dir, null)
    extra = sum(len(group.members) - 1 for group in groups)
    note(f"{len(groups)} groups; {extra} objects beside the first of their group")
    if sheet is not None:
        from search.views.sheet import write_sheet

        shown = "" if len(lines) == len(groups) else f" with the first {len(lines)} of {len(groups)} groups"
        _say_missing(f"sheet: {sheet}{shown}", write_sheet(sheet, lines, max_pixels, "first"))
    if not groups and fail_if_empty:
        raise typer.Exit(EXIT_EMPTY)


def index(feature_dir: FeatureDir, model_path: GalleryModel = None) -> None:
    """Prepare a gallery for quick searches: keep the norms, and the rows in 8 bits, a quarter of the features' size.

    Where the features are not in memory, a search with up to 64 queries then reads only these, and the rows that it
    has to decide between. They lie in the gallery's folder cache, which can be deleted; only what is missing or damaged
    is made.
    """
    from pipeline.errors import RuijiError
    from pipeline.progress import show_steps
    from search.gallery.opening import find_gallery, open_gallery

    folder = find_gallery(feature_dir, model_path)
    gallery = open_gallery(folder)
    unkept = 0
    with show_steps("shards") as progress:
        for number, shard in enumerate(gallery.shards, 1):
            unkept += not shard.keep()
            progress(number, len(gallery.shards))
    zero, nonfinite = gallery.unusable_rows
    if unkept:
        raise RuijiError(
            f"cannot write to {layout.cache_folder(folder)}: nothing is kept of {unkept} shards; check its permissions "
            f"and that the disk has {gallery.size_bytes // 4 / 1e6:.0f} MB to spare"
        )
    note(f"{gallery.rows} objects in {len(gallery.shards)} shards; {zero + nonfinite} cannot be ranked")


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


def _check_pictures(
    sheet: Path | None, html: Path | None, media_dir: Path | None, queries: int = 0, top_k: int = 0, objects: int = 0
) -> None:
    for option, target in (("--sheet", sheet), ("--html", html)):
        if target is not None and media_dir is None:
            raise UsageError(f"{option} shows the pictures of the hits: say where they are with --media-dir")
    if sheet is not None:
        from search.views.sheet import check_target

        check_target(sheet, queries, top_k)
    if html is not None:
        from search.views.page import check_page

        check_page(queries, top_k, objects)


def _check_targets(
    targets: dict[str, Path | None],
    feature_dir: Path,
    model_path: Path | None,
    media_dir: Path | None,
    inputs: list[Path | None],
    queries: list[Path] | None = None,
) -> None:
    if not any(targets.values()):
        return
    from pipeline.targets import check_targets
    from search.gallery.opening import find_gallery

    model = [] if model_path is None else [model_path, layout.toml_file(model_path)]
    folders = [path for path in queries or [] if path.is_dir()]
    check_targets(targets, [*inputs, *model], media_dir, find_gallery(feature_dir, model_path), folders)


def _read_filters(where: list[str] | None, labels: Path | None) -> "tuple[list[Condition], Annotations | None]":
    if not where and labels is None:
        return [], None
    from search.filters import parse_conditions
    from search.labels import read_annotations

    return parse_conditions(where or []), None if labels is None else read_annotations(labels)


def _open(feature_dir: Path, model_path: Path | None, include_stale: bool, paths_wanted: bool) -> "Gallery":
    from search.gallery.opening import find_gallery, open_gallery

    gallery = open_gallery(find_gallery(feature_dir, model_path), include_stale)
    if paths_wanted and gallery.fingerprint is None:
        raise UsageError("--format paths: this gallery has no gallery.json and does not know paths, only object ids")
    _say_provenance(gallery)
    return gallery


def _rank(
    gallery: "Gallery",
    queries: "list[Query]",
    top_k: int,
    metric: Metric,
    exclude_self: bool | None,
    device: Device,
    explain: bool,
) -> "Iterator[list[Hit]]":
    import numpy as np

    from search.queries import is_self, own_rows
    from search.ranking.planner import Work, look_at_machine, make_plan
    from search.ranking.rank import rank

    excluding = [query.by_id if exclude_self is None else exclude_self for query in queries]
    # The first k without the query's own rows are among the first k and so many more.
    more = own_rows(gallery, (query for query, out in zip(queries, excluding, strict=True) if out))
    work = Work(gallery.rows, gallery.length, len(queries), metric, gallery.coded, gallery.in_memory())
    plan = make_plan(work, look_at_machine(device))
    if explain:
        note(f"plan: {plan}")
    features = np.stack([query.feature for query in queries])
    ranking = rank(gallery, features, top_k + more, metric, plan.scan(gallery), plan.queries_at_once)
    for query, out, hits in zip(queries, excluding, ranking.hits, strict=True):
        yield [hit for hit in hits if not (out and is_self(query, hit.object_id, hit.path))][:top_k]


def _say_provenance(gallery: "Gallery") -> None:
    if gallery.fingerprint is None:
        note("warning: unverified gallery: nothing says which model and preprocessing made these shards")
    from pipeline.versions import are_mixed

    if are_mixed(gallery.versions):
        note("warning: shards were made with different library versions; similarities can differ in their last digits")


def _say_other_versions(gallery: "Gallery") -> None:
    from pipeline.versions import other_versions

    for versions in gallery.versions:
        changed = [f"{name} {made} (here {ours})" for name, (made, ours) in other_versions(versions).items()]
        if changed:
            note(f"warning: shards were made with {', '.join(changed)}; similarities can differ in their last digits")


def _say_unusable(gallery: "Gallery") -> None:
    zero, nonfinite = gallery.unusable_rows
    if zero or nonfinite:
        note(
            f"warning: left out {zero} objects whose feature is all zero and "
            f"{nonfinite} whose feature has NaN or infinite values"
        )
    if gallery.searched_rows == zero + nonfinite:
        note("the gallery has no object that can be ranked")


def _show(sheet: Path | None, html: Path | None, lines: "list[SheetLine]", max_pixels: int) -> None:
    """Write what people look at."""
    if sheet is not None:
        from search.views.sheet import write_sheet

        _say_missing(f"sheet: {sheet}", write_sheet(sheet, lines, max_pixels))
    if html is not None:
        from search.views.page import write_page

        about = f"{len(lines)} queries" if len(lines) > 1 else f"query: {lines[0].name}"
        _say_missing(f"page: {html}", write_page(html, "ruiji search", about, lines, max_pixels))


def _line(query: "Query", rows: "list[Row]", annotations: "Annotations | None", media_dir: Path) -> "SheetLine":
    from search.views.output import printable
    from search.views.sheet import SheetHit, SheetLine

    hits = [
        SheetHit(
            str(row["object_id"]),
            None if row["path"] is None else media_dir / str(row["path"]),
            float(row["similarity"] or 0),
            None if row.get("label") is None else str(row["label"]),
        )
        for row in rows
    ]
    label = None if annotations is None else _query_label(query, annotations)
    return SheetLine(query.picture, tuple(hits), label, printable(Path(query.name).name))


def _query_label(query: "Query", annotations: "Annotations") -> str | None:
    if query.object_id is not None:
        return annotations.label(query.object_id, query.path)
    # From outside the media folder nothing is known of it: that a line has its file name says nothing.
    return None if query.path is None else annotations.picture_label(query.path)


def _group_lines(groups: "list[Group]", annotations: "Annotations | None", media_dir: Path) -> "list[SheetLine]":
    from search.views.sheet import GROUP_HITS, GROUP_LINES, SheetHit, SheetLine

    lines = []
    for group in groups[:GROUP_LINES]:
        labels = [
            None if annotations is None else annotations.label(member.object_id, member.path)
            for member in group.members
        ]
        first, *rest = (
            SheetHit(member.object_id, media_dir / member.path if member.path else None, member.similarity, label)
            for member, label in zip(group.members[: GROUP_HITS + 1], labels, strict=False)
        )
        lines.append(SheetLine(first.picture, tuple(rest), first.label, first.object_id))
    return lines


def _say_missing(text: str, missing: int) -> None:
    note(text + (f" ({missing} pictures could not be opened)" if missing else ""))
