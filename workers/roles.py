"""The two roles of a worker process as plain callables: embed a batch of images, reduce a segment.

They take the arguments of tasks, which anybody may have made up, and decide what a fault ends: nothing, this process or
the plan (docs/reliability.md, "Temporary and permanent faults"). If they raise, the work goes back to its queue.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from celery import Celery
from redis.exceptions import LockError

from pipeline.errors import DeviceFault, MachineFault, ModelError, PlanMismatch, RuijiError
from pipeline.plans.files import OpenPlan
from pipeline.plans.generations import is_plan_id
from pipeline.plans.plan import Plan
from pipeline.plans.stops import stop_plan
from pipeline.queue.batches import REST_S
from pipeline.queue.chords import Chords
from pipeline.queue.outages import end_process, noted
from pipeline.segments import LATE_FILE_WAIT_S, Segments
from pipeline.versions import other_versions
from workers.decode.ahead import Decoders
from workers.devices import DEVICE_FAILED
from workers.embed import DONE, FAILED, LATE, SKIPPED, Job, embed_guarded
from workers.ledger import Ledger
from workers.permanent import Repeats
from workers.suspects.in_hand import InHand

if TYPE_CHECKING:
    from workers.encoder import Encoder

logger = logging.getLogger(__name__)

#: A process whose GPU failed so often in a row gives its work back and ends.
_MOST_DEVICE_FAULTS = 2


def check_versions(plan: Plan) -> None:
    """Raise PlanMismatch if other library versions than the plan's would give other bits."""
    differing = [f"{name} {ours} (plan: {theirs})" for name, (theirs, ours) in other_versions(plan.versions).items()]
    if differing:
        raise PlanMismatch(
            f"this worker takes none of the plan's tasks, because its libraries differ: {', '.join(differing)}; "
            "install the plan's versions, or close the plan with ruiji cancel and enqueue again"
        )


class Embedder:
    """Embeds batches of images of the open plan."""

    def __init__(
        self,
        folder: Path,
        media_dir: Path,
        encoder: "Encoder",
        client: redis.Redis,
        on_batch: Callable[[list[str]], None],
        hand: InHand,
        ledger: Ledger,
        decoders: Decoders | None = None,
    ) -> None:
        """Make ready for the gallery in a folder.

        Args:
            on_batch: called with the outcomes of each batch.
            hand: where to say what is being worked on.
            decoders: threads that decode ahead of the encoder, if several batches are in hand at once.
        """
        self._plans, self._lines, self._repeats = OpenPlan(folder), _Lines(), Repeats(folder, client)
        self._media_dir, self._encoder, self._client = media_dir, encoder, client
        self._on_batch, self._hand, self._ledger, self._decoders = on_batch, hand, ledger, decoders
        # How many faults of the device came in a row, when the latest was counted, and whether any image was done.
        self._device_faults, self._faulted, self._worked = 0, -REST_S, False

    def __call__(self, calls: list[tuple[Any, ...]]) -> list[str]:
        """Embed what these calls, `(plan id, segment, path)`, name; returns the outcome of each.

        Raises:
            MachineFault, redis.RedisError: the work is to be done again, here or elsewhere.
            Exception: nobody foresaw this fault.
        """
        try:
            return self._embed(calls)
        except PlanMismatch as error:
            # Permanent for this worker alone: others take what it gives back.
            logger.error("%s", error, extra={"event": "worker_unfit"})
            end_process(error.exit_code)
            raise MachineFault(str(error)) from error
        except DeviceFault:
            self._note_device_fault()
            raise
        except (MachineFault, redis.RedisError):
            raise
        except (OSError, MemoryError) as error:
            raise MachineFault(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            self._repeats.add(error)
            raise

    def _embed(self, calls: list[tuple[Any, ...]]) -> list[str]:
        outcomes = [LATE] * len(calls)
        by_plan: dict[str, list[int]] = {}
        for number, call in enumerate(calls):
            if _well_formed(call):
                by_plan.setdefault(call[0], []).append(number)
        for plan_id, candidates in by_plan.items():
            plan = self._plans.get(plan_id)
            if plan is None:
                continue
            check_versions(plan)
            numbers = [
                number
                for number in candidates
                if _segment_exists(plan, calls[number][1]) and self._lines.hold(plan, *calls[number][1:])
            ]
            jobs = [Job(plan.segments[calls[number][1]], calls[number][2]) for number in numbers]
            try:
                done = embed_guarded(
                    plan, jobs, self._encoder, self._media_dir, self._hand, self._ledger, self._decoders
                )
            except ModelError as error:
                stop_plan(plan, str(error))
                continue
            for number, outcome in zip(numbers, done, strict=True):
                outcomes[number] = outcome
            self._note_failures(plan, jobs, [outcomes[number] for number in numbers])
        if DONE in outcomes:
            self._device_faults, self._worked = 0, True
        self._on_batch(outcomes)
        return outcomes

    def _note_device_fault(self) -> None:
        """End the process at the second in a row: CUDA reports most faults until its process ends."""
        now = time.monotonic()
        # Batches that come while another rests for a fault fail of the same one.
        if now - self._faulted < REST_S:
            return
        self._device_faults, self._faulted = self._device_faults + 1, now
        if self._device_faults >= _MOST_DEVICE_FAULTS:
            end_process(RuijiError.exit_code if self._worked else DEVICE_FAILED)

    def _note_failures(self, plan: Plan, jobs: list[Job], outcomes: list[str]) -> None:
        failed: dict[int, list[str]] = {}
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome not in (FAILED, SKIPPED):
                continue
            object_id = plan.scheme.object_id(job.path)
            # What failed in a batch that was given back is noted when it comes again.
            if outcome == FAILED or plan.has_failed(job.segment, object_id):
                failed.setdefault(job.segment.index, []).append(object_id)
        for index, object_ids in failed.items():
            Chords(self._client, plan.gallery_id, plan.plan_id).note_failed(index, object_ids)


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


class Reducer:
    """Reduces segments of the open plan that are due, and arms what comes next."""

    def __init__(
        self,
        app: Celery,
        folder: Path,
        client: redis.Redis,
        window_segments: int,
        hand: InHand,
        rest: Callable[[str | None, float], None],
    ) -> None:
        """Make ready for the gallery in a folder.

        Args:
            hand: where to say what is being worked on.
            rest: waits so many seconds, and shows the reason if it is given one.
        """
        self._app, self._client, self._window = app, client, window_segments
        self._hand, self._rest = hand, rest
        self._plans, self._repeats = OpenPlan(folder), Repeats(folder, client)

    def __call__(self, plan_id: str, index: int) -> None:
        """Reduce one segment; after a fault rest a while.

        Raises:
            MachineFault, redis.RedisError, OSError: the work is to be done again, here or elsewhere.
            Exception: nobody foresaw this fault.
        """
        try:
            plan = self._plans.get(plan_id) if is_plan_id(plan_id) else None
            if plan is not None and _segment_exists(plan, index):
                in_hand = partial(self._hand.segment, plan_id, index)
                Segments(self._app, self._client, plan).reduce(plan.segments[index], self._window, in_hand)
        except LockError as error:
            logger.error("%s; the segment is given back", error, extra={"event": "machine_fault", "segment": index})
            self._rest(None, LATE_FILE_WAIT_S)
            raise
        except redis.RedisError as error:
            noted(error)
            self._rest(None, LATE_FILE_WAIT_S)
            raise
        except (MachineFault, OSError) as error:
            logger.error("%s; the segment is given back", error, extra={"event": "machine_fault", "segment": index})
            self._rest(str(error), REST_S)
            raise
        except Exception as error:
            if isinstance(error, RuijiError):
                logger.error("%s; the segment is given back", error, extra={"event": "segment_failed"})
            else:
                logger.exception("a segment failed and is given back", extra={"event": "segment_failed"})
            self._repeats.add(error)
            self._rest(str(error), REST_S)
            raise


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
