"""The Celery app: queues, and settings with their reasons."""

from celery import Celery
from kombu import Exchange, Queue

from pipeline.choices import Transport
from pipeline.queue.connection import CONNECT_TIMEOUT_S, HEALTH_CHECK_S, SOCKET_TIMEOUT_S
from pipeline.queue.keys import compare_queue, embed_queue, reduce_queue, unacked_keys


def make_app(
    redis_url: str,
    gallery_id: str,
    *,
    visibility_timeout_s: int,
    prefetch: int = 1,
    transport: Transport = Transport.stock,
) -> Celery:
    """One gallery's Celery app.

    Args:
        visibility_timeout_s: seconds after which a dead worker's messages go to another; a publisher has no use for it.
        prefetch: messages that a thread of a worker holds at most, done ones not counted.
        transport: fast for a worker's own transport and backend, which serve batches; stock for Celery's.
    """
    queues = (embed_queue(gallery_id), reduce_queue(gallery_id), compare_queue(gallery_id))
    fast = transport == Transport.fast
    backend = f"pipeline.queue.chord_parts:Backend+{redis_url}" if fast else redis_url
    app = Celery("ruiji", broker=redis_url, backend=backend, set_as_current=False)
    app.conf.update(
        broker_transport=f"pipeline.queue.transport:{'Transport' if fast else 'StockTransport'}",
        # A connection that falls silent is given up, at the broker's side and at the backend's.
        redis_socket_timeout=SOCKET_TIMEOUT_S,
        redis_socket_connect_timeout=CONNECT_TIMEOUT_S,
        redis_socket_keepalive=True,
        redis_backend_health_check_interval=HEALTH_CHECK_S,
        # The message outlives a killed worker.
        task_acks_late=True,
        # The files are the result; chords still count.
        task_ignore_result=True,
        # Small, inspectable, safe. Pickle is never accepted.
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        # Only chord counters expire; a segment may wait this long for its first member.
        result_expires=14 * 24 * 3600,
        # Rows are placed by their path, not by the order of results; a list is half of a sorted set.
        result_backend_transport_options={"result_chord_ordered": False},
        broker_transport_options={
            **unacked_keys(gallery_id),
            "visibility_timeout": visibility_timeout_s,
            # kombu's default sweeps for dead workers' messages every 100 s.
            "unacked_restore_interval": max(1, min(10, visibility_timeout_s // 4)),
            "unacked_restore_throttle": 1,
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_keepalive": True,
            # Also how often, and how long after its time, a waiting pop is looked at that got no answer.
            "health_check_interval": HEALTH_CHECK_S,
            # A sweeper that is killed keeps all others from sweeping for this long; kombu's default is 300 s.
            "unacked_mutex_expire": 10,
        },
        # Each with an exchange of its own: queues that share one and its key would both get every task. Nothing is
        # declared: messages go by the queue's name, and a binding would stay in Redis for ever.
        task_queues=[Queue(name, Exchange(name), routing_key=name, no_declare=True) for name in queues],
        task_create_missing_queues=False,
        task_default_queue=embed_queue(gallery_id),
        worker_prefetch_multiplier=prefetch,
        # Nobody listens to them, and each costs a connection or CPU per image.
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        # A lost Redis is waited for, for ever: the work is safe on disk.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    return app
