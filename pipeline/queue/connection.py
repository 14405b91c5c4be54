"""The connection to Redis: how one is made, and what goes wrong with it."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis
from kombu.exceptions import BatchPublishError, OperationalError
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from pipeline.errors import BrokerUnavailable, UsageError

#: The oldest Redis whose commands suffice: BLMOVE, and RPOP with a count.
OLDEST_REDIS = (6, 2)
#: An answer of Redis takes milliseconds; after this long its host is gone, or the network between.
SOCKET_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
#: A connection that was idle for longer is asked whether it still works.
HEALTH_CHECK_S = 5
#: After a failover the server behind an open connection is a replica, and only a new connection reaches the one that
#: took its place: so one that refuses a write is closed, and the write, which changed nothing, is sent once more.
AFTER_FAILOVER = Retry(NoBackoff(), 1, supported_errors=(redis.ReadOnlyError,))
#: What is raised if something goes wrong with Redis, by its client (a lease that was lost too) and by kombu.
REDIS_FAULTS = (redis.RedisError, OperationalError, BatchPublishError)
#: What Redis answers while it cannot do what it will do later: a replica, memory or disk full, starting, a long script.
_PASSING = re.compile(r"\b(READONLY|OOM|MISCONF|NOREPLICAS|LOADING|MASTERDOWN|TRYAGAIN|BUSY|UNBLOCKED)\b")


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
            retry_on_error=[redis.ReadOnlyError],
        )
        _require_fit(client.info())
    except (redis.AuthenticationError, redis.ResponseError) as error:
        raise UsageError(f"{public_url(redis_url)}: {refusal(error)}") from None
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


def refused(error: BaseException | None) -> bool:
    """Whether Redis refuses what it is asked, or who asks, and asking again unchanged is of no use."""
    if isinstance(error, redis.ResponseError):
        return _PASSING.search(f"{getattr(error, 'status_code', '')} {error}") is None
    # To its client a wrong password is a lost connection.
    return isinstance(error, redis.AuthenticationError)


def refusal(error: BaseException) -> str:
    """What to tell where Redis refuses what ruiji cannot do without."""
    said = str(error)[:300]
    if isinstance(error, redis.AuthenticationError):
        return f"Redis refuses the user or the password ({said}); correct RUIJI_REDIS_URL or RUIJI_REDIS_PASSWORD_FILE"
    words = f"Redis refuses what ruiji needs: {said}"
    if isinstance(error, redis.exceptions.NoPermissionError):
        return f"{words}; give its user the rights that docs/deployment.md lists"
    return f"{words}. Is something else in this database? Give ruiji one of its own. Nothing is lost"


@contextmanager
def broker_faults() -> Iterator[None]:
    """Turn what goes wrong with Redis meanwhile (connection lost, memory full, a lease not had) into one error."""
    try:
        yield
    except REDIS_FAULTS as error:
        # Of a batch kombu only says that it failed.
        reason = error.__cause__ if isinstance(error, BatchPublishError) else error
        if refused(reason):
            raise UsageError(refusal(reason)) from error
        raise BrokerUnavailable(
            f"trouble with Redis: {reason}. Nothing is lost: run it again once Redis works, and it continues"
        ) from error


def public_url(redis_url: str) -> str:
    """The URL without its user and password, for messages."""
    parts = urlsplit(redis_url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
