"""What a role is to a worker process: what it makes ready before the first task is taken, and the task itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import redis
from celery import Celery

from pipeline.choices import Device
from pipeline.gallery import GalleryInfo
from pipeline.watchdog import Watchdog
from pipeline.worker_settings import WorkerSettings
from workers.heartbeat import Heartbeat, Report
from workers.ledger import Ledger


@dataclass(frozen=True)
class Given:
    """What a process has before its role counts.

    Attributes:
        client: of Redis.
        ledger: where the process' time goes.
    """

    settings: WorkerSettings
    gallery: GalleryInfo
    client: redis.Redis
    ledger: Ledger = field(default_factory=Ledger)


class Work(ABC):
    """A role, made ready.

    Attributes:
        queue: where its tasks come from.
        device: what it computes on, as `ruiji status` shows it.
        batches: how many batches, or single tasks, are worked on at once.
        prefetch: messages that a thread holds at most, done ones not counted.
        facts: of the event `worker_ready`.
    """

    queue: str
    device: Device = Device.cpu
    batches: int = 1
    prefetch: int = 1
    facts: Mapping[str, str]

    @abstractmethod
    def register(self, app: Celery, heartbeat: Heartbeat, report: Report) -> Watchdog | None:
        """Register the role's task; returns what works beside it from the first task on."""
