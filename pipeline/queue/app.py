"""The Celery app: queues, settings with their reasons, and the connection to Redis."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
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
#: The oldest Redis whose commands suffice: BLMOVE, and RPOP with a count.
OLDEST_REDIS = (6, 2)
#: An answer of Redis takes milliseconds; after this long its host is gone, or the network between.
SOCKET_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
#: A connection that was idle for longer is asked whether it still works.
HEALTH_CHECK_S = 5
#: What Redis answers while it cannot do what it will do later: a replica, memory or disk full, starting, a long script.
_PASSING = re.compile(r"\b(READONLY|OOM|MISCONF|NOREPLICAS|LOADING|MASTERDOWN|TRYAGAIN|BUSY|UNBLOCKED)\b")
#: Version of the messages; part of the queues' names, so that a worker of another age never sees them.
PROTOCOL = 1


def embed_queue(gallery_id: str) -> str:
    """The queue of one gallery's embed tasks."""
    return f"embed.{gallery_id}.p{PROTOCOL}"


def reduce_queue(gallery_id: str) -> str:
    """The queue of one gallery's reduce tasks."""
    return f"reduce.{gallery_id}.p{PROTOCOL}"


def task_of(queue: str) -> str:
    """The one task that is in a queue."""
    return {"embed": EMBED_TASK, "reduce": REDUCE_TASK}[queue.partition(".")[0]]


def gallery_of(queue: str) -> str:
    """The gallery that a queue belongs to."""
    return queue.split(".")[1]


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
    backend = f"pipeline.queue.chord_parts:Backend+{redis_url}" if fast else redis_url
    app = Celery("ruiji", broker=redis_url, backend=backend, set_as_current=False)
    app.conf.update(
        broker_transport=f"pipeline.queue.transport:{'Transport' if fast else 'StockTransport'}",
        # A connection that falls silent is given up, at the broker's side and at the backend's.
        redis_socket_timeout=SOCKET_TIMEOUT_S,
        redis_socket_connect_timeout=CONNECT_TIMEOUT_S,
        redis_socket_keepalive=True,
        redis_backend_health_check_interval=HEALTH_CHECK_S,
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
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_keepalive": True,
            # Also how often, and how long after its time, a waiting pop is looked at that got no answer.
            "health_check_interval": HEALTH_CHECK_S,
            # A sweeper that is killed keeps all others from sweeping for this long; kombu's default is 300 s.
            "unacked_mutex_expire": 10,
        },
        # Each with an exchange of its own: queues that share one and its key would both get every task. Nothing is
        # declared: messages go by the queue's name, and a binding would stay in Redis for ever.
        task_queues=[Queue(name, Exchange(name), routing_key=name, no_declare=True) for name in queues],
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
        UsageError: the URL has an option that there is not, or one with a wrong value; Redis refuses the user or the
            password, is too old, or of a kind that cannot be used.
    """
    try:
        client = redis.Redis.from_url(
            redis_url,
            decode_responses=True,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_keepalive=True,
            health_check_interval=HEALTH_CHECK_S,
            retry=Retry(ExponentialBackoff(cap=1), 3),
        )
        _require_fit(client.info())
    except redis.AuthenticationError as error:
        raise UsageError(
            f"Redis at {public_url(redis_url)} refuses the user or the password ({error}); correct RUIJI_REDIS_URL or "
            "RUIJI_REDIS_PASSWORD_FILE"
        ) from None
    except redis.ResponseError as error:
        raise UsageError(refusal(error)) from None
    except redis.RedisError as error:
        reason = str(error).rstrip(".")
        if isinstance(error.__context__, socket.gaierror):
            reason += "; a container does not see the names in its host's /etc/hosts"
        raise BrokerUnavailable(
            f"cannot reach Redis at {public_url(redis_url)}: {reason}. Start it (ruiji redis, or make up), or correct "
            "RUIJI_REDIS_URL (with docker compose REDIS_HOST)"
        ) from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"correct the options after ? in RUIJI_REDIS_URL (--redis-url): {error}") from None
    return client


def _require_fit(info: dict[str, Any]) -> None:
    """Refuse a Redis with which a run would start, and never end."""
    version = str(info.get("redis_version", ""))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < OLDEST_REDIS:
        raise UsageError(f"this Redis is {version}; ruiji needs 6.2 or later, or Valkey. Nothing was changed in it")
    if info.get("cluster_enabled"):
        raise UsageError(
            "this Redis runs in cluster mode, where a script cannot reach several keys; ruiji needs one without "
            "cluster-enabled (a replica beside it is fine). Nothing was changed in it"
        )


def passes(error: redis.ResponseError) -> bool:
    """Whether what Redis refuses now may work later, unchanged."""
    return _PASSING.search(f"{getattr(error, 'status_code', '')} {error}") is not None


def refusal(error: redis.ResponseError) -> str:
    """What to tell where Redis refuses what ruiji cannot do without."""
    words = f"Redis refuses what ruiji needs: {str(error)[:300]}"
    if isinstance(error, redis.exceptions.NoPermissionError):
        return f"{words}; give its user the rights that docs/deployment.md lists"
    return f"{words}. Is something else in this database? Give ruiji one of its own. Nothing is lost"


@contextmanager
def broker_faults() -> Iterator[None]:
    """Turn what goes wrong with Redis meanwhile (connection lost, memory full, a lease not had) into one error."""
    try:
        yield
    except (redis.RedisError, OperationalError, BatchPublishError) as error:
        # Of a batch kombu only says that it failed.
        reason = error.__cause__ if isinstance(error, BatchPublishError) else error
        if isinstance(reason, redis.ResponseError) and not passes(reason):
            raise UsageError(refusal(reason)) from error
        raise BrokerUnavailable(
            f"trouble with Redis: {reason}. Nothing is lost: run it again once Redis is well, and it goes on"
        ) from error


def public_url(redis_url: str) -> str:
    """The URL without its user and password, for messages."""
    parts = urlsplit(redis_url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
