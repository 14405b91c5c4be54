"""Searches over HTTP: the answers of `ruiji.open_gallery`, passes that are shared, and what is not waited for."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import ruiji as ruiji_api
from pipeline.errors import UnknownObject
from pipeline.model import load_model
from search.gallery.opening import find_galleries
from serve.galleries import Galleries
from serve.searches import MOST_WAITING, Busy, Searches, WantedSearch
from serve.server import Address, _keep_looking, _listen
from tests.factories import Ruiji, picture, tiny_model, wait_until
from tests.search.galleries import brute_force, write_article_shard, write_gallery, write_shard
from tests.serve.conftest import COUNT, Served, start, write_served_gallery
from tests.words import with_words


def expected(hits: "tuple[ruiji_api.Hit, ...]") -> list[dict[str, Any]]:
    return [
        {
            "objectId": hit.object_id,
            "distance": hit.distance,
            "similarity": hit.similarity,
            "rank": rank,
            "path": hit.path,
            "label": None,
            "others": None,
        }
        for rank, hit in enumerate(hits, 1)
    ]


@pytest.fixture(scope="module")
def gallery(world: Ruiji) -> ruiji_api.Gallery:
    return ruiji_api.open_gallery(world.features, world.model)


@pytest.fixture(scope="module")
def ids(gallery: ruiji_api.Gallery) -> list[str]:
    return [one.object_id for one in gallery.objects()]


def test_without_parameters_it_is_the_articles_route(
    served: Served, gallery: ruiji_api.Gallery, ids: list[str]
) -> None:
    body = served.similar(ids[3]).json()
    assert body["queryObjectId"] == ids[3]
    features = gallery.features(ids)
    nearest = [name for name, _ in brute_force(features, ids, features[3], euclidean=True) if name != ids[3]]
    assert [one["objectId"] for one in body["similarImages"]] == nearest[:10]
    assert body["similarImages"] == expected(gallery.search_ids(ids[3], metric="euclidean").hits)


@pytest.mark.parametrize("metric", ["cosine", "angle", "euclidean"])
def test_many_at_once_get_the_answers_of_the_search_in_process(
    served: Served, gallery: ruiji_api.Gallery, ids: list[str], metric: str
) -> None:
    wanted = [(name, 1 + place % 12, (None, 0.5)[place % 2]) for place, name in enumerate(ids * 4)]

    def ask(one: tuple[str, int, float | None]) -> Any:
        name, k, least = one
        return served.similar(name, f"?metric={metric}&k={k}" + ("" if least is None else f"&min_similarity={least}"))

    passes = served.metric("ruiji_passes_total")
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, wanted))
    for (name, k, least), answer in zip(wanted, answers, strict=True):
        found = gallery.search_ids(name, top_k=k, metric=metric, min_similarity=least)
        assert answer.json()["similarImages"] == expected(found.hits), (name, k, least)
    assert served.metric("ruiji_passes_total") - passes <= len(wanted)


def test_searches_that_wait_share_a_pass_and_one_that_fails_spoils_no_other(
    gallery: ruiji_api.Gallery, ids: list[str]
) -> None:
    async def ask() -> tuple[list[Any], int]:
        searches = Searches()
        asked = [WantedSearch(gallery=gallery, query=name, top_k=5, metric="cosine") for name in [*ids, "nobody"]]
        vectors = gallery.features(ids)
        asked += [WantedSearch(gallery=gallery, query=vector, top_k=4, metric="cosine") for vector in vectors]
        found = await asyncio.gather(*map(searches.hits, asked), return_exceptions=True)
        alone = searches.passes
        await asyncio.gather(*map(searches.hits, asked[: len(ids)]))
        searches.close()
        return found, searches.passes - alone

    found, passes = asyncio.run(ask())
    for name, hits in zip(ids, found, strict=False):
        assert hits == gallery.search_ids(name, top_k=5).hits
    assert isinstance(found[len(ids)], UnknownObject)
    for feature, hits in zip(gallery.features(ids), found[len(ids) + 1 :], strict=True):
        assert hits == gallery.search_vectors(feature, top_k=4).hits
    # The first comes alone, because nothing else was there yet.
    assert passes <= 2


def test_clients_that_ask_again_one_after_the_other_share_every_pass(
    gallery: ruiji_api.Gallery, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, rounds, pass_s = 8, 6, 0.1
    found, sizes = gallery.search_ids(ids[0], top_k=5).hits, list[int]()

    def search(wanted: list[WantedSearch]) -> "list[tuple[ruiji_api.Hit, ...]]":
        sizes.append(len(wanted))
        time.sleep(pass_s)
        return [found] * len(wanted)

    monkeypatch.setattr("serve.searches._search", search)

    async def ask() -> None:
        searches = Searches()

        async def client(number: int) -> None:
            for _ in range(rounds):
                await searches.hits(WantedSearch(gallery=gallery, query=ids[number], top_k=5, metric="cosine"))
                # The last one asks again after a third of a pass.
                await asyncio.sleep(pass_s / 3 * number / (clients - 1))

        await asyncio.gather(*map(client, range(clients)))
        searches.close()

    asyncio.run(ask())
    # If the next pass began before the last one asks again, it would take one pass and wait for the next.
    assert len(sizes) <= rounds + 2, sizes
    assert sum(sizes) == clients * rounds


def test_beyond_the_bound_a_search_is_refused_and_one_that_is_left_costs_nothing(
    gallery: ruiji_api.Gallery, ids: list[str]
) -> None:
    async def ask() -> tuple[int, int, int]:
        searches = Searches()
        wanted = WantedSearch(gallery=gallery, query=ids[0], top_k=5, metric="cosine")
        tasks = [asyncio.create_task(searches.hits(wanted)) for _ in range(MOST_WAITING + 7)]
        await asyncio.sleep(0)
        busy = sum(task.done() and isinstance(task.exception(), Busy) for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        left = searches.waiting
        # What comes later is answered as ever.
        await searches.hits(wanted)
        searches.close()
        return busy, left, searches.passes

    busy, left, passes = asyncio.run(ask())
    assert (busy, left) == (7, 0)
    # The one pass that had begun, at most, and that of the last search.
    assert passes <= 2


@pytest.fixture
def slow(ruiji: Ruiji) -> Served:
    """A service on a gallery whose searches take a while if they ask for as much as they can."""
    features = np.random.default_rng(0).normal(size=(20_000, 12)).astype(np.float32)
    write_article_shard(ruiji.gallery, 0, features, [str(row) for row in range(len(features))])
    ruiji.media.mkdir()
    return start(ruiji)


def alone(number: int) -> str:
    """A search that shares its pass with no other."""
    return f"/similar/{number}?k=400&min_similarity={-number / 1000}"


def test_beyond_the_bound_clients_are_told_429(slow: Served) -> None:
    connections = [slow.raw() for _ in range(2 * MOST_WAITING)]
    # All at once: while it stands still, the kernel takes them.
    slow.process.send_signal(signal.SIGSTOP)
    for number, connection in enumerate(connections):
        connection.sendall(f"GET {alone(number)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    slow.process.send_signal(signal.SIGCONT)
    answers = [HTTPResponse(connection) for connection in connections]
    for answer in answers:
        answer.begin()
    statuses = [answer.status for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= MOST_WAITING
    refused = answers[statuses.index(429)]
    assert (refused.headers["retry-after"], b"try again in a second" in refused.read()) == ("1", True)
    for connection in connections:
        connection.close()
    assert slow.metric('ruiji_waiting{kind="searches"}') == 0


def test_a_client_that_leaves_is_not_searched_for(slow: Served) -> None:
    assert slow.get(alone(0)).status == 200
    connections = [slow.raw() for _ in range(200)]
    for number, connection in enumerate(connections):
        connection.sendall(f"GET {alone(number)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    for connection in connections:
        connection.close()
    wait_until(lambda: slow.metric('ruiji_waiting{kind="searches"}') == 0, what="an empty queue")
    assert slow.metric("ruiji_passes_total") < 150
    assert slow.get(alone(1)).status == 200
    assert "Traceback" not in slow.log.read_text()


def test_a_picture_that_is_sent_finds_what_it_finds_in_process(
    served: Served, world: Ruiji, gallery: ruiji_api.Gallery, tmp_path: Path
) -> None:
    for seed, name in enumerate(("a.png", "b.jpg", "c.webp")):
        data = picture(tmp_path / name, seed, (300, 200)).read_bytes()
        body = served.search(data, "?k=7").json()
        assert body["queryObjectId"] is None
        assert body["similarImages"] == expected(gallery.search(data, top_k=7).hits)
        body = served.search(data, "?k=3&metric=euclidean&min_similarity=0.2").json()
        assert body["similarImages"] == expected(
            gallery.search(data, top_k=3, metric="euclidean", min_similarity=0.2).hits
        )


def test_what_is_asked_wrongly_is_refused_by_name(served: Served, ids: list[str]) -> None:
    for path, status, said in (
        ("/similar/nobody", 404, "the gallery has no object nobody"),
        (f"/similar/{ids[0]}?metric=dot", 422, "metric: "),
        (f"/similar/{ids[0]}?k=0", 422, "k: "),
        (f"/similar/{ids[0]}?k=1001", 422, "k: "),
        (f"/similar/{ids[0]}?min_similarity=nan", 422, "min_similarity: "),
        (f"/similar/{ids[0]}?top_k=3", 422, "top_k: "),
        (f"/similar/{ids[0]}?gallery=other", 404, "there is no gallery other; choose one with ?gallery=NAME: tiny"),
        ("/objects?count=100000", 422, "count: "),
        ("/nowhere", 404, "/openapi.json"),
    ):
        answer = served.get(path)
        assert (answer.status, said in answer.error) == (status, True), (path, answer.body)
    assert served.search(b"no picture").error == "it is not an image in a known format"
    assert served.search(b"").status == 422


def test_objects_are_listed_and_found(served: Served, ids: list[str]) -> None:
    body = served.get("/objects?first=5&count=3").json()
    assert [one["object_id"] for one in body["objects"]] == ids[5:8]
    assert (body["rows"], body["next"]) == (COUNT, 8)
    assert served.get(f"/objects?first={COUNT - 1}").json()["next"] is None
    assert served.get(f"/objects/{ids[6]}").json() == {
        "object_id": ids[6],
        "path": body["objects"][1]["path"],
        "row": 6,
        "annotations": None,
    }


def test_new_shards_and_galleries_are_taken_up_and_what_cannot_be_is_told(
    serve: Callable[..., Served], ruiji: Ruiji
) -> None:
    served = serve()
    assert served.get("/healthz").json()["status"] == "ok"
    model = load_model(ruiji.model)
    rows = np.random.default_rng(1).normal(size=(4, 12)).astype(np.float32)
    write_shard(ruiji.gallery, 3, rows, [f"new/{row}.png" for row in range(4)], model.fingerprint)
    wait_until(lambda: served.get("/objects/2.png").status == 200, what="the new shard")
    assert served.similar("2.png").json()["similarImages"]

    write_gallery(ruiji.features / "other", model, rows, [f"{row}.jpg" for row in range(4)], 4)
    wait_until(lambda: len(served.get("/healthz").json()["galleries"]) == 2, what="the new gallery")
    assert served.similar("1.jpg", "?gallery=other").json()["gallery"] == "other"
    # The model that was given says which one is meant without a name.
    assert served.similar("2.png").json()["gallery"] == "tiny"
    refused = served.search(b"x", "?gallery=other")
    assert (refused.status, "start the service with --model" in refused.error) == (409, True)

    write_shard(ruiji.gallery, 4, rows[:, :5], [f"odd/{row}.png" for row in range(4)], model.fingerprint)
    wait_until(lambda: served.get("/healthz").json()["status"] == "degraded", what="the odd shard")
    problem = next(one["problem"] for one in served.get("/healthz").json()["galleries"] if one["name"] == "tiny")
    assert "shard 0004" in problem
    assert served.similar("2.png").status == 200


def test_a_model_that_comes_later_is_used(ruiji: Ruiji) -> None:
    write_served_gallery(ruiji)
    data, model = ruiji.model.read_bytes(), load_model(ruiji.model)
    rows = np.random.default_rng(1).normal(size=(4, 12)).astype(np.float32)
    write_gallery(ruiji.features / "other", model, rows, [f"{row}.jpg" for row in range(4)], 4)
    library = ruiji.media.parent / "models"
    ruiji.environment |= {"RUIJI_MODELS": str(library)}
    ruiji.model.unlink()
    served = start(ruiji)
    sent = next(ruiji.media.rglob("*.png")).read_bytes()

    def health(name: str) -> Any:
        return next(one for one in served.get("/healthz").json()["galleries"] if one["name"] == name)

    def check(name: str, file: Path) -> None:
        refused = served.search(sent, f"?gallery={name}")
        assert (refused.status, f"there is no model {file}" in refused.error) == (409, True)
        assert not health(name)["pictures"]
        file.parent.mkdir(parents=True, exist_ok=True)
        # Another model first: it is refused, and the gallery goes on.
        tiny_model(file, seed=1)
        wait_until(lambda: "was made by the model" in (health(name)["problem"] or ""), what="the other model")
        assert served.get(f"/objects?gallery={name}").status == 200
        file.write_bytes(data)
        wait_until(lambda: health(name)["pictures"], what="the model")
        assert health(name)["problem"] is None and not health(name)["words"]
        assert served.search(sent, f"?gallery={name}").status == 200

    check("tiny", ruiji.model)
    check("other", library / "other/other.onnx")
    with_words(ruiji.model)
    wait_until(lambda: health("tiny")["words"], what="the text tower")
    assert "the model is" in served.log.read_text()


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied", "/features/tiny"), KeyError("a bug")])
def test_looks_that_fail_are_told_once_and_what_is_open_goes_on(
    world: Ruiji, ids: list[str], fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    galleries = Galleries(world.features)
    galleries.open()
    looks = 0

    def find(folder: Path) -> list[Path]:
        nonlocal looks
        looks += 1
        if looks == 8:
            raise PermissionError(13, "Permission denied", "/features/other")
        if looks in (2, 3, 4, 6, 7):
            raise fault
        return find_galleries(folder)

    async def look(times: int) -> None:
        looking = asyncio.create_task(_keep_looking(galleries))
        until = time.monotonic() + 60
        while looks < times:
            await asyncio.sleep(0.01)
            assert time.monotonic() < until and not looking.done() and len(galleries.get("tiny").gallery) == len(ids)
        looking.cancel()

    monkeypatch.setattr("serve.server._LOOK_S", 0.01)
    monkeypatch.setattr("serve.galleries.find_galleries", find)
    caplog.set_level("INFO", "serve")
    asyncio.run(look(10))
    events = [record.__dict__["event"] for record in caplog.records]
    assert events == ["looking_failed", "looking_works", "looking_failed", "looking_failed", "looking_works"]
    # The same fault is told once, another one as well.
    failed, other = caplog.records[0], caplog.records[3]
    assert "/features/other" in other.getMessage()
    assert str(fault) in failed.getMessage()
    # Where a bug is has to be seen; a folder's fault is one line.
    assert bool(failed.exc_info) == isinstance(fault, KeyError)


def test_of_several_galleries_one_must_be_named(ruiji: Ruiji) -> None:
    rows = np.eye(5, 12, dtype=np.float32)
    ruiji.media.mkdir()
    for name in ("one", "two"):
        write_article_shard(ruiji.features / name, 0, rows, [f"{name}-{row}" for row in range(5)])
    ruiji.model = ruiji.model.with_name("three.onnx")
    assert "has no gallery three, only one, two: check --model" in ruiji("serve", code=2).stderr
    ruiji.model = ruiji.model.with_name("two.onnx")
    served = start(ruiji)
    assert served.similar("two-1").status == 200
    assert served.similar("one-1").status == 404
    assert served.similar("one-1", "?gallery=one").status == 200


def test_the_end_of_an_answer_never_waits_for_the_client_to_confirm_its_beginning() -> None:
    with _listen(Address("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_unknown_object_shares_no_pass_and_spoils_none(world: Ruiji, served: Served, ids: list[str]) -> None:
    async def ask() -> tuple[list[object], int]:
        searches = Searches()
        gallery = ruiji_api.open_gallery(world.gallery)
        names = [ids[0], "nobody", ids[1], "nobody", ids[0]]
        wanted = [WantedSearch(gallery=gallery, query=name, top_k=3, metric="cosine") for name in names]
        answers = await asyncio.gather(*map(searches.hits, wanted), return_exceptions=True)
        searches.close()
        return list(answers), searches.passes

    answers, passes = asyncio.run(ask())
    assert [type(answer).__name__ for answer in answers] == [
        "tuple",
        "UnknownObject",
        "tuple",
        "UnknownObject",
        "tuple",
    ]
    assert passes == 1 and answers[0] == answers[4] != answers[2]


def test_it_ends_in_order_with_what_it_has_in_hand(serve: Callable[..., Served]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        served = serve()
        decoders = served.decoders()
        assert decoders
        listener = served.raw()
        listener.sendall(b"GET /runs/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert listener.recv(100).startswith(b"HTTP/1.1 200")
        served.process.send_signal(number)
        assert served.process.wait(180) == 0
        assert "Traceback" not in served.log.read_text()
        wait_until(lambda there=decoders: not any(map(psutil.pid_exists, there)), what="the decoders' end")
        listener.close()


def test_names_that_are_not_utf_8_and_paths_as_ids_are_found(ruiji: Ruiji) -> None:
    names = ["a/b.png", "../../etc/passwd", "caf\udce9.png", "日本 ?#%.png", "x" * 44]
    write_article_shard(ruiji.gallery, 0, np.eye(5, 12, dtype=np.float32), names)
    ruiji.media.mkdir()
    served = start(ruiji)
    for name in names:
        body = served.similar(name).json()
        assert body["queryObjectId"] == name
        assert {one["objectId"] for one in body["similarImages"]} == {*names} - {name}


def test_memory_stays_flat(serve: Callable[..., Served]) -> None:
    served = serve()
    ids = [one["object_id"] for one in served.get("/objects").json()["objects"]]
    memory = psutil.Process(served.process.pid).memory_info

    def ask(count: int) -> None:
        with ThreadPoolExecutor(4) as threads:
            for answer in threads.map(lambda n: served.similar(ids[n % len(ids)], f"?k={1 + n % 9}"), range(count)):
                assert answer.status == 200

    ask(300)
    before = memory().rss
    ask(1200)
    assert memory().rss - before < 20 << 20
