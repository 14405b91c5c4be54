"""What `status` and progress say of workers: who is there, who idles, who is missing."""

import json
import subprocess
import time

from tests.factories import Ruiji, pictures, wait_until


def test_beside_a_run_its_workers_and_progress_are_seen(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 4000, distinct=10)
    run = ruiji.start("run", "--workers", "1", "--shard-rows", "500")
    wait_until((ruiji.gallery / "gallery.json").exists, what="the gallery")
    seen: list[dict[str, object]] = []

    def working() -> bool:
        seen.append(json.loads(ruiji("status", "--json", code=None).stdout or "{}"))
        return run.poll() is not None or any(worker["images"] for worker in seen[-1].get("workers", []))  # type: ignore[attr-defined]

    wait_until(working, what="a worker at work")
    assert run.poll() is None, "the run went on while it was looked at"
    assert {worker["role"] for worker in seen[-1]["workers"]} == {"embed", "reduce"}  # type: ignore[attr-defined]
    assert any(now.get("running") for now in seen)
    assert "4,000" in ruiji("status", "--watch").stderr
    assert run.wait(60) == 0
    assert not list((ruiji.state / "runs").glob("*/redis-*"))


def test_a_wait_without_workers_says_so_and_a_worker_without_work_idles(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 5)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    try:
        ruiji("enqueue", "--wait", timeout_s=14)
    except subprocess.TimeoutExpired as ended:
        said = (ended.stderr or b"").decode()
    assert "no worker is running: start one with ruiji worker" in said
    ruiji.start("worker", "--processes", "1")
    assert "no worker" not in ruiji("enqueue", "--wait").stderr
    time.sleep(5)
    workers = json.loads(ruiji("status", "--json").stdout)["workers"]
    assert {(worker["role"], worker["state"]) for worker in workers} == {("embed", "idle"), ("reduce", "idle")}
