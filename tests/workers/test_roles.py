"""What a worker decides before it takes work."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import PlanMismatch
from pipeline.versions import library_versions
from tests.pipeline.galleries import new_plan
from workers.roles import check_versions

#: Libraries that were not compared at first.
LATER = ("simplejpeg", "pi-heif")


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"simplejpeg": "0.1"}, False),
        ({"numpy": "0.1"}, False),
        ({"pi-heif": "0.1"}, False),
        ({"pi-heif": "none"}, False),
    ],
)
def test_libraries_that_an_older_plan_does_not_name_are_not_compared(
    tmp_path: Path, model_path: Path, change: dict[str, str], fits: bool
) -> None:
    plan = new_plan(tmp_path, model_path, 1)
    check_versions(plan)
    older = {name: version for name, version in plan.versions.items() if name not in LATER} | change
    with nullcontext() if fits else pytest.raises(PlanMismatch, match=next(iter(change), "")):
        check_versions(replace(plan, versions=older))


@pytest.mark.parametrize(("decodes", "fits"), [(False, True), (True, False)])
def test_a_plan_of_a_machine_without_a_decoder_of_heif_is_for_workers_without_one(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, decodes: bool, fits: bool
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("pipeline.plans.planning.library_versions", lambda: library_versions() | {"pi-heif": "none"})
        plan = new_plan(tmp_path, model_path, 1)
    if not decodes:
        monkeypatch.setattr("pipeline.versions.heif_decoder", lambda: None)
    library_versions.cache_clear()
    try:
        with nullcontext() if fits else pytest.raises(PlanMismatch, match=r"pi-heif [0-9.]+ \(plan: none\)"):
            check_versions(plan)
    finally:
        library_versions.cache_clear()
