"""What a worker process reports of itself."""

import json

from pipeline.queue.connection import connect
from workers.embed import DONE
from workers.heartbeat import Report
from workers.ledger import Ledger


def test_a_report_tells_the_time_of_the_images_that_it_counts(redis_url: str) -> None:
    client, ledger = connect(redis_url), Ledger()
    report = Report(client, "0123456789abcdef", "embed", ledger)
    ledger.add("encode", 1.0)
    report.count([DONE] * 10)
    # Of a batch that is not at its end.
    ledger.add("encode", 5.0)
    report.send("working")
    (key,) = client.keys("ruiji:0123456789abcdef:worker:*")
    told = json.loads(client.get(key))
    assert (told["images"], told["ms_per_image"]["encode"], told["state"]) == (10, 100.0, "working")
    report.send("idle")
    told = json.loads(client.get(key))
    assert (told["images"], told["images_per_s"], told["ms_per_image"]["encode"]) == (10, 0.0, 100.0)
    report.remove()
    assert client.keys() == []
