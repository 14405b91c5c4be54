"""Telling this machine that a process can take a task: a file that is touched as long as it can.

A health check then is a look at a file's age and costs nothing, however many workers there are:
`find STATE_DIR/ready -newermt '-10 seconds' | grep -q .`
"""

import contextlib
import os
import time
from pathlib import Path

from pipeline import layout

#: A file that was not touched for so long is no living process', or one's that waits; the latter makes it anew.
_LEFT_S = 60.0


def ready_file(state_dir: Path, pid: int) -> Path:
    """One process' file."""
    return layout.ready_folder(state_dir) / str(pid)


def remove_left_ready(state_dir: Path) -> None:
    """Remove what killed processes left."""
    for file in layout.ready_folder(state_dir).glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _LEFT_S:
                file.unlink()


class Readiness:
    """One process' file, `STATE_DIR/ready/<pid>`."""

    def __init__(self, state_dir: Path) -> None:
        self._file = ready_file(state_dir, os.getpid())

    def tell(self) -> None:
        """The process can take a task now; to be told again every few seconds."""
        # Where the state folder cannot be written, the process is only never called ready.
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()

    def leave(self) -> None:
        """The process ends."""
        with contextlib.suppress(OSError):
            self._file.unlink()
