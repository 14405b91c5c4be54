"""GPU slots, with pretended devices: a real Redis, real workers, and a driver that names devices."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import redis

from pipeline.queue.connection import connect
from tests.conftest import ROOT
from tests.cuda.pretended import BUSY, H200, PretendedCuda, uuid
from tests.factories import Ruiji, processes_below, wait_until, worker_processes
from workers.devices import probe
from workers.slots import LEASE_S, device_slots, leased_gpus

DEVICES = [uuid("a"), uuid("b")]


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return connect(redis_url)


@pytest.fixture
def gpu_worker(ruiji: Ruiji, redis_url: str, tmp_path: Path) -> Ruiji:
    """Workers that see two devices. They wait for their first enqueue, which is before the model is loaded."""
    cuda = PretendedCuda(tmp_path / "cuda", ROOT)
    cuda.have(H200, BUSY)
    ruiji.media.mkdir()
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_DEVICE": "cuda", **cuda.environment}
    return ruiji


def shown_devices() -> Counter[str]:
    """What the embed processes of this test's workers see, by device."""
    seen: Counter[str] = Counter()
    for process in worker_processes("embed"):
        with suppress(psutil.Error):
            seen[process.environ().get("CUDA_VISIBLE_DEVICES", "all")] += 1
    return seen


def test_workers_that_start_alike_spread_over_the_devices(gpu_worker: Ruiji, client: redis.Redis) -> None:
    alike = ("worker", "--role", "embed", "--slots", "1", "--processes", "1", "--slots-per-device", "2")
    workers = [gpu_worker.start(*alike) for _ in range(4)]
    wait_until(lambda: shown_devices() == dict.fromkeys(DEVICES, 2), what="two workers on each device")
    assert all(0 < client.pttl(key) <= LEASE_S * 1000 for key in client.keys("ruiji:slot:*"))
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    assert [worker.wait(timeout=180) for worker in workers] == [0] * 4
    assert client.keys("ruiji:slot:*") == [], "slots are given back on exit"


def test_a_worker_waits_for_a_slot_and_takes_a_dead_ones_when_its_lease_runs_out(
    gpu_worker: Ruiji, client: redis.Redis, capfd: pytest.CaptureFixture[str]
) -> None:
    alike = ("worker", "--role", "embed", "--slots", "1", "--processes", "1")
    first, second = (gpu_worker.start(*alike) for _ in range(2))
    wait_until(lambda: shown_devices() == dict.fromkeys(DEVICES, 1), what="a worker on each device")
    third = gpu_worker.start(*alike)
    said: list[str] = []

    def waits() -> bool:
        said.extend(capfd.readouterr().err.splitlines())
        return any("slot_waiting" in line for line in said)

    wait_until(waits, what="the third worker's word that it waits")
    (words,) = (line for line in said if "slot_waiting" in line)
    assert "all 2 GPU slots are taken" in words and f":{first.pid}" in words and f":{second.pid}" in words
    assert third.poll() is None and not processes_below(third.pid), "it waits"
    first.kill()
    holders = {key: client.get(key) for key in client.keys("ruiji:slot:*")}
    (left_behind,) = [key for key, holder in holders.items() if f":{first.pid}:" in str(holder)]
    assert client.pttl(left_behind) > 0
    client.pexpire(left_behind, 1)  # As if its 30 s were over.
    wait_until(lambda: processes_below(third.pid), what="the third worker at work")
    assert f":{third.pid}:" in str(client.get(left_behind))


def test_a_lost_lease_is_taken_again_or_the_worker_ends(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.slots.LEASE_S", 0.6)
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        with device_slots(client, ["GPU-aaaa"], 1):
            client.flushall()
            wait_until(lambda: client.get("ruiji:slot:GPU-aaaa:0"), what="the lease, taken again")
            assert not told
            client.set("ruiji:slot:GPU-aaaa:0", "another:1:x", px=600_000)
            wait_until(lambda: told, what="the signal")
        assert client.get("ruiji:slot:GPU-aaaa:0") == "another:1:x", "another's lease is left alone"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_device_with_the_fewest_workers_is_taken(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.slots._LOOK_S", 0.05)
    taken: list[str] = []

    def fifth() -> None:
        with device_slots(client, DEVICES, 2, 1) as devices:
            taken.extend(devices)

    with device_slots(client, DEVICES, 2, 1) as first, device_slots(client, DEVICES, 2, 1) as second:
        assert [*first, *second] == DEVICES
        with device_slots(client, DEVICES, 2) as rest:
            assert rest == DEVICES, "all that are free"
            thread = threading.Thread(target=fifth)
            thread.start()
            time.sleep(0.5)
            assert not taken, "a fifth slot of four"
            client.delete(f"ruiji:slot:{DEVICES[1]}:0")
            thread.join(30)
            assert taken == [DEVICES[1]]


def test_one_worker_takes_all_gpus_and_the_next_gets_all_that_it_gives_back(
    gpu_worker: Ruiji, client: redis.Redis, tmp_path: Path
) -> None:
    alike = ("worker", "--processes", "2")
    first = gpu_worker.start(*alike)
    wait_until(lambda: shown_devices() == dict.fromkeys(DEVICES, 2), what="two processes on each device")
    wait_until(lambda: len(worker_processes("reduce", first.pid)) == 2, what="two reducers, for one could not follow")
    said = tmp_path / "said.txt"
    second = gpu_worker.start(*alike, errors=said)
    wait_until(lambda: "slot_waiting" in said.read_text(), what="the second worker's word that it waits")
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=180) == 0
    wait_until(lambda: shown_devices() == dict.fromkeys(DEVICES, 2), what="two processes of the second on each")
    assert said.read_text().count("slot_taken") == 2
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=180) == 0
    assert client.keys("ruiji:slot:*") == []


def test_who_waited_for_a_slot_looks_at_what_is_free_then(
    gpu_worker: Ruiji, redis_url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in gpu_worker.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    then = probe().usable
    full = [replace(gpu, free_mb=1) for gpu in then]
    with leased_gpus(redis_url, full, 1, None) as held:
        assert sorted(gpu.free_mb or 0 for gpu in held) == [1, 1], "nobody had to be waited for"
    with ThreadPoolExecutor(1) as pool:
        with device_slots(client, DEVICES, 1):
            waiting = pool.submit(lambda: list(ExitStack().enter_context(leased_gpus(redis_url, full, 1, None))))
            time.sleep(3)
        assert sorted(gpu.uuid for gpu in waiting.result(60)) == DEVICES
        assert [gpu.free_mb for gpu in sorted(waiting.result(), key=lambda gpu: gpu.uuid)] == [
            gpu.free_mb for gpu in then
        ]


def test_a_machine_tells_how_many_workers_its_slots_are_for(gpu_worker: Ruiji, tmp_path: Path) -> None:
    def told(**environment: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-P", "-m", "workers.slots"]
        environment = {**os.environ, **gpu_worker.environment, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert told(RUIJI_SLOTS="1", RUIJI_SLOTS_PER_DEVICE="").stdout == "2\n"
    assert told(RUIJI_SLOTS="1", RUIJI_SLOTS_PER_DEVICE="3").stdout == "6\n"
    assert told(RUIJI_SLOTS="4", RUIJI_SLOTS_PER_DEVICE="3").stdout == "2\n"
    # One takes all.
    assert told(RUIJI_SLOTS="").stdout == "1\n"
    none = told(CUDA_VISIBLE_DEVICES="")
    assert (none.returncode, none.stdout) == (2, "") and "no GPU can be used" in none.stderr


def test_who_chose_devices_shares_them_with_nobody(gpu_worker: Ruiji, client: redis.Redis) -> None:
    gpu_worker.environment["CUDA_VISIBLE_DEVICES"] = ",".join(DEVICES)
    gpu_worker.start("worker", "--role", "embed", "--processes", "1")
    wait_until(lambda: shown_devices() == dict.fromkeys(DEVICES, 1), what="a process on each device")
    assert client.keys("ruiji:slot:*") == []
