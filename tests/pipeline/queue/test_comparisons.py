"""What Redis knows of panels: who waits, who is at it, what was tried in vain; against a real Redis."""

import json
from dataclasses import replace

import pytest
import redis

from pipeline.queue.app import make_app
from pipeline.queue.comparisons import MOST_BEGUN, Comparisons, PanelTask
from pipeline.queue.connection import connect
from pipeline.queue.keys import compare_key, compare_queue, comparing_key, unacked_keys
from pipeline.queue.messages import envelope_fault, task_fault

GALLERY = "0123456789abcdef"
TASKS = [PanelTask(8192, number, 9000 * (number + 1), f"{number:016x}", 0.95) for number in range(3)]


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return connect(redis_url)


def queued(client: redis.Redis) -> list[str]:
    """Ids of what is queued, the next one first."""
    return [json.loads(message)["headers"]["id"] for message in client.lrange(compare_queue(GALLERY), 0, -1)][::-1]


def test_a_panel_is_published_once_however_many_ask(client: redis.Redis, redis_url: str) -> None:
    app = make_app(redis_url, GALLERY, visibility_timeout_s=60)
    for _ in range(2):
        Comparisons(client, GALLERY).publish(app, TASKS)
    assert queued(client) == [task.name for task in TASKS]
    message = json.loads(client.lindex(compare_queue(GALLERY), -1) or "")
    assert envelope_fault(message, compare_queue(GALLERY)) is None
    assert task_fault(message["headers"], [list(vars(TASKS[0]).values()), {}, {}], "ruiji.compare", GALLERY) is None
    # In a worker's hands, as kombu books it.
    raw = client.rpop(compare_queue(GALLERY))
    client.hset(unacked_keys(GALLERY)["unacked_key"], "tag", f'[{raw}, "", "x"]')
    Comparisons(client, GALLERY).publish(app, TASKS)
    assert queued(client) == [task.name for task in TASKS[1:]]
    # Its worker says how far it is, although Redis has forgotten everything else.
    client.flushall()
    panels = Comparisons(client, GALLERY)
    panels.note(TASKS[2], 7)
    panels.publish(app, TASKS)
    assert queued(client) == [task.name for task in TASKS[:2]]


def test_what_is_not_asked_for_again_is_not_waited_for(client: redis.Redis) -> None:
    panels = Comparisons(client, GALLERY)
    assert not panels.is_asked(TASKS[0])
    panels.ask([task.name for task in TASKS])
    assert panels.asked_for() == 3 and panels.is_asked(TASKS[0])
    assert not panels.is_asked(replace(TASKS[0], threshold=0.9))
    seconds, _ = client.time()
    client.zadd(compare_key(GALLERY, "asked"), {TASKS[0].name: seconds - 1})
    assert panels.asked_for() == 2 and not panels.is_asked(TASKS[0])
    assert client.ttl(compare_key(GALLERY, "asked")) > 0
    panels.done(TASKS[1])
    assert panels.asked_for() == 1
    # Somebody asked once more before the file was seen.
    panels.ask([task.name for task in TASKS[1:]])
    panels.answered([task.name for task in TASKS[1:]])
    assert panels.asked_for() == 0


def test_one_worker_is_at_a_panel_and_its_death_counts(client: redis.Redis, redis_url: str) -> None:
    panels, task = Comparisons(client, GALLERY, note_s=1), TASKS[0]
    note = comparing_key(GALLERY, task.name)
    for begun in range(1, MOST_BEGUN + 1):
        assert panels.begin(task) and not panels.begin(task)
        assert panels.seen([task])[task].begun == begun
        assert client.ttl(note) == 1
        client.delete(note)
    # It may still be in the hands of a worker that is slow to say so.
    client.hset(unacked_keys(GALLERY)["unacked_key"], "tag", json.dumps([{"headers": {"id": task.name}}, "", "x"]))
    assert not panels.seen([task])[task].given_up
    client.delete(unacked_keys(GALLERY)["unacked_key"])
    seen = panels.seen([task])[task]
    assert seen.given_up and seen.fault is None and seen.compared is None
    assert not panels.begin(task) and panels.seen([task])[task].begun == MOST_BEGUN
    panels.publish(make_app(redis_url, GALLERY, visibility_timeout_s=60), [task])
    assert queued(client) == []
    panels.forget([task.name])
    assert panels.begin(task)


def test_only_a_fault_of_its_own_counts_against_a_panel(client: redis.Redis) -> None:
    panels, task = Comparisons(client, GALLERY), TASKS[0]
    for _ in range(2 * MOST_BEGUN):
        assert panels.begin(task)
        panels.excuse(task)
    assert panels.seen([task])[task].begun == 0
    assert panels.begin(task)
    panels.note(task, 12)
    assert panels.seen([task])[task].compared == 12
    panels.fail(task, "x" * 5000)
    seen = panels.seen([task])[task]
    assert (seen.begun, seen.compared, len(seen.fault or "")) == (1, None, 1000)
    assert panels.begin(task)
    panels.done(task)
    assert panels.seen([task])[task].begun == 0 and panels.seen([task])[task].fault is None


@pytest.mark.parametrize("garbage", ["", "x", "-3", "1e9", "\x00"])
def test_what_somebody_made_up_ends_nothing(client: redis.Redis, garbage: str) -> None:
    panels, task = Comparisons(client, GALLERY), TASKS[0]
    client.hset(compare_key(GALLERY, "begun"), task.name, garbage)
    client.set(comparing_key(GALLERY, task.name), garbage)
    client.rpush(compare_queue(GALLERY), garbage)
    assert panels.seen(TASKS)[task].compared == 0
    assert not panels.seen([])
