"""The plain functions under the commands, called as a notebook or a service calls them."""

import io
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.progress import show_steps
from search.requests.evaluate import EvaluateRequest, draw, evaluate
from search.requests.index import index
from search.requests.near_duplicates import NearDuplicatesRequest, near_duplicates
from search.requests.search import SearchRequest, search
from search.requests.selection import Selection
from tests.factories import Ruiji
from tests.search.galleries import write_article_shard, write_pictures_gallery


@pytest.fixture
def selection(ruiji: Ruiji) -> Selection:
    write_pictures_gallery(ruiji)
    return Selection(feature_dir=ruiji.features, model_path=ruiji.model)


def test_a_search_returns_answers_failures_and_lines_and_prints_nothing(
    ruiji: Ruiji, selection: Selection, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    said: list[str] = []
    request = SearchRequest(
        selection=selection,
        images=(Path("-"), broken),
        ids=("3.png",),
        media_dir=ruiji.media,
        top_k=2,
        sheet=tmp_path / "sheet.png",
        explain=True,
    )
    stdin = io.TextIOWrapper(io.BytesIO(f"{ruiji.media / 'cat/1.png'}\n".encode()))
    found = search(request, said.append, stdin)
    assert [answer.query.name for answer in found.answers] == ["3.png", str(ruiji.media / "cat/1.png")]
    assert [len(answer.hits) for answer in found.answers] == [2, 2]
    assert found.answers[1].hits[0].path == "cat/1.png"
    assert found.failures == ((broken, "it is not an image in a known format"),)
    assert [line.title for line in found.lines] == ["3.png", "1.png"]
    assert said[0] == f"{broken}: it is not an image in a known format; left out"
    assert said[1].startswith("plan: ")
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "sheet.png").exists()


def test_requests_that_contradict_themselves_are_refused_when_they_are_made(selection: Selection) -> None:
    with pytest.raises(UsageError, match="nothing to search with"):
        SearchRequest(selection=selection)
    with pytest.raises(UsageError, match="--threshold must be above 0"):
        NearDuplicatesRequest(selection=selection, threshold=0)
    with pytest.raises(UsageError, match="either --labels FILE or --labels-from-folder"):
        EvaluateRequest(feature_dir=Path("features"), model_path=Path("model.onnx"))


def test_near_duplicates_of_an_unverified_gallery_come_with_a_warning(tmp_path: Path) -> None:
    features = np.array([[1, 0], [0, 1], [1, 0.01], [0, 0]], np.float32)
    write_article_shard(tmp_path, 0, features, ["a", "b", "c", "d"])
    said: list[str] = []
    request = NearDuplicatesRequest(selection=Selection(feature_dir=tmp_path))
    (group,) = near_duplicates(request, said.append, show_steps).groups
    assert [member.object_id for member in group.members] == ["a", "c"]
    warned, left_out, digests = said
    assert warned.startswith("warning:")
    assert left_out.startswith("warning:") and "left out 1 object whose feature is all zero" in left_out
    assert digests.startswith("4 objects have no digest")
    with pytest.raises(UsageError, match="does not know paths"):
        Selection(feature_dir=tmp_path, need_paths=True).open(said.append)


def test_an_index_and_an_evaluation_return_what_they_found(ruiji: Ruiji, selection: Selection, tmp_path: Path) -> None:
    done = index(selection.folder, show_steps)
    assert (done.objects, done.shards, done.unusable) == (5, 1, 0)
    assert selection.open(print).coded
    request = EvaluateRequest(
        feature_dir=ruiji.features,
        model_path=ruiji.model,
        labels_from_folder=True,
        trec=tmp_path / "run.txt",
        sheet=tmp_path / "sheet.png",
        media_dir=ruiji.media,
    )
    gallery, evaluation = evaluate(request)
    assert evaluation.summaries["rank_1"].value == 1
    assert len((tmp_path / "run.txt").read_text().splitlines()) == 5 * 4
    assert not (tmp_path / "sheet.png").exists()
    assert draw(request, gallery, evaluation) == 0
    assert (tmp_path / "sheet.png").is_file()
