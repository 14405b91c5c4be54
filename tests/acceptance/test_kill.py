"""Processes killed, Redis emptied: the run ends unattended, with the same bytes as an undisturbed one."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.plans.files import open_plan
from pipeline.queue.connection import connect
from pipeline.queue.keys import REDUCE_TASK, lease_key, unacked_keys
from pipeline.queue.leases import lease
from tests.acceptance.test_redis import server_of
from tests.chaos.harness import redis_server
from tests.conftest import ROOT
from tests.factories import Ruiji, kill, pictures, wait_until, worker_processes

#: Four shards of pictures that take some 40 ms each: so many that a run on a fast machine goes on after three kills.
COUNT, ROWS = 240, "60"
#: Short, so that what a dead worker held comes back soon; both are documented settings.
FAST = {"RUIJI_VISIBILITY_TIMEOUT_S": "3", "RUIJI_STALL_TIMEOUT_S": "4", "RUIJI_SHARD_ROWS": ROWS}

#: What a command says at its end that goes on when it is run again.
INTERRUPTED = "interrupted; run it again to continue\n"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Ruiji:
    """A finished run over all pictures."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pictures(folder / "media", COUNT, size=(1600, 1200), distinct=10)
    shutil.copy(model_path, folder)
    command = Ruiji(folder / "media", folder / "features", folder / model_path.name, folder / "state", ROOT)
    command("run", "--shard-rows", ROWS)
    return command


@pytest.fixture
def expected(ruiji: Ruiji, undisturbed: Ruiji) -> dict[str, str]:
    """The undisturbed shards, of the same pictures that this test's command works on."""
    ruiji.media = undisturbed.media
    return undisturbed.shard_digests()


def wait_for_progress(ruiji: Ruiji) -> None:
    """Wait until more objects are done than now; the run may not be over by then."""
    before = ruiji.status().done
    wait_until(lambda: ruiji.status().done > before, what="progress")
    assert ruiji.status().plan is not None, "there is still something to disturb"


def finish(ruiji: Ruiji, expected: dict[str, str]) -> None:
    ruiji("enqueue", "--wait")
    assert ruiji.shard_digests() == expected
    status = json.loads(ruiji("status", "--json").stdout)
    assert (status["done"], status["failed"], status["pending"], status["running"]) == (COUNT, 0, 0, 0)


#: The workers' own transport, and Celery's, which is one setting away.
TRANSPORTS = pytest.mark.parametrize("transport", ["fast", pytest.param("stock", marks=pytest.mark.slow)])


@TRANSPORTS
def test_embed_processes_killed_again_and_again_lose_nothing(
    ruiji: Ruiji, redis_url: str, expected: dict[str, str], transport: str
) -> None:
    ruiji.environment = {**FAST, "RUIJI_REDIS_URL": redis_url, "RUIJI_TRANSPORT": transport}
    ruiji("enqueue")
    # A kill hits a write by chance only. It is there before the run can end, which looks for such files.
    (ruiji.gallery / ".tmp-0123456789abcdef-4").write_bytes(b"half of it")
    ruiji.start("worker", "--processes", "2")
    for round_number in range(3):
        wait_until(lambda: len(worker_processes("embed")) == 2, what="two embed processes")
        wait_for_progress(ruiji)
        for process in worker_processes("embed")[: 1 + round_number % 2]:
            kill(process)
    finish(ruiji, expected)
    assert ruiji("verify").stdout == ""


@pytest.mark.slow
def test_a_whole_worker_killed_is_replaced_by_another(ruiji: Ruiji, redis_url: str, expected: dict[str, str]) -> None:
    ruiji.environment = {**FAST, "RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    worker = ruiji.start("worker", "--processes", "2")
    wait_for_progress(ruiji)
    worker.kill()
    # Its processes notice that their parent died, and end too.
    wait_until(lambda: not worker_processes("embed") and not worker_processes("reduce"), what="the end of the orphans")
    ruiji.start("worker", "--processes", "2")
    finish(ruiji, expected)


@pytest.mark.slow
def test_a_killed_reducer_leaves_no_partial_shard(ruiji: Ruiji, redis_url: str, expected: dict[str, str]) -> None:
    ruiji.environment = {**FAST, "RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    ruiji.start("worker", "--role", "embed", "--processes", "2")
    for _ in range(2):
        reducer = ruiji.start("worker", "--role", "reduce")
        before = len(list(ruiji.gallery.glob("000?.json")))
        wait_until(lambda n=before: len(list(ruiji.gallery.glob("000?.json"))) > n, what="a shard")
        for process in worker_processes("reduce"):
            kill(process)
        reducer.terminate()
        reducer.wait(timeout=180)
    ruiji.start("worker", "--role", "reduce")
    finish(ruiji, expected)


@pytest.mark.slow
def test_an_emptied_redis_costs_only_time(ruiji: Ruiji, redis_url: str, expected: dict[str, str]) -> None:
    ruiji.environment = {**FAST, "RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    ruiji.start("worker", "--processes", "2")
    for _ in range(2):
        wait_for_progress(ruiji)
        connect(redis_url).flushall()
    finish(ruiji, expected)


@pytest.mark.slow
@TRANSPORTS
def test_a_redis_that_is_killed_and_restarted_costs_only_time(
    ruiji: Ruiji, tmp_path: Path, expected: dict[str, str], transport: str
) -> None:
    with redis_server(tmp_path / "redis") as server:
        ruiji.environment = {**FAST, "RUIJI_REDIS_URL": server.url, "RUIJI_TRANSPORT": transport}
        ruiji("enqueue")
        ruiji.start("worker", "--processes", "2")
        wait_for_progress(ruiji)
        server.kill()
        time.sleep(2)
        server.start()
        finish(ruiji, expected)
        ruiji.stop_all()


@pytest.mark.slow
@TRANSPORTS
def test_a_segment_that_could_not_be_given_back_is_taken_up_again(
    ruiji: Ruiji, tmp_path: Path, expected: dict[str, str], transport: str
) -> None:
    with redis_server(tmp_path / "redis") as server:
        ruiji.environment = {**FAST, "RUIJI_REDIS_URL": server.url, "RUIJI_TRANSPORT": transport}
        ruiji("enqueue")
        client, plan = connect(server.url), open_plan(ruiji.gallery)
        assert plan is not None
        held_by_us = lease(client, lease_key(plan.gallery_id, "reduce.0"), timeout_s=600)
        assert held_by_us.acquire()
        ruiji.start("worker", "--processes", "2")
        held = unacked_keys(plan.gallery_id)["unacked_key"]
        wait_until(lambda: any(REDUCE_TASK in m for m in client.hvals(held)), what="a reducer that waits")
        server.kill()
        # The reducer gives up, and then cannot give back either.
        time.sleep(6)
        server.start()
        held_by_us.release()
        finish(ruiji, expected)
        ruiji.stop_all()


@TRANSPORTS
def test_sigterm_finishes_what_is_in_hand_and_gives_the_rest_back(
    ruiji: Ruiji, redis_url: str, expected: dict[str, str], transport: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ruiji.environment = {**FAST, "RUIJI_REDIS_URL": redis_url, "RUIJI_VISIBILITY_TIMEOUT_S": "3600"}
    ruiji.environment["RUIJI_TRANSPORT"] = transport
    ruiji("enqueue")
    worker = ruiji.start("worker", "--processes", "2")
    wait_for_progress(ruiji)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=180) == 0
    assert INTERRUPTED not in capfd.readouterr().err
    client = connect(redis_url)
    held = list(client.keys("ruiji:*:unacked"))
    assert held == [], "nothing waits for the visibility timeout"
    assert not list(ruiji.gallery.rglob(".tmp-*"))
    ruiji.start("worker", "--processes", "2")
    finish(ruiji, expected)


def test_an_interrupted_run_goes_on_where_it_stopped(
    ruiji: Ruiji, expected: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    ruiji.environment = dict(FAST)
    started = ruiji.start("run", "--workers", "2")
    wait_until(lambda: list(ruiji.gallery.glob("0000.json")), what="the first shard")
    # As a terminal's Ctrl-C: to all that did not leave the group.
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(timeout=180) == 130
    said = capfd.readouterr().err
    assert said.endswith(INTERRUPTED) and said.count(INTERRUPTED) == 1 and "Traceback" not in said
    wait_until(lambda: not worker_processes("embed"), what="the end of the workers")
    first = (ruiji.gallery / "0000.json").stat().st_mtime_ns
    ruiji("run", "--workers", "2")
    assert ruiji.shard_digests() == expected
    assert (ruiji.gallery / "0000.json").stat().st_mtime_ns == first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_enqueue_says_how_it_goes_on(
    ruiji: Ruiji, redis_url: str, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures(ruiji.media, 3)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    started = ruiji.start("enqueue", "--wait")
    wait_until(lambda: "0 done" in capfd.readouterr().err, what="the wait")
    started.send_signal(number)
    assert started.wait(timeout=180) == 130
    assert capfd.readouterr().err.endswith(INTERRUPTED)


def test_a_run_whose_redis_dies_ends_and_goes_on_when_it_is_run_again(
    ruiji: Ruiji, expected: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    ruiji.environment = dict(FAST)
    started = ruiji.start("run", "--workers", "2")
    wait_until(lambda: list(ruiji.gallery.glob("0000.json")), what="the first shard")
    server_of(started.pid).kill()
    assert started.wait(timeout=180) == 1
    said = capfd.readouterr().err
    assert "error: " in said and "run it again" in said
    ruiji("run", "--workers", "2")
    assert ruiji.shard_digests() == expected
