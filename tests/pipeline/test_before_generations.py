"""A gallery that ruiji made before it had generations, with a plan half done: it is read, continued or closed.

Made by ruiji 0.1.0 as of 2026-11-28: two shards of a closed plan, with one failure and one row that left the list; an
open plan with one shard, one feature, one failure and one object that nobody looked at.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.enqueue import Extraction
from pipeline.enqueue import enqueue as queue
from pipeline.errors import GalleryMismatch
from pipeline.gallery import read_gallery
from pipeline.model import load_model, pixels_of
from pipeline.plans.closing import cancel_plan
from pipeline.plans.files import open_plan
from pipeline.plans.generations import current
from pipeline.plans.plan import Plan
from pipeline.plans.planning import PlanSettings
from pipeline.segments import finish_plan, reduce_segment
from pipeline.status import StatusReader
from pipeline.store import read_json
from pipeline.verify import verify
from search.gallery.opening import open_gallery
from search.queries import query_model
from tests.factories import pictures
from tests.pipeline.galleries import embed, files, is_done, plan_for

DATA = Path(__file__).resolve().parent.parent / "data" / "before-generations"
OPEN, CLOSED = "06d7f3734df35db3", "9cd00348ef7a59db"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of its folder, as gallery of `tiny.onnx`."""
    shutil.copytree(DATA / "tiny", tmp_path / "features" / "tiny")
    return tmp_path / "features" / "tiny"


def enqueue(tmp_path: Path) -> Plan | None:
    paths = pictures(tmp_path / "media", 12)
    return plan_for(tmp_path, DATA / "tiny.onnx", [*paths[:4], *paths[5:]])


def finish(plan: Plan) -> None:
    for segment in plan.unpublished():
        embed(plan, [path for path in plan.paths(segment) if not is_done(plan, path)])
        assert not reduce_segment(plan, segment, lambda: None).missing
    finish_plan(plan, lambda segment: nullcontext())


def figures(folder: Path) -> tuple[int, ...]:
    status = StatusReader(folder, None).read()
    return status.objects, status.done, status.failed, status.pending, status.stale


def test_it_is_searched_and_its_plan_is_continued(tmp_path: Path, old: Path) -> None:
    before = files(old)
    assert figures(old) == (11, 8, 2, 1, 1)
    assert open_gallery(old).stale_rows == 1
    plan = enqueue(tmp_path)
    assert plan is not None
    assert (plan.plan_id, plan.generation) == (OPEN, 0)
    assert [is_done(plan, path) for path in plan.paths(plan.segments[1])] == [True, True, False]
    finish(plan)
    assert figures(old) == (11, 9, 2, 0, 1)
    after = files(old)
    assert {name: after[name] for name in before} == before
    assert after["0003.json"].count(b'"too-large"') == 1, "what failed is taken over"
    assert [finding for finding in verify(old) if finding.broken] == []
    # The next list is a generation, and a ruiji that knows none refuses the folder.
    assert enqueue(tmp_path) is None
    assert current(old).number == 1
    assert read_json(old / "run" / "plan.json", 2)["format"] == 2
    assert figures(old) == (11, 9, 2, 0, 1)


def test_its_plan_is_closed_and_planned_anew(tmp_path: Path, old: Path) -> None:
    plan = open_plan(old)
    assert plan is not None
    cancel_plan(plan)
    assert open_plan(old) is None
    assert list((old / "run").glob("*.todo.txt")) == []
    again = enqueue(tmp_path)
    assert again is not None
    assert (again.generation, [segment.shard for segment in again.segments]) == (1, [4])
    # Neither an untagged feature nor another plan's failure counts in a plan that knows of tags.
    assert [is_done(again, path) for path in again.paths(again.segments[0])] == [False] * 3
    finish(again)
    assert figures(old) == (11, 10, 1, 0, 1)
    assert verify(old) == []


def test_a_damaged_list_is_noticed_by_its_plans_id(tmp_path: Path, old: Path) -> None:
    todo = old / "run" / f"{OPEN}.todo.txt"
    data = bytearray(todo.read_bytes())
    data[30] ^= 1
    todo.write_bytes(data)
    plan = open_plan(old)
    assert plan is not None
    with pytest.raises(GalleryMismatch, match="ruiji cancel"):
        plan.paths(plan.segments[0])


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_lost_shard_whose_list_is_damaged_becomes_new_shards(tmp_path: Path, old: Path, damage: str) -> None:
    plan = enqueue(tmp_path)
    assert plan is not None
    finish(plan)
    todo = old / "run" / "done" / CLOSED / "todo.txt"
    data = todo.read_bytes()
    todo.unlink()
    if damage != "gone":
        todo.write_bytes(data[: len(data) // 4] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    kinds = [(finding.kind, finding.name, finding.repairable) for finding in verify(old)]
    assert kinds == [("damaged", f"run/done/{CLOSED}/todo.txt", True)]
    for path in old.glob("0000.*"):
        path.unlink()
    again = enqueue(tmp_path)
    assert again is not None
    assert (again.given_up, [segment.shard for segment in again.segments]) == ((0,), [4])
    finish(again)
    assert figures(old)[:4] == (11, 10, 1, 0), "the failure of shard 0 is tried again too"
    assert [finding.kind for finding in verify(old) if finding.broken] == ["damaged"]


def test_a_plans_id_that_is_a_path_names_no_folder(tmp_path: Path, old: Path) -> None:
    victim = tmp_path / "home" / "victim"
    victim.mkdir(parents=True)
    (victim / "thesis.txt").write_text("years of work")
    (old / "run" / "suspects").mkdir()
    (old / "run" / "suspects" / "a").symlink_to(victim.parent)
    path = old / "run" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "plan_id": "a/victim"}))
    with pytest.raises(GalleryMismatch, match=r"plan\.json is damaged"):
        open_plan(old)
    assert (victim / "thesis.txt").exists()


def test_a_list_that_is_not_known_is_starting_and_not_done(old: Path) -> None:
    (old / "run" / "list.json").unlink()
    status = StatusReader(old, None).read()
    assert status.starting and not status.finished
    (old / "run" / "list.json").write_text("")
    with pytest.raises(GalleryMismatch, match=r"list\.json is damaged"):
        StatusReader(old, None).read()


def test_it_keeps_its_fingerprint_and_the_pixels_of_its_time(tmp_path: Path, old: Path) -> None:
    before = (old / "gallery.json").read_bytes()
    paths = pictures(tmp_path / "media", 12)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [*paths[:4], *paths[5:]]))
    settings = PlanSettings(4, keep_features=False, max_pixels=10**8, max_image_s=2, max_image_mb=256)
    work = Extraction(tmp_path / "media", tmp_path / "features", DATA / "tiny.onnx", plan=settings)
    assert queue(work, None, tmp_path / "list.txt").resumed
    assert (old / "gallery.json").read_bytes() == before
    gallery = read_gallery(old)
    assert gallery is not None
    assert gallery.contract is not None
    assert "pixels" not in gallery.contract["spec"]
    model = load_model(DATA / "tiny.onnx", pixels_of(gallery.contract))
    assert (model.fingerprint, model.spec.pixels) == (gallery.fingerprint, 1)
    assert query_model(DATA / "tiny.onnx", open_gallery(old)) == model


def test_a_lost_shard_is_made_again_with_its_record_as_it_was(tmp_path: Path, old: Path) -> None:
    plan = enqueue(tmp_path)
    assert plan is not None
    finish(plan)
    before = json.loads((old / "0000.json").read_text())
    for path in old.glob("0000.*"):
        path.unlink()
    again = enqueue(tmp_path)
    assert again is not None
    finish(again)
    after = json.loads((old / "0000.json").read_text())
    assert sorted(after.pop("versions")) == sorted(before.pop("versions")) == ["numpy", "onnxruntime", "pillow"]
    assert (after["fingerprint"], after["sha256"].keys()) == (before["fingerprint"], before["sha256"].keys())


def test_a_toml_that_wants_other_pixels_is_refused_with_the_way_out(tmp_path: Path, old: Path) -> None:
    shutil.copy(DATA / "tiny.onnx", tmp_path / "tiny.onnx")
    (tmp_path / "tiny.toml").write_text("[input]\npixels = 2\n")
    paths = pictures(tmp_path / "media", 12)
    before = files(old)
    with pytest.raises(GalleryMismatch, match="remove that line"):
        plan_for(tmp_path, tmp_path / "tiny.onnx", paths)
    with pytest.raises(GalleryMismatch, match="remove that line"):
        query_model(tmp_path / "tiny.onnx", open_gallery(old))
    assert files(old) == before
    (tmp_path / "tiny.toml").write_text("[input]\npixels = 1\n")
    assert plan_for(tmp_path, tmp_path / "tiny.onnx", [*paths[:4], *paths[5:]]) is not None


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_a_gallery_file_that_is_rebuilt_keeps_the_pixels_too(tmp_path: Path, old: Path, damage: str) -> None:
    before = (old / "gallery.json").read_bytes()
    (old / "gallery.json").unlink()
    if damage == "cut":
        (old / "gallery.json").write_bytes(before[:40])
    assert enqueue(tmp_path) is not None
    assert (old / "gallery.json").read_bytes() == before


def test_a_gallery_that_nothing_was_made_in_is_made_with_the_newest_pixels(tmp_path: Path, old: Path) -> None:
    before = (old / "gallery.json").read_text()
    shutil.rmtree(old)
    old.mkdir()
    (old / "gallery.json").write_text(before)
    assert enqueue(tmp_path) is not None
    gallery = read_gallery(old)
    assert gallery is not None
    assert pixels_of(gallery.contract) == 2


@pytest.mark.parametrize(
    "change", [{"spec": None}, {"spec": {}}, {"toml": 1}, {"external": "x"}, {"spec": {"pixels": "2"}}]
)
def test_a_contract_of_other_types_is_damage(old: Path, change: dict[str, object]) -> None:
    value = json.loads((old / "gallery.json").read_text())
    if isinstance(change.get("spec"), dict) and change["spec"]:
        change = {"spec": value["contract"]["spec"] | change["spec"]}
    value["contract"] |= change
    (old / "gallery.json").write_text(json.dumps(value))
    with pytest.raises(GalleryMismatch, match="damaged"):
        read_gallery(old)
