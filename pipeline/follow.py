"""Following a run from outside: how it stands, until no plan is open."""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import redis

from pipeline import layout
from pipeline.errors import BrokerUnavailable, MachineFault, RuijiError, UsageError
from pipeline.gallery import read_gallery
from pipeline.queue.connection import broker_faults, connect, refusal, refused
from pipeline.queue.embedded import url_of
from pipeline.status import STARTING, Status, StatusReader

logger = logging.getLogger(__name__)

#: How often progress is read; each read costs a few small answers from Redis.
FOLLOW_INTERVAL_S = 0.3
#: How often what is away is looked for.
_AWAY_S = 2.0


@dataclass(frozen=True)
class Look:
    """How a gallery stands, and what was asked.

    Attributes:
        without_redis: why the disk alone was asked; None if Redis was asked too.
        lost: whether there is a Redis, and it does not answer.
    """

    status: Status
    without_redis: str | None = None
    lost: bool = False


def look(
    folder: Path, state_dir: Path, find_redis: Callable[[], str], *, watch: bool = False, exact: bool = False
) -> Look:
    """How every object of a gallery's list stands.

    Args:
        folder: of the gallery.
        state_dir: a `ruiji run` at work leaves there where its Redis is, which alone knows of its plan.
        find_redis: gives the URL of the Redis otherwise; raises RuijiError if there is none.
        watch: show progress on stderr until no plan is open, then look.
        exact: look at every file instead of at Redis' counters.

    Raises:
        UsageError: nothing was ever enqueued into this folder. BrokerUnavailable: what is to be watched needs a Redis
            that cannot be reached, or went away meanwhile.
    """
    client, without, lost = redis_of_run(folder, state_dir), None, False
    of_run = client is not None
    if client is not None and watch:
        client = follow_run(folder, client)
    elif client is None:
        try:
            client = connect(find_redis())
        except RuijiError as error:
            if watch:
                raise
            without, lost = str(error), isinstance(error, BrokerUnavailable)
        if watch and client is not None:
            follow(folder, client)
    # A run that has just begun has no gallery yet.
    if of_run and read_gallery(folder) is None:
        return Look(STARTING, without)
    try:
        with broker_faults():
            return Look(StatusReader(folder, client).read(exact), without, lost)
    except BrokerUnavailable as error:
        if watch:
            raise
        return Look(StatusReader(folder, None).read(exact), str(error), lost=True)


def follow(folder: Path, client: redis.Redis, *checks: Callable[[], None]) -> Status:
    """Show progress on stderr until no plan is open; returns the final status.

    Redis and the gallery folder may be away meanwhile.

    Args:
        checks: called at each look, also while one of them is away; each raises to end the wait.
    """
    from pipeline.progress import show_progress

    reader = StatusReader(folder, client)
    with show_progress() as update:
        while True:
            status = _read_patiently(reader, checks)
            update(status)
            if status.plan is None:
                return status
            time.sleep(FOLLOW_INTERVAL_S)


def follow_run(folder: Path, client: redis.Redis) -> redis.Redis | None:
    """As `follow`, beside a `ruiji run`; None if it ended meanwhile, and its Redis with it."""

    def there() -> None:
        client.ping()

    try:
        while read_gallery(folder) is None:
            there()
            time.sleep(FOLLOW_INTERVAL_S)
        follow(folder, client, there)
    except redis.RedisError:
        return None
    return client


def _read_patiently(reader: StatusReader, checks: Iterable[Callable[[], None]]) -> Status:
    told = ""
    while True:
        for check in checks:
            check()
        try:
            return reader.read()
        except redis.RedisError as error:
            if refused(error):
                raise UsageError(refusal(error)) from None
            if told != "redis":
                logger.warning("Redis: %s; waiting for it", error, extra={"event": "redis_away"})
            told = "redis"
        except (MachineFault, OSError) as error:
            if told != "folder":
                logger.warning("%s; waiting for it", error, extra={"event": "gallery_away"})
            told = "folder"
        time.sleep(_AWAY_S)


def redis_of_run(folder: Path, state_dir: Path) -> redis.Redis | None:
    """The Redis of a `ruiji run` that is at work on a gallery folder now, for this user on this machine."""
    for data in layout.own_run_folder(state_dir, folder).glob(f"{layout.OWN_REDIS_PREFIX}*"):
        url = url_of(data)
        with suppress(RuijiError):
            return connect(url) if url is not None else None
    return None
