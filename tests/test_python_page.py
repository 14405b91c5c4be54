"""docs/python.md: every example runs on a gallery that `ruiji run` made, and prints what the page says."""

import doctest
import re
from pathlib import Path

import pytest
from PIL import Image

import ruiji
from tests.conftest import ROOT
from tests.factories import Ruiji, picture, tiny_model
from tests.words import with_words

PAGE = ROOT / "docs" / "python.md"
PACKAGES = ("pipeline", "search", "ruiji")
PICTURES = ("holiday/beach.png", "holiday/sea.png", "town/church.png", "town/harbour.png", "town/street.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`photos`, `features` and `model.onnx`, as the page says."""
    made = Ruiji(
        tmp_path / "photos", tmp_path / "features", tiny_model(tmp_path / "model.onnx"), tmp_path / "state", ROOT
    )
    for seed, path in enumerate(PICTURES):
        picture(made.media / path, seed, (64, 48))
    with Image.open(made.media / PICTURES[0]) as beach:
        beach.resize((12, 9)).save(made.media / "holiday" / "beach-small.png")
    made("run")
    with_words(made.model)
    return tmp_path


def test_every_example_of_the_page_gives_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    page = doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, PAGE.name, str(PAGE), 0)
    assert len(page.examples) == len(re.findall(r"^    >>> ", PAGE.read_text(), re.MULTILINE)) > 20
    said: list[str] = []
    doctest.DocTestRunner().run(page, out=said.append)
    assert not said, "".join(said)


def test_the_page_names_every_method_of_a_gallery() -> None:
    public = {name for name in vars(ruiji.Gallery) if not name.startswith("_")}
    assert not {name for name in public if not re.search(rf"\b{name}\b", PAGE.read_text())}


def test_what_is_given_and_taken_is_exported() -> None:
    assert {"Annotations", "Status"} < set(ruiji.__all__)
    assert all(getattr(ruiji, name).__module__.partition(".")[0] in PACKAGES for name in ruiji.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = ruiji.Nothing  # type: ignore[attr-defined]
