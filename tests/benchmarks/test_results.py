import json
from pathlib import Path

import pytest

from benchmarks.results import Figure, save, show


@pytest.mark.parametrize(
    ("rounds", "at_least", "at_most", "bound", "holds"),
    [
        ((0.90, 0.92, 0.99), 0.92, None, ">= 0.92", True),
        ((0.90, 0.91, 0.99), 0.92, None, ">= 0.92", False),
        ((1.0,), 0.9, 1.1, ">= 0.9 and <= 1.1", True),
        ((1.2,), 0.9, 1.1, ">= 0.9 and <= 1.1", False),
        ((0.8,), 0.9, 1.1, ">= 0.9 and <= 1.1", False),
        ((5.0,), None, None, None, None),
    ],
)
def test_the_median_of_the_rounds_is_held_against_the_bounds(
    rounds: tuple[float, ...], at_least: float | None, at_most: float | None, bound: str | None, holds: bool | None
) -> None:
    figure = Figure("a figure", "x", rounds, at_least, at_most)
    assert (figure.bound, figure.holds) == (bound, holds)


def test_only_a_judged_figure_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    fine, short = Figure("fine", "x", (2.0,), 1.0), Figure("short", "x", (0.5,), 1.0)
    expected = Figure("rate", "images/s", (10.0,), 1000.0, judged=False)
    assert show("title", [fine, expected]) == 0
    assert show("title", [fine, short, expected]) == 1
    assert "SHORT" in capsys.readouterr().out


def test_a_part_replaces_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(path, "queue", [Figure("old", "x", (1.0,))], ["numpy"])
    save(path, "memory", [Figure("kept", "bytes", (123456.789,), at_most=2e5)], ["numpy", "not-installed"])
    save(path, "queue", [Figure("new", "x", (3.0, 1.0, 2.0))], ["numpy"])
    parts = json.loads(path.read_text())["parts"]
    assert [figure["name"] for figure in parts["queue"]["figures"]] == ["new"]
    assert parts["queue"]["figures"][0]["value"] == 2.0
    assert parts["memory"]["figures"] == [
        {
            "name": "kept",
            "value": 123460.0,
            "unit": "bytes",
            "bound": "<= 200000",
            "judged": True,
            "holds": True,
            "rounds": [123460.0],
        }
    ]
    assert set(parts["memory"]["machine"]["versions"]) == {"python", "numpy"}
