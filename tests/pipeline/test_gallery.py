"""Whose a gallery folder is, whatever happened to its `gallery.json`."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.choices import ObjectIds
from pipeline.errors import FileDamaged, GalleryMismatch, RuijiError, UsageError
from pipeline.gallery import check_place, claim_gallery, read_gallery
from pipeline.model import load_model
from pipeline.objects import IdScheme, prepare
from pipeline.plans.closing import close_plan
from pipeline.plans.planning import PlanSettings, plan_list
from pipeline.queue.connection import connect
from tests.factories import picture, tiny_model
from tests.pipeline.galleries import new_plan

BASENAME, PATH = IdScheme(ObjectIds.basename), IdScheme(ObjectIds.path)


def test_a_gallery_that_is_used_belongs_to_one_model_and_one_kind_of_id(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 3)
    model = load_model(model_path)
    first = read_gallery(plan.folder)
    assert claim_gallery(plan.folder, model, BASENAME) == first
    other = load_model(tiny_model(tmp_path / "tiny.onnx", seed=1))
    for used in ("open", "closed"):
        with pytest.raises(GalleryMismatch, match="another --feature-dir"):
            claim_gallery(plan.folder, other, BASENAME)
        with pytest.raises(GalleryMismatch, match="--object-id basename"):
            claim_gallery(plan.folder, model, PATH)
        if used == "open":
            close_plan(plan)


def test_a_gallery_of_which_nothing_was_made_is_claimed_anew(tmp_path: Path, model_path: Path) -> None:
    model = load_model(model_path)
    first = claim_gallery(tmp_path / "g", model, BASENAME)
    second = claim_gallery(tmp_path / "g", model, PATH)
    assert second.object_id == "path" and second.gallery_id != first.gallery_id
    other = load_model(tiny_model(tmp_path / "o.onnx", seed=1))
    assert claim_gallery(tmp_path / "g", other, PATH).fingerprint == other.fingerprint
    (tmp_path / "g" / "ab").mkdir()
    with pytest.raises(GalleryMismatch):
        claim_gallery(tmp_path / "g", model, PATH)


def test_a_newer_gallery_is_refused_and_not_written_anew(tmp_path: Path, model_path: Path) -> None:
    model = load_model(model_path)
    claim_gallery(tmp_path / "g", model, BASENAME)
    path = tmp_path / "g" / "gallery.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(GalleryMismatch, match="update ruiji"):
        claim_gallery(tmp_path / "g", model, BASENAME)


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "wrong type", "id", "folder"])
@pytest.mark.parametrize("closed", [False, True])
def test_a_lost_or_damaged_gallery_file_is_written_anew_from_a_plan(
    tmp_path: Path, model_path: Path, damage: str, closed: bool
) -> None:
    plan = new_plan(tmp_path, model_path, 3)
    if closed:
        close_plan(plan)
    path = plan.folder / "gallery.json"
    before = path.read_bytes()
    told = json.loads(before)
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        wrong = {"wrong type": {**told, "length": "12"}, "id": {**told, "gallery_id": "../x"}}.get(damage)
        path.write_bytes({"empty": b"", "cut": before[:40]}.get(damage, json.dumps(wrong).encode()))
    if damage != "gone":
        with pytest.raises(FileDamaged, match="writes it again"):
            read_gallery(plan.folder)
    other = load_model(tiny_model(tmp_path / "tiny.onnx", seed=1))
    with pytest.raises(GalleryMismatch, match="give the gallery's own model"):
        claim_gallery(plan.folder, other, BASENAME)
    if damage == "folder":
        with pytest.raises(RuijiError, match="cannot write"):
            claim_gallery(plan.folder, load_model(model_path), BASENAME)
        path.rmdir()
    claim_gallery(plan.folder, load_model(model_path), BASENAME)
    assert path.read_bytes() == before


def test_foreign_shards_and_a_folder_that_cannot_be_made_are_refused(tmp_path: Path, model_path: Path) -> None:
    model = load_model(model_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RuijiError, match="cannot write"):
        claim_gallery(tmp_path / "file" / "g", model, BASENAME)
    (tmp_path / "0000.features.npy").write_bytes(b"")
    with pytest.raises(GalleryMismatch, match="did not make"):
        claim_gallery(tmp_path, model, BASENAME)
    (tmp_path / "0000.json").write_text("{}")
    with pytest.raises(GalleryMismatch, match="restore it from a copy"):
        claim_gallery(tmp_path, model, BASENAME)


def test_no_gallery_is_made_in_a_gallery(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 3)
    with pytest.raises(UsageError, match="is a gallery itself"):
        claim_gallery(plan.folder / "tiny", load_model(model_path), BASENAME)


def test_a_copy_is_refused_and_what_was_moved_or_is_mounted_elsewhere_is_not(
    tmp_path: Path, model_path: Path, redis_url: str
) -> None:
    client = connect(redis_url)
    plan = new_plan(tmp_path, model_path, 3)
    gallery = read_gallery(plan.folder)
    assert gallery is not None
    for _ in range(2):
        check_place(plan.folder, gallery, client)
    # The same folder by another path.
    (tmp_path / "link").symlink_to(plan.folder)
    check_place(tmp_path / "link", gallery, client)
    shutil.copytree(plan.folder, tmp_path / "copy")
    with pytest.raises(GalleryMismatch, match=r"copy is a copy of the gallery .*RUIJI_REDIS_URL=redis"):
        check_place(tmp_path / "copy", gallery, client)
    check_place(plan.folder, gallery, client)
    # Moved within the file system, and then to another one, whose inodes differ.
    plan.folder.rename(tmp_path / "moved")
    check_place(tmp_path / "moved", gallery, client)
    shutil.rmtree(tmp_path / "moved")
    check_place(tmp_path / "copy", gallery, client)
    # Restored by a program that writes files anew.
    file = tmp_path / "copy" / "gallery.json"
    data = file.read_bytes()
    keep = os.open(file, os.O_RDONLY)
    file.unlink()
    file.write_bytes(data)
    os.close(keep)
    check_place(tmp_path / "copy", gallery, client)
    client.set(f"ruiji:{gallery.gallery_id}:place", "nonsense")
    check_place(tmp_path / "copy", gallery, client)


def test_a_claim_that_came_between_a_claim_and_its_plan_gives_way(tmp_path: Path, model_path: Path) -> None:
    model = load_model(model_path)
    folder = tmp_path / "features" / "tiny"
    first = claim_gallery(folder, model, BASENAME)
    assert claim_gallery(folder, model, PATH) != first
    # The first one commits its plan all the same.
    (tmp_path / "list").write_text("a.png\n")
    picture(tmp_path / "media" / "a.png")
    (tmp_path / "scratch").mkdir()
    objects = prepare(tmp_path / "list", tmp_path / "scratch", BASENAME)
    plan = plan_list(folder, tmp_path / "media", first, objects, PlanSettings(4, False, 10**8, 2, 256))
    assert plan is not None
    assert read_gallery(folder) == first
    # And where the other claim was written after that, the next enqueue finds the plan's.
    told = json.loads((folder / "gallery.json").read_text())
    (folder / "gallery.json").write_text(json.dumps({**told, "gallery_id": "f" * 16, "object_id": "path"}))
    assert claim_gallery(folder, model, BASENAME) == first
