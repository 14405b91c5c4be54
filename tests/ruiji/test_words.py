"""Words in the Python API: the answers of the command, and the same refusals."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import ruiji
from tests.ruiji.test_galleries import World
from tests.search.test_words import feature_of, unit
from tests.words import with_words


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    with_words(world.model.path)
    return world


def test_words_are_answered_after_pictures_as_float64_ranks_them(world: World) -> None:
    gallery = world.open()
    (found,) = gallery.search(text="a red car", top_k=5)
    assert found.query == "a red car"
    assert [hit.object_id for hit in found.hits] == world.expected(feature_of("a red car"), 5)
    picture = world.media / world.paths[2]
    answers = gallery.search(picture, text=["a red car", "blue cats"], top_k=1)
    assert [answer.query for answer in answers] == [str(picture), "a red car", "blue cats"]


def test_combined_queries_have_one_answer(world: World) -> None:
    gallery, picture = world.open(), world.media / world.paths[2]
    total = unit(world.features[2]) + unit(feature_of("a car")) - unit(feature_of("by night"))
    found = gallery.search(picture, text="a car", minus="by night", top_k=12).hits
    assert [hit.object_id for hit in found] == world.expected(total.astype(np.float32), 12)
    total = unit(feature_of("a car")) + unit(feature_of("cats"))
    found = gallery.search(text=["a car", "cats"], combine=True, top_k=12).hits
    assert [hit.object_id for hit in found] == world.expected(total.astype(np.float32), 12)


def test_what_cannot_be_combined_is_refused(world: World) -> None:
    gallery = world.open()
    with pytest.raises(ruiji.QueryError, match=r"no combined query can be made: nowhere\.png: there is no such file"):
        gallery.search("nowhere.png", text="a car", combine=True)
    with pytest.raises(ruiji.UsageError, match="combined queries have none"):
        gallery.search(text="a car", minus="cats", metric="euclidean")
    with pytest.warns(ruiji.RuijiWarning, match="only the first"):
        gallery.search(text="xyz " * 20)


def test_words_need_a_model_with_a_text_tower(world: World) -> None:
    with pytest.raises(ruiji.UsageError, match="words need the model that made the gallery"):
        ruiji.open_gallery(world.features_dir).search(text="a car")
    world.model.path.with_suffix(".toml").unlink()
    gallery = world.open()
    with pytest.raises(ruiji.UsageError, match="has no text tower"):
        gallery.search(text="a car")
    shutil.rmtree(world.model.path.parent / "textual")
    with_words(world.model.path)
    assert gallery.search(text="a car").hits, "what failed is tried again"
