"""What `ruiji worker` ends with."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.choices import Role
from pipeline.worker_settings import WorkerSettings
from workers.places import Place
from workers.supervisor import Supervisor

#: A process that ends with some code once it is told to stop; it makes a file when it listens.
CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
open(sys.argv[2], "w").close()
time.sleep(300)
"""


@contextmanager
def stopped_once(there: Path) -> Iterator[None]:
    """Tell this process to stop as soon as a file is there."""

    def wait() -> None:
        while not there.exists():
            ended.wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    ended = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("status", "code"), [(0, 0), (1, 0), (4, 4), (2, 2)])
def test_a_worker_that_is_told_to_stop_says_if_it_can_never_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    listening = tmp_path / "listening"
    command = [sys.executable, "-c", CHILD, str(status), str(listening)]
    monkeypatch.setattr("workers.supervisor.python_command", lambda *_: command)
    settings = WorkerSettings(
        media_dir=tmp_path, feature_dir=tmp_path, model=Path("m.onnx"), redis_url="redis://x", state_dir=tmp_path
    )
    with stopped_once(listening):
        assert Supervisor([Place(Role.reduce)], settings).run() == code
