"""Leases: locks in Redis that run out by themselves.

They spare work that somebody else is doing. They protect nothing: a holder can sleep through its lease, which is why
commits on the disk are links (docs/format.md).
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import redis
from redis.exceptions import LockError
from redis.lock import Lock

#: A lease is renewed so often while it lasts; two renewals may fail.
_RENEWALS = 3


class LeaseTaken(LockError):
    """Somebody else held a lease for as long as it was waited for, and so is alive and at the work."""


def lease(client: redis.Redis, key: str, timeout_s: float, wait_s: float = 0) -> Lock:
    """A lease that is still to be had.

    Args:
        timeout_s: how long it lasts after it was had or renewed.
        wait_s: how long to wait for somebody else's to run out.
    """
    return Lock(client, key, timeout=timeout_s, blocking_timeout=wait_s, thread_local=False)


@contextmanager
def holding(lease: Lock) -> Iterator[None]:
    """Take a lease and hold it for as long as the block takes.

    A process that was stopped for longer than the lease may find it gone: `lease.reacquire` raises then.

    Raises:
        LeaseTaken: somebody else holds it.
        LockError: it was lost meanwhile.
    """
    if not lease.acquire():
        raise LeaseTaken(f"another process has held {lease.name} all the time")
    try:
        with renewed(lease):
            yield
    finally:
        lease.release()


@contextmanager
def renewed(lease: Lock, regain: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Renew a lease that is held, in a thread, while the block runs.

    Args:
        regain: called when the lease turns out to be lost; returns whether it is held again.
    """
    ended = threading.Event()
    timeout_s = lease.timeout
    assert timeout_s is not None

    def renew() -> None:
        while not ended.wait(timeout_s / _RENEWALS):
            # While Redis is away there is nothing to do; the lease may outlast it.
            with suppress(redis.RedisError):
                try:
                    lease.reacquire()
                except LockError:
                    if not regain():
                        return

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
