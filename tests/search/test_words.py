"""Words as queries: alone, combined and subtracted, in every format, sheet and page."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import GalleryMismatch, ModelError, QueryError, RuijiError, UsageError
from pipeline.model import load_model
from pipeline.npy import map_npy
from tests.factories import tiny_model
from tests.search.galleries import brute_force
from tests.search.test_search_cli import World, made, own_world, world  # noqa: F401
from tests.words import DECLARED, embeddings, text_graph, trained_tokenizer, with_words


@pytest.fixture
def words(own_world: World) -> World:  # noqa: F811
    """A gallery whose model has a text tower."""
    model = own_world.features.parent / own_world.model.path.name
    model.write_bytes(own_world.model.path.read_bytes())
    own_world.model = load_model(with_words(model))
    return own_world


def stored(world: World) -> tuple[np.ndarray, list[str]]:  # noqa: F811
    """All features, and the object ids."""
    parts = sorted(world.folder.glob("*.features.npy"))
    return np.concatenate([map_npy(part).array for part in parts]), [Path(path).name for path in world.paths]


def feature_of(text: str) -> np.ndarray:
    """float32[d], from the tokens by hand."""
    ids = trained_tokenizer().encode(text).ids
    assert len(ids) <= DECLARED["length"]
    return embeddings()[ids].sum(axis=0, dtype=np.float32)


def unit(feature: np.ndarray) -> np.ndarray:
    return feature.astype(np.float64) / np.linalg.norm(feature.astype(np.float64))


def ranked(world: World, *arguments: str | Path) -> list[tuple[str, float]]:  # noqa: F811
    result = world.search(*arguments, "-k", "100", "--format", "json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    return [(hit["object_id"], hit["similarity"]) for hit in found["hits"]]


def agree(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> bool:
    same = [object_id for object_id, _ in found] == [object_id for object_id, _ in expected]
    return same and np.allclose([value for _, value in found], [value for _, value in expected], atol=1e-6)


def test_words_rank_as_float64_does(words: World) -> None:
    assert agree(ranked(words, "--text", "a red car"), brute_force(*stored(words), feature_of("a red car")))
    found = ranked(words, "--text", "blue cats")
    assert agree(found, brute_force(*stored(words), feature_of("blue cats")))
    assert found != ranked(words, "--text", "a red car")


def test_the_gallery_stays_that_of_its_model(words: World) -> None:
    gallery = json.loads((words.folder / "gallery.json").read_text())
    assert gallery["fingerprint"] == words.model.fingerprint
    assert words.search(words.media / words.paths[0]).exit_code == 0


def test_several_words_have_an_answer_each_in_every_format(words: World) -> None:
    texts = ("a red car", "cats/dogs, \n“2”")
    given = [option for text in texts for option in ("--text", text)]
    result = words.search(*given, "-k", "3", "--format", "json")
    found = json.loads(result.stdout)
    assert [one["query"] for one in found] == list(texts)
    flat = [{"query": one["query"], **hit} for one in found for hit in one["hits"]]
    lines = words.search(*given, "-k", "3", "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == flat
    rows = csv.DictReader(io.StringIO(words.search(*given, "-k", "3", "--format", "csv").stdout, newline=""))
    assert [row["query"] for row in rows] == [row["query"] for row in flat]
    paths = words.search(*given, "-k", "3", "--format", "paths").stdout.splitlines()
    assert paths == [hit["path"] for hit in flat]
    table = words.search(*given, "-k", "3").stdout
    assert "query: a red car\n" in table and "query: cats/dogs, \\n“2”\n" in table


def test_pictures_ids_and_words_are_answered_in_this_order(words: World) -> None:
    object_id = Path(words.paths[1]).name
    result = words.search("--text", "a car", words.media / words.paths[0], "--id", object_id, "--format", "json")
    assert [one["query"] for one in json.loads(result.stdout)] == [
        object_id,
        str(words.media / words.paths[0]),
        "a car",
    ]


def test_combined_queries_are_the_sum_of_unit_features_and_minus_subtracts(words: World) -> None:
    features, ids = stored(words)
    expected = unit(feature_of("a red car")) + unit(features[3]) - unit(feature_of("by night"))
    arguments = ("--text", "a red car", words.media / words.paths[3], "--minus", "by night")
    found = ranked(words, *arguments)
    assert agree(found, brute_force(features, ids, expected))
    assert ranked(words, *arguments, "--combine") == found, "--minus combines"
    (query,) = json.loads(words.search(*arguments, "--format", "json").stdout)
    assert query["query"] == f"{words.media / words.paths[3]} + a red car - by night"
    plain = unit(feature_of("a red car")) + unit(feature_of("cats"))
    combined = ranked(words, "--text", "a red car", "--text", "cats", "--combine")
    assert agree(combined, brute_force(features, ids, plain))
    assert len(ranked(words, "--text", "a red car", "--combine")) == len(ids)


def test_objects_that_are_combined_are_left_out_of_their_hits(words: World) -> None:
    features, ids = stored(words)
    arguments = ("--id", ids[2], "--id", ids[5], "--text", "a car", "--combine")
    expected = brute_force(features, ids, unit(features[2]) + unit(features[5]) + unit(feature_of("a car")))
    assert agree(ranked(words, *arguments), [hit for hit in expected if hit[0] not in (ids[2], ids[5])])
    assert agree(ranked(words, *arguments, "--include-self"), expected)
    few = words.search(*arguments, "-k", "3", "--format", "json").stdout
    assert len(json.loads(few)[0]["hits"]) == 3


def test_a_sheet_and_a_page_show_the_words(words: World, tmp_path: Path) -> None:
    sheet, page = tmp_path / "hits.png", tmp_path / "hits.html"
    text = "a <red> car"
    shown = ("--media-dir", words.media, "--sheet", sheet, "--html", page, "-k", "3")
    result = words.search("--text", text, *shown)
    assert result.exit_code == 0, result.output
    assert "could not be opened" not in result.stderr
    written = page.read_text()
    assert '<div class="tile">a &lt;red&gt; car</div>' in written and "no picture" not in written
    with Image.open(sheet) as drawn:
        tile = np.asarray(drawn.convert("L").crop((24, 24, 200, 200)))
    assert (tile < 100).any() and (tile > 240).mean() > 0.8, "dark letters on a light ground"
    long = " ".join(["a-word-that-is-longer-than-its-tile"] * 30)
    assert words.search("--text", long, *shown).exit_code == 0


def test_words_that_are_too_long_are_said_and_those_without_a_token_refused(words: World) -> None:
    result = words.search("--text", "xyz " * 20)
    assert result.exit_code == 0
    assert re.search(r"warning: only the first 6 of \d+ tokens count of .{61}…'\n", result.stderr)
    assert "only the first" not in words.search("--text", "a red car").stderr
    with_words_again = words.model.path.with_suffix(".toml")
    with_words_again.write_text(with_words_again.read_text().replace("'none'", "'canonicalize'"))
    assert "have nothing that the model's tokenizer knows" in words.refused(QueryError, "--text", "?!")
    assert "write them in UTF-8" in words.refused(QueryError, "--text", "a caf\udce9")


@pytest.mark.parametrize(
    ("arguments", "kind", "words_said"),
    [
        (["--text", " "], UsageError, "need words"),
        (["--text", "car", "--minus", " "], UsageError, "need words"),
        (["--minus", "car"], UsageError, "nothing to search with"),
        (["--text", "car", "--combine", "--metric", "euclidean"], UsageError, "combined queries have none"),
        (["--text", "a car", "--minus", "a car"], QueryError, "these cancel each other out"),
    ],
)
def test_what_cannot_be_searched_with_is_refused(
    words: World, arguments: list[str], kind: type[RuijiError], words_said: str
) -> None:
    assert words_said in words.refused(kind, *arguments)


def test_a_picture_that_cannot_be_read_is_not_left_out_of_a_sum(words: World, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    given = (tmp_path / "broken.png", words.media / words.paths[0], "--text", "a car")
    assert words.search(*given).exit_code == 3
    assert "leave it out to go on" in words.refused(QueryError, *given, "--combine")


def test_a_model_without_a_text_tower_says_so(world: World) -> None:  # noqa: F811
    said = world.refused(UsageError, "--text", "a red car")
    assert "has no text tower" in said and "ruiji model add" in said and "\n" not in said


def test_words_need_the_model_of_the_gallery(words: World, tmp_path: Path) -> None:
    other = with_words(tiny_model(tmp_path / "other" / words.model.path.name, seed=7))
    words.model = load_model(other)
    assert "the gallery was made by the model with fingerprint" in words.refused(GalleryMismatch, "--text", "a car")


def test_a_tower_of_another_length_is_refused(words: World) -> None:
    text_graph(words.model.path.parent / "textual" / "model.onnx", length=10)
    assert "features of pictures are float32[12]" in words.refused(ModelError, "--text", "a car")


def test_a_search_with_words_decodes_and_embeds_no_picture(words: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.encoder.Encoder.__init__", None)
    assert words.search("--text", "a car").exit_code == 0
