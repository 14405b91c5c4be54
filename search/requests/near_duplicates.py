"""The plain function under `ruiji near-duplicates`."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import layout
from pipeline.choices import Device
from pipeline.errors import UsageError
from pipeline.gallery import read_gallery
from pipeline.settings import MAX_PIXELS
from pipeline.streams import counted
from search.duplicates.cleanup import decided_groups, open_groups, with_choices
from search.duplicates.decided import Decided, decided_in
from search.duplicates.decisions import read_decisions
from search.duplicates.files import Files
from search.duplicates.groups import Group, Groups
from search.duplicates.keep import Rule, RuleKind
from search.duplicates.linkage import Rules
from search.duplicates.matches import Matches, Settled, find_matches, with_kept
from search.duplicates.sides import Compared
from search.filters import apply_conditions
from search.gallery.shards import Gallery
from search.options import THRESHOLD, Linkage
from search.queries import embed_pictures, query_encoder
from search.ranking.arithmetic import Arithmetic
from search.ranking.planner import Planner, Purpose
from search.requests.pictures import check_picture_targets, check_pictures, group_lines
from search.requests.reference import Reference
from search.requests.selection import Progress, Say, Selection, say_undigested, say_unusable

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pipeline.model import Model
    from search.duplicates.turned import TurnedCopies
    from search.labels import Annotations
    from search.views.sheet import SheetLine


@dataclass(frozen=True, kw_only=True)
class NearDuplicatesRequest:
    """In what near-duplicates are looked for, and what counts as one.

    Attributes:
        selection: the objects that are compared.
        threshold: the least similarity of a pair, above 0, at most 1.
        linkage: whether every pair of a group must reach the threshold, or only enough to connect it.
        media_dir: where the pictures of the gallery are.
        device: where pairs are compared; changes speed, never the groups.
        sheet: what will be drawn; checked before any work.
        explain: say which way the comparison takes, and why.
        decisions: the file of what was decided; None: beside the gallery.
        decided: look for what is decided, instead of for what is open.
        skipped: also groups that were skipped.
        against: conditions as of `--where`; objects that meet them are only compared with those that do not.
        reference: a second gallery of the same model; only pairs of an object with one of the reference are looked for.
        not_within_folder: compare only objects of different folders.
        keep: rules that choose which file of a group is kept; none: none is chosen.
        turned: also look for copies that were rotated by quarters or mirrored.
        max_pixels: pictures with more are not decoded.
        redis_url: of the Redis whose workers compare, with its password; None: this process compares.

    Raises:
        UsageError: the threshold is 0, or the request contradicts itself.
    """

    selection: Selection
    threshold: float = THRESHOLD
    linkage: Linkage = Linkage.complete
    media_dir: Path | None = None
    device: Device = Device.auto
    sheet: Path | None = None
    explain: bool = False
    decisions: Path | None = None
    decided: bool = False
    skipped: bool = False
    against: tuple[str, ...] = ()
    reference: Reference | None = None
    not_within_folder: bool = False
    keep: tuple[Rule, ...] = ()
    turned: bool = False
    max_pixels: int = MAX_PIXELS
    redis_url: str | None = None

    def __post_init__(self) -> None:
        if self.decided and (self.against or self.not_within_folder):
            raise UsageError(
                "--decided shows what is decided; --against and --not-within-folder say what is compared of the rest"
            )
        if self.turned and self.decided:
            raise UsageError("--decided shows what is decided, --turned is about the rest: give one of them")
        if self.turned and (self.media_dir is None or self.selection.model_path is None):
            raise UsageError(
                "--turned looks at the pictures and embeds some of them: say where they are with --media-dir, and what "
                "made the gallery with --model"
            )
        if self.keep and self.media_dir is None:
            raise UsageError("--keep compares the files themselves: say where they are with --media-dir")
        if self.decided and (self.keep or self.skipped):
            option = "--keep" if self.keep else "--skipped"
            raise UsageError(f"--decided shows what is decided, {option} is about the rest: give one of them")
        if self.decided and self.redis_url is not None:
            raise UsageError("--decided shows what is decided, and compares nothing: leave out --distributed")
        if self.threshold == 0:
            raise UsageError("--threshold must be above 0")
        if self.reference is not None:
            self._check_reference(self.reference)

    def _check_reference(self, reference: Reference) -> None:
        without = {
            "--against": bool(self.against),
            "--not-within-folder": self.not_within_folder,
            "--turned": self.turned,
            "--distributed": self.redis_url is not None,
            "--linkage single": self.linkage is Linkage.single,
        }
        for option, given in without.items():
            if given:
                raise UsageError(f"{option} is about one gallery, and does not go with --against-gallery: leave it out")
        shown = {"--keep": bool(self.keep), "--sheet": self.sheet is not None}
        for option, given in shown.items():
            if given and reference.media_dir is None:
                raise UsageError(f"{option} opens files of the reference too: give --against-media-dir")


@dataclass(frozen=True)
class NearDuplicatesResult:
    """What was found.

    Attributes:
        groups: in the order of their first members, or of the decisions; each is made when it is asked for.
        lines: what a sheet shows; empty if none is wanted.
        seen: how many decisions there were.
    """

    groups: Groups | Matches | tuple[Group, ...]
    lines: "tuple[SheetLine, ...]"
    seen: int


def near_duplicates(request: NearDuplicatesRequest, say: Say, progress: Progress) -> NearDuplicatesResult:
    """Find all groups of near-identical objects of a gallery; exact, each pair compared once.

    Args:
        say: called with warnings.
        progress: of pairs compared.

    Raises:
        UsageError: the request contradicts itself or what is on the disk.
        GalleryMismatch, ShardCorrupt: as `open_gallery`.
    """
    selection, media_dir = request.selection, request.media_dir
    check_pictures(request.sheet, None, media_dir)
    check_picture_targets(selection, {"--sheet": request.sheet}, media_dir, [selection.labels])
    conditions, annotations = selection.read_filters()
    whole = selection.open(say)
    annotations = annotations and annotations.among(whole.all_paths)
    gallery = apply_conditions(whole, conditions, annotations)
    say_unusable(gallery, say)
    say_undigested(gallery, say)
    file = request.decisions or layout.decisions_file(selection.folder)
    gone: frozenset[int] = frozenset()
    if request.reference is not None:
        both = request.reference.put_before(selection.folder, gallery, file, say)
        gallery, gone = both.gallery, both.gone
        if gone:
            objects = counted(len(gone), "object")
            say(f"left out {objects} of the reference that should go, as decided in {both.decisions}")
    _check_keep(request, gallery)
    decided = decided_in(gallery, read_decisions(file))
    if request.decided:
        groups: Groups | Matches | tuple[Group, ...] = tuple(decided_groups(gallery, decided))
    else:
        if request.reference is not None:
            groups = _matches(
                request, request.reference, gallery, Settled(decided, gone, request.skipped), say, progress
            )
        else:
            groups = _open(request, gallery, annotations, decided, say, progress)
        if decided.decisions:
            say(f"left out what is decided in {file}; --decided shows it")
    lines: list[SheetLine] = []
    if request.sheet is not None and media_dir is not None:
        reference_media = None if request.reference is None else request.reference.media_dir
        lines = group_lines(groups, annotations, media_dir, reference_media)
    return NearDuplicatesResult(groups, tuple(lines), len(decided.decisions))


def _check_keep(request: NearDuplicatesRequest, gallery: Gallery) -> None:
    if not request.keep:
        return
    if gallery.fingerprint is None:
        raise UsageError("--keep: this gallery has no gallery.json and does not know paths, only object ids")
    if request.media_dir is None or not request.media_dir.is_dir():
        raise UsageError(f"--keep: there is no media folder {request.media_dir}; mount it, or check --media-dir")
    which = "reference" if gallery.reference_shards else "gallery"
    for rule in request.keep:
        if rule.kind is RuleKind.path and not _has_path_below(gallery, rule.prefix):
            raise UsageError(f"--keep path={rule.prefix}: no path of the {which} begins with it")


def _matches(
    request: NearDuplicatesRequest,
    reference: Reference,
    gallery: Gallery,
    settled: Settled,
    say: Say,
    progress: Progress,
) -> Matches:
    arithmetic = _arithmetic(request, gallery, say)
    with progress("pairs") as step:
        matches = find_matches(gallery, request.threshold, settled, arithmetic, step)
    if not request.keep or request.media_dir is None:
        return matches
    files = Files(gallery, request.media_dir, reference.media)
    return with_kept(matches, files, request.keep, say)


def _arithmetic(request: NearDuplicatesRequest, gallery: Gallery, say: Say) -> Arithmetic:
    """What compares all pairs."""
    planner = Planner(request.device)
    # Every row is a query here.
    way = planner.way(gallery, Purpose.pairs, gallery.rows)
    if request.explain:
        say(f"plan: {way}")
    return planner.arithmetic(way)


def _open(
    request: NearDuplicatesRequest,
    gallery: Gallery,
    annotations: "Annotations | None",
    decided: Decided,
    say: Say,
    progress: Progress,
) -> Groups:
    media_dir, model_path = request.media_dir, request.selection.model_path
    compared = Compared(gallery, request.against, annotations, request.not_within_folder)
    arithmetic = _arithmetic(request, gallery, say)
    rules = Rules(request.linkage, sides=compared.sides)
    with progress("pairs") as step, progress("pictures") if request.turned else nullcontext() as looked_at:
        turned = None
        if looked_at is not None and media_dir is not None and model_path is not None:
            load = partial(query_encoder, model_path, gallery, request.device, pictures=gallery.rows)
            turned = turned_copies(gallery, media_dir, load, request.max_pixels, say, looked_at)
        if request.redis_url is not None:
            _distribute(request, request.redis_url, gallery, say, step)
        groups = open_groups(gallery, decided, request.threshold, rules, arithmetic, step, request.skipped, turned)
    if not request.keep or media_dir is None:
        return compared.reference_first(groups)
    return with_choices(gallery, groups, Files(gallery, media_dir), request.keep, say)


def turned_copies(
    gallery: Gallery,
    media_dir: Path,
    load: "Callable[[], tuple[Model, Future[Any]]]",
    max_pixels: int,
    say: Say,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "TurnedCopies":
    """What looks for turned copies in a gallery.

    Args:
        media_dir: where its pictures are.
        load: gives the model that made it, and what encodes, as `query_encoder` does; called once all else is there.
        max_pixels, say, progress: as `TurnedCopies` takes them.

    Raises:
        UsageError: the gallery knows no paths, or there is no media folder or no library.
        GalleryMismatch, ModelError, MachineFault: as `load` raises them.
    """
    if gallery.fingerprint is None:
        raise UsageError("turned copies: this gallery has no gallery.json and does not know paths, only object ids")
    if not media_dir.is_dir():
        raise UsageError(f"turned copies: there is no media folder {media_dir}; mount it, or name another")
    try:
        # It loads Pillow and ImageHash, for which the search for other pairs has no use.
        from search.duplicates.turned import TurnedCopies
    except ModuleNotFoundError as error:
        raise UsageError(
            f"turned copies need the extra turned ({error}): run make setup, or pip install 'ruiji[turned]'"
        ) from None
    model, encoder = load()
    embed = partial(embed_pictures, model=model, encoder=encoder, max_pixels=max_pixels)
    return TurnedCopies(gallery, media_dir, embed, model.spec.exif_orientation, max_pixels, say, progress)


def _distribute(
    request: NearDuplicatesRequest, redis_url: str, gallery: Gallery, say: Say, step: Callable[[int, int], None]
) -> None:
    """Have workers compare what was not compared yet."""
    # It loads Celery, for which a search on one machine has no use.
    from search.duplicates.distributed import Workers, compare_with

    folder = request.selection.folder
    info = read_gallery(folder)
    if info is None:
        raise UsageError(
            f"--distributed: {folder} has no gallery.json, by which workers know it; leave it out to compare here"
        )
    compare_with(Workers(redis_url, folder, info), gallery, request.threshold, say, step)


def _has_path_below(gallery: Gallery, prefix: str) -> bool:
    # With a reference, what is kept is one of its files.
    shards = gallery.shards[: gallery.reference_shards] or gallery.shards
    return any(path.startswith(prefix) for shard in shards for path in shard.paths or ())
