"""What a worker process tells of itself."""

import json
from pathlib import Path

from pipeline.queue.app import connect
from tests.factories import wait_until
from workers.embed import DONE
from workers.ledger import Ledger
from workers.process import Heartbeat
from workers.readiness import Readiness


def test_a_beat_tells_the_time_of_the_images_that_it_counts(redis_url: str, tmp_path: Path) -> None:
    client, ledger = connect(redis_url), Ledger()
    heartbeat = Heartbeat(client, tmp_path, "0123456789abcdef", "embed", 60, ledger, Readiness(tmp_path))
    heartbeat.start()
    try:
        ledger.add("encode", 1.0)
        heartbeat.count([DONE] * 10)
        # Of a batch that is not at its end.
        ledger.add("encode", 5.0)
        wait_until(lambda: client.keys("ruiji:0123456789abcdef:worker:*"), what="a beat")
        (key,) = client.keys("ruiji:0123456789abcdef:worker:*")
        told = json.loads(client.get(key))
        assert (told["images"], told["ms_per_image"]["encode"]) == (10, 100.0)
    finally:
        heartbeat.leave()
        heartbeat.join()
