"""Messages in hand: who holds them, and for how long they stay theirs.

kombu books each message that a worker fetches in a hash and stamps it in an index. It gives a message back to its queue
once the stamp is older than the visibility timeout, whether the holder is dead or alive; so a live process renews the
stamps of its own messages, and one that stands still loses them to others.
"""

import logging
import time
from typing import Any

import redis
from celery.worker.state import reserved_requests

from pipeline.queue import batches
from pipeline.queue.keys import unacked_keys

logger = logging.getLogger(__name__)

#: A consumer whose loop did not turn for this long is stuck. It waits for an answer of Redis for less.
_SILENT_S = 20.0
#: Stamps are renewed so often within the visibility timeout.
_RENEWALS = 4


class Claims:
    """This process' own messages. `keep` is to be called every few seconds, from any thread."""

    def __init__(self, client: redis.Redis, gallery_id: str, visibility_timeout_s: float) -> None:
        self._client = client
        self._index = unacked_keys(gallery_id)["unacked_index_key"]
        #: How often `keep` renews the stamps, and so has to be called; in s.
        self.interval_s = visibility_timeout_s / _RENEWALS
        self._renewed = self._turned = time.monotonic()
        self._consumer: Any = None
        self._idle: set[str] = set()

    def attach(self, consumer: Any) -> None:
        """Celery's consumer, once it is there; it knows which messages are held."""
        self._consumer = consumer

    def working(self) -> bool:
        """Whether the process works on any message."""
        return bool(reserved_requests) or batches.working()

    def alive(self) -> bool:
        """Whether the consumer showed life of late; what it holds while it does not must go to another worker."""
        if self._consumer is not None:
            self._consumer.call_soon(self._turn)
        return self._channel() is not None and time.monotonic() - self._turned < _SILENT_S

    def keep(self) -> None:
        """Renew the stamps if it is time, unless the consumer is stuck.

        Raises:
            redis.RedisError: Redis is away.
        """
        now = time.monotonic()
        if now - self._renewed >= self.interval_s and self.alive():
            channel = self._channel()
            tags = list(channel.qos._delivered) if channel is not None else []
            if tags:
                self._client.zadd(self._index, dict.fromkeys(tags, time.time()), xx=True)
            self._renewed = now
        self._reconnect_if_stuck()

    def _turn(self) -> None:
        self._turned = time.monotonic()

    def _channel(self) -> Any:
        """The channel that messages come through, or None while there is no connection."""
        return getattr(getattr(self._consumer, "task_consumer", None), "channel", None)

    def _reconnect_if_stuck(self) -> None:
        """Start the connection anew if messages are held that nobody works on, at two looks in a row.

        Celery only logs it when an acknowledgement or a giving back fails, and kombu goes on to count the message
        as held. With a full window nothing else is asked of the connection, so that nothing else notices.
        """
        channel = self._channel()
        held: set[str] = set()
        if channel is not None and not self.working():
            held = set(channel.qos._delivered) - channel.qos._dirty
        stuck, self._idle = held & self._idle, held
        if stuck:
            extra = {"event": "reconnecting", "messages": len(stuck)}
            logger.warning("messages are held that could not be settled; connecting again", extra=extra)
            self._idle = set()
            self._consumer.call_soon(self._lose_connection, channel)

    def _lose_connection(self, channel: Any) -> None:
        # In the event loop; the consumer takes it for a lost connection, closes its channel and opens another.
        if channel is self._channel():
            raise redis.ConnectionError("messages could not be settled")
