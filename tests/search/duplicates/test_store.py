"""Pairs as files: what was found stays found, through kills, damage, new shards and other thresholds."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import layout
from pipeline.cache import look_through
from search.duplicates.groups import Group, find_groups
from search.duplicates.pairs import find_pairs, first_equals
from search.duplicates.panels import Comparison, collect, panels_of
from search.duplicates.store import PairFolder, joined
from search.gallery.opening import open_gallery
from search.ranking.arithmetic import Tiles
from search.ranking.numpy_arithmetic import NumpyArithmetic
from tests.search.galleries import in_memory, write_article_shard

ROWS = 60


def rows(count: int, seed: int) -> NDArray[np.float32]:
    """Some random rows, each followed by copies that are a little different, and two that are equal."""
    rng = np.random.default_rng(seed)
    base = np.repeat(rng.standard_normal((count // 3, 16), np.float32), 3, axis=0)
    some: NDArray[np.float32] = base + np.float32(0.1) * rng.standard_normal(base.shape, np.float32)
    some[1] = some[-1]
    return some


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A gallery of three shards."""
    for number in range(3):
        write_article_shard(tmp_path / "g", number, rows(ROWS, number), [f"{number}-{row}" for row in range(ROWS)])
    return tmp_path / "g"


def groups_of(folder: Path, threshold: float = 0.95) -> list[Group]:
    return list(find_groups(open_gallery(folder), threshold, panel_rows=50, tile_rows=32))


def kept(folder: Path) -> dict[str, bytes]:
    names = sorted(name for name in os.listdir(folder / "cache") if layout.panel_of(name))
    return {name: (folder / "cache" / name).read_bytes() for name in names}


def compared(folder: Path, monkeypatch: pytest.MonkeyPatch, threshold: float = 0.95) -> tuple[list[Group], int]:
    """The groups, and how many panels were compared for them."""
    panels = []
    monkeypatch.setattr(
        "search.duplicates.panels.find_pairs", lambda *given: panels.append(given) or find_pairs(*given)
    )
    return groups_of(folder, threshold), len(panels)


def test_what_was_found_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, panels = compared(folder, monkeypatch)
    assert groups and panels == 3
    files = kept(folder)
    assert len(files) == 3
    assert compared(folder, monkeypatch) == (groups, 0)
    assert kept(folder) == files
    assert not list(look_through(folder))


def test_a_higher_threshold_uses_the_files_of_a_lower_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    higher = groups_of(folder, 0.99)
    lower, panels = compared(folder, monkeypatch, 0.9)
    assert panels == 3
    # Those of the higher one serve nobody any more.
    assert {layout.panel_of(name)[2] for name in kept(folder)} == {0.9}  # type: ignore[index]
    assert compared(folder, monkeypatch, 0.99) == (higher, 0)
    assert compared(folder, monkeypatch, 0.9) == (lower, 0)
    assert higher != lower


def test_who_only_reads_leaves_files_of_all_thresholds(folder: Path) -> None:
    groups_of(folder, 0.99)
    files = kept(folder)
    groups_of(folder, 0.9)
    assert not files.keys() & kept(folder).keys()
    files |= kept(folder)
    for name, content in files.items():
        (folder / "cache" / name).write_bytes(content)
    groups_of(folder, 0.95)
    assert kept(folder) == files


def test_masks_say_nothing_of_a_higher_threshold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    higher = groups_of(folder, 0.99)
    monkeypatch.setattr("search.ranking.arithmetic._LISTED", 1 << 40)
    monkeypatch.setattr("search.duplicates.pairs._FEW", 0)
    lower = groups_of(folder, 0.9)
    assert compared(folder, monkeypatch, 0.99) == (higher, 3)
    assert compared(folder, monkeypatch, 0.9) == (lower, 0)


def test_new_shards_cost_only_their_own_panels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups_of(folder)
    files = kept(folder)
    write_article_shard(folder, 3, rows(ROWS, 1), [f"3-{row}" for row in range(ROWS)])
    groups, panels = compared(folder, monkeypatch)
    assert panels == 1
    assert files.items() < kept(folder).items()
    for name in kept(folder):
        (folder / "cache" / name).unlink()
    assert groups_of(folder) == groups


@dataclass(frozen=True)
class SmallCard(NumpyArithmetic):
    """Holds few rows at once, as a GPU whose memory the gallery does not fit into."""

    pass_rows: int

    def tiles(self, length: int) -> Tiles:
        return Tiles(32, self.pass_rows, 0)


@pytest.mark.parametrize("pass_rows", [1, 40, 70, 10_000])
def test_machines_of_every_kind_make_the_same_files_and_use_each_others(
    folder: Path, pass_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.duplicates.panels.PANEL_ROWS", 50)
    groups = list(find_groups(open_gallery(folder), 0.95, panel_rows=50))
    files = kept(folder)
    for name in sorted(files)[1:]:
        (folder / "cache" / name).unlink()
    arithmetic = SmallCard(pass_rows)
    assert list(find_groups(open_gallery(folder), 0.95, arithmetic=arithmetic, panel_rows=50)) == groups
    assert kept(folder) == files
    (folder / "cache" / sorted(files)[1]).unlink()
    assert list(find_groups(open_gallery(folder), 0.95, panel_rows=50)) == groups
    assert kept(folder) == files


def test_files_that_no_longer_fit_are_removed(folder: Path) -> None:
    groups_of(folder)
    before = kept(folder)
    write_article_shard(folder, 1, rows(ROWS, 9), [f"1-{row}" for row in range(ROWS)])
    os.utime(folder / "0001.features.npy", (1, 1))
    groups_of(folder)
    after = kept(folder)
    assert len(after) == 3
    assert set(before) & set(after) == {min(before)}


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other"])
def test_a_damaged_file_is_noticed_and_made_again(
    folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = groups_of(folder)
    files = kept(folder)
    name = sorted(files)[1]
    data = bytearray(files[name])
    if damage == "bit":
        data[len(data) // 2] ^= 1
    other = files[sorted(files)[0]]
    bad = {"cut": bytes(data[:-20]), "bit": bytes(data), "empty": b"", "other": other}[damage]
    (folder / "cache" / name).write_bytes(bad)
    assert [found for found, _, _ in look_through(folder)] == [f"cache/{name}"]
    assert groups_of(folder) == groups
    assert "is damaged" in capsys.readouterr().err
    assert kept(folder) == files


def test_a_filter_uses_what_is_known_of_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = open_gallery(folder)
    rng = np.random.default_rng(0)
    some = gallery.only([rng.random(ROWS) < 0.5 for _ in range(3)])
    alone = list(find_groups(some, 0.95, panel_rows=50, tile_rows=32))
    filtered = kept(folder)
    assert len(filtered) == 3 and alone
    groups_of(folder)
    assert not filtered.keys() & kept(folder).keys()
    monkeypatch.setattr("search.duplicates.panels.find_pairs", None)
    assert list(find_groups(some, 0.95, panel_rows=50, tile_rows=32)) == alone


def test_a_folder_that_cannot_be_written_to_is_said_and_searched_all_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = groups_of(folder)
    for name in os.listdir(folder / "cache"):
        (folder / "cache" / name).unlink()
    (folder / "cache").rmdir()
    (folder / "cache").touch()
    capsys.readouterr()
    assert groups_of(folder) == groups
    assert capsys.readouterr().err.count("pairs cannot be kept") == 1


def test_many_pairs_of_a_panel_are_several_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = groups_of(folder, 0.5)
    for name in kept(folder):
        (folder / "cache" / name).unlink()
    monkeypatch.setattr("search.duplicates.store.AT_ONCE", 64)
    assert groups_of(folder, 0.5) == groups
    assert len(kept(folder)) > 3
    assert compared(folder, monkeypatch, 0.5) == (groups, 0)
    (folder / "cache" / max(kept(folder))).unlink()
    assert compared(folder, monkeypatch, 0.5) == (groups, 1)


def test_parts_of_two_processes_that_cut_a_panel_differently_are_never_taken_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = {}
    for at_once in (64, 200):
        monkeypatch.setattr("search.duplicates.store.AT_ONCE", at_once)
        groups = groups_of(folder, 0.5)
        cut[at_once] = kept(folder)
        for name in cut[at_once]:
            (folder / "cache" / name).unlink()
    panel = max(cut[200])[:-9]
    for name, content in {**cut[64], f"{panel}.0000.npy": cut[200][f"{panel}.0000.npy"]}.items():
        (folder / "cache" / name).write_bytes(content)
    assert f"{panel}.0001.npy" in cut[64] and cut[64][f"{panel}.0000.npy"] != cut[200][f"{panel}.0000.npy"]
    capsys.readouterr()
    assert compared(folder, monkeypatch, 0.5) == (groups, 1)
    assert "does not follow the part before it" in capsys.readouterr().err


def test_pairs_of_all_files_come_in_order_also_where_they_are_tied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    gallery = in_memory(rng.integers(-4, 5, (400, 3)).astype(np.float32), cuts=(60,))
    monkeypatch.setattr("search.duplicates.store.AT_ONCE", 64)
    monkeypatch.setattr("search.duplicates.store._LOOKED_AT", 3)
    store = collect(gallery, 0.9, NumpyArithmetic(), tmp_path, panel_rows=40, tile_rows=16)
    pieces = list(store.in_order())
    assert len(store.parts) > 4
    assert len(pieces) > 10
    merged, wanted = joined(pieces), joined(list(store.pairs())).in_order()
    assert len(np.unique(wanted.similarities)) < len(wanted) // 4
    for column in ("some", "others", "similarities"):
        assert getattr(merged, column).tolist() == getattr(wanted, column).tolist()


SLOW = """
import sys, time
import search.duplicates.panels as panels
from pathlib import Path
from search.duplicates.groups import find_groups
from search.gallery.opening import open_gallery

find = panels.find_pairs
def slow(*given):
    for one in find(*given):
        time.sleep(0.08)
        yield one
panels.find_pairs = slow
list(find_groups(open_gallery(Path(sys.argv[1])), 0.95, panel_rows=50, tile_rows=32))
"""


def test_a_search_that_is_killed_goes_on_and_ends_with_the_same_bytes(folder: Path) -> None:
    whole = groups_of(folder)
    files = kept(folder)
    for name in files:
        (folder / "cache" / name).unlink()
    kills = 0
    while len(kept(folder)) < len(files):
        before = len(kept(folder))
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder)], cwd=Path(__file__).parents[3])
        try:
            deadline = time.monotonic() + 120
            while len(kept(folder)) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        assert len(kept(folder)) > before
    assert kills > 1
    assert kept(folder) == files
    assert json.dumps([str(group) for group in groups_of(folder)]) == json.dumps([str(group) for group in whole])


@pytest.mark.parametrize("seed", range(12))
def test_panels_compared_anywhere_in_any_order_give_the_groups_of_one_machine(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cuts = rng.integers(1, 40, int(rng.integers(1, 8))).tolist()
    values = rows(3 * -(-sum(cuts) // 3), seed)
    values[rng.integers(0, len(values), 3)] = 0
    for number, end in enumerate(np.cumsum(cuts).tolist()):
        ids = [f"{number}-{row}" for row in range(cuts[number])]
        write_article_shard(tmp_path / "g", number, values[end - cuts[number] : end], ids)
    panel_rows, threshold = int(rng.integers(5, 60)), float(rng.choice([0.5, 0.9, 0.99]))
    alone = list(find_groups(open_gallery(tmp_path / "g"), threshold, panel_rows=panel_rows))
    files = kept(tmp_path / "g")
    for name in files:
        (tmp_path / "g" / "cache" / name).unlink()
    # Each worker has opened the gallery by itself.
    workers = [open_gallery(tmp_path / "g").whole() for _ in range(2)]
    panels = list(panels_of(workers[0], panel_rows))
    made = [
        Comparison(one, panels, first_equals(one, 16), NumpyArithmetic(), tile_rows)
        for one, tile_rows in zip(workers, (2048, int(rng.integers(4, 64))), strict=True)
    ]
    for number in rng.permutation(len(panels)).tolist():
        worker = int(rng.integers(2))
        made[worker].compare(panels[number], threshold, PairFolder(workers[worker]), lambda pairs: None)
    assert kept(tmp_path / "g").keys() == files.keys()
    one = open_gallery(tmp_path / "g")
    assert [str(group) for group in find_groups(one, threshold, panel_rows=panel_rows)] == list(map(str, alone))
