"""A gallery that ruiji made before it kept digests, with a plan half done: it is searched, continued and repaired.

Made by ruiji 0.1.0 as of 2026-11-28: shards 0 and 1 of a closed plan, with one failure and one row that left the list;
an open plan with shard 2, and of shard 3 one feature, one failure and one object that nobody looked at.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.arguments import Commands
from pipeline.errors import GalleryMismatch
from pipeline.plans.closing import cancel_plan
from pipeline.plans.files import open_plan, read_closed
from pipeline.plans.plan import Plan
from pipeline.segments import finish_plan, reduce_segment
from pipeline.status import StatusReader
from pipeline.store import Embedded, read_record, write_feature
from pipeline.verify import repair, verify
from search.cli import register
from search.gallery.opening import describe_gallery, open_gallery
from tests.factories import pictures
from tests.pipeline.galleries import digest_of, embed, feature_of, files, is_done, plan_for

DATA = Path(__file__).resolve().parent.parent / "data"
MODEL = DATA / "before-generations" / "tiny.onnx"
OPEN, CLOSED = "759e72d8d5427c89", "c5546e9975def520"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of its folder, as gallery of `tiny.onnx`."""
    shutil.copytree(DATA / "before-digests" / "tiny", tmp_path / "features" / "tiny")
    return tmp_path / "features" / "tiny"


def enqueue(tmp_path: Path, count: int = 14) -> Plan | None:
    """Its list, or one with more pictures."""
    paths = pictures(tmp_path / "media", 14)
    more = pictures(tmp_path / "media", count)
    return plan_for(tmp_path, MODEL, [path for path in more if path != paths[4]])


def finish(plan: Plan) -> None:
    for segment in plan.unpublished():
        embed(plan, [path for path in plan.paths(segment) if not is_done(plan, path)])
        assert not reduce_segment(plan, segment, lambda: None).missing
    finish_plan(plan, lambda segment: nullcontext())


def finished(tmp_path: Path) -> dict[str, bytes]:
    """Its files once its plan is done."""
    plan = enqueue(tmp_path)
    assert plan is not None
    finish(plan)
    return files(plan.folder)


def formats(folder: Path) -> list[int]:
    return [read_record(folder, number).format for number in sorted({int(name[:4]) for name in files(folder)})]


def lose(folder: Path, shard: int) -> None:
    for path in folder.glob(f"{shard:04d}.*"):
        path.unlink()


def test_it_is_searched_and_says_that_it_has_no_digests(old: Path) -> None:
    gallery = open_gallery(old)
    assert (gallery.rows, gallery.digested_rows, gallery.digest(0)) == (10, 0, None)
    assert describe_gallery(old, gallery)["digests"] == 0
    assert [finding for finding in verify(old) if finding.broken] == []


@pytest.mark.parametrize("command", [["gallery", "info"], ["near-duplicates"]], ids=" ".join)
def test_whoever_asks_for_identical_files_is_told_so(old: Path, command: list[str]) -> None:
    app = Commands()
    register(app)
    told = CliRunner().invoke(app, [*command, "--feature-dir", str(old)])
    assert told.exit_code == 0
    assert command == ["near-duplicates"] or "\ndigests         0\n" in told.stdout
    assert "10 objects have no digest of their file" in told.stderr


def test_the_plan_that_was_open_is_finished_as_it_was_begun(tmp_path: Path, old: Path) -> None:
    before = files(old)
    plan = enqueue(tmp_path)
    assert plan is not None
    assert (plan.plan_id, plan.record_format) == (OPEN, 1)
    # What workers left counts, although it has no digest.
    assert [is_done(plan, path) for path in plan.paths(plan.segments[1])] == [True, True, False]
    finish(plan)
    after = files(old)
    assert {name: after[name] for name in before} == before
    assert (formats(old), list(old.glob("*.digests.npy"))) == ([1, 1, 1, 1], [])
    assert verify(old) == []
    status = StatusReader(old, None).read()
    assert (status.objects, status.done, status.failed, status.pending, status.stale) == (13, 11, 2, 0, 1)
    assert read_closed(old, OPEN).plan.record_format == 1, "so that its shards are made again as they were"


def test_a_new_plan_in_it_keeps_digests(tmp_path: Path, old: Path) -> None:
    before = finished(tmp_path)
    plan = enqueue(tmp_path, 18)
    assert plan is not None
    assert plan.record_format == 2
    new = plan.paths(plan.segments[0])
    finish(plan)
    assert formats(old) == [1, 1, 1, 1, 2]
    assert {name: content for name, content in files(old).items() if name in before} == before
    digests = np.load(old / "0004.digests.npy", allow_pickle=False)
    assert digests.tolist() == [list(digest_of(path)) for path in new]
    gallery = open_gallery(old)
    assert (gallery.rows, gallery.digested_rows) == (16, 4)
    assert [gallery.digest(row) for row in (0, 11, 12, 15)] == [None, None, digest_of(new[0]), digest_of(new[3])]
    assert verify(old) == []


@pytest.mark.parametrize("shard", range(5))
@pytest.mark.parametrize("how", ["enqueue", "repair"])
def test_a_lost_shard_is_made_again_in_its_own_format(tmp_path: Path, old: Path, shard: int, how: str) -> None:
    finished(tmp_path)
    plan = enqueue(tmp_path, 18)
    assert plan is not None
    finish(plan)
    before = files(old)
    if how == "enqueue":
        lose(old, shard)
        # With new objects too: one plan makes shards of both formats.
        again = enqueue(tmp_path, 20)
    else:
        features = old / f"{shard:04d}.features.npy"
        features.write_bytes(features.read_bytes()[:-1])
        repair(old, verify(old))
        again = open_plan(old)
    assert again is not None
    for failed in json.loads(before[f"{shard:04d}.json"])["failed"]:
        again.keep_error(failed["object_id"], failed["reason"], failed["message"])
    finish(again)
    after = files(old)
    record = json.loads(after[f"{shard:04d}.json"])
    # Whoever runs this later has other libraries.
    record["versions"] = json.loads(before[f"{shard:04d}.json"])["versions"]
    assert record == json.loads(before[f"{shard:04d}.json"])
    assert {n: c for n, c in after.items() if n in before and n != f"{shard:04d}.json"} == {
        n: c for n, c in before.items() if n != f"{shard:04d}.json"
    }
    assert formats(old) == [1, 1, 1, 1, 2] + [2] * (how == "enqueue")
    assert [finding for finding in verify(old) if finding.broken] == []


def test_a_feature_without_digest_does_not_count_in_a_plan_that_keeps_them(tmp_path: Path, old: Path) -> None:
    plan = open_plan(old)
    assert plan is not None
    left = plan.paths(plan.segments[1])
    cancel_plan(plan)
    again = enqueue(tmp_path)
    assert again is not None
    assert (again.record_format, again.paths(again.segments[0])) == (2, left)
    assert again.feature_file(again.scheme.object_id(left[0])).exists()
    assert [is_done(again, path) for path in left] == [False] * 3
    finish(again)
    assert formats(old) == [1, 1, 1, 2]
    digests = np.load(old / "0004.digests.npy", allow_pickle=False)
    assert digests.tolist() == [list(digest_of(path)) for path in left]
    assert verify(old) == []


def test_features_that_were_kept_serve_when_their_shard_is_made_again(tmp_path: Path, old: Path) -> None:
    finished(tmp_path)
    paths = (old / "0000.paths.txt").read_text().split()
    lose(old, 0)
    again = enqueue(tmp_path, 18)
    assert again is not None
    assert [(segment.shard, again.record_format_of(segment)) for segment in again.segments] == [(0, 1), (4, 2)]
    for path in paths:
        write_feature(again.feature_file(again.scheme.object_id(path)), Embedded(feature_of(path), b""), again.tag)
    assert all(is_done(again, path) for path in paths)
    # Whoever embeds for such a shard writes what it has.
    kept = again.feature_file(again.scheme.object_id(paths[0])).read_bytes()
    embed(again, paths)
    assert again.feature_file(again.scheme.object_id(paths[0])).read_bytes() == kept


@pytest.mark.parametrize("record", ["0000.json", "gallery.json"])
def test_what_is_newer_still_is_refused(old: Path, record: str) -> None:
    value = json.loads((old / record).read_text())
    (old / record).write_text(json.dumps({**value, "format": 3}))
    with pytest.raises(GalleryMismatch, match="update ruiji"):
        open_gallery(old)


def test_digests_beside_a_shard_that_has_none_are_told_and_read_by_nobody(tmp_path: Path, old: Path) -> None:
    finished(tmp_path)
    np.save(old / "0001.digests.npy", np.zeros((3, 32), np.uint8))
    assert open_gallery(old).digested_rows == 0
    assert [(finding.kind, finding.name) for finding in verify(old)] == [("foreign", "0001.digests.npy")]
