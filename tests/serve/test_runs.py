"""A run seen from its page: from the disk alone, live from the Redis of `ruiji run`, and for Prometheus."""

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.factories import Ruiji, pictures, wait_until
from tests.serve.conftest import COUNT, Served, start


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
