"""The workers' own chord backend, against a real Redis and beside the stock one."""

from random import Random

import pytest
from celery import Celery

from pipeline.queue.connection import connect
from pipeline.queue.keys import reduce_queue
from pipeline.queue.messages import Task
from tests.pipeline.queue.test_transport import GALLERY, app_for


def member(number: int, app: Celery) -> Task:
    body = app.signature("ruiji.reduce", args=("plan", 0), immutable=True, task_id="body", queue=reduce_queue(GALLERY))
    return Task(f"m{number}", ("plan", 0, "a.png"), "group", number, dict(body))


def store(app: Celery, numbers: list[int]) -> None:
    app.backend.store_parts([(member(number, app), "done") for number in numbers])


def test_a_batch_of_chord_parts_counts_each_member_once_and_sends_the_body_once(redis_url: str) -> None:
    app, client = app_for(redis_url, "fast"), connect(redis_url)
    app.backend.set_chord_size("group", 6)
    store(app, [0, 1, 2])
    store(app, [2, 1, 3, 3, 1])
    assert client.llen("celery-taskset-meta-group.j") == 4, "a member that comes twice in a batch counts once too"
    assert client.scard("celery-taskset-meta-group.d") == 4
    assert client.llen(reduce_queue(GALLERY)) == 0
    # The last part of this batch was counted before: the body goes all the same.
    store(app, [4, 5, 3])
    assert client.llen(reduce_queue(GALLERY)) == 1
    store(app, [0, 1])
    assert client.llen(reduce_queue(GALLERY)) == 1
    assert not client.exists("celery-taskset-meta-group.d"), "a late duplicate does not begin the count anew"


@pytest.mark.parametrize("numbers", [[0], [0, 1, 2]])
def test_parts_of_a_chord_that_there_is_not_leave_nothing_in_redis(redis_url: str, numbers: list[int]) -> None:
    store(app_for(redis_url, "fast"), numbers)
    assert connect(redis_url).dbsize() == 0


def test_batched_and_stock_members_of_one_chord_add_up(redis_url: str) -> None:
    fast, stock, client = app_for(redis_url, "fast"), app_for(redis_url, "stock"), connect(redis_url)
    fast.backend.set_chord_size("group", 4)
    store(fast, [0, 1])
    stock.backend.on_chord_part_return(member(2, stock), "SUCCESS", "done")
    stock.backend.on_chord_part_return(member(1, stock), "SUCCESS", "done")
    assert client.llen(reduce_queue(GALLERY)) == 0
    store(fast, [3])
    assert client.llen(reduce_queue(GALLERY)) == 1


@pytest.mark.parametrize("seed", range(10))
def test_the_body_goes_with_the_last_member_however_they_come(redis_url: str, seed: int) -> None:
    apps, client, chance = [app_for(redis_url, "fast"), app_for(redis_url, "fast")], connect(redis_url), Random(seed)
    apps[0].backend.set_chord_size("group", 40)
    missing = set(range(40))
    while missing:
        assert client.llen(reduce_queue(GALLERY)) == 0
        numbers = chance.choices(range(40), k=chance.choice((1, 3, 16)))
        store(chance.choice(apps), numbers)
        missing -= set(numbers)
    assert client.llen(reduce_queue(GALLERY)) == 1


def test_a_worker_that_dies_before_it_sends_the_body_leaves_that_to_whoever_has_the_message_then(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying, other, client = app_for(redis_url, "fast"), app_for(redis_url, "fast"), connect(redis_url)
    dying.backend.set_chord_size("group", 3)
    monkeypatch.setattr(dying.backend, "on_chord_part_return", lambda *_: None)
    store(dying, [0, 1, 2])
    assert client.scard("celery-taskset-meta-group.d") == 2
    # Its messages come again, to one worker or several.
    store(other, [0, 1])
    assert client.llen(reduce_queue(GALLERY)) == 0
    store(other, [2])
    assert client.llen(reduce_queue(GALLERY)) == 1


def test_the_keys_of_a_chord_expire_if_nobody_ends_it(redis_url: str) -> None:
    app, client = app_for(redis_url, "fast"), connect(redis_url)
    app.backend.set_chord_size("group", 3)
    store(app, [0, 1])
    for ending in ("j", "d", "s"):
        assert 0 < client.ttl(f"celery-taskset-meta-group.{ending}") <= app.backend.chord_expires
