"""Feature folders on file systems that take two names for one, or hold no long ones."""

import errno
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.enqueue import Extraction, enqueue
from pipeline.errors import ObjectListError, UsageError
from pipeline.folding import folds
from tests.factories import pictures


def take_for_one(monkeypatch: pytest.MonkeyPatch, fold: str) -> None:
    """Have every folder look up names as one that folds them does."""
    same = {"case": str.lower, "form": lambda name: unicodedata.normalize("NFC", name)}[fold]

    def exists(path: Path) -> bool:
        return path.parent.is_dir() and same(path.name) in map(same, os.listdir(path.parent))

    monkeypatch.setattr(Path, "exists", exists)


@pytest.fixture
def work(tmp_path: Path, model_path: Path) -> Extraction:
    pictures(tmp_path / "media", 2)
    return Extraction(tmp_path / "media", tmp_path / "features", model_path)


def listed(work: Extraction, *paths: str) -> Extraction:
    layout.object_list_file(work.media_dir).write_text("".join(f"{path}\n" for path in paths))
    return work


def test_the_folders_of_this_machine_tell_names_apart(tmp_path: Path) -> None:
    assert not folds(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fold", "one", "other"),
    [
        ("case", "a/IMG_1.JPG", "b/img_1.jpg"),
        ("case", "ÄB.jpg", "äb.jpg"),
        ("form", "in a caf\u00e9.jpg", "in a cafe\u0301.jpg"),
    ],
)
def test_two_ids_that_would_have_one_file_are_refused(
    work: Extraction, monkeypatch: pytest.MonkeyPatch, fold: str, one: str, other: str
) -> None:
    media = [path.relative_to(work.media_dir).as_posix() for path in work.media_dir.rglob("*.png")]
    assert enqueue(listed(work, *media, one, other), None).plan is not None, "here they have two"
    take_for_one(monkeypatch, fold)
    assert folds(work.feature_dir)
    elsewhere = replace(work, feature_dir=work.feature_dir.with_name("elsewhere"))
    with pytest.raises(ObjectListError, match=r"one name.*another file system"):
        enqueue(elsewhere, None)
    assert not elsewhere.folder.exists() or list(elsewhere.folder.iterdir()) == []
    # What differs in more than that is taken, and so are paths as ids, whose files lie in other folders.
    assert enqueue(listed(elsewhere, *media, one), None).plan is not None
    by_path = replace(work, feature_dir=work.feature_dir.with_name("by-path"), object_ids=ObjectIds.path)
    assert enqueue(listed(by_path, *media, one, other), None).plan is not None


def test_a_file_system_without_long_names_is_refused(work: Extraction, monkeypatch: pytest.MonkeyPatch) -> None:
    touch = Path.touch

    def short(path: Path, mode: int = 0o666, exist_ok: bool = True) -> None:
        if len(os.fsencode(path.name)) > 143:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        touch(path, mode, exist_ok)

    monkeypatch.setattr(Path, "touch", short)
    with pytest.raises(UsageError, match=r"holds no names of .* --feature-dir on another one"):
        enqueue(work, None)
