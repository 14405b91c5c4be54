"""Fixtures: a plan, and both its sides, the disk and Redis."""

from pathlib import Path

import pytest
import redis

from pipeline.plans.plan import Plan
from pipeline.queue.app import make_app
from pipeline.queue.chords import Chords
from pipeline.queue.connection import connect
from pipeline.segments import Segments
from tests.pipeline.galleries import new_plan


@pytest.fixture
def plan(tmp_path: Path, model_path: Path) -> Plan:
    """Twenty objects in five segments."""
    return new_plan(tmp_path, model_path, 20)


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return connect(redis_url)


@pytest.fixture
def chords(client: redis.Redis, plan: Plan) -> Chords:
    return Chords(client, plan.gallery_id, plan.plan_id)


@pytest.fixture
def segments(redis_url: str, client: redis.Redis, plan: Plan) -> Segments:
    return Segments(make_app(redis_url, plan.gallery_id, visibility_timeout_s=60), client, plan)
