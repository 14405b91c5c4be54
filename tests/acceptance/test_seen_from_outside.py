"""What `status` and progress say of workers: who is there, who idles, who is missing."""

import json
import logging

import redis

from pipeline.follow import _read_patiently
from pipeline.gallery import read_gallery
from pipeline.queue.connection import connect
from pipeline.status import StatusReader
from tests.factories import Ruiji, pictures, wait_until


def test_beside_a_run_its_workers_and_progress_are_seen(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 4000, distinct=10)
    run = ruiji.start("run", "--workers", "1", "--shard-rows", "500")
    wait_until((ruiji.gallery / "gallery.json").exists, what="the gallery")
    seen: list[dict[str, object]] = []

    def working() -> bool:
        seen.append(json.loads(ruiji("status", "--json", code=None).stdout or "{}"))
        workers: list[dict[str, object]] = seen[-1].get("workers", [])  # type: ignore[assignment]
        # Each reports by itself, some time after its start.
        both = {worker["role"] for worker in workers} == {"embed", "reduce"}
        return run.poll() is not None or (both and any(worker["images"] for worker in workers))

    wait_until(working, what="both roles, and a worker at work")
    assert run.poll() is None, "the run went on while it was looked at"
    assert any(now.get("running") for now in seen)
    assert "4,000" in ruiji("status", "--watch").stderr
    assert run.wait(180) == 0
    assert not list((ruiji.state / "runs").glob("*/redis-*"))


def test_a_wait_tells_once_that_redis_is_away_and_ends_where_it_refuses(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 3)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    gallery = read_gallery(ruiji.gallery)
    assert gallery is not None
    client = connect(redis_url)
    (plan,) = client.scan_iter("ruiji:*:plan:*")
    client.delete(plan)
    client.set(plan, "no hash")
    assert "wrong kind of value" in ruiji("status", "--watch", code=2).stderr
    client.delete(plan)
    reader, said = StatusReader(ruiji.gallery, client), []
    server = reader.read
    answers = [redis.ConnectionError("gone")] * 2

    def read() -> object:
        if answers:
            raise answers.pop()
        return server()

    reader.read = read  # type: ignore[method-assign, assignment]
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("pipeline.follow").addHandler(handler)
    try:
        _read_patiently(reader, [])
    finally:
        logging.getLogger("pipeline.follow").removeHandler(handler)
    assert len(said) == 1


def test_a_wait_without_workers_says_so_and_a_worker_without_work_idles(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 5)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    said = ruiji.media.parent / "said.txt"
    waiting = ruiji.start("enqueue", "--wait", errors=said)
    missing = "no worker is running: start one with ruiji worker"
    wait_until(lambda: missing in said.read_text(), what="the word that no worker is there")
    ruiji.start("worker", "--processes", "1")
    assert waiting.wait(timeout=180) == 0
    assert "no worker" not in ruiji("enqueue", "--wait").stderr

    def states() -> set[tuple[str, str]]:
        return {(w["role"], w["state"]) for w in json.loads(ruiji("status", "--json").stdout)["workers"]}

    wait_until(lambda: states() == {("embed", "idle"), ("reduce", "idle")}, what="idle workers")
