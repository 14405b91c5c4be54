"""Starting child processes: they die with their parent, and run no code of the folder that they are started in."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours in this Python.

    `-m` alone would put the current folder first on the path, so that a `numpy.py` beside somebody's photos is run.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


#: Exit code of a worker process that an exception ended which nobody foresaw. Only its supervisor sees it.
CRASHED = 70


def start_child(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Start a child in a session of its own, which Ctrl-C does not reach; it is told to end when its parent dies.

    Args:
        options: as `subprocess.Popen` has them.
    """
    return subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent, **options)


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, however that dies; runs in a new child."""
    pr_set_pdeathsig = 1
    # Not on Linux: an orphan stays until it is stopped by hand.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
