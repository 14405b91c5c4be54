"""What goes wrong with Redis."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import LockError

from pipeline.choices import Transport
from pipeline.errors import BrokerUnavailable, UsageError
from pipeline.queue import batches
from pipeline.queue.app import make_app
from pipeline.queue.connection import broker_faults, connect
from pipeline.queue.embedded import locked
from pipeline.queue.leases import lease
from tests.chaos.harness import Network, redis_server


@pytest.mark.parametrize("kind", [RedisConnectionError, LockError, OperationalError])
def test_what_goes_wrong_with_redis_is_one_error_that_says_what_to_do(kind: type[Exception]) -> None:
    with pytest.raises(BrokerUnavailable, match=r"the reason\. Nothing is lost: run it again"), broker_faults():
        raise kind("the reason")


def test_a_folder_that_has_no_locks_is_not_taken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    with locked(lock, "another"), pytest.raises(UsageError, match=r"^another$"), locked(lock, "another"):
        pass

    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.raises(UsageError, match=r"No locks.*--state-dir"), locked(lock, "another"):
        pass


@pytest.mark.parametrize("transport", list(Transport))
def test_after_a_failover_behind_one_address_every_client_finds_the_new_master(
    tmp_path: Path, transport: Transport
) -> None:
    with redis_server(tmp_path / "first") as first, redis_server(tmp_path / "second", first.password) as second:
        network = Network(first.port)
        url = first.url.replace(str(first.port), str(network.port))
        with make_app(url, "gallery", visibility_timeout_s=60, transport=transport) as app:
            client, channel = connect(url), app.connection_for_read().default_channel
            writes: list[Callable[[], object]] = [
                lambda: client.set("key", "value"),
                lambda: lease(client, "lease", 60).acquire(),
                lambda: channel.client.lpush("queue", "message"),
            ]
            if transport == Transport.fast:
                writes += [
                    lambda: channel.qos.restore_by_tag("tag"),
                    lambda: app.backend.client.sadd("chord", "member"),
                ]
            for write in writes:
                write()
            # What had been the master becomes a replica, and keeps the connections that it has.
            connect(first.url).replicaof("127.0.0.1", second.port)
            network.lead_to(second.port)
            for write in writes:
                write()
        assert connect(second.url).get("key") == "value"
        network.close()


def test_a_batch_that_cannot_be_given_back_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    class Message:
        def reject(self, requeue: bool) -> None:
            raise RedisConnectionError("gone")

    batches._give_back([Message()] * 64)
    (said,) = caplog.records
    assert (said.event, said.messages) == ("give_back_failed", 64)  # type: ignore[attr-defined]
