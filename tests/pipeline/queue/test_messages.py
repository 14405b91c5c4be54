"""Whatever lies in a queue: a worker drops what ruiji did not send, with one short line, and goes on."""

import base64
import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest

from pipeline.plans.files import open_plan
from pipeline.queue.connection import connect
from pipeline.queue.keys import compare_queue, embed_queue, gallery_of, reduce_queue, task_of, unacked_keys
from pipeline.queue.messages import envelope_fault, opened, task_fault, task_in, written
from tests.factories import Ruiji, pictures, wait_until

#: What is put in the place of any part of a message.
HOSTILE: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, "", "x", "a b\n", "é\x1b[31m", "\ud800", [], {}, ["x"], [None], {"x": 1}, [[]],
    {"__type__": "datetime", "__value__": "x"}, {"__type__": [], "__value__": 1}, "../" * 200, "9" * 100_000,
]  # fmt: skip
NAMES = ["compression", "chord", "errbacks", "callbacks", "eta", "expires", "timelimit", "stamps", "shadow", "args"]
NAMES += ["called_directly", "delivery_info", "task", "id", "headers", "redelivered", "group", "reply_to"]
GARBAGE = [
    "",
    "{",
    "null",
    "[]",
    "7",
    '"x"',
    "[" * 100_000,
    "\0",
    '{"delivery_tag": "a"}',
    '"delivery_tag": ""',
    "x" * 10**6,
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) of nested JSON."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutated(message: dict[str, Any], random_: random.Random) -> str:
    """A message with something wrong with its envelope, its headers or its body; or, now and then, nothing."""
    message = deepcopy(message)
    message["properties"]["delivery_tag"] = random_.randbytes(8).hex()
    body = json.loads(base64.b64decode(message["body"]))
    for _ in range(random_.choice([1, 1, 2, 5])):
        container, key = random_.choice(list(places(random_.choice([message, message["headers"], body])) or [({}, 0)]))
        what = random_.random()
        if what < 0.6:
            container[key] = deepcopy(random_.choice(HOSTILE))
        elif what < 0.8 and isinstance(container, dict):
            del container[key]
        elif isinstance(container, dict):
            container[random_.choice(NAMES)] = deepcopy(random_.choice(HOSTILE))
        if not all(isinstance(message.get(part), dict) and message[part] for part in ("headers", "properties")):
            break
    if random_.random() < 0.7:
        message["body"] = base64.b64encode(json.dumps(body).encode()).decode()
    return json.dumps(message)


@pytest.mark.parametrize("transport", ["fast", pytest.param("stock", marks=pytest.mark.slow)])
def test_hundreds_of_damaged_messages_in_both_queues_end_nothing(
    ruiji: Ruiji, redis_url: str, capfd: pytest.CaptureFixture[str], transport: str
) -> None:
    pictures(ruiji.media, 30)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "10", "RUIJI_STALL_TIMEOUT_S": "3"}
    ruiji.environment["RUIJI_TRANSPORT"] = transport
    ruiji("enqueue")
    plan = open_plan(ruiji.gallery)
    assert plan is not None
    client, random_ = connect(redis_url), random.Random(transport)
    embed, reduce = embed_queue(plan.gallery_id), reduce_queue(plan.gallery_id)
    real = json.loads(client.lrange(embed, 0, 0)[0])
    body = json.loads(base64.b64decode(real["body"]))
    follower = deepcopy(real)
    follower["headers"] |= {"task": "ruiji.reduce", "group": None, "group_index": None, "stamps": {}, "eta": None}
    follower["properties"]["delivery_info"]["routing_key"] = reduce
    empty = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    follower["body"] = base64.b64encode(json.dumps([body[0][:2], {}, empty]).encode()).decode()
    huge = deepcopy(real)
    huge["properties"]["delivery_tag"] = "huge"
    huge["body"] = base64.b64encode(json.dumps([[plan.plan_id, 0, "x" * 10_000_000], {}, empty]).encode()).decode()
    huge["headers"] |= {"group": None, "group_index": None}
    for queue, message in ((embed, real), (reduce, follower)):
        for garbage in [*GARBAGE, json.dumps(message)[:-20], json.dumps(huge), json.dumps(message)]:
            client.lpush(queue, garbage)
            client.rpush(queue, garbage)
        for _ in range(400):
            (client.lpush if random_.random() < 0.5 else client.rpush)(queue, mutated(message, random_))
    worker = ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait")
    held = unacked_keys(plan.gallery_id)
    wait_until(
        lambda: not client.exists(embed, reduce, held["unacked_key"], held["unacked_index_key"]), 30, "the queues"
    )
    assert worker.poll() is None
    ruiji.stop_all()
    assert json.loads(ruiji("status", "--json").stdout)["done"] == 30
    assert ruiji("verify").stdout == ""
    output = capfd.readouterr().err
    assert output.count("message_dropped") > 100 and "process_died" not in output
    assert "Traceback" not in output and "batch_failed" not in output
    assert max(map(len, output.splitlines())) < 3000


def real_message(queue: str) -> dict[str, Any]:
    task = task_of(queue)
    return {
        "body": base64.b64encode(b"[]").decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": "0123456789abcdef.0.x.1", "retries": 0, "ignore_result": True},
        "properties": {"delivery_info": {"exchange": "", "routing_key": queue}, "delivery_tag": "t", "priority": 0}
        | {"body_encoding": "base64"},
    }


ARGUMENTS: dict[str, list[Any]] = {
    embed_queue("g"): ["0123456789abcdef", 0, "a.png"],
    reduce_queue("g"): ["0123456789abcdef", 0],
    compare_queue("g"): [8192, 0, 9000, "0123456789abcdef", 0.95],
}


@pytest.mark.parametrize("queue", list(ARGUMENTS))
def test_what_is_wrong_is_found_before_kombu_and_celery_see_it(queue: str) -> None:
    good, args = real_message(queue), ARGUMENTS[queue]
    task, payload = task_of(queue), [args, {}, {}]

    def both(change: Callable[[dict[str, Any], list[Any]], Any]) -> str | None:
        message, body = deepcopy(good), deepcopy(payload)
        change(message, body)
        return envelope_fault(message, queue, "t") or task_fault(message["headers"], body, task, gallery_of(queue))

    assert both(lambda message, body: None) is None
    for name in ("task", "id"):
        for value in ([], ["x"], 7, None, {}, "", "x\n", "y" * 300):
            assert both(lambda message, body, n=name, v=value: message["headers"].update({n: v})), (name, value)  # type: ignore[misc]
    for part in (None, 7, [], "x", {"chord": {"task": "os.system"}}, {"errbacks": [1]}, {"id": "other"}):
        assert both(lambda message, body, p=part: body.__setitem__(2, p)), part  # type: ignore[misc]
    for header in ("compression", "chord", "errbacks", "eta", "timelimit"):
        assert both(lambda message, body, h=header: message["headers"].update({h: "zlib"})), header  # type: ignore[misc]
    assert both(lambda message, body: message["headers"].update({"of_a_later_celery": "x"})) is None
    assert envelope_fault(good, queue, "other")
    assert envelope_fault(good, "another", "t")


PLAN, GALLERY = "0123456789abcdef", "fedcba9876543210"
GROUP, QUEUE = f"{PLAN}.3.01234567", embed_queue(GALLERY)


def both_ways(raw: str, queue: str) -> tuple[Any, Any]:
    """What the strict reading takes of a message, and what the checks leave of it."""
    try:
        message = json.loads(raw)
        tag = str(message["properties"]["delivery_tag"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return opened(raw.encode(errors="replace"), b"t", queue), None
    read = opened(raw.encode(errors="replace"), tag.encode(errors="replace"), queue)
    if envelope_fault(message, queue, tag) is not None:
        return read, None
    try:
        body = json.loads(base64.b64decode(message["body"]))
    except ValueError:
        return read, None
    fault = task_fault(message["headers"], body, task_of(queue), gallery_of(queue))
    return read, task_in(message["headers"], body) if fault is None and len(body[0]) == 3 else None


@pytest.mark.parametrize("path", ["a.png", 'é/"\\\U0001f426 \x7f.png', "x" * 4000])
def test_what_is_written_is_what_is_read(path: str) -> None:
    (raw,) = written([(2, 5, path)], PLAN, 3, GROUP, GALLERY)
    read, left = both_ways(raw.decode(), QUEUE)
    assert read == left
    assert read.args == (PLAN, 3, path) and (read.id, read.group, read.group_index) == (f"{GROUP}.5", GROUP, 2)
    assert opened(raw, b"another", QUEUE) is None
    for queue in (reduce_queue(GALLERY), embed_queue("another")):
        assert opened(raw.replace(QUEUE.encode(), queue.encode()), read.id.encode(), queue) is None


def test_the_strict_reading_takes_nothing_that_the_checks_refuse() -> None:
    (raw,) = written([(2, 5, "a.png")], PLAN, 3, GROUP, GALLERY)
    random_, taken = random.Random(0), 0
    for _ in range(5000):
        text = mutated(json.loads(raw), random_)
        read, left = both_ways(text, QUEUE)
        taken += read is not None
        assert read is None or read == left, text
    assert taken > 50, "now and then nothing is wrong"
    for garbage in GARBAGE:
        assert opened(garbage.encode(), b"a", QUEUE) is None
