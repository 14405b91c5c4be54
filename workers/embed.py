"""One batch of objects, from paths to feature or error files, as a plain function without Celery."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ImageError, MachineFault, ObjectListError
from pipeline.objects import check_path
from pipeline.plan import Plan, Segment
from pipeline.store import read_error, read_feature, shard_file, write_error, write_feature
from workers.images import load_pixels

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


def embed_batch(plan: Plan, jobs: Iterable[Job], encoder: "Encoder", media_dir: Path) -> list[str]:
    """Embed a batch; afterwards every object has a feature file, an error file or a published shard.

    Args:
        jobs: of one plan.
        encoder: of the plan's model.

    Returns:
        One of DONE, FAILED, SKIPPED, LATE for each job, in order.

    Raises:
        MachineFault: media folder gone, disk full, device failed. Some objects of the batch may be
            done; running it again does the rest.
    """
    jobs = list(jobs)
    outcomes = [SKIPPED] * len(jobs)
    waiting: list[tuple[int, NDArray[np.uint8]]] = []
    for number, job in enumerate(jobs):
        object_id = plan.scheme.object_id(job.path)
        if _refused(job) or _published(plan, job):
            outcomes[number] = LATE
        elif (
            read_feature(plan.feature_file(object_id), plan.length) is None
            and read_error(plan.error_file(object_id)) is None
        ):
            try:
                waiting.append((number, _load(plan, job.path, media_dir, encoder)))
            except ImageError as error:
                outcomes[number] = _fail(plan, job, error)
    if not waiting:
        return outcomes
    features = encoder.encode(np.stack([pixels for _, pixels in waiting]))
    for (number, _), feature in zip(waiting, features, strict=True):
        job = jobs[number]
        if np.isfinite(feature).all():
            write_feature(plan.feature_file(plan.scheme.object_id(job.path)), feature)
            outcomes[number] = DONE
        else:
            outcomes[number] = _fail(plan, job, ImageError("the model gives values that are not finite", "not-finite"))
    if not plan.keep_features:
        for number, job in enumerate(jobs):
            # A task that came twice and late: its shard was published between the two looks.
            if outcomes[number] in (DONE, FAILED) and _published(plan, job):
                object_id = plan.scheme.object_id(job.path)
                plan.feature_file(object_id).unlink(missing_ok=True)
                plan.error_file(object_id).unlink(missing_ok=True)
                outcomes[number] = LATE
    return outcomes


def _refused(job: Job) -> bool:
    try:
        check_path(job.path)
    except ObjectListError as error:
        # No list holds such a path, so the task is not the producer's; it may not even fail an object.
        logger.warning("task refused: %s", error, extra={"event": "task_refused"})
        return True
    return False


def _published(plan: Plan, job: Job) -> bool:
    return shard_file(plan.folder, job.segment.shard, "json").exists()


def _load(plan: Plan, path: str, media_dir: Path, encoder: "Encoder") -> NDArray[np.uint8]:
    try:
        if not _inside(media_dir, path):
            raise ImageError("a link leads out of the media folder", "outside-media")
        return load_pixels(media_dir / path, encoder.model.spec, plan.limits.max_pixels)
    except ImageError as error:
        if error.reason in ("missing", "unreadable", "outside-media"):
            check_media(plan, media_dir)
        raise


def _inside(media_dir: Path, path: str) -> bool:
    root = os.path.realpath(media_dir)
    return os.path.realpath(os.path.join(root, path)).startswith(root.rstrip("/") + "/")


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
