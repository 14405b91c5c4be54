"""Whether the media folder is there: told by any image that is known, at a bounded cost."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import MachineFault
from pipeline.model import load_model
from pipeline.plans.plan import Plan
from pipeline.plans.probes import note_probes, noted_probes
from pipeline.segments import reduce_segment
from tests.pipeline.galleries import embed, new_plan
from workers.decode import media
from workers.decode.media import check_media
from workers.embed import DONE, FAILED, Job, embed_batch
from workers.encoder import Encoder


@pytest.fixture
def plan(tmp_path: Path, model_path: Path) -> Plan:
    """Forty objects in ten segments."""
    return new_plan(tmp_path, model_path, 40)


def remove(folder: Path, paths: tuple[str, ...] | list[str]) -> None:
    for path in paths:
        (folder / path).unlink()


def all_paths(plan: Plan) -> list[str]:
    return [path for segment in plan.segments for path in plan.paths(segment)]


def test_deleted_probes_do_not_stand_for_the_folder(tmp_path: Path, plan: Plan, model_path: Path) -> None:
    remove(tmp_path / "media", plan.probes)
    batch = [Job(segment, path) for segment in plan.segments for path in plan.paths(segment)]
    outcomes = embed_batch(plan, batch, Encoder(load_model(model_path), "cpu"), tmp_path / "media")
    assert outcomes.count(FAILED) == len(plan.probes)
    assert outcomes.count(DONE) == 40 - len(plan.probes)


def test_one_line_of_the_plan_or_of_its_shards_proves_the_folder(tmp_path: Path, plan: Plan) -> None:
    paths = all_paths(plan)
    remove(tmp_path / "media", paths[:20] + paths[21:])
    check_media(plan, tmp_path / "media")
    (tmp_path / "media" / paths[20]).unlink()
    with pytest.raises(MachineFault, match="is gone"):
        check_media(plan, tmp_path / "media")


def test_images_of_published_shards_count(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    embed(plan, plan.paths(plan.segments[0]))
    reduce_segment(plan, plan.segments[0], lambda: None)
    paths = all_paths(plan)
    remove(tmp_path / "media", paths[1:])
    # As in a plan that makes another shard again: only the shard's own list has the image.
    monkeypatch.setattr(Plan, "todo", tmp_path / "none")
    check_media(plan, tmp_path / "media")


def test_fresh_probes_count(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "media" / "new.png").touch()
    remove(tmp_path / "media", all_paths(plan))
    assert noted_probes(plan) == []
    note_probes(plan, ("new.png",))
    check_media(plan, tmp_path / "media")
    file = plan.folder / "run" / "probes.json"
    for damaged in (f'{{"format": 1, "plan": "{plan.plan_id}", "probes": [1, {{}}]}}', "{}", "[]", '{"format": 1}'):
        file.write_text(damaged)
        assert noted_probes(plan) == []
    note_probes(replace(plan, plan_id="0" * 16), ("new.png",))
    assert noted_probes(plan) == [], "they are another plan's"


def test_a_folder_that_is_gone_is_noticed_at_once_and_again_when_it_is_back(tmp_path: Path, plan: Plan) -> None:
    check_media(plan, tmp_path / "media")
    (tmp_path / "media").rename(tmp_path / "away")
    with pytest.raises(MachineFault, match=r"mount it, or, if .* ruiji cancel"):
        check_media(plan, tmp_path / "media")
    (tmp_path / "away").rename(tmp_path / "media")
    check_media(plan, tmp_path / "media")


def test_many_missing_files_and_a_long_list_cost_little(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    access = os.access
    monkeypatch.setattr(media.os, "access", lambda *a: looks.append(a) or access(*a))
    remove(tmp_path / "media", plan.probes)
    for _ in range(1000):
        check_media(plan, tmp_path / "media")
    assert len(looks) < 1100, "one look each, and what it took to find an image"
    shutil.rmtree(tmp_path / "media")
    looks.clear()
    for _ in range(1000):
        with pytest.raises(MachineFault):
            check_media(plan, tmp_path / "media")
    assert len(looks) < 1000 * (len(plan.probes) + 1) + 500, "the list was gone through once"


def test_a_look_ends_in_time_and_the_next_goes_on(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_LOOK_S", 0.0)
    monkeypatch.setattr(media, "_PAUSE_S", 0.0)
    monkeypatch.setattr(media, "_PLACES", 1)
    paths = all_paths(plan)
    remove(tmp_path / "media", paths[:-1])
    tries = 0
    started = time.monotonic()
    found = False
    while not found:
        tries += 1
        try:
            check_media(plan, tmp_path / "media")
            found = True
        except MachineFault:
            continue
    assert 30 < tries <= 42
    assert time.monotonic() - started < 10
