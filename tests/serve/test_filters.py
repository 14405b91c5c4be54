"""Words as queries, filters by path and annotations, hits that are collapsed, objects by chance: over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import ruiji as ruiji_api
from pipeline.model import load_model
from search.queries import embed_images, load_encoder
from tests.conftest import ROOT
from tests.factories import Ruiji, pictures, tiny_model, wait_until
from tests.search.galleries import write_shard
from tests.serve.conftest import COUNT, Answer, Served, start, write_served_gallery
from tests.words import with_words


@pytest.fixture(scope="module")
def words_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ruiji]:
    """A gallery whose model has a text tower, with annotations for all objects but one."""
    base = tmp_path_factory.mktemp("words")
    model = with_words(tiny_model(base / "model.onnx"))
    ruiji = Ruiji(base / "media", base / "features", model, base / "state", ROOT)
    paths = write_served_gallery(ruiji)
    lines = [f"{path},{'cat' if n % 4 else 'dog'},{n % 2}" for n, path in enumerate(paths[1:])]
    # Another file with the name of the one that has no annotations.
    lines.append(f"elsewhere/{Path(paths[0]).name},cat,0")
    (base / "anno.csv").write_text("\n".join(["img_path,label,side", *lines, ""]))
    yield ruiji
    ruiji.stop_all()


@pytest.fixture(scope="module")
def known(words_world: Ruiji) -> Served:
    return start(words_world, "--labels", str(words_world.media.parent / "anno.csv"))


@pytest.fixture(scope="module")
def in_process(words_world: Ruiji) -> ruiji_api.Gallery:
    return ruiji_api.open_gallery(words_world.features, words_world.model)


def say(served: Served, text: str, query: str = "") -> Answer:
    """Search with words, as the page's form does."""
    body = f'--sep\r\nContent-Disposition: form-data; name="text"\r\n\r\n{text}\r\n--sep--\r\n'.encode()
    sent = {"Origin": served.origin, "Content_Type": "multipart/form-data; boundary=sep"}
    return served.ask("POST", f"/search{query}", body, **sent)


def found(answer: Answer) -> list[tuple[str, float]]:
    assert answer.status == 200, answer.body
    return [(one["objectId"], one["similarity"]) for one in answer.json()["similarImages"]]


def test_words_find_what_they_find_in_process(known: Served, in_process: ruiji_api.Gallery) -> None:
    wanted = [(hit.object_id, hit.similarity) for hit in in_process.search(text="a red car", top_k=7).hits]
    answer = say(known, "a red car", "?k=7")
    assert found(answer) == wanted
    assert answer.json()["queryObjectId"] is None and answer.json()["note"] is None
    assert "only the first 6 of" in say(known, "a red car at night and two blue cats").json()["note"]


def test_words_that_cannot_be_searched_with_are_refused(known: Served, served: Served) -> None:
    assert say(known, "  ").status == 422 and "image, or words" in say(known, "").error
    assert say(known, "x" * 1001).status == 422
    assert say(served, "a red car").status == 409 and "no text tower" in say(served, "a red car").error
    (gallery,) = known.get("/healthz").json()["galleries"]
    assert gallery["words"] and gallery["pictures"] and gallery["paths"]
    assert not served.get("/healthz").json()["galleries"][0]["words"]


def test_only_objects_that_meet_the_conditions_are_found(known: Served, in_process: ruiji_api.Gallery) -> None:
    everything = in_process.objects()
    query, csv = everything[0].object_id, Path(in_process.folder).parent.parent / "anno.csv"
    prefix = (everything[5].path or "")[:9]
    for conditions in (["label=dog"], ["label=cat", "label=dog", "side=1"], [f"path={prefix}"], ["label!=dog"]):
        wanted = in_process.only(*conditions, labels=csv).search_ids(query, top_k=COUNT).hits
        asked = "&".join(f"where={quote(one, safe='')}" for one in conditions)
        # The second time it is kept.
        for _ in range(2):
            answer = known.similar(query, f"?metric=cosine&k={COUNT}&{asked}")
            assert found(answer) == [(hit.object_id, hit.similarity) for hit in wanted]
        labels = {one["label"] for one in answer.json()["similarImages"]}
        if conditions == ["label=dog"]:
            assert labels == {"dog"} and 0 < len(wanted) < COUNT
    assert found(known.similar(query, "?where=label=cow")) == []
    assert known.similar(query, "?where=label").status == 422
    assert known.similar(query, "?where=colour%3Dred").status == 409
    assert "has no column colour" in known.similar(query, "?where=colour%3Dred").error


def test_without_annotations_only_paths_can_be_asked_for(served: Served) -> None:
    listed: list[Any] = served.get("/objects?count=2").json()["objects"]
    assert listed[0]["annotations"] is None
    path = quote(listed[1]["path"], safe="")
    assert [one for one, _ in found(served.similar(listed[0]["object_id"], f"?where=path={path}"))] == [
        listed[1]["object_id"]
    ]
    said = "where label=… asks for a column of an annotation CSV: start the service with --labels"
    assert said in served.similar(listed[0]["object_id"], "?where=label%3Dcat").error
    assert served.get("/columns").json() == {"columns": []}


def test_the_annotations_can_be_seen(known: Served, in_process: ruiji_api.Gallery) -> None:
    columns = {one["name"]: one["values"] for one in known.get("/columns").json()["columns"]}
    assert columns["label"] == ["cat", "dog"] and columns["side"] == ["0", "1"]
    first, second = in_process.objects(0, 2)
    assert known.get(f"/objects/{first.object_id}").json()["annotations"] is None
    line = {"img_path": second.path, "label": "dog", "side": "0"}
    assert known.get(f"/objects/{second.object_id}").json()["annotations"] == line


def test_near_identical_hits_are_collapsed(ruiji: Ruiji) -> None:
    paths = write_served_gallery(ruiji, 8)
    copies = [f"copy/{n}.png" for n in range(3)]
    for copy in copies:
        (ruiji.media / copy).parent.mkdir(exist_ok=True)
        (ruiji.media / copy).write_bytes((ruiji.media / paths[0]).read_bytes())
    add_rows(ruiji, copies)
    served = start(ruiji)
    query = paths[1].rpartition("/")[2]
    assert all(one["others"] is None for one in served.similar(query).json()["similarImages"])
    hits = served.similar(query, "?metric=cosine&collapse=0.999").json()["similarImages"]
    # The first of equal ids stands for the rest.
    assert len(hits) == 7 and sorted(one["others"] for one in hits) == [0] * 6 + [3]
    assert [one["objectId"] for one in hits if one["others"]] == ["0.png"]
    assert len(served.similar(query, "?collapse=0.999&k=2").json()["similarImages"]) == 2


def add_rows(ruiji: Ruiji, paths: list[str]) -> None:
    """One more shard with these pictures."""
    model = load_model(ruiji.model)
    features = embed_images([ruiji.media / path for path in paths], model, load_encoder(model, "cpu"), 10**6).features
    write_shard(ruiji.gallery, 9, features, paths, model.fingerprint)


def test_objects_come_by_chance_and_none_twice(known: Served, in_process: ruiji_api.Gallery) -> None:
    everything = [one.object_id for one in in_process.objects()]
    some = [one["object_id"] for one in known.get("/sample?count=10").json()["objects"]]
    assert len(set(some)) == 10 and set(some) <= set(everything)
    assert any([one["object_id"] for one in known.get("/sample?count=10").json()["objects"]] != some for _ in range(3))
    assert sorted(one["object_id"] for one in known.get("/sample?count=100").json()["objects"]) == sorted(everything)
    dogs = known.get("/sample?where=label%3Ddog").json()["objects"]
    assert {one["annotations"]["label"] for one in dogs} == {"dog"}
    assert known.get("/sample?where=label%3Dcow").json() == {"objects": [], "total": 0}


def test_filtered_galleries_take_up_new_shards(ruiji: Ruiji) -> None:
    paths = pictures(ruiji.media, 9)
    write_served_gallery(ruiji, 8)
    served = start(ruiji)
    query = next(one["object_id"] for one in served.get("/objects").json()["objects"])
    assert found(served.similar(query, "?where=path%3Dnew/")) == []
    new = "new/0.png"
    (ruiji.media / new).parent.mkdir()
    (ruiji.media / new).write_bytes((ruiji.media / paths[8]).read_bytes())
    add_rows(ruiji, [new])
    wait_until(lambda: [one for one, _ in found(served.similar(query, "?where=path%3Dnew/"))] == ["0.png"])


def test_annotations_that_cannot_be_read_are_refused_at_the_start(ruiji: Ruiji) -> None:
    write_served_gallery(ruiji, 8)
    said = ruiji("serve", "--port", "0", "--labels", "nowhere.csv", code=2).stderr
    assert "cannot read nowhere.csv" in said
