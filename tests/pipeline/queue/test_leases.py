"""Leases, against a real Redis."""

import time

import pytest
import redis
from redis.exceptions import LockError

from pipeline.queue.leases import LeaseTaken, holding, lease, renewed
from tests.factories import wait_until

KEY = "ruiji:g:lease:arm"
#: A process that waits for a busy machine as long as two thirds of this loses a lease that it renews.
LEASE_S = 3.0


def test_a_lease_lasts_as_long_as_its_block_and_no_longer(client: redis.Redis) -> None:
    with holding(lease(client, KEY, LEASE_S)):
        time.sleep(1.5 * LEASE_S)
        assert client.exists(KEY), "it is renewed"
        with pytest.raises(LeaseTaken), holding(lease(client, KEY, LEASE_S)):
            pytest.fail("it was had twice")
        assert client.exists(KEY), "who did not get it does not end it"
    assert not client.exists(KEY)


def test_who_lost_a_lease_is_told(client: redis.Redis) -> None:
    held = lease(client, KEY, 5)
    with pytest.raises(LockError), holding(held):  # noqa: PT012
        client.set(KEY, "another's")
        with pytest.raises(LockError):
            held.reacquire()
    assert client.get(KEY) == "another's"


def test_a_lost_lease_is_regained_until_that_fails(client: redis.Redis) -> None:
    held, asked = lease(client, KEY, LEASE_S), []

    def regain() -> bool:
        asked.append(client.get(KEY))
        return len(asked) < 2 and bool(held.acquire(token="again"))

    assert held.acquire(token="first")
    with renewed(held, regain):
        client.delete(KEY)
        wait_until(lambda: asked == [None] and client.get(KEY) == "again", what="the lease, had again")
        client.set(KEY, "another's")
        wait_until(lambda: asked == [None, "another's"], what="a second loss")
        time.sleep(LEASE_S)
    assert asked == [None, "another's"], "then it is given up"
