"""A segment that ends its reducers, or whose features vanish: given up in the end, and nothing else with it."""

import json
import os
from pathlib import Path

import pytest

from pipeline import layout
from pipeline.plans.files import open_plan
from pipeline.plans.stuck import MOST_DEATHS, note_death
from tests.conftest import ROOT
from tests.factories import Ruiji, pictures, wait_until

#: Processes that are started with this as `PYTHONPATH` find some shards deadly.
DEADLY = f"{Path(__file__).parent / 'deadly'}{os.pathsep}{ROOT}"
COUNT, ROWS = 20, "4"


@pytest.fixture
def deadly(ruiji: Ruiji, redis_url: str) -> Ruiji:
    """Five shards, and short times."""
    pictures(ruiji.media, COUNT)
    ruiji.environment = {
        "RUIJI_REDIS_URL": redis_url,
        "RUIJI_VISIBILITY_TIMEOUT_S": "2",
        "RUIJI_STALL_TIMEOUT_S": "1",
        "RUIJI_SHARD_ROWS": ROWS,
        "RUIJI_WINDOW_SEGMENTS": "2",
        "PYTHONPATH": DEADLY,
    }
    return ruiji


def shards(ruiji: Ruiji) -> dict[int, str]:
    return {shard.shard: shard.state for shard in ruiji.status().shards}


def without_harm(ruiji: Ruiji) -> None:
    for name in ("DEADLY_SHARDS", "LOST_SHARDS", "FULL_SHARDS"):
        ruiji.environment.pop(name, None)


def finish(ruiji: Ruiji) -> None:
    """A person enqueues again, and a worker that has what was missing does the rest."""
    without_harm(ruiji)
    ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait")
    status = json.loads(ruiji("status", "--json").stdout)
    assert (status["done"], status["failed"], status["stopped"]) == (COUNT, 0, None)
    assert ruiji("verify").stdout == ""
    assert not list((ruiji.gallery / "run" / "suspects").glob("*")), "nothing is held against what is done"


def test_a_shard_that_ends_its_reducers_is_given_up_and_all_others_are_made(deadly: Ruiji, tmp_path: Path) -> None:
    deadly.environment["DEADLY_SHARDS"] = "1"
    deadly("enqueue")
    # Deaths of an earlier worker, so that this one ends sooner: a dead reducer's lease lasts 10 s.
    plan = open_plan(deadly.gallery)
    assert plan is not None
    for _ in range(MOST_DEATHS - 2):
        note_death(plan, plan.segments[1])
    said = tmp_path / "said"
    worker = deadly.start("worker", "--processes", "1", errors=said)
    stopped = deadly("enqueue", "--wait", code=1, timeout_s=100)
    assert "1 of 5 shards could not be made (0001)" in stopped.stderr
    assert "ruiji enqueue" in stopped.stderr
    assert worker.poll() is None, "the worker is fit for other work"
    assert shards(deadly) == dict.fromkeys([0, 2, 3, 4], "done")
    status = json.loads(deadly("status", "--json", code=1).stdout)
    assert (status["done"], status["pending"], status["failed"]) == (COUNT - 4, 4, 0)
    assert len(list(deadly.gallery.glob("??/??/*.npy"))) == 4, "what was computed is kept"
    events = [line.split()[2] for line in said.read_text().splitlines() if len(line.split()) > 2]
    assert (events.count("process_died"), events.count("segment_stuck")) == (2, 1)
    assert "ruiji run, goes on" in deadly("retry").stderr
    worker.terminate()
    worker.wait(timeout=60)
    finish(deadly)


def test_a_shard_that_is_given_up_while_others_are_left_is_tried_again_when_somebody_enqueues(deadly: Ruiji) -> None:
    deadly("enqueue")
    plan = open_plan(deadly.gallery)
    assert plan is not None
    for _ in range(MOST_DEATHS):
        note_death(plan, plan.segments[0])
    assert shards(deadly)[0] == "stuck"
    assert json.loads(deadly("status", "--json", code=3).stdout)["shards"][0]["state"] == "stuck"
    # The window of two is for the others.
    deadly.environment["FULL_SHARDS"] = "4"
    worker = deadly.start("worker", "--processes", "1")
    wait_until(lambda: list(shards(deadly).values()) == ["stuck", "done", "done", "done", "running"], what="the others")
    wait_until(
        lambda: any("No space left" in worker.state for worker in deadly.status().workers),
        what="a word of what the reducer waits for",
    )
    assert not layout.record_file(deadly.gallery, 0).exists()
    worker.terminate()
    worker.wait(timeout=60)
    finish(deadly)


@pytest.mark.slow
def test_a_shard_whose_features_vanish_each_time_is_given_up(deadly: Ruiji) -> None:
    deadly.environment["LOST_SHARDS"] = "2"
    deadly("enqueue")
    worker = deadly.start("worker", "--processes", "1")
    stopped = deadly("enqueue", "--wait", code=1, timeout_s=100)
    assert "(0002)" in stopped.stderr
    assert "must be the same folder on all hosts" in stopped.stderr
    assert layout.record_file(deadly.gallery, 4).exists()
    worker.terminate()
    worker.wait(timeout=60)
    finish(deadly)
