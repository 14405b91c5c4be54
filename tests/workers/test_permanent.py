"""Faults that cannot pass end the run with one line; faults of the machine are blamed on no image."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.choices import Device, ObjectIds
from pipeline.enqueue import Extraction, enqueue
from pipeline.errors import MachineFault, ModelError, UsageError
from pipeline.gallery import claim_gallery, read_gallery
from pipeline.model import load_model
from pipeline.objects import IdScheme
from pipeline.plans.files import open_plan
from pipeline.plans.stops import stop_plan, stopped
from pipeline.queue.connection import connect
from pipeline.segments import reduce_segment
from pipeline.store import DIGEST_BYTES, Embedded
from pipeline.trial import prove_model
from tests.conftest import ROOT
from tests.factories import Ruiji, pictures, processes_below, tiny_model, wait_until
from tests.odd_models import odd_model
from tests.pipeline.galleries import embed, new_plan, plan_for
from workers.encoder import Encoder
from workers.permanent import REPEATS, Repeats
from workers.suspects.in_hand import InHand
from workers.trial import proven_encoder

SCHEME = IdScheme(ObjectIds.basename)


def give(ruiji: Ruiji, kind: str) -> None:
    """Let the command have a model that does not do what it promises."""
    ruiji.model = odd_model(ruiji.model.with_name("odd.onnx"), kind)


def claim(ruiji: Ruiji) -> None:
    """As a ruiji did that tried no model."""
    claim_gallery(ruiji.gallery, load_model(ruiji.model), SCHEME)


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line in which a command fails."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "kind", ["longer", "second-input", *(pytest.param(odd, marks=pytest.mark.slow) for odd in ("fails", "other-rank"))]
)
def test_a_model_that_does_not_run_is_refused_before_anything_is_made(ruiji: Ruiji, redis_url: str, kind: str) -> None:
    pictures(ruiji.media, 4)
    give(ruiji, kind)
    assert "odd.onnx" in said(ruiji("run", "--workers", "1", code=2))
    assert not ruiji.gallery.exists() or not (ruiji.gallery / "gallery.json").exists()
    said(ruiji("enqueue", "--redis-url", redis_url, code=2))
    assert connect(redis_url).keys("ruiji:*") == []
    # Nothing is claimed: the mended model is taken.
    tiny_model(ruiji.model)
    ruiji.model.with_suffix(".toml").unlink(missing_ok=True)
    ruiji("run", "--workers", "1")


def test_a_gallery_that_is_there_has_its_model_not_tried_again(
    ruiji: Ruiji, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(ruiji.media, 4)
    ruiji("run", "--workers", "1")
    # Every child of this dies; one is started for the first enqueue only.
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ModelError, match="ends the process"):
        prove_model(load_model(ruiji.model))
    work = Extraction(ruiji.media, ruiji.features, ruiji.model)
    assert enqueue(work, redis_url).plan is None


def test_what_the_cpu_cannot_do_is_left_to_the_first_worker_which_ends_the_run(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 4)
    give(ruiji, "no-cpu")
    done = ruiji("run", "--workers", "1", code=1)
    assert "model_untried" in done.stderr
    assert "cannot run on cpu" in done.stderr.splitlines()[-1]
    assert "cannot run on cpu" in json.loads(ruiji("status", "--json", code=1).stdout)["stopped"]


def test_a_gallery_from_before_whose_model_does_not_run_is_stopped_by_the_first_worker(
    ruiji: Ruiji, redis_url: str
) -> None:
    pictures(ruiji.media, 4)
    give(ruiji, "longer")
    claim(ruiji)
    assert "the run was stopped: " in said(ruiji("run", "--workers", "1", code=1))
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    assert stopped(ruiji.gallery) is None
    assert json.loads(ruiji("status", "--json", code=3).stdout)["stopped"] is None
    said_so = ruiji.media.parent / "said.txt"
    waiting = ruiji.start("enqueue", "--wait", errors=said_so)
    # It follows this plan; a stopped one would be followed by a new one.
    wait_until(lambda: "published now" in said_so.read_text(), what="the plan's being taken up")
    worker = ruiji.start("worker", "--processes", "1")
    assert waiting.wait(timeout=180) == 1
    assert "gives float32[1, 12]" in said_so.read_text()
    assert worker.wait(timeout=180) == 2
    assert "the run was stopped: the model" in ruiji("status", code=1).stdout


def test_a_model_that_breaks_its_word_later_stops_the_run(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 4)
    give(ruiji, "sometimes-shorter")
    assert "gives float32[1, 11]" in said(ruiji("run", "--workers", "1", code=1))
    assert "gives float32[1, 11]" in json.loads(ruiji("status", "--json", code=1).stdout)["stopped"]


def test_an_image_that_the_model_does_not_run_on_fails_alone(ruiji: Ruiji) -> None:
    paths = pictures(ruiji.media, 4)
    for path in paths[1:]:
        Image.new("RGB", (16, 12), (128, 128, 128)).save(ruiji.media / path)
    give(ruiji, "sometimes-fails")
    ruiji("run", "--workers", "1", code=3)
    assert ruiji("failures", code=3).stdout.split()[0] == "model-failed"
    assert json.loads(ruiji("status", "--json", code=3).stdout)["done"] == 3
    ruiji("retry", "--reason", "model-failed")


@pytest.mark.slow
def test_an_image_that_the_model_does_not_get_done_with_fails_alone(ruiji: Ruiji) -> None:
    paths = pictures(ruiji.media, 4)
    for path in paths[1:]:
        Image.new("RGB", (16, 12), (128, 128, 128)).save(ruiji.media / path)
    give(ruiji, "sometimes-endless")
    ruiji("run", "--workers", "1", "--max-image-s", "1", "--visibility-timeout-s", "3", code=3)
    assert ruiji("failures", code=3).stdout.split()[0] == "crashed-worker"
    assert json.loads(ruiji("status", "--json", code=3).stdout)["done"] == 3


def test_a_worker_that_cannot_run_the_model_ends_itself_only_where_others_can(
    tmp_path: Path, model_path: Path, redis_url: str
) -> None:
    plan = new_plan(tmp_path, model_path, 8)
    gallery = read_gallery(plan.folder)
    assert gallery is not None
    client = connect(redis_url)

    def cannot(_: object) -> Encoder:
        raise ModelError("no")

    arguments = (model_path, plan.folder, gallery, client, InHand(), cannot)
    embed(plan, plan.paths(plan.segments[0]))
    reduce_segment(plan, plan.segments[0], lambda: None)
    with pytest.raises(ModelError):
        proven_encoder(*arguments)
    assert open_plan(plan.folder) is not None, "somebody did a part of it"
    assert stop_plan(plan, "x\ny")
    assert stopped(plan.folder) == "x y"
    assert not stop_plan(plan, "again")


def test_a_finished_plan_is_not_called_stopped(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 4)
    embed(plan, plan.paths(plan.segments[0]))
    reduce_segment(plan, plan.segments[0], lambda: None)
    # The last shard came between the fault and the stop.
    stop_plan(plan, "why")
    assert stopped(plan.folder) is None
    assert not stop_plan(plan, "again")


def test_a_machine_without_the_memory_ends_with_one_line_and_blames_no_image(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 4)
    give(ruiji, "large")
    claim(ruiji)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_VISIBILITY_TIMEOUT_S": "4"}
    ruiji("enqueue")
    worker = ruiji.start("worker", "--processes", "1")
    ended = threading.Event()

    def kill_the_large() -> None:
        # As the kernel does where a control group has 420 MB.
        while not ended.wait(0.01):
            for process in processes_below(worker.pid):
                with suppress(psutil.Error):
                    if process.memory_info().rss > 420 << 20:
                        process.kill()

    killer = threading.Thread(target=kill_the_large)
    killer.start()
    try:
        assert worker.wait(timeout=180) == 1
    finally:
        ended.set()
        killer.join()
    plan = open_plan(ruiji.gallery)
    assert plan is not None
    assert not list((ruiji.gallery / "run").glob("suspects/*/*")), "no image is suspected"
    assert ruiji("failures").stdout == ""


def test_a_model_file_that_is_away_for_a_while_is_waited_for(
    ruiji: Ruiji, redis_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures(ruiji.media, 4)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    away = ruiji.model.rename(ruiji.model.with_name("away"))
    ruiji.model.touch()
    worker = ruiji.start("worker", "--processes", "1")
    wait_until(lambda: "waiting_for_model" in capfd.readouterr().err, what="a process that waits")
    ruiji.model.unlink()
    time.sleep(3)
    assert worker.poll() is None
    away.rename(ruiji.model)
    ruiji("enqueue", "--wait")


def test_what_is_waited_for_in_vain_ends(
    tmp_path: Path, model_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = new_plan(tmp_path, model_path, 4)
    gallery = read_gallery(plan.folder)
    assert gallery is not None
    client = connect(redis_url)

    def too_large(_: object) -> Encoder:
        raise MachineFault("the model failed on cpu: bad allocation")

    rest = (plan.folder, gallery, client, InHand())
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match="no model at"):
        proven_encoder(tmp_path / "none.onnx", *rest, lambda model: Encoder(model, Device.cpu), patience_s=1.5)
    with caplog.at_level(logging.WARNING), pytest.raises(UsageError, match="cannot run the model"):
        proven_encoder(model_path, *rest, too_large, patience_s=1.5)
    assert len(caplog.records) == 2, "each is told once"
    assert open_plan(plan.folder) is not None


def test_a_fault_that_nobody_foresaw_stops_the_plan_if_nothing_else_goes_on(
    tmp_path: Path, model_path: Path, redis_url: str
) -> None:
    plan = new_plan(tmp_path, model_path, 8)
    repeats = Repeats(plan.folder, connect(redis_url))
    for _ in range(REPEATS - 1):
        repeats.add(KeyError("x"))
    embed(plan, plan.paths(plan.segments[0]))
    reduce_segment(plan, plan.segments[0], lambda: None)
    for _ in range(REPEATS - 1):
        repeats.add(KeyError("x"))
    assert open_plan(plan.folder) is not None, "a shard was published meanwhile"
    repeats.add(KeyError("x"))
    assert open_plan(plan.folder) is None
    assert "KeyError: 'x'" in (stopped(plan.folder) or "")


def patch(ruiji: Ruiji, tmp_path: Path, script: str) -> None:
    """Let the processes that the command starts from now on run a script before all else."""
    folder = tmp_path / "patch"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(script)
    ruiji.root = Path(f"{ROOT}{os.pathsep}{folder}")


#: Else a minute passes before the plan is stopped.
SOON = "import workers.permanent\nworkers.permanent.REPEATS = 3\n"


@pytest.mark.slow
def test_a_bug_that_one_image_brings_out_ends_the_run_when_all_else_is_done(ruiji: Ruiji, tmp_path: Path) -> None:
    paths = pictures(ruiji.media, 40)
    script = (
        "import workers.embed as e\n"
        "def bug(path, *rest):\n"
        f"    if path.endswith({paths[3]!r}): raise KeyError('a bug')\n"
        "    return open_image(path, *rest)\n"
        "open_image, e.open_image = e.open_image, bug\n"
    )
    patch(ruiji, tmp_path, SOON + script)
    ruiji.environment = {"RUIJI_KEEP_FEATURES": "1"}
    assert "KeyError: 'a bug'" in said(ruiji("run", "--workers", "1", code=1))
    assert len(list(ruiji.gallery.glob("??/??/*.npy"))) == 39
    ruiji.root = ROOT
    ruiji("run", "--workers", "1")


def test_a_bug_in_reducing_ends_the_run(ruiji: Ruiji, tmp_path: Path) -> None:
    pictures(ruiji.media, 4)
    script = (
        "import pipeline.segments as s, workers.roles as r\n"
        "def bug(*_): raise KeyError('a bug')\n"
        "s.reduce_segment, r.REST_S = bug, 0.1\n"
    )
    patch(ruiji, tmp_path, SOON + script)
    assert "KeyError: 'a bug'" in said(ruiji("run", "--workers", "1", code=1))
    ruiji.root = ROOT
    ruiji("run", "--workers", "1")


def test_a_damaged_list_ends_the_run_with_its_reason(ruiji: Ruiji, redis_url: str, tmp_path: Path) -> None:
    pictures(ruiji.media, 4)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    plan = open_plan(ruiji.gallery)
    assert plan is not None
    plan.todo.write_bytes(plan.todo.read_bytes()[:-5])
    patch(ruiji, tmp_path, SOON)
    ruiji.start("worker", "--processes", "1", "--role", "embed")
    wait_until(lambda: stopped(ruiji.gallery) is not None, what="the stop")
    assert "todo.txt is not as its plan says" in json.loads(ruiji("status", "--json", code=1).stdout)["stopped"]
    ruiji.start("worker", "--processes", "1", "--role", "reduce")
    ruiji("enqueue", "--wait")


#: A worker whose numpy is another one than the plan's.
OTHER_LIBRARIES = (
    "import pipeline.versions as v\nours = v.library_versions\nv.library_versions = lambda: {**ours(), 'numpy': '0'}\n"
)


@pytest.mark.parametrize("before", [True, False])
def test_a_worker_with_other_libraries_than_the_plans_ends(
    ruiji: Ruiji, redis_url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], before: bool
) -> None:
    pictures(ruiji.media, 4)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_VISIBILITY_TIMEOUT_S": "3600"}
    ruiji("enqueue")
    patch(ruiji, tmp_path, OTHER_LIBRARIES)
    if before:
        ruiji.root = ROOT
        ruiji("cancel")
        patch(ruiji, tmp_path, OTHER_LIBRARIES)
    late = ruiji.start("worker", "--processes", "1", "--role", "embed")
    if before:
        wait_until(lambda: "worker_ready" in capfd.readouterr().err, what="the worker")
        ruiji.root = ROOT
        ruiji("enqueue")
    assert late.wait(timeout=180) == 4
    ruiji.root = ROOT
    ruiji.start("worker", "--processes", "1")
    # What it held is given back at once, not after the visibility timeout.
    ruiji("enqueue", "--wait")


@pytest.mark.slow
def test_a_process_whose_gpu_is_lost_is_followed_by_another(
    ruiji: Ruiji, tmp_path: Path, redis_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures(ruiji.media, 8)
    lost = tmp_path / "lost"
    lost.mkdir()
    script = (
        "import os\nimport workers.roles as t\nfrom pipeline.errors import DeviceFault\n"
        "def lose(*a):\n"
        f"    times = len(os.listdir({str(lost)!r}))\n"
        "    if times < 2:\n"
        f"        open(f'{lost}/{{times}}', 'w').close(); raise DeviceFault('CUDA failure 719')\n"
        "    return embed_guarded(*a)\n"
        "embed_guarded, t.embed_guarded = t.embed_guarded, lose\n"
    )
    patch(ruiji, tmp_path, script)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    worker = ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait")
    assert "process_died" in capfd.readouterr().err
    assert worker.poll() is None


def test_doctor_and_search_say_what_is_wrong_with_a_model_in_one_line(ruiji: Ruiji, redis_url: str) -> None:
    paths = pictures(ruiji.media, 4)
    give(ruiji, "longer")
    done = ruiji("doctor", "--redis-url", redis_url, code=1)
    assert "bad   device" in done.stdout and "gives float32[1, 12]" in done.stdout
    assert "Traceback" not in done.stderr
    plan = plan_for(ruiji.media.parent, ruiji.model, paths)
    assert plan is not None
    embedded = Embedded(np.ones(16, np.float32), bytes(DIGEST_BYTES))
    plan.write_features(plan.segments[0], {plan.scheme.object_id(path): embedded for path in paths})
    reduce_segment(plan, plan.segments[0], lambda: None)
    assert "gives float32" in said(ruiji("search", str(ruiji.media / paths[0]), code=2))
    ruiji("search", "--id", paths[0].rpartition("/")[2])


def test_a_stop_signal_ends_a_process_that_waits_for_its_model(
    ruiji: Ruiji, redis_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures(ruiji.media, 4)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    ruiji.model.write_bytes(b"")
    worker = ruiji.start("worker", "--processes", "1", "--role", "embed")
    wait_until(lambda: "waiting_for_model" in capfd.readouterr().err, what="a process that waits")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=180) == 0


@pytest.mark.parametrize(
    ("end", "untried"),
    [("kill -9 $$", "too little memory"), ("kill -11 $$", None), ("echo no Redis >&2; exit 3", None)],
)
def test_a_trial_that_ends_its_process_is_told(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, untried: str | None
) -> None:
    monkeypatch.setattr("pipeline.trial.python_command", lambda *_: ["sh", "-c", end])
    if untried is not None:
        assert untried in (prove_model(load_model(model_path)) or "")
    else:
        with pytest.raises(ModelError, match=r"ends the process .* (SIGSEGV|status 3: no Redis)"):
            prove_model(load_model(model_path))


def test_a_trial_that_does_not_end_is_ended(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.trial.python_command", lambda *_: ["sleep", "600"])
    monkeypatch.setattr("pipeline.trial.TRIAL_S", 0.2)
    with pytest.raises(ModelError, match="takes longer than"):
        prove_model(load_model(model_path))
