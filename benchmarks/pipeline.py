"""ruiji as a user starts it on one machine: `ruiji redis`, `ruiji worker`, `ruiji enqueue`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from benchmarks.data import ROOT
from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.gallery import claim_gallery
from pipeline.model import load_model
from pipeline.objects import IdScheme
from pipeline.plans.files import open_plan
from pipeline.queue.connection import connect
from pipeline.status import StatusReader

#: Nothing here takes as long.
_TIMEOUT_S = 900.0


def wait_until(condition: Callable[[], object], what: str, check: Callable[[], object]) -> None:
    """Poll until the condition holds.

    Args:
        check: called at each look; raises an error if what is waited for cannot come any more.

    Raises:
        RuntimeError: it did not within 15 minutes.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(0.05)


class Ruiji:
    """Starts `ruiji` commands on one media folder, model and working folder."""

    def __init__(self, media: Path, model: Path, work: Path, **settings: str) -> None:
        """Make the gallery, as an earlier enqueue would have.

        Args:
            work: an empty folder for features and state.
            settings: further `RUIJI_…` variables, lower case, without the prefix.
        """
        self.state = work / "state"
        self.gallery = layout.gallery_folder(work / "features", model)
        values = {"media_dir": media, "feature_dir": work / "features", "model": model, "state_dir": self.state}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RUIJI_")}
        named = {f"RUIJI_{name.upper()}": str(value) for name, value in (values | settings).items()}
        # This checkout first; packages may lie in the other folders.
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # The commands' own defaults, whatever stands in a .env here.
        self._environment = {**clean, "PYTHONPATH": python_path, **named}
        self._work = work
        self.gallery_info = claim_gallery(self.gallery, load_model(model), IdScheme(ObjectIds.basename))
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(
        self, *arguments: str, module: str = "pipeline", log: str | None = None, **variables: str
    ) -> "subprocess.Popen[bytes]":
        """Start a command that stays, with further variables; its stderr goes to a log in the working folder.

        Args:
            module: of which it is a command.
            log: the log's name; by default the command's.
        """
        name = log or arguments[0]
        with (self._work / f"{name}.log").open("ab") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=self._environment | variables,
                cwd=self._work,
                stderr=stderr,
            )
        self._running.append((name, process))
        return process

    def run(self, *arguments: str) -> None:
        """Run a command to its end.

        Raises:
            RuntimeError: it failed; with its last words.
        """
        self.start(*arguments).wait()
        self.check()

    def check(self) -> None:
        """Nothing comes after the end of a command that failed.

        Raises:
            RuntimeError: one has; with its last words.
        """
        for name, process in self._running:
            if code := process.poll():
                told = (self._work / f"{name}.log").read_text(errors="replace").splitlines()[-5:]
                raise RuntimeError(f"ruiji {name} ended with {code}: {told}")

    def start_redis(self) -> redis.Redis:
        """Start the embedded Redis; returns a client."""
        self.start("redis")
        wait_until(lambda: (self.state / "redis.url").exists() and self.redis_url, "the embedded Redis", self.check)
        return connect(self.redis_url)

    @property
    def redis_url(self) -> str:
        """The embedded Redis."""
        return (self.state / "redis.url").read_text().strip()

    def start_workers(self, client: redis.Redis, processes: int, *arguments: str) -> None:
        """Start `ruiji worker` and wait until so many of its processes have told that they are ready.

        Raises:
            RuntimeError: it failed.
        """
        self.start("worker", *arguments)
        reader = StatusReader(self.gallery, client)
        wait_until(lambda: len(reader.read().workers) >= processes, "the workers", self.check)

    def enqueue(self, listed: Path) -> None:
        """Start an enqueue, which goes on publishing, and wait for its plan.

        Raises:
            RuntimeError: it failed.
        """
        process = self.start("enqueue", "--list", str(listed))
        wait_until(lambda: open_plan(self.gallery) or process.poll() == 0, "the plan", self.check)

    def finished(self) -> bool:
        """Whether the plan is closed and its per-image files and their folders are gone.

        Raises:
            RuntimeError: a command failed.
        """
        self.check()
        return open_plan(self.gallery) is None and not any(self.gallery.glob("[0-9a-f][0-9a-f]"))

    def stop(self) -> None:
        """Stop everything, in order."""
        for _, process in reversed(self._running):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()


@contextmanager
def ruiji(media: Path, model: Path, work: Path, **settings: str) -> Iterator[Ruiji]:
    """A `Ruiji` whose processes end with the block."""
    running = Ruiji(media, model, work, **settings)
    try:
        yield running
    finally:
        running.stop()
