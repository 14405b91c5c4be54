"""Processes killed at random moments: nothing lost, nothing failed, every shard once, the undisturbed bytes."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import layout
from pipeline.plans.files import open_plan
from pipeline.queue.chords import Chords
from pipeline.queue.connection import connect
from pipeline.segments import reduce_segment
from pipeline.store import check_shard, read_record
from tests.chaos.conftest import SHIPPED, Undisturbed, finish
from tests.chaos.harness import Server, kill_one, progress, sized, wait_for_progress
from tests.conftest import ROOT
from tests.factories import Ruiji, wait_until, worker_processes
from tests.pipeline.galleries import embed, files, new_plan

#: A fixed seed: a failure can be looked for again, as far as processes repeat themselves.
RNG = random.Random(4)


def test_embed_processes_and_whole_workers_killed_at_random_moments(disturbed: Ruiji, undisturbed: Undisturbed) -> None:
    disturbed("enqueue")
    worker = disturbed.start("worker", "--processes", "2")
    kills = 0
    while kills < sized(8, 30) and wait_for_progress(disturbed):
        time.sleep(RNG.uniform(0, 1.0))
        if RNG.random() < 0.3:
            worker.kill()
            worker = disturbed.start("worker", "--processes", "2")
            kills += 1
        else:
            kills += kill_one("embed", RNG)
    assert kills >= sized(4, 30), "the run was over too soon to be disturbed"
    finish(disturbed, undisturbed)


def test_reducers_killed_at_random_moments(disturbed: Ruiji, undisturbed: Undisturbed) -> None:
    disturbed("enqueue")
    disturbed.start("worker", "--role", "embed", "--processes", "2")
    disturbed.start("worker", "--role", "reduce")
    kills = 0
    while kills < sized(4, 20) and progress(disturbed) is not None:
        # Dead reducers are started again after growing pauses; start-up takes a second or two.
        wait_until(lambda: worker_processes("reduce") or progress(disturbed) is None, what="a reducer")
        time.sleep(RNG.uniform(0, 4))
        kills += kill_one("reduce", RNG)
    finish(disturbed, undisturbed)


def test_a_reducer_killed_at_any_point_of_its_write(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.factories import tiny_model

    rows = 1000
    model = tiny_model(tmp_path / "m.onnx", length=12)
    plan = new_plan(tmp_path / "whole", model, rows, shard_rows=rows)
    embed(plan, plan.paths(plan.segments[0]))
    prepared = tmp_path / "prepared"
    shutil.copytree(plan.folder, prepared)
    script = (
        "import sys; from pathlib import Path; from pipeline.plans.files import open_plan\n"
        "from pipeline.segments import reduce_segment\n"
        "plan = open_plan(Path(sys.argv[1]))\n"
        "print('go', flush=True)\n"
        "reduce_segment(plan, plan.segments[0], lambda: None)\n"
        "print('done', flush=True)\n"
    )

    def start() -> "subprocess.Popen[str]":
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(plan.folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None and child.stdout.readline() == "go\n"
        return child

    began = time.monotonic()
    child = start()
    assert child.stdout is not None
    assert child.stdout.readline() == "done\n"
    child.wait()
    child.stdout.close()
    seconds = time.monotonic() - began
    whole = files(plan.folder)
    states = set()
    kills = sized(10, 20)
    for number in range(kills):
        shutil.rmtree(plan.folder)
        shutil.copytree(prepared, plan.folder)
        child = start()
        time.sleep(seconds * number / kills)
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
        if layout.record_file(plan.folder, 0).exists():
            check_shard(plan.folder, read_record(plan.folder, 0))
            states.add("published")
        else:
            assert len(list(plan.folder.glob("??/??/*.npy"))) == rows, "no input goes before the record"
            states.add("not published")
        reduce_segment(plan, plan.segments[0], lambda: None)
        assert files(plan.folder) == whole
        assert not list(plan.folder.glob("??/??/*.npy"))
    assert states == {"published", "not published"}, "the kills were spread over the write"


def test_with_shipped_settings_a_dead_workers_images_run_again_within_75_s(
    disturbed: Ruiji, server: Server, undisturbed: Undisturbed
) -> None:
    disturbed.environment = {**SHIPPED, "RUIJI_REDIS_URL": server.url}
    disturbed("enqueue")
    worker = disturbed.start("worker", "--processes", "2")
    assert wait_for_progress(disturbed)
    plan = open_plan(disturbed.gallery)
    assert plan is not None
    worker.kill()
    killed = time.monotonic()
    wait_until(lambda: not worker_processes("embed") and not worker_processes("reduce"), what="the end of the orphans")
    client = connect(server.url)
    held = Chords(client, plan.gallery_id, plan.plan_id).held_messages()
    assert held > 0, "the dead worker held something"
    before = progress(disturbed)
    disturbed.start("worker", "--processes", "2")
    wait_until(lambda: (progress(disturbed) or 10**9) > (before or 0), timeout_s=20, what="other work, at once")
    wait_until(lambda: progress(disturbed) is None, timeout_s=75 + undisturbed.seconds, what="the end of the run")
    assert time.monotonic() - killed < 75 + undisturbed.seconds
    finish(disturbed, undisturbed)


def test_three_poison_images_fail_and_nothing_else(ruiji: Ruiji, server: Server) -> None:
    from tests.factories import pictures
    from tests.workers.poison import POISON_PATH, poison

    count = sized(150, 1000)
    paths = pictures(ruiji.media, count)
    reasons = {"segfault": "crashed-worker", "hog": "memory", "endless": "timeout"}
    poisoned = dict(zip(RNG.sample(paths, 3), reasons, strict=True))
    for path, kind in poisoned.items():
        poison(ruiji.media / path, kind)
    ruiji.environment = {
        "RUIJI_REDIS_URL": server.url,
        "RUIJI_VISIBILITY_TIMEOUT_S": "3",
        "RUIJI_STALL_TIMEOUT_S": "4",
        "RUIJI_SHARD_ROWS": "50",
        "RUIJI_MAX_IMAGE_S": "3",
        "RUIJI_MAX_IMAGE_MB": "512",
        "RUIJI_BATCH_IMAGES": "8",
        "PYTHONPATH": POISON_PATH,
    }
    ruiji("enqueue")
    ruiji.start("worker", "--processes", "2")
    ruiji("enqueue", "--wait", code=3)
    listed = [json.loads(line) for line in ruiji("failures", "--format", "jsonl", code=3).stdout.splitlines()]
    assert {entry["path"]: entry["reason"] for entry in listed} == {p: reasons[kind] for p, kind in poisoned.items()}
    status = json.loads(ruiji("status", "--json", code=3).stdout)
    assert (status["done"], status["failed"]) == (count - 3, 3)
    assert not list((ruiji.gallery / "run" / "suspects").glob("*")), "no suspicion outlives its plan"
