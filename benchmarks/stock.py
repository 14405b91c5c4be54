"""A Celery app as most people would write it, with nothing to compute: the queue's peer.

`celery -A benchmarks.stock worker` needs `BENCH_REDIS_URL`.
"""

import os
import uuid

from celery import Celery

QUEUE = "stock"

app = Celery("stock", broker=os.environ.get("BENCH_REDIS_URL"), backend=os.environ.get("BENCH_REDIS_URL"))
app.conf.update(
    # The same promises as ruiji's: late acknowledgement, chords that count, JSON, no events.
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue=QUEUE,
    # Stock threads were fastest with this; its default of 4 costs more.
    worker_prefetch_multiplier=64,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
)


@app.task(name="stock.embed")  # type: ignore[untyped-decorator]
def embed(plan: str, segment: int, path: str) -> str:
    """Compute nothing."""
    return "done"


@app.task(name="stock.reduce")  # type: ignore[untyped-decorator]
def reduce(results: list[str]) -> None:
    """The body of the chord."""


def publish_chord(paths: list[str]) -> None:
    """Publish one chord quickly; what is measured with it is the worker."""
    group = uuid.uuid4().hex
    app.backend.set_chord_size(group, len(paths))
    body = dict(app.signature("stock.reduce", task_id=f"{group}.r"))
    with app.producer_or_acquire() as producer, producer.batch(500):
        for index, path in enumerate(paths):
            app.send_task(
                "stock.embed",
                args=(group, 0, path),
                task_id=f"{group}.{index}",
                group_id=group,
                group_index=index,
                chord=body,
                producer=producer,
                add_to_parent=False,
            )


def publish_plainly(paths: list[str]) -> None:
    """What everybody writes first: one `apply_async` a task."""
    for path in paths:
        embed.apply_async(("0123456789abcdef", 0, path))
