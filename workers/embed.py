"""One batch of objects, from paths to feature or error files, as a plain function without Celery."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ImageError, MachineFault, ObjectListError
from pipeline.objects import check_path
from pipeline.plan import Plan, Segment
from pipeline.store import shard_file, write_error, write_feature
from workers.images import decode, open_image
from workers.ledger import Ledger

if TYPE_CHECKING:
    from workers.encoder import Encoder

logger = logging.getLogger(__name__)

#: What became of one object: a feature was written, a failure was recorded, it was done before, or
#: nothing is wanted of it (its shard is published already).
DONE, FAILED, SKIPPED, LATE = "done", "failed", "skipped", "late"


@dataclass(frozen=True)
class Job:
    """One object to embed."""

    segment: Segment
    path: str


def embed_batch(
    plan: Plan,
    jobs: Sequence[Job],
    encoder: "Encoder",
    media_dir: Path,
    ledger: Ledger | None = None,
    decoders: Executor | None = None,
) -> list[str]:
    """Embed a batch; afterwards every object has a feature file, an error file or a published shard.

    Args:
        jobs: of one plan.
        encoder: of the plan's model.
        ledger: told where the time goes.
        decoders: threads that decode the whole batch ahead of the encoder; None: one image after the other, here.

    Returns:
        One of DONE, FAILED, SKIPPED, LATE for each job, in order.

    Raises:
        MachineFault: media folder gone, disk full, device failed. Some objects of the batch may be
            done; running it again does the rest.
    """
    ledger = ledger or Ledger()
    published = _published(plan, jobs)
    outcomes = [
        LATE if job.segment.shard in published or _refused(job) else SKIPPED if plan.is_done(job.path) else DONE
        for job in jobs
    ]
    waiting = [(number, job) for number, job in enumerate(jobs) if outcomes[number] == DONE]
    load = partial(_load, plan, encoder, media_dir, os.path.realpath(media_dir), ledger)
    loaded = (decoders.map if decoders else map)(load, (job.path for _, job in waiting))
    # As many at once as the encoder runs at once, so that a feature is on disk as soon as it can be.
    for start in range(0, len(waiting), encoder.run_images):
        part = waiting[start : start + encoder.run_images]
        for number, outcome in _embed(plan, part, loaded, encoder, ledger):
            outcomes[number] = outcome
    if waiting and not plan.keep_features:
        published = _published(plan, jobs)
        for number, job in waiting:
            # A task that came twice and late: its shard was published between the two looks.
            if job.segment.shard in published:
                plan.forget(job.path)
                outcomes[number] = LATE
    return outcomes


def _embed(
    plan: Plan,
    part: list[tuple[int, Job]],
    loaded: "Iterator[NDArray[np.uint8] | ImageError]",
    encoder: "Encoder",
    ledger: Ledger,
) -> Iterator[tuple[int, str]]:
    """Take the pixels of some jobs, encode and write them; yields the jobs' numbers and outcomes."""
    ready: list[tuple[int, Job, NDArray[np.uint8]]] = []
    for number, job in part:
        pixels = next(loaded)
        if isinstance(pixels, ImageError):
            yield number, _fail(plan, job, pixels)
        else:
            ready.append((number, job, pixels))
    if not ready:
        return
    batch = np.stack([pixels for _, _, pixels in ready])
    with encoder.turn, ledger.encoding():
        features = encoder.encode(batch)
    for (number, job, _), feature in zip(ready, features, strict=True):
        if np.isfinite(feature).all():
            with ledger.busy("write"):
                write_feature(plan.feature_file(plan.scheme.object_id(job.path)), feature)
            yield number, DONE
        else:
            error = ImageError("the model gives values that are not finite", "not-finite")
            yield number, _fail(plan, job, error)


def _refused(job: Job) -> bool:
    try:
        check_path(job.path)
    except ObjectListError as error:
        # No list holds such a path, so the task is not the producer's; it may not even fail an object.
        logger.warning("task refused: %s", error, extra={"event": "task_refused"})
        return True
    return False


def _published(plan: Plan, jobs: Iterable[Job]) -> set[int]:
    """Those of the jobs' shards that exist."""
    shards = {job.segment.shard for job in jobs}
    return {shard for shard in shards if shard_file(plan.folder, shard, "json").exists()}


def _load(
    plan: Plan, encoder: "Encoder", media_dir: Path, media_root: str, ledger: Ledger, path: str
) -> NDArray[np.uint8] | ImageError:
    """The pixels of one object, or why it has none."""
    try:
        with ledger.busy("read"):
            file = open_image(f"{media_dir}/{path}", media_root)
        with file, ledger.busy("decode"):
            return decode(file, encoder.model.spec, plan.limits.max_pixels)
    except ImageError as error:
        if error.reason in ("missing", "unreadable", "outside-media"):
            check_media(plan, media_dir)
        return error


def check_media(plan: Plan, media_dir: Path) -> None:
    """Tell a missing file from a media folder that is gone.

    Raises:
        MachineFault: none of the plan's probes, readable when it was made, can be read.
    """
    if not any(os.access(media_dir / probe, os.R_OK) for probe in plan.probes):
        raise MachineFault(
            f"the media folder {media_dir} is gone, or not what it was: none of its known images is there"
        )


def _fail(plan: Plan, job: Job, error: ImageError) -> str:
    write_error(plan.error_file(plan.scheme.object_id(job.path)), error.reason, str(error))
    extra = {"event": "object_failed", "path": job.path, "reason": error.reason}
    if error.__cause__ is not None:
        # The decoder's own words: for the log only, they differ between releases and machines.
        extra["cause"] = repr(error.__cause__)
    logger.warning("%s", error, extra=extra)
    return FAILED
