"""No interleaving, and no kill, gives an object two rows, another's failure, or other libraries' bits.

Each actor is stopped before each of its steps, or killed there, while others do what they do; then all goes to its end
and every object must count once. That this finds faults is shown by putting each fault back.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import segments, store
from pipeline import verify as verify_module
from pipeline.errors import RuijiError
from pipeline.objects import ObjectList
from pipeline.plans import files, generations, planning, repair
from pipeline.plans import plan as plan_module
from pipeline.plans import published as published_module
from pipeline.plans.files import open_plan, write_plan
from pipeline.plans.plan import Plan
from pipeline.plans.planning import Retry
from tests.pipeline.plans.explorer import BAD, BIG, LARGE, SMALL, Stepper, World, stepped

ALL = ["a.png", "b.png", BAD, BIG, "c.png"]
PART = ["a.png", "b.png"]
OTHER = ["b.png", "c.png", "d.png"]
#: None of these is there.
AWAY = ["x.png"]

Action = Callable[[World], object]


def _open(world: World) -> Plan:
    plan = open_plan(world.folder)
    assert plan is not None
    return plan


def _own(world: World) -> Plan:
    """The plan as an actor has read it, which may be closed by now."""
    return replace(world.state["plan"], folder=world.folder)


def _reducer(world: World) -> object:
    plan = _own(world)
    return world.reduce(plan, plan.segments[0])


def _embedder(world: World) -> object:
    plan = _own(world)
    return [world.embed(plan, segment) for segment in plan.segments]


def _watchdog(world: World) -> object:
    return world.finish(_own(world))


def _upgrade(world: World) -> None:
    world.versions["numpy"] = "2"


def _cancel_and_enqueue(world: World) -> None:
    world.cancel()
    world.enqueue(ALL)


def _cancel_and_all(world: World) -> None:
    world.cancel()
    world.enqueue(ALL)
    world.work()


def _cancel_late_record_all(world: World) -> None:
    """A reducer names its record only after the plan was cancelled and the list enqueued again."""
    plan = _own(world)
    Stepper("/0000.json", kill=False).run(
        lambda: world.reduce(plan, plan.segments[0]), lambda: _cancel_and_enqueue(world)
    )
    world.work()


def _upgrade_and_part(world: World) -> None:
    world.cancel()
    _upgrade(world)
    world.enqueue(PART)
    world.work()


def _other_list(world: World) -> None:
    world.enqueue(OTHER)
    world.work()


def _refused(world: World) -> None:
    with pytest.raises(RuijiError, match="is it mounted"):
        world.enqueue(AWAY)
    accepted = generations.current(world.folder).objects
    assert accepted is not None
    assert accepted.lines != len(AWAY), "a refused list is accepted"


def _nothing(world: World) -> None:
    pass


# What the folder is when the actor begins.


def empty(world: World) -> None:
    world.state["list"] = ALL


def planned(world: World) -> None:
    world.state.update(list=ALL, plan=world.enqueue(ALL))


def planned_small(world: World) -> None:
    world.state.update(list=ALL, plan=world.enqueue(ALL, SMALL))


def _embed_all(world: World) -> None:
    plan = _open(world)
    for segment in plan.segments:
        world.embed(plan, segment)


def embedded(world: World) -> None:
    planned(world)
    _embed_all(world)


def published(world: World) -> None:
    embedded(world)
    plan = _open(world)
    for segment in plan.segments:
        world.reduce(plan, segment)


def done(world: World) -> None:
    published(world)
    world.work()


def shrunk(world: World) -> None:
    done(world)
    world.enqueue(PART)
    world.state["list"] = PART


def broken(world: World) -> None:
    done(world)
    world.flip(0)


def lost_and_shrunk(world: World) -> None:
    shrunk(world)
    world.lose_record(1)


def repairing(world: World) -> None:
    broken(world)
    world.repair()
    plan = world.state["plan"] = _open(world)
    for segment in plan.segments:
        world.embed(plan, segment)


def retrying(world: World) -> None:
    done(world)
    plan = world.state["plan"] = world.enqueue(ALL, LARGE, Retry())
    assert plan is not None
    for segment in plan.segments:
        world.embed(plan, segment)


def cancelled(world: World) -> None:
    embedded(world)
    world.cancel()


def older_planned(world: World) -> None:
    """The open plan of a ruiji that kept no digests."""
    planned(world)
    plan = world.state["plan"] = replace(_open(world), record_format=1)
    write_plan(generations.current(world.folder).made_folder, plan)


def older(world: World) -> None:
    """It has all features."""
    older_planned(world)
    _embed_all(world)


def older_and_lost(world: World) -> None:
    """It is done, but for a shard that was lost since."""
    older(world)
    world.work()
    world.lose(1)


def older_and_cancelled(world: World) -> None:
    older(world)
    world.cancel()


BEGINNINGS: dict[str, Action] = {
    each.__name__: each
    for each in (
        empty, planned, planned_small, embedded, published, done, shrunk, broken, lost_and_shrunk, repairing, retrying,
        cancelled, older_planned, older, older_and_lost, older_and_cancelled,
    )
}  # fmt: skip
ACTORS: dict[str, Action] = {
    "enqueue": lambda world: world.enqueue(world.state["list"]),
    "enqueue other": lambda world: world.enqueue(OTHER),
    "enqueue what is away": _refused,
    "embed": _embedder,
    "reduce": _reducer,
    "watchdog": _watchdog,
    "cancel": lambda world: world.cancel(),
    "repair": lambda world: world.repair(),
    "retry": lambda world: world.enqueue(ALL, LARGE, Retry()),
}
MEANWHILE: dict[str, Action] = {
    "nothing": _nothing,
    "enqueue other and all of it": _other_list,
    "work": lambda world: world.work(),
    "reduce": _reducer,
    "cancel": lambda world: world.cancel(),
    "cancel, enqueue": _cancel_and_enqueue,
    "cancel, enqueue, all of it": _cancel_and_all,
    "cancel, upgrade, a part": _upgrade_and_part,
    "cancel, late record, enqueue, all of it": _cancel_late_record_all,
    "repair": lambda world: world.repair(),
}

#: Actors by what they need to find.
PAIRS = [
    *itertools.product(("empty", "done", "shrunk", "cancelled", "lost_and_shrunk"), ("enqueue", "enqueue other")),
    *itertools.product(("planned", "planned_small"), ("embed", "cancel")),
    *itertools.product(("embedded", "repairing", "retrying"), ("reduce", "cancel")),
    *itertools.product(("published",), ("watchdog", "cancel", "reduce")),
    *itertools.product(("broken", "lost_and_shrunk"), ("repair", "enqueue")),
    *itertools.product(("done",), ("retry", "enqueue what is away")),
    *itertools.product(("older_planned",), ("embed",)),
    *itertools.product(("older",), ("reduce", "cancel")),
    *itertools.product(("older_and_lost",), ("repair", "enqueue other")),
    *itertools.product(("older_and_cancelled",), ("enqueue",)),
]


def explore(tmp_path: Path, beginning: str, actor: str, meanwhile: str, kill: bool) -> Iterator[int]:
    """Stop the actor at each of its steps in turn; yields the steps that held."""
    prepared = World(tmp_path / "prepared")
    with _library_versions(prepared):
        BEGINNINGS[beginning](prepared)
    for at in itertools.count():
        world = _copy(prepared, tmp_path / "world")
        with _library_versions(world):
            stepper = Stepper(at, kill)
            if not stepper.run(lambda: ACTORS[actor](world), lambda: MEANWHILE[meanwhile](world)):  # noqa: B023
                MEANWHILE[meanwhile](world)
            try:
                # A late duplicate that is killed leaves its file.
                world.check(world.state["list"], tidy=actor != "embed")
            except Exception as error:
                raise AssertionError(f"{beginning}: {actor} stopped at {at}, kill {kill}; then {meanwhile}") from error
        yield at
        if not stepper.reached:
            return
    raise AssertionError


def _copy(prepared: World, root: Path) -> World:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(prepared.root, root)
    world = World(root, dict(prepared.versions), state=dict(prepared.state))
    return world


@contextlib.contextmanager
def _library_versions(world: World) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (planning, repair):
            patch.setattr(module, "library_versions", lambda: dict(world.versions))
        yield


def _cases() -> list[tuple[str, str, str, bool]]:
    cases = []
    for (beginning, actor), meanwhile, kill in itertools.product(PAIRS, MEANWHILE, (False, True)):
        if meanwhile in ("reduce", "cancel, late record, enqueue, all of it") and beginning not in (
            "embedded",
            "published",
            "repairing",
            "retrying",
            "older",
        ):
            continue
        cases.append((beginning, actor, meanwhile, kill))
    return cases


CASES = _cases()
#: A change of any size runs a part of them, in which all that can come between occurs; `make chaos` runs the rest.
_STRIDE = 17
CHOSEN = [
    pytest.param(*case, marks=[pytest.mark.chaos] if number % _STRIDE else [], id="-".join(map(str, case)))
    for number, case in enumerate(CASES)
    if number % _STRIDE == 0 or os.environ.get("CHAOS") == "long"
]


@pytest.mark.parametrize(("beginning", "actor", "meanwhile", "kill"), CHOSEN)
def test_whatever_comes_between_every_object_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beginning: str, actor: str, meanwhile: str, kill: bool
) -> None:
    with stepped(monkeypatch):
        assert len(list(explore(tmp_path, beginning, actor, meanwhile, kill))) > 1 or actor in ("cancel", "watchdog")


# Faults that were there once, each put back by one line, with the cases that find it.


def _commit_without_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is committed as the next one, whatever was committed since the look (two enqueues at once)."""
    real = generations.commit
    monkeypatch.setattr(planning, "commit", lambda before, *rest: real(generations.current(before.folder), *rest))


def _late_records_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record counts that was linked after its plan was closed (cancel while a reducer names its record)."""
    monkeypatch.setattr(published_module.Published, "_too_late", lambda self, kind: set())


def _closing_is_not_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who closes a plan second writes its list anew."""
    real = files.write_atomic

    def write(path: Any, chunks: Any, exclusive: bool = False, sync: bool = False) -> bool:
        return real(path, chunks, exclusive=exclusive and "done" not in Path(path).parts, sync=sync)

    monkeypatch.setattr(files, "write_atomic", write)


def _failures_of_any_plan_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure under a cancelled plan's limits enters the next plan."""
    real = plan_module.read_error

    def read(path: Any, plan_id: str, unnamed: bool) -> Any:
        for named in [plan_id, *(folder.name for folder in Path(path).parents[2].glob("run/done/*"))]:
            if (found := real(path, named, unnamed)) is not None:
                return found
        return None

    monkeypatch.setattr(plan_module, "read_error", read)


def _features_of_any_libraries_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature of other library versions enters a shard."""
    monkeypatch.setattr(plan_module, "versions_tag", lambda versions: b"0" * 16)


def _features_without_digest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature that a ruiji without digests left enters a shard that has them."""
    real = store.read_feature

    def read(path: Any, length: int, digest_bytes: int, *rest: Any) -> Any:
        left = real(path, length, 0, *rest)
        return real(path, length, digest_bytes, *rest) if left is None else left._replace(digest=bytes(digest_bytes))

    for module in (plan_module, store):
        monkeypatch.setattr(module, "read_feature", read)


def _made_again_in_the_newest_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost shard is made again in another format than its record had."""
    monkeypatch.setattr(Plan, "record_format_of", lambda plan, segment: plan.record_format)


def _removed_objects_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is marked in a lost shard that is made again."""
    real = planning.write_marks
    monkeypatch.setattr(planning, "write_marks", lambda made, stale, ids, *rest: real(made, stale, {}, *rest))


def _closed_before_inputs_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is closed whose reducer died between its record and its deletions."""
    monkeypatch.setattr(segments, "not_emptied", lambda plan: [])


def _the_list_is_accepted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """An enqueue says what the list is before it knows whether it will be refused."""
    real = planning._compare

    def compare(folder: Path, made: Path, objects: ObjectList, *rest: Any) -> Any:
        fresh, state = real(folder, made, objects, *rest)
        if objects.lines == len(AWAY):
            generations.commit(generations.current(folder), made, None, state)
        return fresh, state

    monkeypatch.setattr(planning, "_compare", compare)


def _repair_deletes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair removes a broken shard before its plan is committed."""
    real = verify_module.plan_repair

    def make(folder: Path, broken: Any) -> Any:
        for shard in broken:
            for path in folder.glob(f"{shard:04d}.*"):
                path.unlink()
        shutil.rmtree(folder / "run" / "done")
        return real(folder, broken)

    monkeypatch.setattr(verify_module, "plan_repair", make)


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, str, str, bool]]] = [
    (_commit_without_proof, ("empty", "enqueue", "enqueue other and all of it", False)),
    (_late_records_count, ("embedded", "reduce", "cancel, enqueue", False)),
    (_closing_is_not_exclusive, ("embedded", "cancel", "cancel, late record, enqueue, all of it", False)),
    (_failures_of_any_plan_count, ("planned_small", "embed", "cancel, enqueue, all of it", False)),
    (_features_of_any_libraries_count, ("cancelled", "enqueue", "cancel, upgrade, a part", False)),
    (_features_without_digest_count, ("older_and_cancelled", "enqueue", "nothing", False)),
    (_made_again_in_the_newest_format, ("older_and_lost", "enqueue other", "nothing", False)),
    (_removed_objects_come_back, ("lost_and_shrunk", "enqueue", "nothing", False)),
    (_closed_before_inputs_are_gone, ("embedded", "reduce", "work", True)),
    (_the_list_is_accepted_first, ("done", "enqueue what is away", "nothing", False)),
]


@pytest.mark.parametrize(("fault", "case"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_that_is_put_back_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, case: tuple[str, str, str, bool]
) -> None:
    with stepped(monkeypatch):
        list(explore(tmp_path / "right", *case))
        with monkeypatch.context() as patch:
            fault(patch)
            with pytest.raises(AssertionError):
                list(explore(tmp_path / "wrong", *case))
