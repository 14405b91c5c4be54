"""Real commands that are killed at random moments while they compare with a second gallery, or decide about it."""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import layout
from pipeline.gallery import read_gallery
from pipeline.model import load_model
from search.duplicates.decisions import Verdict
from tests.chaos.harness import sized
from tests.conftest import ROOT
from tests.factories import tiny_model, wait_until
from tests.search.duplicates.test_against_gallery import Desk, different, same, snapshot
from tests.search.duplicates.test_clean_up import Home
from tests.search.duplicates.test_decisions import TOLD, kill_deciders
from tests.search.galleries import write_gallery

PANEL_ROWS = 40
#: A pause at each tile, so that there is something to interrupt.
CHANGED = {
    "TEST_PANEL_ROWS": str(PANEL_ROWS),
    "TEST_TILE_S": "0.05",
    "PYTHONPATH": f"{Path(__file__).parent / 'disturbed'}{os.pathsep}{ROOT}",
}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    model = load_model(tiny_model(tmp_path / "m.onnx", length=16))
    return Desk(*(Home(tmp_path / name, tmp_path / f"{name}-features", model) for name in ("card", "archive")))


def test_a_killed_run_against_a_gallery_goes_on_and_ends_with_the_same_bytes(desk: Desk, tmp_path: Path) -> None:
    kill_runs(desk, tmp_path, 8)


@pytest.mark.chaos
def test_a_killed_run_against_a_gallery_ends_with_the_same_bytes_in_the_long_form(desk: Desk, tmp_path: Path) -> None:
    kill_runs(desk, tmp_path, sized(8, 100))


def kill_runs(desk: Desk, tmp_path: Path, kills: int) -> None:
    """Kill runs at random moments, half of them once they kept something more; what is left is never wrong."""
    rng, chance = np.random.default_rng(0), random.Random(0)
    base = rng.standard_normal((60, 16), np.float32)
    for home, count in ((desk.archive, 310), (desk.card, 290)):
        near = base[rng.integers(0, 60, count)] + np.float32(0.02) * rng.standard_normal((count, 16), np.float32)
        paths = [f"{row % 3}/{home.media.name}{row:04d}.jpg" for row in range(count)]
        write_gallery(home.folder, home.model, near, paths, 50)
    command = [sys.executable, "-m", "pipeline", "near-duplicates", "--feature-dir", desk.card.folder]
    command += ["--against-gallery", desk.archive.folder, "--threshold", "0.99", "--format", "jsonl"]
    kept = layout.against_folder(layout.cache_folder(desk.card.folder), gallery_id(desk.archive))
    out, of_archive = tmp_path / "out.jsonl", snapshot(desk.archive.features)

    def start() -> "subprocess.Popen[bytes]":
        with out.open("wb") as stdout:
            return subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **CHANGED}, stdout=stdout, stderr=subprocess.DEVNULL
            )

    assert start().wait(240) == 0
    answer, files = out.read_bytes(), pairs_in(kept)
    assert answer.count(b"\n") > 200 and len(files) > 5
    killed = ended = 0
    while killed < kills or not ended:
        before, process = pairs_in(kept).keys(), start()
        after_s = 3.0
        if chance.random() < 0.5 and len(before) < len(files):
            after_s = 0.3
            wait_until(lambda b=before, p=process: pairs_in(kept).keys() - b or p.poll() is not None, 240)  # type: ignore[misc]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(240 if killed >= kills else chance.random() * after_s)
        process.kill()
        assert pairs_in(kept).items() <= files.items()
        if process.wait() == 0:
            ended += 1
            assert out.read_bytes() == answer and pairs_in(kept) == files
            for name in files:
                (kept / name).unlink()
        else:
            killed += 1
            assert answer.startswith(out.read_bytes())
    assert snapshot(desk.archive.features) == of_archive


def pairs_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("pairs.*")}


def gallery_id(home: Home) -> str:
    info = read_gallery(home.folder)
    assert info is not None
    return info.gallery_id


def test_killed_deciders_about_two_galleries_lose_no_decision_that_was_confirmed_and_invent_none(
    desk: Desk, tmp_path: Path
) -> None:
    kill_deciders_about_two(desk, tmp_path, 8)


@pytest.mark.chaos
def test_killed_deciders_about_two_galleries_lose_and_invent_nothing_in_the_long_form(
    desk: Desk, tmp_path: Path
) -> None:
    kill_deciders_about_two(desk, tmp_path, sized(8, 200))


def kill_deciders_about_two(desk: Desk, tmp_path: Path, kills: int) -> None:
    """Ids are the same in both galleries, so that only the gallery's own tells which object is meant."""
    for home in (desk.card, desk.archive):
        write_gallery(home.folder, home.model, np.ones((len(TOLD), 16), np.float32), TOLD, 500)
    of_archive = snapshot(desk.archive.features)

    def decision(own: str, other: str) -> dict[str, Any]:
        return same(other, own) if int(other) % 2 else different(own, other)

    given = ("--against-gallery", desk.archive.folder)
    decided = kill_deciders(desk.card.folder, tmp_path, kills, given, decision)
    there = gallery_id(desk.archive)
    for one in decided:
        first, second = one.objects
        own, other = (second, first) if one.decision is Verdict.same else (first, second)
        assert (own.gallery, other.gallery) == (None, there)
        assert (one.decision is Verdict.same) == bool(int(other.name) % 2)
    assert snapshot(desk.archive.features) == of_archive
