"""What `ruiji worker` ends with."""

import errno
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import layout
from pipeline.children import CRASHED, start_child
from pipeline.choices import Role
from pipeline.plans.stuck import stuck, try_again
from pipeline.worker_settings import WorkerSettings
from tests.conftest import ROOT
from tests.pipeline.galleries import new_plan
from workers.places import Place
from workers.supervisor import Supervisor

#: A process that ends with some code once it is told to stop; it makes a file when it listens.
CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
open(sys.argv[2], "w").close()
time.sleep(300)
"""


def settings(tmp_path: Path) -> WorkerSettings:
    """Of a worker whose processes are not ruiji's."""
    return WorkerSettings(
        media_dir=tmp_path, feature_dir=tmp_path, model=Path("m.onnx"), redis_url="redis://x", state_dir=tmp_path
    )


@contextmanager
def signals_kept() -> Iterator[None]:
    """A supervisor takes the signals of its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopped_once(so_far: Callable[[], object]) -> Iterator[None]:
    """Tell this process to stop as soon as something is so."""

    def wait() -> None:
        while not so_far():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    with signals_kept():
        thread.start()
        try:
            yield
        finally:
            thread.join()


@pytest.mark.parametrize(("status", "code"), [(0, 0), (1, 0), (4, 4), (2, 2)])
def test_a_worker_that_is_told_to_stop_says_if_it_can_never_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    listening = tmp_path / "listening"
    command = [sys.executable, "-c", CHILD, str(status), str(listening)]
    monkeypatch.setattr("workers.supervisor.python_command", lambda *_: command)
    with stopped_once(listening.exists):
        assert Supervisor([Place(Role.reduce)], settings(tmp_path)).run() == code


@pytest.mark.parametrize("end", [f"os.kill(os.getpid(), {signal.SIGSEGV})", f"sys.exit({CRASHED})"])
def test_a_worker_ends_if_its_processes_die_again_and_again_with_nothing_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    monkeypatch.setattr("workers.supervisor._LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(
        "workers.supervisor.python_command", lambda *_: [sys.executable, "-Ic", f"import os, sys; {end}"]
    )
    with signals_kept():
        assert Supervisor([Place(Role.reduce)], settings(tmp_path)).run() == 1
    deaths = [record for record in caplog.records if record.event == "process_died"]
    assert len(deaths) == 12
    assert "reduce in a row died with nothing in hand" in caplog.text


def test_processes_that_end_with_a_fault_that_may_pass_are_started_again_for_as_long_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.supervisor._LONGEST_PAUSE_S", 0.01)
    enough = tmp_path / "enough"
    count = "from pathlib import Path; import sys; file = Path(sys.argv[1]); file.write_text(file.read_text() + '.')"
    tries = tmp_path / "tries"
    tries.write_text("")
    script = f"{count}\nif len(file.read_text()) > 20: Path(sys.argv[2]).touch()\nsys.exit(1)"
    command = [sys.executable, "-Ic", script, str(tries), str(enough)]
    monkeypatch.setattr("workers.supervisor.python_command", lambda *_: command)
    with stopped_once(enough.exists):
        assert Supervisor([Place(Role.reduce)], settings(tmp_path)).run() == 0


def test_a_process_that_cannot_be_started_again_now_is_started_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("workers.supervisor._LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr("workers.supervisor.python_command", lambda *_: [sys.executable, "-Ic", "raise SystemExit(1)"])
    starts = itertools.count()

    def start(*arguments: Any, **options: Any) -> Any:
        if next(starts) in (1, 2):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start_child(*arguments, **options)

    monkeypatch.setattr("workers.supervisor.start_child", start)
    supervisor, ended = Supervisor([Place(Role.reduce)], settings(tmp_path)), threading.Event()
    with stopped_once(lambda: len(caplog.records) > 4 or ended.is_set()):
        try:
            assert supervisor.run() == 0
        finally:
            ended.set()
    said = [record.getMessage() for record in caplog.records]
    assert said.count("a worker process cannot be started: Resource temporarily unavailable") == 2


#: Dies with something in hand that a plan would be to blame for.
HOLDS = """
import os, sys
from pathlib import Path
from workers.suspects.in_hand import InHand
with InHand(Path(os.environ["RUIJI_IN_HAND"])).segment(sys.argv[1], 1):
    os.kill(os.getpid(), 9)
"""


def test_a_death_with_a_segment_in_hand_is_held_against_the_segment_alone(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = new_plan(tmp_path, model_path, 12)
    monkeypatch.setattr("workers.supervisor._LONGEST_PAUSE_S", 0.01)
    command = [sys.executable, "-c", HOLDS, plan.plan_id]
    monkeypatch.setattr("workers.supervisor.python_command", lambda *_: command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told = replace(settings(tmp_path), feature_dir=tmp_path / "features", model=model_path)
    trouble = layout.segment_trouble_file(plan.folder, plan.plan_id, 1)

    def deaths() -> int:
        return int(json.loads(trouble.read_text())["deaths"]) if trouble.exists() else 0

    with stopped_once(lambda: deaths() > 13):
        assert Supervisor([Place(Role.reduce)], told).run() == 0
    assert set(stuck(plan)) == {1}
    assert try_again(plan) == [1]
    assert stuck(plan) == {}
