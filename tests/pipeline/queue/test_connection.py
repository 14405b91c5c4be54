"""What goes wrong with Redis."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import LockError

from pipeline.errors import BrokerUnavailable, UsageError
from pipeline.queue.connection import broker_faults
from pipeline.queue.embedded import locked


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
