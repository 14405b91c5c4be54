"""The supervisor: keeps a machine's embed and reduce processes running, and ends them in order."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.broker.embedded import die_with_parent

logger = logging.getLogger(__name__)

#: After a SIGTERM a process finishes what it has in hand; one batch never takes this long.
STOP_TIMEOUT_S = 60.0
#: A process that keeps dying is started again after 1, 2, 4 … at most this many seconds.
_LONGEST_PAUSE_S = 30.0
#: A process that lived this long was healthy.
_HEALTHY_S = 30.0
#: Exit codes of a process that can never work (usage, inconsistent data): starting it again is useless.
_HOPELESS = (2, 4)


@dataclass
class _Child:
    role: str
    process: "subprocess.Popen[bytes]"
    started: float = field(default_factory=time.monotonic)
    deaths: int = 0
    due: float | None = None


class Supervisor:
    """Runs `ruiji worker-process` children, one per role given."""

    def __init__(self, roles: list[str], environment: dict[str, str]) -> None:
        """Remember what to run.

        Args:
            roles: `embed` or `reduce`, one a process.
            environment: the children's settings, as `RUIJI_…` variables.
        """
        self._roles = roles
        self._environment = {**os.environ, **environment}
        self._stopping = False

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; returns the exit code.

        That is 0 after an orderly stop, and a child's own where that says it can never work.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        children = [_Child(role, self._start(role)) for role in self._roles]
        code = 0
        while not self._stopping and not code:
            time.sleep(0.2)
            for child in children:
                code = code or self._tend(child)
        self._end(children)
        return code

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True

    def _start(self, role: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "pipeline", "worker-process", "--role", role]
        # Its own session: Ctrl-C reaches the supervisor only, which then ends its children in order.
        # Celery says good-bye on stdout, which is for answers; events go to stderr.
        return subprocess.Popen(
            command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def _tend(self, child: _Child) -> int:
        now = time.monotonic()
        if child.due is not None:
            if now >= child.due:
                child.process, child.started, child.due = self._start(child.role), now, None
            return 0
        status = child.process.poll()
        if status is None:
            return 0
        if status in _HOPELESS:
            return status
        child.deaths = 1 if now - child.started > _HEALTHY_S else child.deaths + 1
        pause = min(_LONGEST_PAUSE_S, 2.0 ** (child.deaths - 1))
        child.due = now + pause
        extra = {"event": "process_died", "role": child.role, "status": status, "restart_in_s": pause}
        logger.warning("a worker process died", extra=extra)
        return 0

    def _end(self, children: list[_Child]) -> None:
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
