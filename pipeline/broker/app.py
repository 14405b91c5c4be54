"""The Celery app: queues, settings with their reasons, and the connection to Redis."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import redis
from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import BatchPublishError, OperationalError
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from pipeline.errors import BrokerUnavailable, UsageError

EMBED_TASK = "ruiji.embed"
REDUCE_TASK = "ruiji.reduce"
#: Version of the messages; part of the queues' names, so that a worker of another age never sees them.
PROTOCOL = 1


def embed_queue(gallery_id: str) -> str:
    """The queue of one gallery's embed tasks."""
    return f"embed.{gallery_id}.p{PROTOCOL}"


def reduce_queue(gallery_id: str) -> str:
    """The queue of one gallery's reduce tasks."""
    return f"reduce.{gallery_id}.p{PROTOCOL}"


def unacked_keys(gallery_id: str) -> dict[str, str]:
    """Kombu's names for its hash, index and mutex of messages that a worker holds; one set a gallery."""
    return {f"unacked{part}_key": f"ruiji:{gallery_id}:unacked{part}" for part in ("", "_index", "_mutex")}


def make_app(
    redis_url: str, gallery_id: str, *, visibility_timeout_s: int, prefetch: int = 1, transport: str = "stock"
) -> Celery:
    """One gallery's Celery app.

    Args:
        prefetch: messages that a thread of a worker holds at most, done ones not counted.
        transport: `fast` for a worker's own transport and backend, which serve batches; `stock` for Celery's.
    """
    queues = (embed_queue(gallery_id), reduce_queue(gallery_id))
    fast = transport == "fast"
    backend = f"pipeline.broker.results:Backend+{redis_url}" if fast else redis_url
    app = Celery("ruiji", broker=redis_url, backend=backend, set_as_current=False)
    app.conf.update(
        broker_transport="pipeline.broker.transport:Transport" if fast else None,
        # The message outlives a killed worker.
        task_acks_late=True,
        # The files are the result; chords still count.
        task_ignore_result=True,
        # Small, inspectable, safe. Pickle is never accepted.
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        # Only chord counters expire; a segment may wait this long for its first member.
        result_expires=14 * 24 * 3600,
        # Rows are placed by their path, not by the order of results; a list is half of a sorted set.
        result_backend_transport_options={"result_chord_ordered": False},
        broker_transport_options={
            **unacked_keys(gallery_id),
            "visibility_timeout": visibility_timeout_s,
            # kombu's default sweeps for dead workers' messages every 100 s.
            "unacked_restore_interval": max(1, min(10, visibility_timeout_s // 4)),
            "unacked_restore_throttle": 1,
            # A sweeper that is killed keeps all others from sweeping for this long; kombu's default is 300 s.
            "unacked_mutex_expire": 10,
        },
        # Each with an exchange of its own: queues that share one and its key would both get every task.
        task_queues=[Queue(name, Exchange(name), routing_key=name) for name in queues],
        task_create_missing_queues=False,
        task_default_queue=embed_queue(gallery_id),
        worker_prefetch_multiplier=prefetch,
        # Nobody listens to them, and each costs a connection or CPU per image.
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        # A lost Redis is waited for, for ever: the work is safe on disk.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app


def connect(redis_url: str) -> redis.Redis:
    """A connected client of its own, answering in text.

    Raises:
        BrokerUnavailable: Redis does not answer; the message hides the password.
        UsageError: the URL has an option that there is not, or one with a wrong value.
    """
    try:
        client = redis.Redis.from_url(
            redis_url,
            decode_responses=True,
            socket_connect_timeout=5,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=1), 3),
        )
        client.ping()
    except redis.RedisError as error:
        raise BrokerUnavailable(
            f"cannot reach Redis at {public_url(redis_url)}: {error}. Start one with `ruiji redis` "
            "(make redis) or docker compose, or correct RUIJI_REDIS_URL"
        ) from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"correct the options after ? in RUIJI_REDIS_URL (--redis-url): {error}") from None
    return client


@contextmanager
def broker_faults() -> Iterator[None]:
    """Turn what goes wrong with Redis meanwhile (connection lost, memory full, a lease not had) into one error."""
    try:
        yield
    except (redis.RedisError, OperationalError, BatchPublishError) as error:
        # Of a batch kombu only says that it failed.
        reason = error.__cause__ if isinstance(error, BatchPublishError) else error
        raise BrokerUnavailable(
            f"trouble with Redis: {reason}. Nothing is lost: run it again once Redis is well, and it goes on"
        ) from error


def public_url(redis_url: str) -> str:
    """The URL without its user and password, for messages."""
    parts = urlsplit(redis_url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
