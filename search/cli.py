"""`ruiji search`, `near-duplicates`, `index`, `map` and `gallery info`.

What they need beyond the standard library and typer is imported when they run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.arguments import Commands, Panel
from pipeline.choices import Device
from pipeline.errors import EXIT_EMPTY, EXIT_INCOMPLETE, UsageError
from pipeline.settings import (
    MAX_PIXELS,
    FeatureDir,
    MaxPixels,
    OptionalMediaDir,
    RedisPasswordFile,
    RedisUrl,
    StateDir,
    model_option,
    resolve_redis_url,
)
from pipeline.streams import counted, exact_stdout, note, tell, to_json
from search.duplicates import cli as duplicates_cli
from search.duplicates.cli import AgainstGallery, AgainstMediaDir, DecisionsFile, Threshold, reference_of
from search.evaluation import cli as evaluation_cli
from search.options import THRESHOLD, TOP_K, GroupFormat, Linkage, Metric, OutputFormat, Projection

if TYPE_CHECKING:
    from search.requests.selection import Selection
    from search.views.sheet import SheetLine

Images = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="IMAGE...",
        help="What to find look-alikes of: pictures, folders, lists of pictures (.txt, or .csv with img_path), or - "
        "for a list on stdin (one per line, or as find -print0 writes it).",
    ),
]
GalleryModel = Annotated[
    Path | None,
    model_option(
        "The ONNX model; its name is also the gallery's. The file itself is needed only to search with pictures. "
        "Without it, --feature-dir must be a gallery or contain exactly one."
    ),
]
Ids = Annotated[
    list[str] | None,
    typer.Option("--id", metavar="ID", help="Search with an object of the gallery; needs no model. Repeatable."),
]
Features = Annotated[
    list[Path] | None,
    typer.Option(
        "--feature", metavar="FILE", help="Search with the features in a .npy file: one, or one per row. Repeatable."
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="WORDS", help="Search with words, if the model has a text tower. Repeatable."),
]
Minus = Annotated[
    list[str] | None,
    typer.Option("--minus", metavar="WORDS", help="Combine the queries and subtract these words. Repeatable."),
]
Combine = Annotated[
    bool,
    typer.Option(
        "--combine", help="Search once, with the sum of all queries (each scaled to norm 1), instead of with each."
    ),
]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, metavar="N", help="Hits per query.")]
MinSimilarity = Annotated[
    float | None,
    typer.Option("--min-similarity", min=-1.0, max=1.0, metavar="COSINE", help="Leave out hits below this cosine."),
]
Collapse = Annotated[
    float | None,
    typer.Option(
        "--collapse",
        min=0.0,
        max=1.0,
        metavar="COSINE",
        help="Show only the first of several hits that are this similar to each other, with the number of the others.",
    ),
]
ExcludeSelf = Annotated[
    bool | None,
    typer.Option(
        "--exclude-self/--include-self",
        help="If a query is itself an object of the gallery, leave it out of its hits, or not. For pictures, "
        "--exclude-self needs --media-dir.  [default: exclude for --id, include for pictures]",
        show_default=False,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="A CSV about the objects, with a header: img_path or img_name, label, and any other columns.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help="Search only objects with COLUMN=VALUE (or COLUMN!=VALUE) in --labels, or path=PREFIX. Repeatable: "
        "several values of one column are alternatives, conditions on different columns must all hold.",
    ),
]
MetricOption = Annotated[
    Metric,
    typer.Option(
        "--metric",
        help="How hits are ordered. cosine and angle give the same order, with the angle in radians as distance; "
        "euclidean is the distance between raw features.",
    ),
]
SearchDevice = Annotated[
    Device,
    typer.Option(
        "--device",
        envvar="RUIJI_DEVICE",
        help="cuda embeds and ranks on CUDA, ranking with torch. cpu ranks with numpy, or with torch if that is "
        "faster. auto means cpu. The ranking is the same.",
    ),
]
Format = Annotated[
    OutputFormat,
    typer.Option("--format", help="table is for people; the others show every digit. paths writes one path per line."),
]
GroupFormatOption = Annotated[
    GroupFormat,
    typer.Option("--format", help="paths writes one path per line, and an empty line between groups (not with -0)."),
]
Null = Annotated[
    bool, typer.Option("--null", "-0", help="With --format paths: end each path with a null character, for xargs -0.")
]
Sheet = Annotated[
    Path | None,
    typer.Option("--sheet", metavar="FILE", help="Also draw what was found into this .jpg or .png; needs --media-dir."),
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Also write the hits as one page that contains the pictures; needs --media-dir."
    ),
]
IncludeStale = Annotated[
    bool, typer.Option("--include-stale", help="Also search objects that are no longer on the list.")
]
FailIfEmpty = Annotated[bool, typer.Option("--fail-if-empty", help="Exit with code 5 if nothing is found.")]
Explain = Annotated[bool, typer.Option("--explain", help="Show on stderr which way the search takes, and why.")]

Keep = Annotated[
    str | None,
    typer.Option(
        "--keep",
        metavar="RULES",
        help="Choose which file of a group to keep, and say why. Rules in their order, with commas between: pixels, "
        "bytes, oldest, path=PREFIX, format. Needs --media-dir.",
    ),
]

_SEARCH_EXAMPLES = [
    "ruiji search photo.jpg -k 20",
    "ruiji search FOLDER --format jsonl",
    "ruiji search --id IMG_0042.jpg --sheet hits.jpg",
    "ruiji search --text 'a red car' --html hits.html",
    "ruiji search photo.jpg --text 'at night' --combine",
    "ruiji search photo.jpg --labels anno.csv --where label=cat --html hits.html",
    "ruiji search photo.jpg --format paths -0 | xargs -0r cp --backup=numbered -t FOUND",
    "find NEW -name '*.jpg' -print0 | ruiji search - --min-similarity 0.9",
]
_NEAR_DUPLICATES_EXAMPLES = [
    "ruiji near-duplicates --threshold 0.95 --sheet groups.jpg",
    "ruiji near-duplicates --against path=archive/ --format csv",
    "ruiji near-duplicates --against-gallery ARCHIVE_FEATURES",
    "ruiji near-duplicates --keep pixels,bytes",
    "ruiji near-duplicates --turned --sheet groups.jpg",
    "ruiji near-duplicates --keep path=originals/,oldest --format jsonl | ruiji duplicates decide",
    "ruiji near-duplicates --distributed",
]
_MAP_EXAMPLES = ["ruiji map --feature-dir FEATURES", "ruiji map --feature-dir FEATURES --projection umap"]

gallery_app = Commands(help="Look at galleries.")


def register(app: Commands) -> None:
    """Add the commands to the root command."""
    app.command(panel=Panel.search, examples=_SEARCH_EXAMPLES)(search)
    app.command("near-duplicates", panel=Panel.search, examples=_NEAR_DUPLICATES_EXAMPLES)(near_duplicates)
    app.command(panel=Panel.search, examples=["ruiji index --feature-dir FEATURES"])(index)
    app.command("map", panel=Panel.search, examples=_MAP_EXAMPLES)(map_gallery)
    app.add_typer(gallery_app, name="gallery", rich_help_panel=Panel.check)
    duplicates_cli.register(app)
    evaluation_cli.register(app)


def search(
    feature_dir: FeatureDir,
    images: Images = None,
    model_path: GalleryModel = None,
    media_dir: OptionalMediaDir = None,
    ids: Ids = None,
    features: Features = None,
    texts: Texts = None,
    minus: Minus = None,
    combine: Combine = False,
    top_k: TopK = TOP_K,
    metric: MetricOption = Metric.cosine,
    min_similarity: MinSimilarity = None,
    collapse: Collapse = None,
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
    """Find the objects that look most like each query.

    The ranking is exact, with ties broken by object id. Exit code 3: some pictures could not be read; the others got
    their hits.
    """
    from search.requests.search import SearchRequest
    from search.requests.search import search as answer

    paths_wanted = output_format is OutputFormat.paths
    request = SearchRequest(
        selection=_selection(feature_dir, model_path, labels, where, include_stale, paths_wanted),
        images=tuple(images or ()),
        ids=tuple(ids or ()),
        features=tuple(features or ()),
        texts=tuple(texts or ()),
        minus=tuple(minus or ()),
        combine=combine,
        media_dir=media_dir,
        top_k=top_k,
        metric=metric,
        min_similarity=min_similarity,
        collapse=collapse,
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
    threshold: Threshold = THRESHOLD,
    linkage: Annotated[
        Linkage,
        typer.Option(
            "--linkage",
            help="complete: every pair of a group is at or above the threshold. single: a group is everything that is "
            "connected by such pairs.",
        ),
    ] = Linkage.complete,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="CONDITION",
            help="Compare only these objects with the others, for example path=ARCHIVE/ with what is new; conditions "
            "as for --where. One of them comes first in each group.",
        ),
    ] = None,
    against_gallery: AgainstGallery = None,
    against_media_dir: AgainstMediaDir = None,
    not_within_folder: Annotated[
        bool, typer.Option("--not-within-folder", help="Do not compare objects of the same folder.")
    ] = False,
    turned: Annotated[
        bool,
        typer.Option(
            "--turned",
            help="Also find copies that were rotated by quarters or mirrored. Reads each picture; needs --media-dir "
            "and --model.",
        ),
    ] = False,
    labels: Labels = None,
    where: Where = None,
    device: SearchDevice = Device.auto,
    output_format: GroupFormatOption = GroupFormat.table,
    null: Null = False,
    sheet: Sheet = None,
    include_stale: IncludeStale = False,
    fail_if_empty: FailIfEmpty = False,
    explain: Explain = False,
    keep: Keep = None,
    decisions: DecisionsFile = None,
    decided: Annotated[bool, typer.Option("--decided", help="Show what is decided instead.")] = False,
    skipped: Annotated[bool, typer.Option("--skipped", help="Also show groups that were skipped.")] = False,
    distributed: Annotated[
        bool,
        typer.Option("--distributed", help="Have workers on any number of hosts compare: ruiji worker --role compare."),
    ] = False,
    redis_url: RedisUrl = None,
    redis_password_file: RedisPasswordFile = None,
    state_dir: StateDir = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Find all groups of near-identical objects.

    Compares each pair once; the result is exact. In a group every pair is at or above the threshold. A pair that is in
    no group is shown as "see also" in both groups that it connects. A member's similarity is to the group's first
    member: the first in the object list, or the one that --keep chooses. identical_to names the first member whose file
    has exactly the same bytes. Results are kept, so an interrupted search continues. With --distributed, workers
    compare (ruiji worker --role compare); the groups are the same. Pairs that are decided (ruiji duplicates decide)
    are left out.

    With --against-gallery a group is one object with all that it matches in the reference, the other gallery. The
    reference is kept.
    """
    from pipeline.progress import show_steps
    from search.duplicates.keep import parse_rules
    from search.ranking.planner import wait_asleep
    from search.requests.near_duplicates import NearDuplicatesRequest
    from search.requests.near_duplicates import near_duplicates as find
    from search.views.output import CHOSEN, DECIDED, MATCHED, write_groups

    paths_wanted = output_format is GroupFormat.paths
    reference = reference_of(against_gallery, against_media_dir)
    if paths_wanted and reference is not None and (media_dir is None or against_media_dir is None):
        raise UsageError("--format paths has paths of two folders then: give --media-dir and --against-media-dir")
    request = NearDuplicatesRequest(
        selection=_selection(feature_dir, model_path, labels, where, include_stale, paths_wanted),
        threshold=threshold,
        linkage=linkage,
        against=tuple(against or ()),
        reference=reference,
        not_within_folder=not_within_folder,
        media_dir=media_dir,
        device=device,
        sheet=sheet,
        explain=explain,
        decisions=decisions,
        decided=decided,
        skipped=skipped,
        keep=() if keep is None else parse_rules(keep),
        turned=turned,
        max_pixels=max_pixels,
        redis_url=resolve_redis_url(redis_url, redis_password_file, state_dir) if distributed else None,
    )
    _check_null(null, paths_wanted)
    wait_asleep()
    found = find(request, note, show_steps)
    groups = found.groups
    columns = DECIDED if decided else CHOSEN if keep is not None else MATCHED if reference is not None else ()
    write_groups(groups, output_format, media_dir, null, columns, against_media_dir, reference is not None, found.seen)
    if isinstance(groups, tuple):
        note(counted(len(groups), "decision"))
    elif reference is not None and len(groups):
        note(f"{counted(len(groups), 'object has', 'objects have')} near-duplicates in the reference")
    elif len(groups):
        is_open = counted(len(groups), "group is open", "groups are open")
        more = counted(groups.objects - len(groups), "object")
        note(f"{is_open}; {more} besides the first of each group")
    else:
        note("nothing is open")
    if sheet is not None:
        from search.requests.pictures import draw_sheet

        shown = "" if len(found.lines) == len(groups) else f" with the first {len(found.lines)} of {len(groups)} groups"
        draw_sheet(sheet, found.lines, max_pixels, note, shown, "first")
    if not len(groups) and fail_if_empty:
        raise typer.Exit(EXIT_EMPTY)


def index(feature_dir: FeatureDir, model_path: GalleryModel = None) -> None:
    """Prepare a gallery for fast searches.

    Keeps the norms, and the rows in 8 bits (a quarter of the features' size), in the gallery's folder cache, which can
    be deleted. A search with up to 64 queries then reads only these and a few rows. If the features are in memory
    already, this needs a CPU with AVX2, and ruiji installed with a C compiler. Makes only what is missing or damaged.
    """
    from pipeline.progress import show_steps
    from search.gallery.opening import find_gallery
    from search.requests.index import index as keep

    done = keep(find_gallery(feature_dir, model_path), show_steps)
    objects, shards = counted(done.objects, "object"), counted(done.shards, "shard")
    note(f"{objects} in {shards}; {done.unusable} cannot be ranked")


def map_gallery(
    feature_dir: FeatureDir,
    model_path: GalleryModel = None,
    projection: Annotated[
        Projection,
        typer.Option(
            "--projection",
            help="pca: the first two principal components. umap: UMAP, which separates groups and takes much "
            "longer; it needs the extra map.",
        ),
    ] = Projection.pca,
) -> None:
    """Place all objects on a plane, for the map of ruiji serve.

    Objects that look alike are near each other. The map is kept in the gallery's folder cache, which can be deleted; it
    is made again when the gallery has new objects.
    """
    from pipeline.progress import show_steps
    from search.gallery.opening import find_gallery
    from search.requests.map import map_gallery as make

    made = make(find_gallery(feature_dir, model_path), projection, show_steps)
    placed = counted(len(made.rows), "object is", "objects are")
    note(f"{placed} on the map; {made.unplaced} cannot be ranked and are not")


@gallery_app.command(examples=["ruiji gallery info --feature-dir FEATURES --json"])
def info(
    feature_dir: FeatureDir,
    model_path: GalleryModel = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a gallery holds.

    Objects, shards, length, fingerprint, size, failed objects, rows that cannot be ranked, and rows with a digest of
    their file.
    """
    from search.gallery.opening import describe_gallery, find_gallery, open_gallery
    from search.requests.selection import say_undigested

    folder = find_gallery(feature_dir, model_path)
    gallery = open_gallery(folder)
    say_undigested(gallery, note)
    facts = describe_gallery(folder, gallery)
    if as_json:
        print(to_json(facts), file=exact_stdout())
        return
    for name, value in facts.items():
        tell(f"{name:<15} {'-' if value is None else f'{value:,}' if isinstance(value, int) else value}")


def _check_null(null: bool, paths: bool) -> None:
    if null and not paths:
        raise UsageError("-0 needs --format paths")


def _selection(
    feature_dir: Path,
    model_path: Path | None,
    labels: Path | None,
    where: list[str] | None,
    include_stale: bool,
    need_paths: bool,
) -> "Selection":
    from search.requests.selection import Selection

    return Selection(
        feature_dir=feature_dir,
        model_path=model_path,
        labels=labels,
        where=tuple(where or ()),
        include_stale=include_stale,
        need_paths=need_paths,
    )


def _draw(sheet: Path | None, html: Path | None, lines: "Sequence[SheetLine]", max_pixels: int) -> None:
    """Write what people look at."""
    if sheet is None and html is None:
        return
    from search.requests.pictures import draw_page, draw_sheet

    if sheet is not None:
        draw_sheet(sheet, lines, max_pixels, note)
    if html is not None:
        draw_page(html, lines, max_pixels, note)
