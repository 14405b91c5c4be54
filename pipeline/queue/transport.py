"""kombu's Redis transport with a cheaper and safer consuming side, for workers.

Five changes; the messages, the keys and the visibility timeout stay kombu's, so that workers with and without
it mix freely:

* messages move from the queue to the unacknowledged ones in one script, many at a time. Stock kombu pops a message and
  books it afterwards: a worker that is killed in between loses it for ever;
* acknowledgements are sent together, once a turn of the event loop;
* one client is kept, where kombu makes a new one for each call;
* an embed task of ruiji's producers is read and checked in one go (`messages.opened`), and kombu decodes nothing;
* what is no message is dropped before kombu sees it: one that it cannot read ends the process, again and again.

Leans on internals of kombu 5.7. It expects queues as `pipeline.queue.app` declares them: one a worker, without
priorities.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import Any, NamedTuple

import redis
from kombu.transport import redis as stock
from kombu.transport import virtual

from pipeline.queue.connection import AFTER_FAILOVER
from pipeline.queue.keys import EMBED_TASK
from pipeline.queue.messages import Task, envelope_fault, opened, report_dropped

#: Moves up to ARGV[1] messages from the queue KEYS[1] to the hash KEYS[2] and its index KEYS[3], at the time ARGV[2].
#: Never more than a quarter of the queue, so that the last ones of a run are shared out among the workers.
#: kombu has put the delivery tag into the message's JSON; the hash holds `[message, exchange, routing key]`. Celery
#: publishes to the exchange without a name, which routes by the queue's name and needs no binding. Returns each message
#: after the tag under which it is booked; what has none, or one that is taken, is garbage and gets an empty one.
#: Few commands with many arguments: each command of its own would cost Redis as much as the message.
#: Everything that could fail comes before the first message is taken.
_FETCH = """
local share = math.ceil(redis.call('LLEN', KEYS[1]) / 4)
if share == 0 then return {} end
redis.call('HLEN', KEYS[2])
redis.call('ZCARD', KEYS[3])
local messages = redis.call('RPOP', KEYS[1], math.min(tonumber(ARGV[1]), share))
local tags = {}
for i, message in ipairs(messages) do
  local place = string.find(message, '"delivery_tag"', 1, true)
  local tag = place and string.match(message, '^"delivery_tag": *"([^"]+)"', place) or ''
  tags[i] = #tag > 255 and '' or tag
end
local taken = redis.call('HMGET', KEYS[2], unpack(tags))
local booked, stamped, fetched, ending = {}, {}, {}, ', "", "' .. KEYS[1] .. '"]'
local own = {['']=true}
for i, message in ipairs(messages) do
  local tag = tags[i]
  if taken[i] or own[tag] then
    tag = ''
  else
    own[tag] = true
    booked[#booked + 1] = tag
    booked[#booked + 1] = '[' .. message .. ending
    stamped[#stamped + 1] = ARGV[2]
    stamped[#stamped + 1] = tag
  end
  fetched[#fetched + 1] = tag
  fetched[#fetched + 1] = message
end
if booked[1] then
  redis.call('HSET', KEYS[2], unpack(booked))
  redis.call('ZADD', KEYS[3], unpack(stamped))
end
return fetched
"""
#: Puts the unacknowledged message ARGV[1] back to the end of its queue where the next fetch takes from, or to the other
#: end. kombu's own way watches the whole hash and starts again whenever another worker touches it. What is no message
#: is dropped: it would stop everything that comes after it.
_RESTORE = """
local held = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if not held then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
local message, queue = string.match(held, '^%[(.*), "[^"]*", "([^"]*)"%]$')
if message then redis.pcall(ARGV[2], queue, message) end
return 1
"""
#: The part of the window that is empty before more is fetched; the rest keeps the worker busy meanwhile.
_WORTH_A_FETCH = 4
#: Messages a fetch at most: one script holds Redis for some 10 us a message.
_FETCH_MESSAGES = 128


class _Fetched(NamedTuple):
    """What is delivered of a message that was opened already."""

    task: Task
    tag: str


class Message(virtual.Message):  # type: ignore[misc]
    """A message to kombu.

    Attributes:
        task: what it says, if nothing is left to decode.
    """

    task: Task | None = None

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        if not isinstance(payload, _Fetched):
            super().__init__(payload, channel, **kwargs)
            return
        # Of its own, kombu makes ten attributes more.
        self.channel, self.delivery_tag, self._state = channel, payload.tag, "RECEIVED"
        self.task = payload.task
        self.headers = {"task": EMBED_TASK, "id": self.task.id}


class QoS(stock.QoS):  # type: ignore[misc]
    """Which messages this channel holds; acknowledgements wait for `flush_acks`."""

    def __init__(self, channel: "Channel", prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self._acks: list[str | bytes] = []

    def can_consume(self) -> bool:
        """Whether so many messages may be fetched that the fetch is worth it; for each one its own would cost more."""
        window = self.prefetch_count
        return not window or window - len(self._delivered) + len(self._dirty) >= max(1, window // _WORTH_A_FETCH)

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a message that the fetch has booked in Redis already."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge soon; may be called from any thread."""
        self._acks.append(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)
        if self.channel.closed:
            # The connection was lost meanwhile, and no loop turns for this channel any more.
            self.flush_acks()

    def settle(self, tag: bytes) -> None:
        """Take a message that was booked, but never delivered, off the books soon."""
        self._acks.append(tag)

    def flush_acks(self) -> None:
        """Send what was acknowledged. Repeating it is harmless, so a failure only keeps it for the next time."""
        count = len(self._acks)
        if count:
            tags = self._acks[:count]
            with self.pipe_or_acquire() as pipe:
                pipe.zrem(self.unacked_index_key, *tags).hdel(self.unacked_key, *tags).execute()
            del self._acks[:count]

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        """Give one message back to its queue."""
        with self.channel.conn_or_acquire(client) as client:
            push = "LPUSH" if leftmost else "RPUSH"
            self.channel.restore_script(
                keys=[self.unacked_key, self.unacked_index_key], args=[tag, push], client=client
            )

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """At the end: send the acknowledgements, give back the rest."""
        # Where Redis is away the visibility timeout gives back what was done too; that is only done twice.
        with suppress(*self.channel.connection_errors, redis.ResponseError):
            self.flush_acks()
        super().restore_unacked_once(stderr)


class _LastingChannel(stock.Channel):  # type: ignore[misc]
    """A channel that outlives a failover; of consumers and producers."""

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        return {**super()._connparams(asynchronous), "retry": AFTER_FAILOVER}


class Channel(_LastingChannel):
    """A channel that peeks at its queue and then fetches many messages at once."""

    QoS = QoS
    Message = Message
    _kept: Any = None
    _peeked = ""

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """The given client, or the one that is kept; it takes a connection from the pool for each command."""
        if client is None:
            if self._kept is None:
                self._kept = self._create_client()
                self.fetch_script = self._kept.register_script(_FETCH)
                self.restore_script = self._kept.register_script(_RESTORE)
            client = self._kept
        yield client

    def _brpop_start(self, timeout: float | None = None) -> None:
        queues = self._queue_cycle.consume(1)
        if queues:
            self._peeked = queues[0]
            connection = self._in_poll = self.client.connection
            self._brpop_sent_at = time.monotonic()
            # From the queue's end to the same end: waits for a message and leaves it where it is.
            command = ("BLMOVE", self._peeked, self._peeked, "RIGHT", "RIGHT", timeout or self.brpop_timeout)
            connection.send_command(*command)

    def _brpop_read(self, **options: Any) -> bool:
        try:
            try:
                message = self.client.parse_response(self.client.connection, "BLMOVE", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            if message is None or self._closing:
                raise Empty
            fetched = self._fetch(self._peeked)
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if not fetched:
            raise Empty  # Another worker took them.
        for tag, raw in zip(fetched[0::2], fetched[1::2], strict=True):
            if tag and (task := opened(raw, tag, self._peeked)) is not None:
                self.connection._deliver(_Fetched(task, tag.decode()), self._peeked)
                continue
            message, fault = _parsed(raw, self._peeked, tag.decode(errors="replace"))
            if fault is None:
                self.connection._deliver(message, self._peeked)
            else:
                report_dropped(self._peeked, fault)
                if tag:
                    self.qos.settle(tag)
        return True

    def _fetch(self, queue: str) -> list[bytes]:
        """Take the next messages: a tag, its message, a tag, its message, and so on."""
        room = self.qos.can_consume_max_estimate()
        count = _FETCH_MESSAGES if room is None else min(_FETCH_MESSAGES, max(1, room))
        with self.conn_or_acquire() as client:
            keys = [queue, self.unacked_key, self.unacked_index_key]
            fetched: list[bytes] = self.fetch_script(keys=keys, args=[count, time.time()], client=client)
        return fetched


class StockTransport(stock.Transport):  # type: ignore[misc]
    """kombu's own way for a worker, which is spared messages that would end it."""

    class Channel(_LastingChannel):
        """A channel that outlives what is no JSON."""

        def _brpop_read(self, **options: Any) -> bool:
            try:
                return bool(super()._brpop_read(**options))
            except (Empty, redis.RedisError, OSError):
                raise
            except Exception as error:  # Whatever a decoder raises at what somebody made up.
                report_dropped("", f"it is not JSON ({type(error).__name__})")
                raise Empty from None

    def _deliver(self, message: Any, queue: str) -> None:
        fault = envelope_fault(message, queue)
        if fault is None:
            super()._deliver(message, queue)
        else:
            report_dropped(queue, fault)


def _parsed(raw: bytes, queue: str, tag: str) -> tuple[Any, str | None]:
    """A message as kombu wants it, or what is wrong with it."""
    if not tag:
        return None, "it has no delivery tag of its own"
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return None, f"it is not JSON ({type(error).__name__})"
    return message, envelope_fault(message, queue, tag)


class Transport(stock.Transport):  # type: ignore[misc]
    """To be named as Celery's `broker_transport`; the URL stays `redis://` or `rediss://`."""

    Channel = Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Send acknowledgements at every turn of the loop; a batch that ends wakes it."""
        super().register_with_event_loop(connection, loop)

        def flush() -> None:
            for channel in self.channels:
                if channel._qos is not None:
                    channel._qos.flush_acks()

        loop.on_tick.add(flush)
