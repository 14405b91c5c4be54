"""What a worker decides before it takes work."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import PlanMismatch
from tests.pipeline.galleries import new_plan
from workers.roles import check_versions


@pytest.mark.parametrize(("change", "fits"), [({}, True), ({"simplejpeg": "0.1"}, False), ({"numpy": "0.1"}, False)])
def test_libraries_that_an_older_plan_does_not_name_are_not_compared(
    tmp_path: Path, model_path: Path, change: dict[str, str], fits: bool
) -> None:
    plan = new_plan(tmp_path, model_path, 1)
    check_versions(plan)
    older = {name: version for name, version in plan.versions.items() if name != "simplejpeg"} | change
    with nullcontext() if fits else pytest.raises(PlanMismatch, match=next(iter(change), "")):
        check_versions(replace(plan, versions=older))
