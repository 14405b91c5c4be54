"""GPU slots, with pretended devices: a real Redis, real workers, and a driver that names devices."""

import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import redis

from pipeline.queue.connection import connect
from tests.conftest import ROOT
from tests.cuda.pretended import BUSY, H200, PretendedCuda, uuid
from tests.factories import Ruiji, wait_until
from workers.slots import LEASE_S, device_slot

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
    for process in psutil.Process().children(recursive=True):
        try:
            if "worker-process" in process.cmdline():
                seen[process.environ()["CUDA_VISIBLE_DEVICES"]] += 1
        except psutil.Error:
            continue
    return seen


def test_workers_that_start_alike_spread_over_the_devices(gpu_worker: Ruiji, client: redis.Redis) -> None:
    workers = [gpu_worker.start("worker", "--role", "embed", "--slots-per-device", "2") for _ in range(4)]
    wait_until(lambda: shown_devices() == dict.fromkeys(DEVICES, 2), what="two workers on each device")
    assert all(0 < client.pttl(key) <= LEASE_S * 1000 for key in client.keys("ruiji:slot:*"))
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    assert [worker.wait(timeout=60) for worker in workers] == [0] * 4
    assert client.keys("ruiji:slot:*") == [], "slots are given back on exit"


def test_a_worker_waits_for_a_slot_and_takes_a_dead_ones_when_its_lease_runs_out(
    gpu_worker: Ruiji, client: redis.Redis, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = (gpu_worker.start("worker", "--role", "embed") for _ in range(2))
    wait_until(lambda: shown_devices() == dict.fromkeys(DEVICES, 1), what="a worker on each device")
    third = gpu_worker.start("worker", "--role", "embed")
    said: list[str] = []

    def waits() -> bool:
        said.extend(capfd.readouterr().err.splitlines())
        return any("slot_waiting" in line for line in said)

    wait_until(waits, what="the third worker's word that it waits")
    (words,) = (line for line in said if "slot_waiting" in line)
    assert "all 2 GPU slots are taken" in words and f":{first.pid}" in words and f":{second.pid}" in words
    assert third.poll() is None and not psutil.Process(third.pid).children(), "it waits"
    first.kill()
    holders = {key: client.get(key) for key in client.keys("ruiji:slot:*")}
    (left_behind,) = [key for key, holder in holders.items() if f":{first.pid}:" in str(holder)]
    assert client.pttl(left_behind) > 0
    client.pexpire(left_behind, 1)  # As if its 30 s were over.
    wait_until(lambda: psutil.Process(third.pid).children(), what="the third worker at work")
    assert f":{third.pid}:" in str(client.get(left_behind))


def test_a_lost_lease_is_taken_again_or_the_worker_ends(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.slots.LEASE_S", 0.6)
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        with device_slot(client, ["GPU-aaaa"], 1):
            client.flushall()
            wait_until(lambda: client.get("ruiji:slot:GPU-aaaa:0"), timeout_s=5, what="the lease, taken again")
            assert not told
            client.set("ruiji:slot:GPU-aaaa:0", "another:1:x", px=5000)
            wait_until(lambda: told, timeout_s=5, what="the signal")
        assert client.get("ruiji:slot:GPU-aaaa:0") == "another:1:x", "another's lease is left alone"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_device_with_the_fewest_workers_is_taken(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.slots._LOOK_S", 0.05)
    taken: list[str] = []

    def fifth() -> None:
        with device_slot(client, DEVICES, 2) as device:
            taken.append(device)

    with device_slot(client, DEVICES, 2) as first, device_slot(client, DEVICES, 2) as second:
        assert [first, second] == DEVICES
        with device_slot(client, DEVICES, 2), device_slot(client, DEVICES, 2):
            thread = threading.Thread(target=fifth)
            thread.start()
            time.sleep(0.5)
            assert not taken, "a fifth slot of four"
            client.delete(f"ruiji:slot:{DEVICES[1]}:0")
            thread.join(30)
            assert taken == [DEVICES[1]]
