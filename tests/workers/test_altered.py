"""A gallery with pixels = 1 counts the pictures that it takes otherwise than people see them, each once."""

import json
import os
import shutil
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import altered as counting
from pipeline.altered import Altered
from pipeline.model import load_model
from pipeline.plans.closing import cancel_plan, close_plan
from pipeline.plans.plan import Limits, Plan
from pipeline.segments import finish_plan, reduce_segment
from pipeline.status import StatusReader
from tests.factories import Ruiji, picture, tiny_model
from tests.pipeline.galleries import plan_for
from workers.embed import Job, embed_batch
from workers.encoder import Encoder
from workers.suspects.alone import decode_alone

EXPECTED = Altered(clipped=2, ground=3, turned=1)


def odd_pictures(media: Path) -> list[str]:
    """Two wide ones, three transparent ones, a turned one, and four that are as everybody sees them."""
    for name in ("a.png", "b.jpg"):
        picture(media / name)
    Image.fromarray(np.full((8, 8), 300, "<u2")).save(media / "c.png")
    Image.fromarray(np.full((8, 8), 0.5, "<f4")).save(media / "d.tif")
    Image.new("RGBA", (8, 8), (1, 2, 3, 254)).save(media / "e.png")
    Image.new("P", (8, 8), 0).save(media / "f.png", transparency=0)
    Image.new("L", (8, 8), 7).save(media / "g.png", transparency=7)
    Image.new("RGB", (8, 6)).save(media / "h.tif", tiffinfo={0x0112: 6})
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(media / "i.png")
    Image.new("L", (8, 8), 7).save(media / "j.png", transparency=8)
    return sorted(path.name for path in media.iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tiny_model(tmp_path / "m.onnx")
    path.with_suffix(".toml").write_text("[input]\npixels = 1\n")
    return path


def opened(tmp_path: Path, model: Path, keep_features: bool = False) -> Plan:
    plan = plan_for(tmp_path, model, odd_pictures(tmp_path / "media"), 4, keep_features)
    assert plan is not None
    return plan


def embed(tmp_path: Path, plan: Plan, model: Path, *indices: int) -> None:
    encoder = Encoder(load_model(model), "cpu")
    for index in indices:
        segment = plan.segments[index]
        embed_batch(plan, [Job(segment, path) for path in plan.paths(segment)], encoder, tmp_path / "media")


def counted(plan: Plan) -> Altered | None:
    return StatusReader(plan.folder, None).read().altered


@pytest.fixture(autouse=True)
def media(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()


@pytest.mark.parametrize("keep_features", [False, True])
def test_each_is_counted_once_whatever_comes_late_or_twice(tmp_path: Path, model: Path, keep_features: bool) -> None:
    plan = opened(tmp_path, model, keep_features)
    embed(tmp_path, plan, model, 0, 1, 2)
    assert counted(plan) == Altered()
    for segment in plan.segments:
        reduce_segment(plan, segment, lambda: None)
        reduce_segment(plan, segment, lambda: None)
    assert counted(plan) == EXPECTED
    # A late duplicate marks again; nobody counts that.
    counting.begin_marks(plan)
    counting.mark(plan, "c.png", ["clipped"])
    reduce_segment(plan, plan.segments[0], lambda: None)
    assert counted(plan) == EXPECTED
    finish_plan(plan, lambda segment: nullcontext())
    assert counted(plan) == EXPECTED
    assert sorted(os.listdir(plan.folder / "run" / "altered")) == ["0000.json", "0001.json", "0002.json"]


def test_a_reducer_that_is_killed_anywhere_while_it_counts_loses_and_doubles_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = opened(tmp_path, model)
    embed(tmp_path, plan, model, 0, 1, 2)
    unlink = Path.unlink
    for segment in plan.segments:

        def dies(path: Path, missing_ok: bool = False) -> None:
            unlink(path, missing_ok)
            if path.parent.name == "marks":
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(counting, "write_atomic", dies_at_once)
            with pytest.raises(KeyboardInterrupt):
                reduce_segment(plan, segment, lambda: None)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", dies)
            with suppress(KeyboardInterrupt):
                reduce_segment(plan, segment, lambda: None)
        reduce_segment(plan, segment, lambda: None)
    assert counted(plan) == EXPECTED


def dies_at_once(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_a_cancelled_plan_embedded_is_counted_by_the_next(tmp_path: Path, model: Path) -> None:
    plan = opened(tmp_path, model)
    embed(tmp_path, plan, model, 0, 1, 2)
    cancel_plan(plan)
    again = plan_for(tmp_path, model, odd_pictures(tmp_path / "media"), 4)
    assert again is not None
    embed(tmp_path, again, model, 0, 1, 2)
    for segment in again.segments:
        reduce_segment(again, segment, lambda: None)
    assert counted(again) == EXPECTED


def test_shards_from_before_are_said_to_be_unknown_and_a_gallery_of_2_says_nothing(tmp_path: Path, model: Path) -> None:
    plan = opened(tmp_path, model)
    embed(tmp_path, plan, model, 0, 1, 2)
    for segment in plan.segments:
        reduce_segment(plan, segment, lambda: None)
    (plan.folder / "run" / "altered" / "0001.json").unlink()
    close_plan(plan)
    before = counted(plan)
    assert before is not None
    assert before.unknown_shards == 1
    assert "1 shards from before" in str(before) and "--feature-dir" in str(before)
    model.with_suffix(".toml").unlink()
    shutil.rmtree(plan.folder)
    second = opened(tmp_path, model)
    embed(tmp_path, second, model, 0)
    assert counted(second) is None
    assert not (second.folder / "run" / "altered").exists()


def test_a_suspect_that_is_decoded_alone_is_counted_too(tmp_path: Path, model: Path) -> None:
    odd_pictures(tmp_path / "media")
    told: list[str] = []
    spec = load_model(model).spec
    decode_alone(tmp_path / "media" / "e.png", spec, Limits(10**8, 60, 1024), told)
    assert told == ["ground"]
    decode_alone(tmp_path / "media" / "e.png", replace(spec, pixels=2), Limits(10**8, 60, 1024), told)
    assert told == ["ground"]


def test_run_a_wait_and_status_say_how_many_there_are(ruiji: Ruiji, redis_url: str) -> None:
    ruiji.model.with_suffix(".toml").write_text("[input]\npixels = 1\n")
    odd_pictures(ruiji.media)
    words = "pixels = 1: 2 images clipped, 3 without their white ground, 1 turned wrongly; a gallery of pixels = 2"
    assert words in ruiji("run", "--workers", "2", "--shard-rows", "3").stderr
    assert words in ruiji("status").stdout
    assert json.loads(ruiji("status", "--json").stdout)["altered"] == asdict(EXPECTED)
    ruiji.environment["RUIJI_REDIS_URL"] = redis_url
    assert words in ruiji("enqueue", "--wait", "--list", str(ruiji.gallery / "run" / "objects.txt")).stderr
    assert "pixels" in ruiji("model", "inspect", str(ruiji.model)).stdout
