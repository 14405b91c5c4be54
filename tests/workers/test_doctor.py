"""The doctor's checks, on things that are well and on things made ill."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline.choices import Device
from pipeline.model import load_model
from pipeline.plans.closing import close_plan
from pipeline.plans.plan import Plan
from pipeline.queue import embedded
from pipeline.queue.connection import connect
from pipeline.segments import reduce_segment
from tests.factories import picture
from tests.pipeline.galleries import new_plan
from workers import doctor
from workers.decode.resize import NO_INSTRUCTIONS
from workers.doctor import Check, examine
from workers.embed import Job, embed_batch
from workers.encoder import Encoder


@pytest.fixture
def plan(tmp_path: Path, model_path: Path) -> Plan:
    """A finished gallery of ten objects."""
    plan = new_plan(tmp_path, model_path, 10)
    encoder = Encoder(load_model(model_path), Device.cpu)
    for segment in plan.segments:
        embed_batch(plan, [Job(segment, path) for path in plan.paths(segment)], encoder, tmp_path / "media")
        reduce_segment(plan, segment, lambda: None)
    close_plan(plan)
    return plan


def look(tmp_path: Path, model_path: Path, url: str | None) -> dict[str, Check]:
    checks = examine(tmp_path / "media", tmp_path / "features", model_path, url, "cpu")
    return {check.name: check for check in checks}


@pytest.mark.parametrize(
    ("reason", "state"), [(None, "ok"), (NO_INSTRUCTIONS, "ok"), ("there was no C compiler; install gcc", "warn")]
)
def test_it_says_who_resizes_and_why(
    tmp_path: Path, model_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, reason: str | None, state: str
) -> None:
    monkeypatch.setattr(doctor, "why_not", lambda: reason)
    check = look(tmp_path, model_path, None)["resizing"]
    assert check.state == state and (reason or "compiled") in check.detail


@pytest.mark.parametrize(("reason", "state"), [(None, "ok"), ("there was no C compiler; install gcc", "warn")])
def test_it_says_who_reads_and_writes_small_files_and_why(
    tmp_path: Path, model_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, reason: str | None, state: str
) -> None:
    monkeypatch.setattr(doctor.small_files, "why_not", lambda: reason)
    check = look(tmp_path, model_path, None)["small files"]
    assert check.state == state and (reason or "compiled") in check.detail


def test_where_all_is_well_it_says_so(tmp_path: Path, model_path: Path, plan: Plan, redis_url: str) -> None:
    checks = look(tmp_path, model_path, redis_url)
    compiled = {"resizing", "small files"}
    assert {check.state for name, check in checks.items() if name not in compiled} == {"ok"}
    assert set(checks) == {"redis", "media", "folder", "model", "space", "libraries", "device", "features", *compiled}
    assert "10 objects embedded again, cosine at least 1.0000000" in checks["features"].detail
    assert "cpu" in checks["device"].detail
    assert redis_url.partition("@")[0].rpartition(":")[2] not in str(checks["redis"])


def test_a_redis_that_forgets_is_reported(tmp_path: Path, model_path: Path, redis_url: str) -> None:
    client = connect(redis_url)
    client.config_set("appendonly", "no")
    client.config_set("maxmemory", "100mb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        check = look(tmp_path, model_path, redis_url)["redis"]
    finally:
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "yes")
    assert check.state == "warn"
    assert "append-only" in check.detail and "noeviction" in check.detail and "password" not in check.detail
    assert look(tmp_path, model_path, "redis://:sesame@127.0.0.1:1/0")["redis"].state == "bad"


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_redis_only_a_run_that_starts_its_own_works(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if not installed:
        monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    check = look(tmp_path, model_path, None)["redis"]
    assert check.state == ("warn" if installed else "bad")
    assert "ruiji redis" in check.detail and ("ruiji run starts its own" in check.detail) is installed


def test_another_picture_under_an_old_id_is_noticed(
    tmp_path: Path, model_path: Path, plan: Plan, redis_url: str
) -> None:
    path = plan.paths(plan.segments[0])[0]
    picture(tmp_path / "media" / path, seed=1234)
    check = look(tmp_path, model_path, redis_url)["features"]
    assert check.state == "wrong"
    assert check.detail == (
        "9 objects embedded again, cosine at least 1.0000000; 1 picture is not the one that was embedded, first "
        f"{path}: ruiji verify --pictures finds all"
    )


def test_folders_that_are_not_there_or_damaged(tmp_path: Path, model_path: Path, plan: Plan, redis_url: str) -> None:
    for file in (tmp_path / "media").rglob("*.png"):
        file.unlink()
    assert look(tmp_path, model_path, redis_url)["features"].state == "warn", "nothing to compare"
    (tmp_path / "media").rename(tmp_path / "away")
    assert look(tmp_path, model_path, redis_url)["media"].state == "bad"
    np.save(plan.folder / "0000.features.npy", np.zeros(3))
    assert look(tmp_path, model_path, redis_url)["features"].state in ("bad", "warn")


@pytest.mark.parametrize(("file", "ill"), [("0002.json", "libraries"), ("run/generations/000001.json", "space")])
def test_a_damaged_file_of_ours_ends_its_checks_not_the_doctor(
    tmp_path: Path, model_path: Path, plan: Plan, redis_url: str, file: str, ill: str
) -> None:
    (plan.folder / file).write_text("{")
    checks = look(tmp_path, model_path, redis_url)
    assert checks[ill].state == "bad" and f"{file} is damaged" in checks[ill].detail
    assert checks["device"].state == "ok" and "features" in checks


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path, model_path: Path, redis_url: str) -> None:
    (tmp_path / "features").write_text("in the way")
    assert look(tmp_path, model_path, redis_url)["folder"].state == "bad"


def test_a_disk_too_small_for_the_open_plan(tmp_path: Path, model_path: Path, redis_url: str) -> None:
    import os

    if os.geteuid() != 0:
        pytest.skip("mounts a small tmpfs, which only root may")
    (tmp_path / "features").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path / "features")]).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        new_plan(tmp_path, model_path, 40, shard_rows=40)
        assert look(tmp_path, model_path, redis_url)["space"].state == "bad"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "features")], check=True)
