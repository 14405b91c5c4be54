"""What the driver says of GPUs, with a driver that is built here."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline.choices import Device
from pipeline.errors import DeviceFault, UsageError
from tests.conftest import ROOT
from tests.cuda.pretended import BUSY, H200, V100, PretendedCuda, uuid
from tests.factories import Ruiji, wait_until, worker_processes
from workers.devices import Gpus, has_code, probe
from workers.doctor import examine
from workers.places import gpus_for


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    """The driver that this process' children see."""
    cuda = PretendedCuda(tmp_path / "cuda", ROOT)
    cuda.have(H200)
    for name, value in cuda.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return cuda


def test_cards_are_told_by_name_with_what_is_free(cuda: PretendedCuda) -> None:
    cuda.have(H200, BUSY)
    first, second = probe().usable
    assert (first.uuid, first.name, first.capability) == (uuid("a"), "NVIDIA H200", (9, 0))
    assert (first.total_mb, first.free_mb, second.free_mb, first.exclusive) == (143_000, 142_000, 3_000, False)
    assert cuda.calls() == ["retain 0 0", "release 0 0", "retain 1 0", "release 1 0"]


def test_a_cut_card_is_named_as_cuda_names_it_and_an_exclusive_one_is_noticed(cuda: PretendedCuda) -> None:
    cuda.have("a 9 0 18000 17000 0 NVIDIA H200 MIG 1g.18gb", "b 8 6 24000 23000 3 NVIDIA A10")
    cut, exclusive = probe().usable
    assert cut.uuid == uuid("a").replace("GPU", "MIG") and not cut.exclusive
    assert exclusive.exclusive


def test_of_several_instances_of_cut_cards_each_is_looked_at_by_itself(
    cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, third = (f"{letter} 9 0 18000 17000 0 NVIDIA H200 MIG 1g.18gb" for letter in "abc")
    cuda.have(one, other, third)
    names = [uuid(letter).replace("GPU", "MIG") for letter in "abc"]
    assert [gpu.uuid for gpu in probe().usable] == names[:1], "CUDA shows the first"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names[1:]))
    found = probe()
    assert ([gpu.uuid for gpu in found.usable], found.refused, found.problem) == (names[1:], (), "")
    cuda.have(third)
    found = probe()
    assert [gpu.uuid for gpu in found.usable] == names[2:]
    (reason,) = found.refused
    assert "CUDA_ERROR_NO_DEVICE" in reason and names[1] in reason
    cuda.have(one)
    assert not probe().usable and "CUDA_ERROR_NO_DEVICE" in probe().problem


def test_a_card_without_code_is_refused_by_name_and_the_others_serve(
    cuda: PretendedCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.have(V100, H200)
    assert [gpu.uuid for gpu in gpus_for(Device.auto)] == [uuid("a")]
    (record,) = caplog.records
    assert "Tesla V100" in record.getMessage() and "7.0" in record.getMessage()
    cuda.have(V100)
    with pytest.raises(UsageError, match=r"Tesla V100 .* compute capability 7\.0; .* code for 7\.5, 8\.0"):
        gpus_for(Device.cuda)


def test_code_is_known_by_capability() -> None:
    assert all(map(has_code, [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (12, 0)]))
    assert not any(map(has_code, [(6, 1), (7, 0), (10, 0), (10, 3), (12, 1)]))


def test_a_card_that_is_closed_is_refused(cuda: PretendedCuda) -> None:
    cuda.have("a 9 0 143000 142000 2 NVIDIA H200")
    assert "nvidia-smi -c DEFAULT" in probe().problem


@pytest.mark.parametrize(
    ("version", "result", "words", "passes"),
    [
        (12_040, 0, "CUDA up to 12.4, and ONNX Runtime needs 13.0: install driver 580", False),
        (13_010, 803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: system has unsupported display driver", False),
        (13_010, 802, "CUDA_ERROR_SYSTEM_NOT_READY: system not yet initialized", True),
        (13_010, 999, "error 999", True),
    ],
)
def test_the_drivers_own_reason_is_told(
    cuda: PretendedCuda, version: int, result: int, words: str, passes: bool
) -> None:
    cuda.driver(version, result)
    found = probe()
    assert words in found.problem and found.passes is passes and found.usable == ()
    assert isinstance(found.fault(), DeviceFault if passes else UsageError)
    assert str(found.fault()).startswith("no GPU can be used: the NVIDIA driver")
    assert gpus_for(Device.auto) == ()
    if not passes:
        with pytest.raises(UsageError, match="no GPU can be used: the NVIDIA driver"):
            gpus_for(Device.cuda)


def test_a_fault_that_may_pass_is_waited_for_with_growing_pauses(
    cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.driver(result=802)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            cuda.driver()

    monkeypatch.setattr("workers.places.time", SimpleNamespace(sleep=sleep))
    assert [gpu.name for gpu in gpus_for(Device.cuda)] == ["NVIDIA H200"]
    assert pauses == [1, 2, 4]
    assert all("CUDA_ERROR_SYSTEM_NOT_READY" in record.getMessage() for record in caplog.records)


def test_devices_that_are_hidden_are_not_there(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.have(H200, BUSY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", uuid("b"))
    assert [gpu.uuid for gpu in probe().usable] == [uuid("b")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no CUDA-capable device is detected (CUDA_VISIBLE_DEVICES is '')" in probe().problem


def test_a_card_that_does_not_answer_now_stays_usable(cuda: PretendedCuda) -> None:
    cuda.have("a 9 0 143000 0 0 NVIDIA H200")
    (gpu,) = probe().usable
    assert gpu.free_mb is None


def test_a_machine_without_a_driver_says_so(cuda: PretendedCuda) -> None:
    cuda.library.unlink()
    found = probe()
    assert "there is no NVIDIA driver here (libcuda.so.1: cannot open" in found.problem and not found.passes


def test_a_driver_that_crashes_ends_the_look_alone(cuda: PretendedCuda) -> None:
    cuda.driver(version=-1)
    found = probe()
    assert "ended with status -6" in found.problem and found.passes


def test_an_onnx_runtime_without_cuda_is_nothing_to_warn_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import onnxruntime as o; print('CUDAExecutionProvider' in o.get_available_providers())"
    if subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True":
        pytest.skip("this ONNX Runtime has CUDA")
    assert gpus_for(Device.auto) == () and caplog.records == []
    with pytest.raises(UsageError, match="built without CUDA; make clean setup ACCEL=gpu"):
        gpus_for(Device.cuda)
    assert gpus_for(Device.cpu) == ()


def test_auto_without_a_gpu_says_so_and_takes_all_cores(
    cuda: PretendedCuda, ruiji: Ruiji, redis_url: str, tmp_path: Path
) -> None:
    """The GPU build on a machine without a GPU: one process a core, not one."""
    cuda.have()
    ruiji.media.mkdir()
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, **cuda.environment}
    errors = tmp_path / "said.txt"
    worker = ruiji.start("worker", "--role", "embed", errors=errors)

    def devices() -> list[str | None]:
        """What the worker's processes are told; one that is just starting has nothing to read yet."""
        told = []
        for child in worker_processes("embed", worker.pid):
            with suppress(psutil.Error):
                told.append(child.environ().get("RUIJI_DEVICE"))
        return told

    wait_until(lambda: devices() == ["cpu"] * len(os.sched_getaffinity(0)), what="a process a core")
    assert "no CUDA-capable device is detected; the CPU runs the model" in errors.read_text()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=180) == 0


def test_the_doctor_names_cards_and_warns_where_none_serves(
    cuda: PretendedCuda, tmp_path: Path, model_path: Path
) -> None:
    def told() -> str:
        checks = examine(tmp_path / "media", tmp_path / "features", model_path, None, Device.auto)
        return str(next(check for check in checks if check.name == "device"))

    cuda.have(V100)
    assert told().startswith("warn") and "Tesla V100" in told() and "capability 7.0; this ONNX Runtime" in told()


def test_what_the_look_prints_is_one_line_of_json(cuda: PretendedCuda) -> None:
    said = subprocess.run([sys.executable, "-P", "-m", "workers.devices"], capture_output=True, text=True, cwd=ROOT)
    assert json.loads(said.stdout)["usable"][0]["name"] == "NVIDIA H200"
    assert Gpus(problem="x").fault().exit_code == 2
