"""What goes wrong with Redis."""

import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import LockError

from pipeline.errors import BrokerUnavailable
from pipeline.queue.connection import broker_faults


@pytest.mark.parametrize("kind", [RedisConnectionError, LockError, OperationalError])
def test_what_goes_wrong_with_redis_is_one_error_that_says_what_to_do(kind: type[Exception]) -> None:
    with pytest.raises(BrokerUnavailable, match=r"the reason\. Nothing is lost: run it again"), broker_faults():
        raise kind("the reason")
