"""The reducer: one segment, one shard, whenever and however often it runs."""

import errno
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from pipeline import layout
from pipeline.errors import MachineFault
from pipeline.plans.closing import cancel_plan
from pipeline.reduce import collect, missing_after_reread, tidy
from pipeline.segments import finish_plan, reduce_segment
from pipeline.store import check_shard, read_record
from tests.pipeline.galleries import digest_of, embed, fail, feature_of, files, new_plan, write


def ours() -> None:
    """Nobody else takes the segment."""


def stops_at(call: int) -> Callable[[], None]:
    """Raises at a call, as a kill or a lost lease would end the reducer there."""
    calls = iter(range(call))

    def check() -> None:
        if next(calls, None) is None:
            raise RuntimeError("stopped here")

    return check


def test_rows_are_in_list_order_and_failures_move_no_other(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 6, shard_rows=6)
    paths = plan.paths(plan.segments[0])
    embed(plan, [paths[0], paths[1], paths[4], paths[5]])
    fail(plan, paths[2], "missing")
    fail(plan, paths[3])
    reduced = reduce_segment(plan, plan.segments[0], ours)
    assert (reduced.rows, reduced.failed, reduced.missing) == (4, 2, ())
    kept = [paths[0], paths[1], paths[4], paths[5]]
    features = np.load(plan.folder / "0000.features.npy", allow_pickle=False)
    assert features.dtype == np.float32
    assert (features == np.stack([feature_of(path) for path in kept])).all()
    digests = np.load(plan.folder / "0000.digests.npy", allow_pickle=False)
    assert digests.dtype == np.uint8
    assert digests.tolist() == [list(digest_of(path)) for path in kept]
    ids = np.load(plan.folder / "0000.object_ids.npy", allow_pickle=False)
    assert ids.tolist() == [path.rsplit("/")[-1] for path in kept]
    record = read_record(plan.folder, 0)
    assert [(failure.path, failure.reason) for failure in record.failed] == [
        (paths[2], "missing"),
        (paths[3], "undecodable"),
    ]
    check_shard(plan.folder, record)


def test_running_it_again_changes_nothing(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 3)
    embed(plan, plan.paths(plan.segments[0]))
    reduce_segment(plan, plan.segments[0], ours)
    before = files(plan.folder)
    assert reduce_segment(plan, plan.segments[0], ours).rows == 3
    assert files(plan.folder) == before


def test_missing_features_are_named_and_nothing_is_written(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 4)
    paths = plan.paths(plan.segments[0])
    embed(plan, paths[:2])
    plan.feature_file(plan.scheme.object_id(paths[2])).parent.mkdir(parents=True, exist_ok=True)
    plan.feature_file(plan.scheme.object_id(paths[2])).write_bytes(b"half")
    assert reduce_segment(plan, plan.segments[0], ours).missing == (paths[2], paths[3])
    assert files(plan.folder) == {}
    embed(plan, [paths[3]])
    assert missing_after_reread(plan, plan.segments[0], (paths[2], paths[3])) == [paths[2]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_feature_that_is_not_finite_is_missing_and_moves_no_other(
    tmp_path: Path, model_path: Path, bad: float
) -> None:
    plan = new_plan(tmp_path, model_path, 5, shard_rows=5)
    segment = plan.segments[0]
    paths = plan.paths(segment)
    embed(plan, paths)
    fail(plan, paths[3])
    for path in (paths[1], paths[3]):
        feature = feature_of(path)
        feature[5] = bad
        write(plan, path, feature)
    collected = collect(plan, segment, paths)
    assert collected.paths == [paths[0], paths[2], paths[4]]
    assert (collected.features == np.stack([feature_of(path) for path in collected.paths])).all()
    assert collected.digests is not None
    assert [bytes(one) for one in collected.digests] == [digest_of(path) for path in collected.paths]
    assert collected.missing == (paths[1],)
    assert [failure.path for failure in collected.failures] == [paths[3]]


def test_a_segment_of_failures_only_has_arrays_of_no_rows(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 2)
    for path in plan.paths(plan.segments[0]):
        fail(plan, path)
    assert reduce_segment(plan, plan.segments[0], ours).failed == 2
    assert np.load(plan.folder / "0000.features.npy", allow_pickle=False).shape == (0, 12)
    assert np.load(plan.folder / "0000.digests.npy", allow_pickle=False).shape == (0, 32)
    assert np.load(plan.folder / "0000.object_ids.npy", allow_pickle=False).shape == (0,)


@pytest.mark.parametrize("call", range(5))
def test_stopped_at_any_step_it_loses_nothing_and_ends_with_the_same_bytes(
    tmp_path: Path, model_path: Path, call: int
) -> None:
    plan = new_plan(tmp_path, model_path, 3)
    embed(plan, plan.paths(plan.segments[0]))
    with pytest.raises(RuntimeError, match="stopped here"):
        reduce_segment(plan, plan.segments[0], stops_at(call))
    assert not (plan.folder / "0000.json").exists()
    assert len(list(plan.folder.glob("??/??/*.npy"))) == 3, "no input goes before the record"
    reduce_segment(plan, plan.segments[0], ours)
    undisturbed = new_plan(tmp_path / "other", model_path, 3)
    embed(undisturbed, undisturbed.paths(undisturbed.segments[0]))
    reduce_segment(undisturbed, undisturbed.segments[0], ours)
    assert files(plan.folder) == files(undisturbed.folder)


@pytest.mark.parametrize("after", ["reduce", "finish", "cancel"])
def test_a_record_that_another_could_not_make_durable_is_durable_before_its_inputs_go(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    plan = new_plan(tmp_path, model_path, 3, shard_rows=3)
    embed(plan, plan.paths(plan.segments[0]))
    real, inputs = os.fsync, list(plan.folder.glob("??/??/*.npy"))
    left_at_sync: list[int] = []

    def sync(number: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{number}")) == plan.folder:
            if layout.record_file(plan.folder, 0).exists():
                left_at_sync.append(sum(path.exists() for path in inputs))
            if len(left_at_sync) == 1:
                raise OSError(errno.EIO, "the disk fails once")
        real(number)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="fails once"):
        reduce_segment(plan, plan.segments[0], ours)
    {
        "reduce": lambda: reduce_segment(plan, plan.segments[0], ours),
        "finish": lambda: finish_plan(plan, lambda segment: nullcontext()),
        "cancel": lambda: cancel_plan(plan),
    }[after]()
    assert left_at_sync[:2] == [3, 3]
    assert not any(path.exists() for path in inputs)


@pytest.mark.parametrize("asleep", [0, 4])
@pytest.mark.parametrize("killed", [1, 4, None])
def test_a_reducer_that_sleeps_before_a_rename_replaces_nothing_of_the_one_that_takes_over(
    tmp_path: Path, model_path: Path, asleep: int, killed: int | None
) -> None:
    plan = new_plan(tmp_path, model_path, 3, shard_rows=3)
    segment = plan.segments[0]
    paths = plan.paths(segment)
    embed(plan, paths[:2])
    fail(plan, paths[2], "memory")
    calls = iter(range(asleep))

    def other() -> None:
        """The lease runs out just after it was looked at."""
        if next(calls, None) is None:
            # A late duplicate of its task, on a larger machine.
            embed(plan, [paths[2]])
            with nullcontext() if killed is None else pytest.raises(RuntimeError, match="stopped here"):
                reduce_segment(plan, segment, ours if killed is None else stops_at(killed))

    with pytest.raises(MachineFault, match="cannot write"):
        reduce_segment(plan, segment, other)
    reduce_segment(plan, segment, ours)
    check_shard(plan.folder, read_record(plan.folder, 0))
    assert read_record(plan.folder, 0).rows == 3
    assert not list(plan.folder.glob(f"{layout.TEMPORARY_PREFIX}*"))


def test_leftovers_of_another_reducer_are_overwritten(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 3)
    embed(plan, plan.paths(plan.segments[0]))
    (plan.folder / "0000.features.npy").write_bytes(b"half of it")
    reduce_segment(plan, plan.segments[0], ours)
    check_shard(plan.folder, read_record(plan.folder, 0))


def test_inputs_and_their_folders_go_unless_they_are_kept(tmp_path: Path, model_path: Path) -> None:
    for keep in (False, True):
        plan = new_plan(tmp_path / str(keep), model_path, 3, keep_features=keep)
        embed(plan, plan.paths(plan.segments[0]))
        reduce_segment(plan, plan.segments[0], ours)
        tidy(plan)
        assert len(list(plan.folder.glob("??/??/*.npy"))) == (3 if keep else 0)
        assert bool(list(plan.folder.glob("??"))) is keep


def test_half_written_files_of_the_killed_go_and_nothing_else(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 3, keep_features=True)
    embed(plan, plan.paths(plan.segments[0]))
    reduce_segment(plan, plan.segments[0], ours)
    before = sorted(plan.folder.rglob("*"))
    for folder in (plan.folder, plan.feature_file(plan.scheme.object_id(plan.paths(plan.segments[0])[0])).parent):
        (folder / f"{layout.TEMPORARY_PREFIX}0123-4").write_bytes(b"half of it")
    assert len(sorted(plan.folder.rglob("*"))) == len(before) + 2
    tidy(plan)
    assert sorted(plan.folder.rglob("*")) == before
