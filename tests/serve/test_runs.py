"""A run seen from its page: from the disk alone, live from the Redis of `ruiji run`, and for Prometheus."""

import http.client
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from pipeline.model import load_model
from tests.factories import Ruiji, picture, pictures, wait_until
from tests.search.galleries import write_gallery
from tests.serve.conftest import COUNT, Answer, Served, start, write_served_gallery


def events(served: Served) -> Iterator[Any]:
    """The body of each event, as it comes."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
    connection.request("GET", "/runs/events")
    answer = connection.getresponse()
    assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"
    try:
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))
    finally:
        connection.close()


def retry(served: Served) -> Answer:
    return served.ask("POST", "/retry", b"{}", Origin=served.origin, Content_Type="application/json")


def samples(served: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and labels; what is not in Prometheus' format is refused."""
    text = served.get("/metrics").body.decode()
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_a_run_is_followed_live_and_its_shards_are_searched_while_it_goes_on(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 12)
    ruiji("run", "--shard-rows", "4")
    served = start(ruiji)
    before = served.get("/runs").json()
    assert (before["gallery"], before["status"]["done"], before["status"]["plan"]) == ("tiny", 12, None)
    assert before["without_redis"].startswith("no Redis")
    listening = events(served)
    assert next(listening) == before

    pictures(ruiji.media, 300)
    run = ruiji.start("run", "--shard-rows", "50")
    seen = []
    for event in listening:
        seen.append(event)
        if event["status"]["done"] == 300:
            break
    listening.close()
    assert run.wait(120) == 0
    # While it went on, its own Redis was asked, and its workers told of themselves.
    assert any(event["without_redis"] is None and event["status"]["plan"] for event in seen)
    wait_until(lambda: served.get("/healthz").json()["galleries"][0]["objects"] == 300, what="all shards")
    wait_until(
        lambda: samples(served)["ruiji_run_objects", (("gallery", "tiny"), ("state", "done"))] == 300, what="the count"
    )
    assert "Traceback" not in served.log.read_text()


def test_a_run_that_has_just_begun_is_shown_and_its_gallery_is_taken_up(ruiji: Ruiji, redis_url: str) -> None:
    paths = pictures(ruiji.media, 20)
    (ruiji.media / paths[3]).write_text("<html>")
    ruiji.features.mkdir()
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "10"}
    served = start(ruiji)
    health = served.get("/healthz").json()
    assert (health["status"], health["coming"], health["galleries"], health["default"]) == ("ok", ["tiny"], [], "tiny")
    assert "gallery tiny: no shards yet" in served.log.read_text()
    assert "nothing was enqueued" in served.get("/runs").error
    refused = served.get("/similar/x")
    assert (refused.status, "has no shards yet" in refused.error) == (404, True)

    ruiji("enqueue")
    failing = served.get("/runs").json()["status"]
    assert (failing["pending"], failing["plan"] is not None) == (20, True)
    ruiji.start("worker", "--processes", "1")
    wait_until(lambda: served.get("/healthz").json()["coming"] == [], what="the first shard")
    wait_until(lambda: served.get("/runs").json()["status"]["failed"] == 1, what="the failed one")
    wait_until(lambda: served.get("/runs").json()["status"]["plan"] is None, what="the end")
    object_id = Path(paths[3]).name
    assert served.get("/failures").json()["failures"][0]["object_id"] == object_id
    assert served.get(f"/thumbs/{object_id}").headers["content-type"] == "image/svg+xml"

    # Mended, it is tried again: once, however often that is asked at the same time.
    picture(ruiji.media / paths[3], 3)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: retry(served), range(4)))
    assert {answer.status for answer in answers} == {200}
    told = [answer.json() for answer in answers]
    assert (told[0]["objects"], bool(told[0]["plan"])) == (1, True)
    wait_until(lambda: served.get(f"/similar/{object_id}").status == 200, what="the mended one")
    status = served.get("/runs").json()["status"]
    assert (status["done"], status["failed"], len(status["shards"])) == (20, 0, 3)
    assert retry(served).json() == {"objects": 0, "plan": None}
    assert ruiji("verify").stdout == ""


def test_what_cannot_be_tried_again_is_told(ruiji: Ruiji, redis_url: str) -> None:
    paths = pictures(ruiji.media, 12)
    (ruiji.media / paths[3]).write_text("<html>")
    ruiji("run", "--workers", "1", code=3)
    served = start(ruiji)
    refused = retry(served)
    assert (refused.status, refused.error.startswith("no Redis")) == (409, True)
    assert served.ask("POST", "/retry", b"{}", Content_Type="application/json").status == 403
    served.process.terminate()

    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    served = start(ruiji)
    whole = (ruiji.media / "objects.txt").read_text()
    (ruiji.media / "objects.txt").write_text(whole.replace(f"{paths[5]}\n", ""))
    refused = retry(served)
    assert (refused.status, "not the one that was enqueued last" in refused.error) == (409, True)
    # Nothing left the list.
    assert served.get("/runs").json()["status"]["objects"] == 12
    picture(ruiji.media / "new.png")
    (ruiji.media / "objects.txt").write_text(f"new.png\n{whole}")
    ruiji("enqueue")
    refused = retry(served)
    assert (refused.status, "never tried" in refused.error) == (409, True)


def test_a_damaged_gallery_leaves_the_others_alone_and_is_taken_up_when_it_is_mended(ruiji: Ruiji) -> None:
    write_served_gallery(ruiji)
    model = load_model(ruiji.model)
    other = ruiji.features / "other"
    write_gallery(other, model, np.eye(8, 12, dtype=np.float32), [f"{row}.jpg" for row in range(8)], 4)
    whole = (other / "0001.features.npy").read_bytes()
    (other / "0001.features.npy").write_bytes(whole[:100])
    served = start(ruiji)
    health = served.get("/healthz").json()
    assert (health["status"], [one["name"] for one in health["galleries"]]) == ("degraded", ["tiny"])
    assert "0001.features.npy" in health["refused"]["other"]
    assert served.log.read_text().count("warning: gallery other: ") == 1
    assert served.get("/objects").status == 200
    refused = served.get("/objects?gallery=other")
    assert (refused.status, "cannot be opened" in refused.error) == (404, True)
    # Its run is told all the same.
    told = served.get("/runs?gallery=other").json()["status"]
    assert [shard["done"] for shard in told["shards"]] == [4, 4]
    (other / "0001.features.npy").write_bytes(whole)
    wait_until(lambda: served.get("/objects?gallery=other").status == 200, what="the mended gallery")
    assert served.get("/healthz").json()["status"] == "ok"
    served.process.terminate()

    # Meant, it is refused at once.
    (other / "gallery.json").write_text("{")
    ruiji.model = ruiji.model.with_name("other.onnx")
    assert re.search(r"^error: .*gallery.json is damaged", ruiji("serve", code=4).stderr, re.MULTILINE)


def test_what_is_counted_is_what_was_asked(serve: Callable[..., Served]) -> None:
    served = serve()
    for path in ("/objects", "/objects", "/objects/nobody", "/nowhere", "/similar/nobody?k=0"):
        served.get(path)
    told = samples(served)

    def requests(route: str, status: int) -> float:
        return told["ruiji_requests_total", (("route", route), ("status", str(status)))]

    assert requests("/objects", 200) == 2
    assert requests("/objects/{object_id:path}", 404) == 1
    assert requests("/similar/{object_id:path}", 422) == 1
    # What strangers make up is no label.
    assert requests("none", 404) == 1
    assert told["ruiji_request_seconds_count", (("route", "/objects"),)] == 2
    assert told["ruiji_gallery_objects", (("gallery", "tiny"),)] == COUNT
    assert told["ruiji_waiting", (("kind", "searches"),)] == told["ruiji_waiting", (("kind", "pictures"),)] == 0


def test_listeners_are_bounded_and_leave_no_trace(serve: Callable[..., Served]) -> None:
    served = serve()
    open_ones = []
    for _ in range(64):
        connection = served.raw()
        connection.sendall(b"GET /runs/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        open_ones.append(connection)
    answer = served.get("/runs/events")
    assert (answer.status, "ask /runs" in answer.error) == (429, True)
    for connection in open_ones:
        connection.close()

    def free() -> bool:
        with served.raw() as connection:
            connection.sendall(b"GET /runs/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return connection.recv(100).startswith(b"HTTP/1.1 200")

    wait_until(free, what="a free place")
