"""Publishing: one Celery task per image, which count as the members of one chord per segment."""

from collections.abc import Callable, Sequence

from celery import Celery
from celery.canvas import Signature

from pipeline.queue.keys import EMBED_TASK, embed_queue, task_id
from pipeline.queue.messages import chord_body

#: Messages sent in one round trip; more only adds memory.
PUBLISH_BATCH = 100
#: Headers that Celery's protocol leaves out or takes as empty; written out they are a sixth of a message, which Redis
#: holds for every row in flight.
_OPTIONAL_HEADERS = (
    "shadow",
    "eta",
    "expires",
    "timelimit",
    "parent_id",
    "argsrepr",
    "kwargsrepr",
    "replaced_task_nesting",
    "stamped_headers",
    "stamps",
)


class Publisher:
    """Sends one plan's tasks."""

    def __init__(self, app: Celery, gallery_id: str, plan_id: str) -> None:
        self._app = app
        self._gallery_id, self._plan_id = gallery_id, plan_id

    def members(
        self, segment: int, group: str, rows: Sequence[tuple[int, str]], after_each_batch: Callable[[], object]
    ) -> None:
        """Send an embed task for each row of a segment, as the members of one chord.

        Args:
            rows: number in the todo list and path.
            after_each_batch: called after each round trip; what it raises ends the sending.

        Raises:
            OperationalError, BatchPublishError: Redis is away; see `broker_faults`.
        """
        amqp, body = self._app.amqp, dict(self._body(segment, group))
        queue = amqp.queues[embed_queue(self._gallery_id)]
        with self._app.producer_or_acquire() as producer:
            for start in range(0, len(rows), PUBLISH_BATCH):
                # kombu's batch sends a whole pipeline at once: 5 times as fast as one call per task.
                with producer.batch(PUBLISH_BATCH):
                    for index, (row, path) in enumerate(rows[start : start + PUBLISH_BATCH], start):
                        # The two halves of `send_task`, without its routing, and without a result that nobody asks for.
                        message = amqp.as_task_v2(
                            task_id(group, row),
                            EMBED_TASK,
                            args=(self._plan_id, segment, path),
                            group_id=group,
                            group_index=index,
                            chord=body,
                            ignore_result=True,
                            argsrepr="",
                            kwargsrepr="",
                        )
                        for name in _OPTIONAL_HEADERS:
                            message.headers.pop(name, None)
                        # The exchange without a name routes by the queue's: there is nothing to declare.
                        amqp.send_task_message(producer, EMBED_TASK, message, queue=queue, declare=(), retry=False)
                after_each_batch()

    def body(self, segment: int, group: str) -> None:
        """Send the reduce task of a segment by itself: nothing is left to embed."""
        self._body(segment, group).apply_async()

    def _body(self, segment: int, group: str) -> Signature:
        return self._app.signature(chord_body(group, self._plan_id, segment, self._gallery_id))
