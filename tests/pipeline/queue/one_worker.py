"""A worker as `pipeline.queue` runs one, which prints as JSON what it saw of Celery and kombu; for `test_contract.py`.

In a process of its own, since Celery's state is global: `python -m tests.pipeline.queue.one_worker URL GALLERY QUEUE
TRANSPORT FAULTS`, where FAULTS is how many batches fail before one is done.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from pipeline.queue import batches, worker
from pipeline.queue.app import make_app
from pipeline.queue.claims import Claims
from pipeline.queue.connection import connect
from pipeline.queue.consumer import Consumer
from pipeline.queue.keys import EMBED_TASK, REDUCE_TASK, reduce_queue, unacked_keys
from pipeline.queue.outages import end_process

#: What the worker ends with once it has done what is asked; and if it never does.
DONE, LATE = 7, 9

told: dict[str, Any] = {"batches": [], "handled": 0, "connections": 0}


class Watched(Consumer):
    """Counts how often the hooks of Celery's consumer are called."""

    class Blueprint(Consumer.Blueprint):
        def start(self, parent: Any) -> None:
            told["connections"] += 1
            super().start(parent)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        handle = super().create_task_handler(*args, **kwargs)

        def counted(message: Any) -> None:
            told["handled"] += 1
            handle(message)

        return counted


def main(url: str, gallery: str, queue: str, transport: str, faults: str) -> None:
    client, index = connect(url), unacked_keys(gallery)["unacked_index_key"]
    app = make_app(url, gallery, visibility_timeout_s=60, prefetch=4, transport=transport)
    # Renews at each call.
    claims = Claims(client, gallery, 0)

    def held() -> set[str]:
        qos = claims._channel().qos
        return set(qos._delivered) - qos._dirty

    def compute(calls: list[tuple[Any, ...]]) -> list[str]:
        told["batches"].append(calls)
        # Acknowledgements of the batch before may be on their way.
        told["in_hand"] = wait_for(lambda: held() and held() <= set(client.zrange(index, 0, -1)))
        live = held()
        told["working"] = claims.working()
        before = claims._turned
        told["turned"] = wait_for(lambda: claims.alive() and claims._turned > before)
        client.zadd(index, dict.fromkeys(live, 1.0), xx=True)
        claims.keep()
        told["renewed"] = all(client.zscore(index, tag) != 1.0 for tag in live)
        if len(told["batches"]) <= int(faults):
            raise ValueError("given back")
        return ["done"] * len(calls)

    def reduce(*args: object) -> None:
        told["reduced"], told["working"] = args, claims.working()
        end_process(DONE)

    def end_when_settled() -> None:
        settled = wait_for(lambda: client.exists(reduce_queue(gallery)) and not client.exists(index), 20)
        end_process(DONE if settled else LATE)

    worker.Consumer = Watched  # type: ignore[misc]
    batches.REST_S = 0.1
    stopping = threading.Event()
    register = {"batch_images": 4, "on_rest": lambda why: None, "stopping": stopping, "busy": nullcontext}
    batches.register_batched(app, EMBED_TASK, compute, **register)  # type: ignore[arg-type]
    batches.register(app, REDUCE_TASK, reduce)
    if queue.startswith("embed"):
        threading.Thread(target=end_when_settled, daemon=True).start()
    late = threading.Timer(30, end_process, (LATE,))
    late.daemon = True
    late.start()
    told["status"] = worker.run_worker(
        app, "contract", queue, claims, batches=1, on_ready=lambda: None, on_stopping=stopping.set
    )
    print(json.dumps(told))


def wait_for(condition: Callable[[], object], seconds: float = 10) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
