"""Publishing: one Celery task per image, which count as the members of one chord per segment."""

from collections.abc import Callable, Sequence

from celery import Celery
from celery.canvas import Signature

from pipeline.queue.keys import embed_queue
from pipeline.queue.messages import chord_body, written

#: Messages sent in one round trip; more only adds memory.
PUBLISH_BATCH = 100


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
            RedisError, OperationalError: Redis is away; see `broker_faults`.
        """
        queue = embed_queue(self._gallery_id)
        with self._app.producer_or_acquire() as producer:
            for start in range(0, len(rows), PUBLISH_BATCH):
                part = [(n, row, path) for n, (row, path) in enumerate(rows[start : start + PUBLISH_BATCH], start)]
                messages = written(part, self._plan_id, segment, group, self._gallery_id)
                # As kombu would send each of them; together they cost Redis half as much.
                with producer.channel.conn_or_acquire() as client:
                    client.lpush(queue, *messages)
                after_each_batch()

    def body(self, segment: int, group: str) -> None:
        """Send the reduce task of a segment by itself: nothing is left to embed."""
        self._body(segment, group).apply_async()

    def _body(self, segment: int, group: str) -> Signature:
        return self._app.signature(chord_body(group, self._plan_id, segment, self._gallery_id))
