"""The status of a run from Python: what the command says, with Redis and without."""

import pytest

import ruiji as api
from tests.factories import Ruiji, pictures


def test_a_run_that_waits_is_counted_with_redis_and_from_the_disk(ruiji: Ruiji, redis_url: str) -> None:
    ruiji.environment["RUIJI_REDIS_URL"] = redis_url
    with pytest.raises(api.UsageError, match="no gallery in"):
        api.status(ruiji.features, ruiji.model, state_dir=ruiji.state)
    pictures(ruiji.media, 7)
    ruiji("enqueue")
    for redis in (None, redis_url):
        now = api.status(ruiji.features, ruiji.model, redis, state_dir=ruiji.state)
        assert (now.objects, now.done, now.failed, now.running + now.pending) == (7, 0, 0, 7)
        assert not now.finished
    with pytest.raises(api.BrokerUnavailable, match=r"127\.0\.0\.1"):
        api.status(ruiji.features, ruiji.model, "redis://127.0.0.1:1/0", state_dir=ruiji.state)
