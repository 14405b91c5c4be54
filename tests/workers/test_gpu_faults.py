"""GPUs that fail while they work, with real worker processes on a GPU that is not there."""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT
from tests.cuda.pretended import H200, PretendedCuda, uuid
from tests.factories import Ruiji, pictures, wait_until

#: What every later call reports too, as CUDA has it.
STICKY = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize(stream)"


@pytest.fixture
def cuda(ruiji: Ruiji, redis_url: str, tmp_path: Path) -> PretendedCuda:
    """One GPU that this test's commands see."""
    cuda = PretendedCuda(tmp_path / "cuda", ROOT)
    cuda.have(H200)
    ruiji.environment = {
        "RUIJI_REDIS_URL": redis_url,
        "RUIJI_DEVICE": "cuda",
        "RUIJI_PROCESSES": "1",
        "RUIJI_LOG_FORMAT": "json",
        **cuda.environment,
    }
    return cuda


def events(file: Path, *names: str) -> list[dict[str, Any]]:
    """What a worker has told, in order."""
    lines = (json.loads(line) for line in file.read_text().splitlines() if line.startswith("{") and line.endswith("}"))
    return [line for line in lines if line["event"] in names]


def test_a_gpu_that_fails_for_good_is_left_given_up_and_taken_again(
    ruiji: Ruiji, cuda: PretendedCuda, tmp_path: Path
) -> None:
    pictures(ruiji.media, 4)
    ruiji("enqueue")
    said = tmp_path / "said.txt"
    worker = ruiji.start("worker", errors=said)
    ruiji("enqueue", "--wait")

    cuda.fail("run", STICKY)
    pictures(ruiji.media, 12)
    ruiji("enqueue")

    def given_up() -> list[str]:
        return [state.state for state in ruiji.status().workers if "given up" in state.state]

    def told() -> bool:
        status = ruiji("status", code=None)
        return status.returncode == 3 and expected.search(status.stdout) is not None

    # It is tried again every few seconds: meanwhile it is not given up, and then after one start more.
    expected = re.compile(rf"NVIDIA H200 \({uuid('a')}\) was given up after \d starts without one image done")
    wait_until(lambda: any(map(expected.search, given_up())), timeout_s=120, what="the GPU given up")
    wait_until(told, timeout_s=120, what="that in the text of ruiji status")
    # The process that had worked took the batch twice, then ended as any other; three more did not even begin.
    faults = events(said, "machine_fault", "process_died", "gpu_given_up")
    deaths = [fault["status"] for fault in faults if fault["event"] == "process_died"]
    assert deaths[:4] == [1, 75, 75, 75]
    before = faults[: [fault["event"] for fault in faults].index("process_died")]
    assert len(before) >= 2 and all("illegal memory access" in fault["message"] for fault in before)
    assert [fault["event"] for fault in faults].count("gpu_given_up") == 1
    pauses = [fault["restart_in_s"] for fault in faults if fault["event"] == "process_died"]
    assert pauses[:4] == [1, 2, 4, 8]
    assert worker.poll() is None

    cuda.fail("run", None)
    ruiji("enqueue", "--wait")
    status = ruiji.status()
    assert (status.done, status.failed, given_up()) == (12, 0, [])
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=180) == 0


def test_one_fault_that_passes_ends_no_process(ruiji: Ruiji, cuda: PretendedCuda, tmp_path: Path) -> None:
    pictures(ruiji.media, 4)
    ruiji("enqueue")
    said = tmp_path / "said.txt"
    ruiji.start("worker", errors=said)
    ruiji("enqueue", "--wait")
    cuda.fail("run", "CUDA failure 2: out of memory ; GPU=0")
    pictures(ruiji.media, 8)
    ruiji("enqueue")
    wait_until(lambda: events(said, "machine_fault"), what="the fault")
    cuda.fail("run", None)
    ruiji("enqueue", "--wait")
    # Also where it took several batches.
    assert events(said, "process_died") == []


def test_a_card_that_is_of_no_use_ends_the_worker_in_one_line(ruiji: Ruiji, cuda: PretendedCuda) -> None:
    cuda.have("a 6 1 8000 7000 0 NVIDIA GeForce GTX 1080")
    ruiji.media.mkdir()
    done = ruiji("worker", code=2)
    (line,) = done.stderr.splitlines()
    assert "NVIDIA GeForce GTX 1080" in line and "compute capability 6.1" in line


def test_what_no_known_fault_of_a_gpu_says_ends_this_worker_and_stops_no_plan(
    ruiji: Ruiji, cuda: PretendedCuda
) -> None:
    pictures(ruiji.media, 4)
    ruiji("enqueue")
    cuda.fail("run", "an error that nobody knows")
    done = ruiji("worker", code=2)
    assert "this GPU cannot run the model" in done.stderr
    status = ruiji.status()
    assert (status.plan is not None, status.stopped) == (True, None)
    # Another host does the work.
    ruiji.environment |= {"RUIJI_DEVICE": "cpu"}
    ruiji.start("worker")
    ruiji("enqueue", "--wait")


def test_a_gpu_that_is_gone_ends_no_other(ruiji: Ruiji, cuda: PretendedCuda, tmp_path: Path) -> None:
    cuda.have(H200, H200.replace("a", "b", 1))
    pictures(ruiji.media, 4)
    ruiji("enqueue")
    said = tmp_path / "said.txt"
    worker = ruiji.start("worker", errors=said)
    ruiji("enqueue", "--wait")
    cuda.have(H200.replace("a", "b", 1))
    os.kill(next(pid_of_process_on(uuid("a"))), signal.SIGKILL)
    wait_until(lambda: "is gone: no GPU can be used" in said.read_text(), what="the reason")
    pictures(ruiji.media, 12)
    ruiji("enqueue", "--wait")
    assert worker.poll() is None
    assert {event["status"] for event in events(said, "process_died")} <= {-signal.SIGKILL, 75}


def pid_of_process_on(device: str) -> Iterator[int]:
    """The processes that embed on a device."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RUIJI_GPU") == device and "worker-process" in process.cmdline():
                yield process.pid
