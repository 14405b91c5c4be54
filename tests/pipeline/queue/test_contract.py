"""Every internal of Celery and kombu that the queue leans on, by name, against the installed release.

A failure begins with the name of the internal that is not what `pipeline/queue` takes it for. `make contract` runs this
file with other releases than the pinned ones.
"""

import base64
import importlib
import inspect
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery import Celery
from celery.app.task import Context

from pipeline.queue.app import make_app
from pipeline.queue.chords import Chords
from pipeline.queue.keys import EMBED_TASK, chord_keys, embed_queue, group_id, reduce_queue, unacked_keys
from pipeline.queue.messages import Task, chord_body, envelope_fault, task_fault
from pipeline.queue.publish import Publisher
from tests.conftest import ROOT
from tests.pipeline.queue.one_worker import DONE

GALLERY, PLAN, SEGMENT = "fedcba9876543210", "0123456789abcdef", 3
GROUP = group_id(PLAN, SEGMENT, "01234567")
QUEUE = embed_queue(GALLERY)
UNACKED, INDEX = unacked_keys(GALLERY)["unacked_key"], unacked_keys(GALLERY)["unacked_index_key"]


@contextmanager
def leaning_on(name: str) -> Iterator[None]:
    """Name the internal that whatever fails in the block is about."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise AssertionError(f"{name} is not what pipeline/queue takes it for: {reason}") from error


# What has to be there, and how it is called or overridden.

#: By full name: the parameters that are passed or overridden, in order if by position; None: it only has to be there.
CALLED: dict[str, tuple[str, ...] | None] = {
    "celery.backends.redis:RedisBackend.on_chord_part_return": ("self", "request", "state", "result", "propagate"),
    "celery.backends.redis:RedisBackend._unpack_chord_result": ("self", "tup", "decode"),
    "celery.backends.redis:RedisBackend.get_key_for_group": ("self", "group_id", "key"),
    "celery.worker.consumer:Consumer.Blueprint.start": ("self", "parent"),
    "celery.worker.consumer:Consumer.call_soon": ("self", "p"),
    "celery.worker.consumer:Consumer.call_soon_ack": ("self", "p"),
    "celery.worker.consumer:Consumer.create_task_handler": ("self",),
    "celery.worker.consumer:Consumer.on_connection_error_after_connected": ("self", "exc"),
    "celery.worker.consumer:Consumer.on_connection_error_before_connected": ("self", "exc"),
    "celery.worker.state:reserved_requests": None,
    "celery.worker.state:should_stop": None,
    "kombu.exceptions:BatchPublishError": None,
    "kombu.message:Message.ack_log_error": ("self", "logger", "errors"),
    "kombu.message:Message.reject": ("self", "requeue"),
    "kombu.transport.redis:Channel._brpop_read": ("self",),
    "kombu.transport.redis:Channel._brpop_start": ("self", "timeout"),
    "kombu.transport.redis:Channel._create_client": ("self",),
    "kombu.transport.redis:Channel._flush_brpop_reauth": ("self",),
    "kombu.transport.redis:Channel.conn_or_acquire": ("self", "client"),
    "kombu.transport.redis:Channel.health_check_interval": None,
    "kombu.transport.redis:MultiChannelPoller.maybe_check_brpop_health": ("self",),
    "kombu.transport.redis:QoS.append": ("self", "message", "delivery_tag"),
    "kombu.transport.redis:QoS.can_consume": ("self",),
    "kombu.transport.redis:QoS.can_consume_max_estimate": ("self",),
    "kombu.transport.redis:QoS.pipe_or_acquire": ("self", "pipe", "client"),
    "kombu.transport.redis:QoS.restore_by_tag": ("self", "tag", "client", "leftmost"),
    "kombu.transport.redis:QoS.restore_unacked_once": ("self", "stderr"),
    "kombu.transport.redis:Transport._deliver": ("self", "message", "queue"),
    "kombu.transport.redis:Transport.register_with_event_loop": ("self", "connection", "loop"),
    "kombu.transport.virtual:Message": ("payload", "channel"),
    "kombu.transport.virtual:QoS.__init__": ("self", "channel", "prefetch_count"),
    "kombu.transport.virtual:QoS.ack": ("self", "delivery_tag"),
    "kombu.transport.virtual:QoS.append": ("self", "message", "delivery_tag"),
}


@pytest.mark.parametrize("name", CALLED)
def test_it_is_there_and_takes_what_it_is_given(name: str) -> None:
    module, _, path = name.partition(":")
    with leaning_on(name):
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        expected = CALLED[name]
        if expected is None:
            return
        parameters = list(inspect.signature(found).parameters.values())
        taken = {parameter.name: parameter for parameter in parameters}
        for place, parameter in enumerate(expected):
            assert parameter in taken, f"it has no parameter {parameter!r}"
            if place < 3:
                assert parameters[place].name == parameter, f"its parameter {place} is {parameters[place].name!r}"
        needed = {
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        assert needed <= set(expected), f"it needs {sorted(needed - set(expected))}"


# What messages look like.


def app_for(redis_url: str, transport: str = "stock") -> Celery:
    return make_app(redis_url, GALLERY, visibility_timeout_s=60, transport=transport)


@pytest.fixture(autouse=True)
def channel(request: pytest.FixtureRequest) -> None:
    """Say first of all if kombu does not take the installed client at all."""
    if "redis_url" in request.fixturenames:
        with leaning_on("kombu.transport.redis:Channel: opens"):
            app_for(request.getfixturevalue("redis_url")).connection_for_read().channel()


def publish(app: Celery, client: redis.Redis, count: int) -> None:
    Chords(client, GALLERY, PLAN).begin_group(GROUP, count)
    rows = [(number, f"{number}.png") for number in range(count)]
    Publisher(app, GALLERY, PLAN).members(SEGMENT, GROUP, rows, lambda: None)


def test_layout_of_a_published_message(redis_url: str, client: redis.Redis) -> None:
    publish(app_for(redis_url), client, 3)
    with leaning_on("kombu.transport.redis: a queue is a list of its name, the next message last"):
        messages = [json.loads(raw) for raw in reversed(client.lrange(QUEUE, 0, -1))]
        assert [message["headers"]["id"] for message in messages] == [f"{GROUP}.{row}" for row in range(3)]
    first = messages[0]
    with leaning_on("kombu.transport.virtual: envelope of a message"):
        assert first.keys() == {"body", "content-encoding", "content-type", "headers", "properties"}
        assert (first["content-type"], first["content-encoding"]) == ("application/json", "utf-8")
        properties = first["properties"]
        assert properties["body_encoding"] == "base64"
        assert properties["delivery_info"] == {"exchange": "", "routing_key": QUEUE}
        assert isinstance(properties["delivery_tag"], str) and isinstance(properties["priority"], int)
        assert envelope_fault(first, QUEUE, properties["delivery_tag"]) is None
    with leaning_on('kombu.transport.redis: "delivery_tag": "…" in the text of a message, which a script reads'):
        assert f'"delivery_tag": "{properties["delivery_tag"]}"' in client.lrange(QUEUE, -1, -1)[0]
    with leaning_on("celery.app.amqp:AMQP.as_task_v2: headers of a task"):
        headers = first["headers"]
        expected = {"task": EMBED_TASK, "id": f"{GROUP}.0", "root_id": f"{GROUP}.0", "group": GROUP, "group_index": 0}
        expected |= {"lang": "py", "retries": 0, "ignore_result": True}
        assert headers == expected | {"origin": headers["origin"]}, "a new header: optional, or needed?"
    with leaning_on("celery.app.amqp:AMQP.as_task_v2: body of a task"):
        args, kwargs, embed = body = json.loads(base64.b64decode(first["body"]))
        assert (args, kwargs) == ([PLAN, SEGMENT, "0.png"], {})
        assert embed == {"callbacks": None, "errbacks": None, "chain": None} | {
            "chord": chord_body(GROUP, PLAN, SEGMENT, GALLERY)
        }
        assert task_fault(headers, body, EMBED_TASK, GALLERY) is None


def test_tasks_are_written_as_celery_and_kombu_write_them(redis_url: str, client: redis.Redis) -> None:
    app, path = app_for(redis_url), 'a "b"\\\x7f/é\U0001f426.png'
    Publisher(app, GALLERY, PLAN).members(SEGMENT, GROUP, [(7, path)], lambda: None)
    ours = json.loads(client.rpop(QUEUE) or "")
    with leaning_on("celery.app.amqp:AMQP.as_task_v2, send_task_message: a task"):
        message = app.amqp.as_task_v2(
            f"{GROUP}.7",
            EMBED_TASK,
            args=(PLAN, SEGMENT, path),
            group_id=GROUP,
            group_index=0,
            chord=chord_body(GROUP, PLAN, SEGMENT, GALLERY),
            ignore_result=True,
            argsrepr="",
            kwargsrepr="",
        )
        with app.producer_or_acquire() as producer:
            app.amqp.send_task_message(producer, EMBED_TASK, message, queue=QUEUE, declare=(), retry=False)
    theirs = json.loads(client.rpop(QUEUE) or "")
    for sent in (ours, theirs):
        sent["body"] = json.loads(base64.b64decode(sent["body"]))
        assert sent["properties"].pop("delivery_tag")
    with leaning_on("celery.app.amqp:AMQP.as_task_v2: headers that ruiji leaves out are empty"):
        left_out = {name: theirs["headers"].pop(name) for name in theirs["headers"].keys() - ours["headers"].keys()}
        assert all(value in (None, "", 0, [], {}, [None, None]) for value in left_out.values()), left_out
    assert ours == theirs


def test_layout_of_a_body_that_celery_sends(redis_url: str, client: redis.Redis) -> None:
    app = app_for(redis_url)
    Publisher(app, GALLERY, PLAN).body(SEGMENT, GROUP)
    with leaning_on("celery.canvas:Signature.apply_async: message of a reduce task"):
        (message,) = (json.loads(raw) for raw in client.lrange(reduce_queue(GALLERY), 0, -1))
        assert envelope_fault(message, reduce_queue(GALLERY)) is None
        body = json.loads(base64.b64decode(message["body"]))
        assert task_fault(message["headers"], body, "ruiji.reduce", GALLERY) is None
    with leaning_on("kombu: nothing is declared, so no _kombu.binding is left"):
        assert client.keys("_kombu*") == []


def test_headers_that_are_left_out_are_optional() -> None:
    with leaning_on("celery.app.task:Context: headers that a message may lack"):
        context = Context({"id": "x", "task": EMBED_TASK, "group": GROUP, "group_index": 0, "retries": 0})
        assert (context.eta, context.expires, context.shadow, context.parent_id) == (None, None, None, None)
        assert context.replaced_task_nesting == 0 and not context.stamps and not context.stamped_headers
        assert tuple(context.timelimit or (None, None)) == (None, None)


# How kombu keeps what a worker holds.


@contextmanager
def consuming(app: Celery, received: list[Any], prefetch: int = 8) -> Iterator[Any]:
    with app.connection_for_read() as connection:
        channel = connection.channel()
        channel.basic_qos(0, prefetch, False)
        consumer = app.amqp.TaskConsumer(channel, queues=[app.amqp.queues[QUEUE]], on_message=received.append)
        consumer.consume()
        yield connection


def drain(connection: Any, received: list[Any], count: int) -> None:
    deadline = time.monotonic() + 20
    while len(received) < count:
        assert time.monotonic() < deadline, f"{len(received)} of {count} messages came"
        connection.drain_events(timeout=5)


@pytest.mark.parametrize("transport", ["stock", "fast"])
def test_layout_of_messages_in_hand(redis_url: str, client: redis.Redis, transport: str) -> None:
    app = app_for(redis_url, transport)
    publish(app, client, 2)
    received: list[Any] = []
    with consuming(app, received) as connection:
        with leaning_on("kombu.transport.redis:Channel._brpop_read: delivers what was fetched"):
            drain(connection, received, 2)
        qos = received[0].channel.qos
        tag = received[0].delivery_tag
        with leaning_on("kombu.transport.redis:QoS.append: a hash of [message, exchange, routing key] by delivery tag"):
            message, exchange, key = json.loads(client.hget(UNACKED, tag) or "")
            assert (message["headers"]["id"], exchange, key) == (f"{GROUP}.0", "", QUEUE)
        with leaning_on("kombu.transport.redis:QoS.append: an index of delivery tags by the time of their fetch"):
            assert abs(float(client.zscore(INDEX, tag) or 0) - time.time()) < 30
        with leaning_on("kombu.transport.virtual:QoS._delivered: the messages that are held, by delivery tag"):
            assert list(qos._delivered) == [message.delivery_tag for message in received]
        with leaning_on("kombu.transport.virtual:QoS._dirty: tags that were acknowledged and are still counted"):
            received[0].ack()
            assert qos._dirty == {tag} or tag not in qos._delivered
        with leaning_on("kombu.transport.redis:QoS.restore_unacked_once: the end gives back what is held"):
            received.clear()
    with leaning_on("kombu.transport.redis:QoS.restore_unacked_once: the end gives back what is held"):
        assert client.llen(QUEUE) == 1 and not client.exists(UNACKED, INDEX)


@pytest.mark.parametrize("transport", ["stock", "fast"])
def test_what_a_dead_worker_held_comes_back(redis_url: str, client: redis.Redis, transport: str) -> None:
    app = app_for(redis_url, transport)
    publish(app, client, 1)
    (raw,) = client.lrange(QUEUE, 0, -1)
    client.delete(QUEUE)
    tag = json.loads(raw)["properties"]["delivery_tag"]
    client.hset(UNACKED, tag, json.dumps([json.loads(raw), "", QUEUE]))
    client.zadd(INDEX, {tag: time.time() - 61})
    received: list[Any] = []
    name = "kombu.transport.redis:MultiChannelPoller.maybe_restore_messages: gives back old messages"
    with consuming(app, received) as connection, leaning_on(name):
        connection.connection.cycle.maybe_restore_messages()
        drain(connection, received, 1)
        assert received[0].headers["id"] == f"{GROUP}.0"
        received[0].ack()


def test_options_of_the_transport(redis_url: str) -> None:
    with app_for(redis_url).connection_for_read() as connection:
        channel = connection.channel()
        with leaning_on("kombu.transport.redis:Channel.brpop_timeout: how long a pop waits, in s"):
            assert 0 < channel.brpop_timeout <= 10
        for name, value in {
            **unacked_keys(GALLERY),
            "unacked_mutex_expire": 10,
            "unacked_restore_throttle": 1,
            "unacked_restore_interval": 10,
            "visibility_timeout": 60,
            "socket_timeout": 10.0,
            "health_check_interval": 5,
        }.items():
            with leaning_on(f"kombu.transport.redis:Channel.{name}: an option of the transport"):
                options = {**connection.transport_options, **vars(type(channel)), **vars(channel)}
                assert getattr(channel, name, options.get(name)) == value


def test_what_is_logged_of_a_message_that_cannot_be_settled(caplog: pytest.LogCaptureFixture) -> None:
    from kombu import Message

    class Away:
        no_ack_consumers = None

        def basic_ack(self, *_: Any, **__: Any) -> None:
            raise redis.ConnectionError("away")

    with leaning_on('kombu.message:Message.ack_log_error: logs "Couldn\'t …", which pipeline.queue.worker leaves out'):
        message = Message(body="", channel=Away(), delivery_tag="t")
        message.ack_log_error(logging.getLogger("contract"), (redis.ConnectionError,))
        assert str(caplog.records[-1].msg).startswith("Couldn't ")
    with leaning_on("celery.worker.consumer: the logger whose lines pipeline.queue.worker leaves out"):
        consumer = importlib.import_module("celery.worker.consumer.consumer")
        assert consumer.logger.name.startswith("celery.worker.consumer")


# How Celery counts a chord.


def member(number: int) -> Task:
    chord = chord_body(GROUP, PLAN, SEGMENT, GALLERY)
    return Task(f"{GROUP}.{number}", (PLAN, SEGMENT, f"{number}.png"), GROUP, number, chord)


def keys_of(client: redis.Redis) -> dict[str, Any]:
    kinds: dict[str, Callable[[str], Any]] = {
        "string": client.get,
        "set": client.smembers,
        "list": lambda key: client.lrange(key, 0, -1),
    }
    return {ending: kinds[client.type(key)](key) for ending, key in chord_keys(GROUP).items() if client.exists(key)}


@pytest.mark.parametrize("transport", ["stock", "fast"])
def test_keys_of_a_chord(redis_url: str, client: redis.Redis, transport: str) -> None:
    backend = app_for(redis_url, transport).backend
    Chords(client, GALLERY, PLAN).begin_group(GROUP, 2)
    with leaning_on("celery.backends.base: celery-taskset-meta-<group>.<letter>"):
        assert [backend.get_key_for_group(GROUP, f".{e}") for e in "jdtsc"] == [
            key.encode() for key in chord_keys(GROUP).values()
        ]
    backend.on_chord_part_return(member(0), "SUCCESS", "done")
    with leaning_on("celery-taskset-meta-<group>.s: the size of the chord, set beforehand"):
        assert keys_of(client)["s"] == "2"
    with leaning_on("celery-taskset-meta-<group>.d: a set of `<task id>:<index>` of members that are through"):
        assert keys_of(client)["d"] == {f"{GROUP}.0:0"}
    with leaning_on("celery-taskset-meta-<group>.j: a list of [1, task id, state, result] of members"):
        (part,) = keys_of(client)["j"]
        assert part == backend.encode([1, f"{GROUP}.0", "SUCCESS", backend.encode_result("done", "SUCCESS")])
    with leaning_on("celery-taskset-meta-<group>.t: a correction of the size, not there unless Celery has one"):
        assert keys_of(client).keys() == {"s", "d", "j"}
    backend.on_chord_part_return(member(1), "SUCCESS", "done")
    with leaning_on("celery.backends.redis:RedisBackend.on_chord_part_return: sends the body after the last member"):
        (body,) = (json.loads(raw) for raw in client.lrange(reduce_queue(GALLERY), 0, -1))
        assert body["headers"]["id"] == f"{GROUP}.r"
        assert task_fault(body["headers"], json.loads(base64.b64decode(body["body"])), "ruiji.reduce", GALLERY) is None
    with leaning_on("celery-taskset-meta-<group>.c: `done` once the body was sent, the only key that is left"):
        assert keys_of(client) == {"c": "done"}
    backend.on_chord_part_return(member(1), "SUCCESS", "done")
    with leaning_on("celery-taskset-meta-<group>.c: `done` keeps late duplicates from beginning the count anew"):
        assert keys_of(client) == {"c": "done"} and client.llen(reduce_queue(GALLERY)) == 1


def test_parts_that_are_noted_by_script_count_for_celery(redis_url: str, client: redis.Redis) -> None:
    backend = app_for(redis_url, "fast").backend
    Chords(client, GALLERY, PLAN).begin_group(GROUP, 3)
    with leaning_on("celery.backends.redis:CHORD_PART_RETURN_LUA: counts members that another script noted"):
        backend.store_parts([(member(number), "done") for number in range(2)])
        (first, _) = client.lrange(chord_keys(GROUP)["j"], 0, -1)
        assert first == backend.encode([1, f"{GROUP}.0", "SUCCESS", backend.encode_result("done", "SUCCESS")])
        backend.store_parts([(member(2), "done")])
        assert client.llen(reduce_queue(GALLERY)) == 1


# How a worker works. It runs in a process of its own, since Celery's state is global.


def work(redis_url: str, queue: str, transport: str, faults: int = 0) -> dict[str, Any]:
    """Run a worker until it has done what is in the queue; returns what it saw."""
    command = [sys.executable, "-m", "tests.pipeline.queue.one_worker", redis_url, GALLERY, queue, transport]
    done = subprocess.run([*command, str(faults)], cwd=ROOT, capture_output=True, text=True, timeout=90)
    with leaning_on("celery.apps.worker:Worker: starts, works and ends"):
        assert done.returncode == 0, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


@pytest.mark.parametrize("transport", ["stock", "fast"])
def test_a_worker_computes_a_batch_and_its_chord_sends_the_body(
    redis_url: str, client: redis.Redis, transport: str
) -> None:
    publish(app_for(redis_url), client, 4)
    told = work(redis_url, QUEUE, transport)
    calls = [call for batch in told["batches"] for call in batch]
    with leaning_on("celery.app.task:Task.Strategy: handles each message"):
        assert sorted(calls) == [[PLAN, SEGMENT, f"{number}.png"] for number in range(4)]
    with leaning_on("celery.worker.consumer:Consumer.create_task_handler: makes what takes each message"):
        assert told["handled"] >= 4
    with leaning_on("celery.worker.consumer:Consumer.Blueprint.start: called for each connection"):
        assert told["connections"] >= 1
    assert told["working"]
    with leaning_on("celery.worker.consumer:Consumer.task_consumer.channel.qos._delivered: tags of what is held"):
        assert told["in_hand"]
    with leaning_on("celery.worker.consumer:Consumer.call_soon: runs in the loop"):
        assert told["turned"]
    with leaning_on("kombu.transport.redis: the stamps of messages in hand, which are renewed"):
        assert told["renewed"]
    with leaning_on("celery.backends.redis:RedisBackend.on_chord_part_return: stores each member's part in its chord"):
        assert client.get(chord_keys(GROUP)["c"]) == "done"
        assert client.llen(reduce_queue(GALLERY)) == 1
    with leaning_on("celery.worker.consumer:Consumer.call_soon_ack: acknowledges late, in the loop"):
        assert not client.exists(UNACKED, INDEX, QUEUE)
    with leaning_on("celery.worker.state:should_stop: ends the worker with this exit status"):
        assert told["status"] == DONE


@pytest.mark.parametrize("transport", ["stock", "fast"])
def test_a_worker_gives_a_batch_back_and_takes_it_again(redis_url: str, client: redis.Redis, transport: str) -> None:
    publish(app_for(redis_url), client, 1)
    told = work(redis_url, QUEUE, transport, faults=1)
    with leaning_on("kombu.message:Message.reject(requeue=True): gives the message back"):
        assert told["batches"] == [[[PLAN, SEGMENT, "0.png"]]] * 2
        assert told["status"] == DONE


def test_a_worker_runs_a_task_alone(redis_url: str) -> None:
    Publisher(app_for(redis_url), GALLERY, PLAN).body(SEGMENT, GROUP)
    told = work(redis_url, reduce_queue(GALLERY), "fast")
    with leaning_on("celery.app.base:Celery.task: a plain function as a task"):
        assert told["reduced"] == [PLAN, SEGMENT] and told["status"] == DONE
    with leaning_on("celery.worker.state:reserved_requests: what is worked on"):
        assert told["working"]
