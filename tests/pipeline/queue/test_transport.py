"""The workers' own transport, against a real Redis and beside the stock one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery

from pipeline.queue.app import make_app
from pipeline.queue.connection import connect
from pipeline.queue.keys import EMBED_TASK, embed_queue, unacked_keys
from tests.conftest import ROOT

GALLERY = "g"
QUEUE = embed_queue(GALLERY)
UNACKED, INDEX = unacked_keys(GALLERY)["unacked_key"], unacked_keys(GALLERY)["unacked_index_key"]


def app_for(redis_url: str, transport: str, visibility_timeout_s: int = 60) -> Celery:
    return make_app(redis_url, GALLERY, visibility_timeout_s=visibility_timeout_s, transport=transport)


def publish(redis_url: str, count: int, transport: str = "stock") -> None:
    app = app_for(redis_url, transport)
    for number in range(count):
        app.send_task(EMBED_TASK, args=(number,), task_id=f"t{number}", queue=QUEUE)


@contextmanager
def consumer(app: Celery, prefetch: int, received: list[Any]) -> Iterator[Any]:
    """A consumer that acknowledges nothing by itself; yields its connection."""
    with app.connection_for_read() as connection:
        channel = connection.channel()
        channel.basic_qos(0, prefetch, False)
        taken = app.amqp.TaskConsumer(channel, queues=[app.amqp.queues[QUEUE]], on_message=received.append)
        taken.consume()
        yield connection


def drain(connection: Any, received: list[Any], count: int) -> None:
    while len(received) < count:
        connection.drain_events(timeout=5)


def test_many_messages_are_taken_at_once_and_booked_as_the_stock_transport_books_them(redis_url: str) -> None:
    publish(redis_url, 40)
    client = connect(redis_url)
    received: list[Any] = []
    with consumer(app_for(redis_url, "fast"), 6, received) as connection:
        connection.drain_events(timeout=5)
        assert [message.payload[0][0] for message in received] == [0, 1, 2, 3, 4, 5], "no more than the window holds"
        assert client.llen(QUEUE) == 34
        assert client.hlen(UNACKED) == client.zcard(INDEX) == 6
        message, exchange, key = json.loads(client.hget(UNACKED, received[0].delivery_tag) or "")
        assert (exchange, key, message["headers"]["id"]) == ("", QUEUE, "t0")


def test_a_tag_that_is_taken_is_not_booked_again(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    publish(redis_url, 1)
    client = connect(redis_url)
    (message,) = client.lrange(QUEUE, 0, -1)
    client.rpush(QUEUE, *[message] * 7)
    received: list[Any] = []
    with consumer(app_for(redis_url, "fast"), 100, received) as connection:
        # Two of them come in one fetch, the others once the first is booked.
        while client.exists(QUEUE):
            connection.drain_events(timeout=5)
        assert [message.payload[0][0] for message in received] == [0]
        assert client.hlen(UNACKED) == client.zcard(INDEX) == 1
    assert caplog.text.count("a message that ruiji did not send is dropped") == 7


def test_more_is_fetched_once_a_quarter_of_the_window_is_empty(redis_url: str) -> None:
    publish(redis_url, 40)
    received: list[Any] = []
    with consumer(app_for(redis_url, "fast"), 8, received) as connection:
        drain(connection, received, 8)
        received[0].ack()
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.5)
        received[1].ack()
        connection.drain_events(timeout=5)
        assert len(received) == 10


@pytest.mark.parametrize("window", [1, 3])
def test_a_small_window_is_filled_one_by_one(redis_url: str, window: int) -> None:
    publish(redis_url, 40)
    received: list[Any] = []
    with consumer(app_for(redis_url, "fast"), window, received) as connection:
        for number in range(5):
            drain(connection, received, window + number)
            received[number].ack()


def test_the_last_messages_are_left_to_be_shared(redis_url: str) -> None:
    publish(redis_url, 10)
    received: list[Any] = []
    with consumer(app_for(redis_url, "fast"), 100, received) as connection:
        taken = []
        while len(received) < 10:
            connection.drain_events(timeout=5)
            taken.append(len(received) - sum(taken))
    assert taken == [3, 2, 2, 1, 1, 1]


def test_acknowledgements_go_together_and_the_rest_goes_back_in_order(redis_url: str) -> None:
    publish(redis_url, 5)
    client = connect(redis_url)
    received: list[Any] = []
    with consumer(app_for(redis_url, "fast"), 4, received) as connection:
        drain(connection, received, 4)
        received[1].ack()
        received[0].ack()
        assert client.hlen(UNACKED) == 4, "not sent yet"
        received[0].channel.qos.flush_acks()
        assert client.hlen(UNACKED) == client.zcard(INDEX) == 2
        received[2].ack()
    assert client.hlen(UNACKED) == client.zcard(INDEX) == 0, "the end sends what was acknowledged, gives back the rest"
    assert [json.loads(raw)["headers"]["id"] for raw in reversed(client.lrange(QUEUE, 0, -1))] == ["t3", "t4"]


def test_a_message_acknowledged_after_its_connection_was_lost_does_not_come_back(redis_url: str) -> None:
    publish(redis_url, 1)
    client = connect(redis_url)
    received: list[Any] = []
    with consumer(app_for(redis_url, "fast"), 4, received) as connection:
        drain(connection, received, 1)
        qos = received[0].channel.qos
        qos._delivered.clear()  # What a lost connection leaves: a closed channel, and the message in Redis.
    assert client.hlen(UNACKED) == 1
    received[0].ack()
    assert client.hlen(UNACKED) == client.zcard(INDEX) == 0


@pytest.mark.parametrize(("dead", "heir"), [("fast", "stock"), ("stock", "fast"), ("fast", "fast")])
def test_what_a_dead_worker_held_goes_to_a_worker_with_either_transport(redis_url: str, dead: str, heir: str) -> None:
    publish(redis_url, 3)
    take_and_die = (
        "import os, sys; from tests.pipeline.queue.test_transport import *\n"
        "received = []\n"
        "with consumer(app_for(sys.argv[1], sys.argv[2]), 3, received) as connection:\n"
        "    drain(connection, received, 3)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", take_and_die, redis_url, dead], cwd=ROOT, env={**os.environ})
    client = connect(redis_url)
    assert (client.llen(QUEUE), client.hlen(UNACKED)) == (0, 3)
    # As if a minute had passed.
    client.zadd(INDEX, {tag: time.time() - 61 for tag in client.hkeys(UNACKED)})
    received: list[Any] = []
    with consumer(app_for(redis_url, heir), 3, received) as connection:
        connection.connection.cycle.maybe_restore_messages()
        drain(connection, received, 3)
        for message in received:
            message.ack()
    assert sorted(message.headers["id"] for message in received) == ["t0", "t1", "t2"]
    assert client.hlen(UNACKED) == client.zcard(INDEX) == client.llen(QUEUE) == 0


@pytest.mark.parametrize("transport", ["fast", "stock"])
def test_a_process_killed_while_it_sweeps_holds_up_the_others_for_seconds(redis_url: str, transport: str) -> None:
    held = (
        "import os, sys\nfrom kombu.transport.redis import Mutex\n"
        "from tests.pipeline.queue.test_transport import app_for\n"
        "qos = app_for(sys.argv[1], sys.argv[2]).connection_for_read().channel().qos\n"
        "with qos.channel.conn_or_acquire() as client:\n"
        "    with Mutex(client, qos.unacked_mutex_key, qos.unacked_mutex_expire): os._exit(9)\n"
    )
    died = subprocess.run([sys.executable, "-c", held, redis_url, transport], cwd=ROOT)
    assert died.returncode == 9
    assert 0 < connect(redis_url).pttl(unacked_keys(GALLERY)["unacked_mutex_key"]) <= 10_000
