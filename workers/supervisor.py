"""The supervisor: keeps a machine's embed and reduce processes running, and ends them in order.

It also finds out which objects a process had in hand when it died, or does not get done with.
"""

import logging
import os
import secrets
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from pipeline import layout
from pipeline.children import python_command, start_child
from pipeline.choices import Device, Reason, Role
from pipeline.errors import RuijiError
from pipeline.gallery import read_gallery
from pipeline.plans.files import open_plan
from pipeline.plans.stuck import note_death
from pipeline.queue.connection import connect
from pipeline.worker_settings import WorkerSettings
from workers.devices import DEVICE_FAILED, LONGEST_PAUSE_S
from workers.places import Place
from workers.readiness import ready_file, remove_left_ready
from workers.suspects.deaths import note_deaths
from workers.suspects.in_hand import TRIAL, Hold, left_behind, read_in_hand

if TYPE_CHECKING:
    from workers.heartbeat import Report

logger = logging.getLogger(__name__)

#: After a SIGTERM a process finishes what it has in hand; one batch never takes this long.
STOP_TIMEOUT_S = 60.0
#: A process that keeps dying is started again after 1, 2, 4 … at most this many seconds.
_LONGEST_PAUSE_S = 30.0
#: A process that lived this long was healthy.
_HEALTHY_S = 30.0
#: Exit codes of a process that can never work (usage, inconsistent data): starting it again is useless.
_HOPELESS = (2, 4)
#: Where so many processes in a row died before they had encoded a grey picture, this machine cannot run the model.
_MOST_TRIALS = 5
#: Where so many in a row died young and with nothing in hand, no process of the kind can run here.
_MOST_IDLE_DEATHS = 12
#: Where so many in a row on a GPU did not get one image done, the GPU is given up, and tried again ever more seldom.
_MOST_STARTS = 3
#: How often a GPU that was given up is reported.
_REPORT_INTERVAL_S = 2.0
#: How often a process is looked at for a batch that does not end.
_LOOK_INTERVAL_S = 1.0


#: What docker compose calls the memory of each role.
_MEMORY = {Role.embed: "WORKER_MEMORY", Role.reduce: "REDUCER_MEMORY", Role.compare: "COMPARER_MEMORY"}


def _how(status: int, role: Role) -> str:
    """What the end of a process means, in words."""
    if status == -signal.SIGKILL:
        return (
            f"it was killed; if nobody did that, memory ran out: give it more (with docker compose {_MEMORY[role]}), "
            "or run fewer processes"
        )
    if status == DEVICE_FAILED:
        return "its GPU failed before an image was done; the lines above say why"
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}" if -status in signal.valid_signals() else "by a signal"
    return f"it ended with exit code {status}; the lines above say why"


def _given_up(child: "_Child") -> str:
    assert child.due is not None
    wait_s = max(0.0, child.due - time.monotonic())
    return (
        f"{child.place.gpu} was given up after {child.failed_starts} starts without one image done; tried again in "
        f"{wait_s:.0f} s, the worker's log says why"
    )


def _withdraw(child: "_Child") -> None:
    if child.report is not None:
        child.report.remove()


@dataclass
class _Child:
    """One process, or the place of one that is to be started again.

    Attributes:
        in_hand: the file in which it tells what it works on.
        holds: what it was seen to have in hand, by number, and since when.
        worked: whether it was seen to go from one batch to another.
        hung: whether it was ended for a batch that took too long.
        failed_starts: how often in a row it, and those before it in this place, died before a grey picture was through,
            or, on a GPU, an image.
        idle_deaths: how often in a row they died young with nothing in hand that could be to blame.
        due: when the place is to be filled again.
        report: of a place that is empty because its GPU was given up, and when that was last sent.
    """

    place: Place
    process: "subprocess.Popen[bytes]"
    in_hand: Path
    started: float = field(default_factory=time.monotonic)
    holds: dict[int, float] = field(default_factory=dict)
    looked: float = 0.0
    worked: bool = False
    hung: bool = False
    deaths: int = 0
    failed_starts: int = 0
    idle_deaths: int = 0
    due: float | None = None
    report: "Report | None" = None
    reported: float = 0.0

    @property
    def given_up(self) -> bool:
        """Whether the place is empty because its GPU does not work."""
        return self.due is not None and self.place.gpu is not None and self.failed_starts >= _MOST_STARTS


class Supervisor:
    """Runs `ruiji worker-process` children, one per place given."""

    def __init__(self, places: list[Place], settings: WorkerSettings) -> None:
        """Remember what to run.

        Args:
            settings: of the processes, but for the file of each.
        """
        self._places = places
        self._settings = settings
        self._gallery = settings.folder
        self._state_dir = settings.state_dir
        remove_left_ready(self._state_dir)
        self._in_hand = layout.in_hand_folder(self._state_dir, self._gallery)
        try:
            self._in_hand.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._in_hand.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise RuijiError(
                f"cannot write the state folder {self._state_dir}: {error.strerror}; name one on this host with "
                "RUIJI_STATE_DIR (--state-dir)"
            ) from None
        # Whether processes died, here or before this start, whose files were not looked at.
        self._unread = True
        self._unread_why = ""
        self._stopping = False

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; returns the exit code.

        That is 0 after an orderly stop, and a child's own where that says it can never work.
        """
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._stop)
        children = [self._start(place) for place in self._places]
        code = 0
        while not self._stopping and not code:
            time.sleep(0.2)
            if self._unread:
                self._find_suspects(children)
            for number, child in enumerate(children):
                code = code or self._tend(child)
                if child.given_up:
                    self._report(child)
                if child.due is not None and time.monotonic() >= child.due:
                    try:
                        after = self._start(child.place)
                    except OSError as error:
                        # Too little memory, or too many processes: as likely to pass as what ended the last one.
                        child.due = time.monotonic() + _LONGEST_PAUSE_S
                        extra = {"event": "process_died", "role": child.place.role, "restart_in_s": _LONGEST_PAUSE_S}
                        logger.warning("a worker process cannot be started: %s", error.strerror, extra=extra)
                        continue
                    _withdraw(child)
                    children[number] = after
                    after.deaths, after.failed_starts = child.deaths, child.failed_starts
                    after.idle_deaths = child.idle_deaths
        self._end(children)
        self._find_suspects(children)
        # One may have found out while it was told to stop.
        return code or next((status for child in children if (status := child.process.returncode) in _HOPELESS), 0)

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True

    def _start(self, place: Place) -> _Child:
        command = python_command("pipeline", "worker-process", "--role", place.role)
        in_hand = self._in_hand / secrets.token_hex(8)
        told = replace(self._settings, in_hand=in_hand, gpu=place.gpu.uuid if place.gpu is not None else None)
        # Its own session: Ctrl-C reaches the supervisor only, which then ends its children in order.
        # Celery says good-bye on stdout, which is for answers; events go to stderr.
        process = start_child(
            command,
            env={**os.environ, **self._threads(place), **place.variables(), **told.environment()},
            stdout=subprocess.DEVNULL,
        )
        return _Child(place, process, in_hand)

    def _threads(self, place: Place) -> dict[str, str]:
        """What numpy and torch multiply with; they ask when they are loaded. The encoder is told otherwise."""
        return {"OMP_NUM_THREADS": str(self._settings.threads)} if place.role is Role.compare else {}

    def _tend(self, child: _Child) -> int:
        if child.due is not None:
            return 0
        status = child.process.poll()
        if status is None:
            self._look(child)
            return 0
        if status in _HOPELESS:
            return status
        holds = read_in_hand(child.in_hand)
        child.failed_starts = child.failed_starts + 1 if TRIAL in holds or status == DEVICE_FAILED else 0
        now = time.monotonic()
        healthy = not child.failed_starts and (child.worked or now - child.started > _HEALTHY_S)
        child.deaths = 1 if healthy else child.deaths + 1
        if holds or healthy:
            child.idle_deaths = 0  # What it has in hand is to blame, or nothing.
        elif status not in (RuijiError.exit_code, DEVICE_FAILED):
            child.idle_deaths += 1  # Others end with a fault that may pass, such as a Redis that is away.
        given_up = child.place.gpu is not None and child.failed_starts >= _MOST_STARTS
        pause = min(LONGEST_PAUSE_S if given_up else _LONGEST_PAUSE_S, 2.0 ** (child.deaths - 1))
        child.due = now + pause
        self._unread = True
        extra = {"event": "process_died", "role": child.place.role, "status": status, "restart_in_s": pause}
        ready_file(self._state_dir, child.process.pid).unlink(missing_ok=True)
        logger.warning("a worker process died: %s", _how(status, child.place.role), extra=extra)
        if given_up and child.failed_starts == _MOST_STARTS:
            logger.error("%s", _given_up(child), extra={"event": "gpu_given_up"})
        if child.idle_deaths >= _MOST_IDLE_DEATHS:
            logger.error(
                "%d processes with the role %s in a row died with nothing in hand, the last one like this: %s",
                child.idle_deaths,
                child.place.role,
                _how(status, child.place.role),
                extra={"event": "worker_unfit"},
            )
            return RuijiError.exit_code
        if child.place.gpu is not None or child.failed_starts < _MOST_TRIALS:
            return 0
        logger.error(
            "this machine cannot run the model: %d processes in a row ended with status %d before they had encoded "
            "a grey picture; is there too little memory? Give it more (compose: WORKER_MEMORY), or run fewer processes",
            child.failed_starts,
            status,
            extra={"event": "worker_unfit"},
        )
        return RuijiError.exit_code

    def _report(self, child: _Child) -> None:
        """Show in `ruiji status` that a GPU was given up: nobody else does while no process is on it."""
        now = time.monotonic()
        if now - child.reported < _REPORT_INTERVAL_S:
            return
        child.reported = now
        try:
            gallery = read_gallery(self._gallery)
            if child.report is None and gallery is not None:
                # It loads numpy and Pillow, for which an ordinary supervisor has no use.
                from workers.heartbeat import Report
                from workers.ledger import Ledger

                client = connect(self._settings.redis_url)
                pid = child.process.pid
                child.report = Report(client, gallery.gallery_id, child.place.role, Ledger(), Device.cuda, pid)
            if child.report is not None:
                child.report.send(f"waiting: {_given_up(child)}")
        except (redis.RedisError, RuijiError, OSError):
            # It is in the log too.
            return

    def _look(self, child: _Child) -> None:
        """End a process that does not get done with what it has in hand."""
        now = time.monotonic()
        if child.place.role is not Role.embed or now - child.looked < _LOOK_INTERVAL_S:
            return
        child.looked = now
        holds = read_in_hand(child.in_hand)
        child.worked = child.worked or any(number > 1 for number in holds)
        child.holds = {number: child.holds.get(number, now) for number in holds}
        for number, hold in holds.items():
            if hold.limit_s is not None and now - child.holds[number] > hold.limit_s:
                extra = {"event": "process_hangs", "images": len(hold.paths), "limit_s": hold.limit_s}
                logger.warning("a worker process takes too long for its images and is ended", extra=extra)
                child.hung = True
                child.process.kill()
                return

    def _find_suspects(self, children: list[_Child]) -> None:
        """Note what dead processes of this machine had in hand, those of earlier supervisors too."""
        hung = {child.in_hand for child in children if child.hung}
        try:
            for path in sorted(self._in_hand.iterdir()):
                with left_behind(path) as holds:
                    for hold in holds or ():
                        self._suspect(hold, path in hung)
        except (OSError, RuijiError) as error:
            # The suspects stay in their files until the folder can be written again; it is looked at all the time.
            if str(error) != self._unread_why:
                logger.warning("cannot note suspects: %s", error, extra={"event": "suspects_wait"})
            self._unread_why = str(error)
        else:
            self._unread, self._unread_why = False, ""

    def _suspect(self, hold: Hold, hung: bool) -> None:
        plan = open_plan(self._gallery)
        if plan is None or plan.plan_id != hold.plan:
            return
        if hold.segment is not None:
            if hold.segment < len(plan.segments):
                note_death(plan, plan.segments[hold.segment])
            return
        # Alone, it was decoded already, and the model runs on other pixels.
        note_deaths(plan, hold.paths, Reason.timeout if hung and not hold.alone else Reason.crashed_worker, hold.alone)
        extra = {"event": "suspects_found", "images": len(hold.paths), "alone": hold.alone}
        if len(hold.paths) == 1:
            extra["path"] = hold.paths[0]
        logger.warning("images of a dead process run alone next time", extra=extra)

    def _end(self, children: list[_Child]) -> None:
        for child in children:
            _withdraw(child)
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
