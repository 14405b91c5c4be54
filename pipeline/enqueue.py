"""Enqueuing: check the object list, open a plan or take up the open one, and publish its first segments."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline import layout
from pipeline.choices import ObjectIds, Reason
from pipeline.errors import FileDamaged, PlanMismatch, RuijiError, UsageError
from pipeline.folding import check_names
from pipeline.gallery import check_place, claim_gallery, gallery_model, read_gallery, require_gallery
from pipeline.objects import Exclude, IdScheme, prepare
from pipeline.plans.files import closed_plans, open_plan
from pipeline.plans.mending import mend
from pipeline.plans.plan import Plan
from pipeline.plans.planning import PlanSettings, Retry, check_matches, kept_settings, plan_list
from pipeline.plans.probes import find_probes, note_probes
from pipeline.plans.stuck import try_again
from pipeline.queue.app import make_app
from pipeline.queue.connection import broker_faults, connect
from pipeline.queue.leases import LeaseTaken
from pipeline.segments import Segments
from pipeline.settings import VISIBILITY_TIMEOUT_S, WINDOW_SEGMENTS
from pipeline.store import machine_faults
from pipeline.trial import prove_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """What is to become features, where these go, and how.

    Attributes:
        object_ids: what ids are made from; the same for all of a gallery.
        plan: what a new plan freezes.
    """

    media_dir: Path
    feature_dir: Path
    model: Path
    object_ids: ObjectIds = ObjectIds.basename
    plan: PlanSettings = field(default_factory=PlanSettings)

    @property
    def folder(self) -> Path:
        """The gallery folder."""
        return layout.gallery_folder(self.feature_dir, self.model)

    def check_media(self) -> None:
        """Refuse to begin without a media folder.

        Raises:
            UsageError: there is none.
        """
        if not self.media_dir.is_dir():
            raise UsageError(f"the media folder {self.media_dir} does not exist or is not a folder; is it mounted?")


@dataclass(frozen=True)
class Enqueued:
    """What one enqueue did.

    Attributes:
        plan: the open plan, or None if nothing is to do.
        resumed: whether it was open before.
        published: tasks sent now; further segments follow by themselves.
        elsewhere: another process is sending the plan's tasks, and took longer than this one waited.
        objects: on the list.
        notes: how the list was changed, what of it is known under another path, and what the open plan keeps instead of
            what was asked for, for people.
        list_waits: whether the list was not looked at, because the open plan tries failed objects or makes lost shards
            again.
    """

    plan: Plan | None
    resumed: bool
    published: int
    objects: int
    notes: tuple[str, ...]
    elsewhere: bool = False
    list_waits: bool = False


def enqueue(
    work: Extraction,
    redis_url: str | None,
    list_path: Path | None = None,
    *,
    failed: Retry | None = None,
    exclude: Exclude | None = None,
    window_segments: int = WINDOW_SEGMENTS,
) -> Enqueued:
    """Check the object list, open a plan or take up the open one, and publish its first segments.

    Args:
        redis_url: None: publish nothing; whoever works later finds the open plan on the disk.
        list_path: the object list; None: that of the media folder.
        failed: plan these failed objects again, and nothing else.
        exclude: lines of the list to leave out.
        window_segments: how many segments to publish now; the workers publish the others.

    Raises:
        ObjectListError, ModelError: bad input, or a model that does not run.
        BrokerUnavailable: no Redis, or it fails meanwhile.
        GalleryMismatch, PlanMismatch: the folder belongs to another model, another plan is open.
    """
    work.check_media()
    model, scheme = gallery_model(work.folder, work.model), IdScheme(work.object_ids)
    client = connect(redis_url) if redis_url is not None else None
    try:
        found = read_gallery(work.folder)
    except FileDamaged:
        found = None  # The claim writes it anew if it can.
    # The model that a gallery was made by ran: it is not tried again.
    if (found is None or found.fingerprint != model.fingerprint) and (untried := prove_model(model)) is not None:
        logger.warning("%s; the first worker tries it", untried, extra={"event": "model_untried"})
    run = layout.run_folder(work.folder)
    with machine_faults(f"cannot write {run}"), _leaving_nothing(run):
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=run, prefix=f"{layout.TEMPORARY_PREFIX}list-") as scratch:
            objects = prepare(list_path or layout.object_list_file(work.media_dir), Path(scratch), scheme, exclude)
            check_names(objects, scheme, Path(scratch))
            if found is None:
                # Before the folder is this model's: a first enqueue that is refused leaves no claim.
                find_probes(work.media_dir, objects)
            if found is not None and found.fingerprint == model.fingerprint:
                mend(work.folder)
            gallery = claim_gallery(work.folder, model, scheme)
            if client is not None:
                with broker_faults():
                    check_place(work.folder, gallery, client)
            plan = open_plan(work.folder)
            resumed, anew, notes = plan is not None, list[int](), list(objects.notes)
            if plan is None:
                plan = plan_list(work.folder, work.media_dir, gallery, objects, work.plan, failed, notes.append)
            if plan is not None:
                if failed is not None and not plan.retry:
                    raise PlanMismatch(
                        f"the plan {plan.plan_id} is open in {work.folder}, with objects that were never tried; let it "
                        "finish, or close it with ruiji cancel, before failed ones are tried again"
                    )
                check_matches(plan, objects, gallery, work.plan.shard_rows)
                if resumed:
                    anew = try_again(plan)
                    notes += kept_settings(plan, work.plan)
                    # Where none can be read, the workers wait for the media folder as they did.
                    with suppress(RuijiError):
                        note_probes(plan, find_probes(work.media_dir, objects))
    published, elsewhere = 0, False
    if plan is not None and client is not None and redis_url is not None:
        with broker_faults(), make_app(redis_url, plan.gallery_id, visibility_timeout_s=VISIBILITY_TIMEOUT_S) as app:
            try:
                segments = Segments(app, client, plan)
                segments.forget(anew)
                published = segments.fill_window(window_segments)
            except LeaseTaken:
                elsewhere = True  # If that process dies, a watchdog goes on where it stopped.
    waits = resumed and failed is None and plan is not None and not plan.from_list
    return Enqueued(plan, resumed, published, objects.lines, tuple(notes), elsewhere, waits)


def retry(
    work: Extraction, redis_url: str | None, list_path: Path | None = None, reason: Reason | None = None
) -> Enqueued:
    """Plan the failed objects of the list again, and nothing else.

    Args:
        redis_url: as for `enqueue`.
        list_path: the object list; None: that of the media folder, or the one that `ruiji run` made.
        reason: only objects that last failed for this.

    Raises:
        As `enqueue`. PlanMismatch: also if a plan is open with objects that were never tried.
    """
    return _retry(work, redis_url, list_path, Retry(reason))


def retry_as_before(
    folder: Path, media_dir: Path, model: Path, redis_url: str, list_path: Path | None = None
) -> Enqueued:
    """As `retry`, for a caller who may choose nothing: with the last list and the settings of the last plan.

    Args:
        folder: of the gallery, which has the model's name.

    Raises:
        As `retry`. PlanMismatch: also if the object list is another one than was accepted last.
    """
    gallery = require_gallery(folder)
    closed = max((one.plan for one in closed_plans(folder)), key=lambda plan: plan.generation, default=None)
    settings = PlanSettings()
    if closed is not None:
        settings = PlanSettings(closed.shard_rows, closed.keep_features, **asdict(closed.limits))
    work = Extraction(media_dir, folder.parent, model, gallery.object_id, settings)
    return _retry(work, redis_url, list_path, Retry(same_list=True))


def _retry(work: Extraction, redis_url: str | None, list_path: Path | None, failed: Retry) -> Enqueued:
    made = layout.run_list_file(work.folder)
    if list_path is None and made.exists() and not layout.object_list_file(work.media_dir).exists():
        list_path = made
    return enqueue(work, redis_url, list_path, failed=failed)


@contextmanager
def _leaving_nothing(run: Path) -> Iterator[None]:
    """After a refusal, remove the folders that were made for nothing."""
    try:
        yield
    except BaseException:
        for folder in (run, run.parent):
            with suppress(OSError):
                folder.rmdir()
        raise
