"""The Celery tasks: thin coats around `embed_batch` and `reduce_segment`."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from celery import Celery
from redis.exceptions import LockError

from pipeline.errors import DeviceFault, MachineFault, ModelError, PlanMismatch, RuijiError
from pipeline.plans.files import OpenPlan, is_closed
from pipeline.plans.generations import is_plan_id
from pipeline.plans.plan import Plan
from pipeline.plans.stops import stop_plan
from pipeline.queue.batches import REST_S, register, register_batched
from pipeline.queue.chords import Chords
from pipeline.queue.keys import EMBED_TASK, REDUCE_TASK, lease_key
from pipeline.queue.leases import holding, lease
from pipeline.queue.outages import end_process, noted
from pipeline.reduce import missing_after_reread, reduce_segment
from pipeline.segments import Segments
from pipeline.versions import other_versions
from pipeline.watchdog import advance
from workers.embed import FAILED, LATE, SKIPPED, Job, embed_guarded
from workers.ledger import Ledger
from workers.permanent import Repeats
from workers.suspects.in_hand import InHand

if TYPE_CHECKING:
    from workers.encoder import Encoder

logger = logging.getLogger(__name__)

#: A dead reducer's segment goes to another after this long; a live one renews its lease.
_REDUCE_LEASE_S = 10.0
#: How long to wait for a segment that another reducer holds, before its task goes back to the queue.
_REDUCE_WAIT_S = 30.0
#: Another host's file may show late on a network folder.
_LATE_FILE_WAIT_S = 1.0
#: A segment whose features vanish is published again this often at once, then only by the watchdog.
_QUICK_HEALS = 3


def check_versions(plan: Plan) -> None:
    """Raise PlanMismatch if other library versions than the plan's would give other bits."""
    differing = [f"{name} {ours} (plan: {theirs})" for name, (theirs, ours) in other_versions(plan.versions).items()]
    if differing:
        raise PlanMismatch(
            f"this worker takes none of the plan's tasks, because its libraries differ: {', '.join(differing)}; "
            "install the plan's versions, or close the plan with ruiji cancel and enqueue again"
        )


def register_embed(
    app: Celery,
    folder: Path,
    media_dir: Path,
    encoder: "Encoder",
    client: redis.Redis,
    on_batch: Callable[[list[str]], None],
    on_rest: Callable[[str | None], None],
    stopping: threading.Event,
    hand: InHand,
    ledger: Ledger,
    decoders: Executor | None = None,
) -> None:
    """Register the embed task: `(plan id, segment, path)`, one image.

    Args:
        on_batch: told the outcomes of each batch.
        hand: told what is being worked on.
        decoders: threads that decode ahead of the encoder, where several batches are in hand at once.
    """
    plans, lines, repeats = OpenPlan(folder), _Lines(), Repeats(folder, client)

    def compute(calls: list[tuple[Any, ...]]) -> list[str]:
        try:
            return embed(calls)
        except PlanMismatch as error:
            # Permanent for this worker alone: others take what it gives back.
            logger.error("%s", error, extra={"event": "worker_unfit"})
            end_process(error.exit_code)
            raise MachineFault(str(error)) from error
        except DeviceFault as error:
            # CUDA does not recover within a process; the next one tries the model first.
            end_process(error.exit_code)
            raise
        except (MachineFault, redis.RedisError):
            raise
        except (OSError, MemoryError) as error:
            raise MachineFault(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            repeats.add(error)
            raise

    def embed(calls: list[tuple[Any, ...]]) -> list[str]:
        outcomes = [LATE] * len(calls)
        by_plan: dict[str, list[int]] = {}
        for number, call in enumerate(calls):
            if _well_formed(call):
                by_plan.setdefault(call[0], []).append(number)
        for plan_id, candidates in by_plan.items():
            plan = plans.get(plan_id)
            if plan is None:
                continue
            check_versions(plan)
            numbers = [n for n in candidates if _segment_exists(plan, calls[n][1]) and lines.hold(plan, *calls[n][1:])]
            jobs = [Job(plan.segments[calls[n][1]], calls[n][2]) for n in numbers]
            try:
                done = embed_guarded(plan, jobs, encoder, media_dir, hand, ledger, decoders)
            except ModelError as error:
                stop_plan(plan, str(error))
                continue
            for number, outcome in zip(numbers, done, strict=True):
                outcomes[number] = outcome
            _note_failures(client, plan, jobs, [outcomes[n] for n in numbers])
        on_batch(outcomes)
        return outcomes

    register_batched(
        app,
        EMBED_TASK,
        compute,
        batch_images=encoder.batch_images,
        on_rest=on_rest,
        stopping=stopping,
        busy=lambda: ledger.busy("queue"),
    )


class _Lines:
    """The lines of the segments that are worked on, of which a task has to be one.

    So a forged task can neither name a file of its own choice nor fail a healthy object by a wrong path.
    """

    #: A window's segments come one after the other, but for what is published again.
    _KEPT = 2

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], frozenset[str]] = {}

    def hold(self, plan: Plan, index: int, path: str) -> bool:
        key = (plan.plan_id, index)
        lines = self._kept.get(key)
        if lines is None:
            lines = frozenset(plan.paths(plan.segments[index]))
            self._kept = dict([*self._kept.items(), (key, lines)][-self._KEPT :])
        if path in lines:
            return True
        logger.warning("task refused: segment %d has no %r", index, path, extra={"event": "task_refused"})
        return False


def _well_formed(call: tuple[Any, ...]) -> bool:
    """Whether these are the arguments of an embed task; others are dropped, no producer of ours sends them."""
    if len(call) == 3 and isinstance(call[0], str) and is_plan_id(call[0]) and isinstance(call[2], str):
        return True
    logger.warning("task refused: its arguments are wrong", extra={"event": "task_refused"})
    return False


def _segment_exists(plan: Plan, index: object) -> bool:
    if isinstance(index, int) and 0 <= index < len(plan.segments):
        return True
    logger.warning("task refused: the plan has no segment %r", index, extra={"event": "task_refused"})
    return False


def _note_failures(client: redis.Redis, plan: Plan, jobs: list[Job], outcomes: list[str]) -> None:
    failed: dict[int, list[str]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        object_id = plan.scheme.object_id(job.path)
        # What failed in a batch that was given back is noted when it comes again.
        if outcome == FAILED or (outcome == SKIPPED and plan.has_failed(object_id)):
            failed.setdefault(job.segment.index, []).append(object_id)
    for index, object_ids in failed.items():
        Chords(client, plan.gallery_id, plan.plan_id).note_failed(index, object_ids)


def register_reduce(app: Celery, folder: Path, client: redis.Redis, window_segments: int) -> None:
    """Register the reduce task: `(plan id, segment)`, the body of the segment's chord."""
    plans, repeats = OpenPlan(folder), Repeats(folder, client)

    def reduce(plan_id: str, index: int) -> None:
        try:
            plan = plans.get(plan_id) if is_plan_id(plan_id) else None
            if plan is not None and _segment_exists(plan, index):
                reduce_and_advance(app, client, plan, index, window_segments)
        except (MachineFault, redis.RedisError, LockError, OSError) as error:
            if isinstance(error, redis.RedisError) and not isinstance(error, LockError):
                noted(error)
            else:
                logger.error("%s; the segment is given back", error, extra={"event": "machine_fault", "segment": index})
            time.sleep(_LATE_FILE_WAIT_S)
            raise
        except Exception as error:
            if isinstance(error, RuijiError):
                logger.error("%s; the segment is given back", error, extra={"event": "segment_failed"})
            else:
                logger.exception("a segment failed and is given back", extra={"event": "segment_failed"})
            repeats.add(error)
            time.sleep(REST_S)
            raise

    # What goes wrong is given back to the queue.
    register(app, REDUCE_TASK, reduce)


def reduce_and_advance(app: Celery, client: redis.Redis, plan: Plan, index: int, window_segments: int) -> None:
    """Reduce one segment under a lease; arm what is missing, or what comes next.

    Raises:
        MachineFault: the disk failed, or the plan was cancelled. LockError: another reducer holds the segment, or
            took it over.
    """
    segment, chords = plan.segments[index], Chords(client, plan.gallery_id, plan.plan_id)
    started = time.monotonic()
    held = lease(client, lease_key(plan.gallery_id, f"reduce.{index}"), _REDUCE_LEASE_S, wait_s=_REDUCE_WAIT_S)

    def still_ours() -> None:
        held.reacquire()
        # Spares work only: what is linked after the plan was closed does not exist.
        if is_closed(plan.folder, plan.plan_id):
            raise MachineFault(f"the plan {plan.plan_id} was closed meanwhile")

    with holding(held):
        reduced = reduce_segment(plan, segment, still_ours)
    if reduced.missing:
        time.sleep(_LATE_FILE_WAIT_S)
        missing = missing_after_reread(plan, reduced.missing)
        seen = chords.armed().get(index)
        if seen is not None and chords.finished_members([seen]) < [seen.size]:
            return  # The body of an older arming; the present one's will come.
        heals = seen.heals if seen else 0
        extra = {"event": "segment_incomplete", "shard": segment.shard, "images": len(missing), "heals": heals}
        logger.warning("features are missing", extra=extra)
        if heals < _QUICK_HEALS:
            Segments(app, client, plan).heal(segment, seen)
        return
    chords.forget(index)
    extra = {
        "event": "shard_published",
        "shard": segment.shard,
        "rows": reduced.rows,
        "failed": reduced.failed,
        "seconds": round(time.monotonic() - started, 2),
    }
    logger.info("shard published", extra=extra)
    advance(app, client, plan, window_segments)
