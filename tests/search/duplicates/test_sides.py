"""New objects against a reference, and objects of different folders."""

from pathlib import Path

import numpy as np
import pytest

import ruiji
from pipeline.errors import UsageError
from pipeline.model import load_model
from pipeline.progress import show_steps
from search.requests.near_duplicates import NearDuplicatesRequest, near_duplicates
from search.requests.selection import Selection
from tests.factories import tiny_model
from tests.search.galleries import write_article_shard, write_gallery

#: One direction in four places, then another in two.
PATHS = ["archive/a.jpg", "archive/b.jpg", "archive/c.jpg", "new/a.jpg", "new/b.jpg", "new/x/c.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = np.zeros((6, 12), np.float32)
    rows[:, 0] = 1
    # Not equal, but near: a difference that a cosine shows.
    rows[:, 1] = np.arange(6) / 100
    rows[[1, 4], 0], rows[[1, 4], 2] = 0, 1
    write_gallery(tmp_path / "tiny", load_model(tiny_model(tmp_path / "tiny.onnx")), rows, PATHS, 4)
    return tmp_path / "tiny"


def found(folder: Path, *against: str, apart: bool = False) -> list[list[str]]:
    gallery = ruiji.open_gallery(folder)
    groups = gallery.near_duplicates(0.99, against=against, not_within_folder=apart)
    return [[member.path or "" for member in group.members] for group in groups]


def test_all_are_compared_if_nothing_is_said(folder: Path) -> None:
    a, b, c, new_a, new_b, new_c = PATHS
    assert found(folder) == [[a, c, new_a, new_c], [b, new_b]]


def test_a_new_set_against_a_reference_set_which_comes_first_czkawka_686_1524_imagededup_170(folder: Path) -> None:
    a, b, c, new_a, new_b, new_c = PATHS
    assert found(folder, "path=archive/") == [[a, c, new_a, new_c], [b, new_b]]
    assert found(folder, "path=new/x/") == [[new_c, a, c, new_a]]
    assert found(folder, "path=archive/b") == [[b, new_b]]
    (group, _) = ruiji.open_gallery(folder).near_duplicates(0.99, against=["path=new/"])
    assert [member.path for member in group.members] == [new_a, new_c, a, c]
    assert group.members[0].similarity == 1.0
    # Each of the two new ones with each of the two in the archive.
    assert group.pairs == 4


def test_groups_within_one_folder_are_hidden_czkawka_1361(folder: Path) -> None:
    a, b, c, new_a, new_b, new_c = PATHS
    (first, second) = ruiji.open_gallery(folder).near_duplicates(0.99, not_within_folder=True)
    assert [[member.path for member in group.members] for group in (first, second)] == [
        [a, c, new_a, new_c],
        [b, new_b],
    ]
    assert (first.pairs, second.pairs) == (5, 1)
    assert found(folder, "path=archive/", apart=True) == [[a, c, new_a, new_c], [b, new_b]]


@pytest.mark.parametrize("against", ["path=", "path=nowhere/"])
def test_a_reference_that_is_all_or_nothing_is_refused(folder: Path, against: str) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        found(folder, against)


def test_a_condition_that_cannot_be_read_is_named_by_its_option(folder: Path) -> None:
    for against, said in (("archive", "archive: write"), ("kind=old", "kind=… asks for a column .* give one")):
        request = NearDuplicatesRequest(selection=Selection(feature_dir=folder), against=(against,))
        with pytest.raises(UsageError, match=f"^--against {said}"):
            near_duplicates(request, lambda line: None, show_steps)
        # From Python by its argument.
        with pytest.raises(UsageError, match=f"^against {said}"):
            found(folder, against)


def test_a_gallery_without_paths_has_no_folders(tmp_path: Path) -> None:
    write_article_shard(tmp_path / "g", 0, np.ones((3, 4), np.float32), ["a", "b", "c"])
    selection = Selection(feature_dir=tmp_path / "g")
    for request in (
        NearDuplicatesRequest(selection=selection, not_within_folder=True),
        NearDuplicatesRequest(selection=selection, against=("path=new/",)),
    ):
        with pytest.raises(UsageError, match="does not know paths"):
            near_duplicates(request, lambda line: None, show_steps)
