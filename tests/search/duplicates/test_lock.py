"""One writer at a time: several at once, killed ones, sleeping ones, and ones on other machines."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import layout
from pipeline.errors import MachineFault
from search.duplicates import lock
from search.duplicates.lock import one_writer
from tests.conftest import ROOT
from tests.factories import wait_until

HOLDER = """
import sys, time
from pathlib import Path
from search.duplicates.lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def held_elsewhere(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_only_one_of_many_holds_it_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(10):
            with one_writer(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 60 and set(most) == {1}
    assert len(list((tmp_path / "lock").iterdir())) == 1, "passed numbers are removed"


def test_the_lock_of_a_killed_process_is_taken_at_once_and_that_of_a_live_one_never(tmp_path: Path) -> None:
    process = held_elsewhere(tmp_path)
    with pytest.raises(MachineFault, match=f"process {process.pid} on "), one_writer(tmp_path, wait_s=0.5):
        pass
    process.kill()
    # Also while nobody has asked how it ended: a zombie.
    wait_until(lambda: lock._started(process.pid) is None, what="its end")
    with one_writer(tmp_path, quiet_s=1000, wait_s=5):
        pass
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    me = lock._Holder("here", os.getpid(), lock._place(), 1)
    layout.writer_lock_file(tmp_path, 1).write_bytes(lock._bytes(me))
    with one_writer(tmp_path, quiet_s=1000, wait_s=5):
        pass


@pytest.mark.parametrize("content", ["elsewhere", "empty"])
def test_a_holder_that_nobody_can_ask_is_dead_once_it_was_quiet_for_long_enough(tmp_path: Path, content: str) -> None:
    other = lock._bytes(lock._Holder("elsewhere", 1, "another start pid:[1]", 1)) if content == "elsewhere" else b""
    layout.writer_lock_file(tmp_path, 7).write_bytes(other)
    with pytest.raises(MachineFault, match="try again"), one_writer(tmp_path, quiet_s=1000, wait_s=0.3):
        pass
    with one_writer(tmp_path, quiet_s=0.3, wait_s=60):
        assert json.loads(layout.writer_lock_file(tmp_path, 8).read_bytes())["pid"] == os.getpid()


def test_one_that_slept_too_long_notices_and_frees_nobody_elses(tmp_path: Path) -> None:
    with one_writer(tmp_path) as slept:
        slept.check()
        number = lock._last(tmp_path)
        # Another one took it for dead.
        me = lock._Holder("here", os.getpid(), lock._place(), lock._started(os.getpid()) or 0)
        layout.writer_lock_file(tmp_path, number + 1).write_bytes(lock._bytes(me))
        with pytest.raises(MachineFault, match="slept"):
            slept.check()
    with pytest.raises(MachineFault, match="holds"), one_writer(tmp_path, wait_s=0.3):
        pass
    layout.writer_lock_file(tmp_path, number + 1).write_bytes(lock._bytes(replace(me, free=True)))
    with one_writer(tmp_path, wait_s=0.3):
        assert lock._last(tmp_path) == number + 2


def test_a_number_that_others_have_passed_gives_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looked long ago can link a number that was removed since; that is none."""
    for _ in range(2):
        with one_writer(tmp_path) as held:
            held.check()
    real, asked = lock._last, []

    def looked_long_ago(folder: Path) -> int:
        asked.append(1)
        return 0 if len(asked) == 1 else real(folder)

    monkeypatch.setattr(lock, "_last", looked_long_ago)
    before = real(tmp_path)
    with one_writer(tmp_path, wait_s=5) as held:
        held.check()
        assert real(tmp_path) == before + 1


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    old, new = tmp_path / f"{layout.TEMPORARY_PREFIX}old", tmp_path / f"{layout.TEMPORARY_PREFIX}new"
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 7200,) * 2)
    with one_writer(tmp_path):
        assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MachineFault, match="cannot write"), one_writer(tmp_path / "file" / "lock"):
        pass
