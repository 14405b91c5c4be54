"""Containers that come and go during a run: it ends unattended, with the same bytes."""

from collections.abc import Callable

import pytest

from tests.compose.stack import Stack
from tests.factories import pictures, wait_until

#: Three shards of large pictures: 20 s for two cores, so that each disturbance falls into the run.
COUNT = 180
SETTINGS = {"RUIJI_SHARD_ROWS": "60", "RUIJI_VISIBILITY_TIMEOUT_S": "5", "RUIJI_STALL_TIMEOUT_S": "6"}


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """Three workers with nothing to do."""
    media = tmp_path_factory.mktemp("pictures") / "media"
    pictures(media, COUNT, size=(2800, 2100), distinct=4)
    stack = new_stack(media)
    stack.set(**SETTINGS)
    stack.make("up", "WORKERS=3")
    return stack


@pytest.fixture(scope="module")
def expected(stack: Stack) -> dict[str, str]:
    """The shards of an undisturbed run."""
    stack.make("enqueue", "ARGS=--wait")
    return stack.shard_digests()


@pytest.fixture
def running(stack: Stack, expected: dict[str, str]) -> Stack:
    """Three workers in the middle of making all shards anew."""
    stack.make("scale", "WORKERS=3")
    for path in stack.gallery.glob("[0-9]*"):
        if path.is_file():
            path.unlink()
    stack.make("enqueue")
    stack.wait_for_progress()
    return stack


def finish(stack: Stack, expected: dict[str, str]) -> None:
    """Only look; nothing is set going again."""
    wait_until(lambda: not stack.running(), timeout_s=240, what="the end of the run")
    status = stack.status()
    assert (status["done"], status["failed"], status["pending"], status["running"]) == (COUNT, 0, 0, 0)
    assert stack.shard_digests() == expected


def test_scaling_down_and_up_again(running: Stack, expected: dict[str, str]) -> None:
    running.make("scale", "WORKERS=1")
    assert len(running.containers("worker")) == 1
    running.wait_for_progress()
    assert "with docker compose" in running.make("scale", "WORKERS=4").stderr
    assert len(running.containers("worker")) == 4
    finish(running, expected)


def test_a_worker_and_a_reducer_are_killed(running: Stack, expected: dict[str, str]) -> None:
    for service in ("worker", "reducer"):
        running.run("docker", "kill", running.containers(service)[0]["Id"])
    assert (len(running.containers("worker")), len(running.containers("reducer"))) == (2, 1)
    finish(running, expected)


def test_a_container_whose_process_dies_is_started_again(running: Stack, expected: dict[str, str]) -> None:
    container = running.containers("worker")[0]
    # The supervisor, all that the container's init runs; not an order as `docker kill` is, but a crash.
    crash = ["docker", "exec", container["Id"], "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)"]
    running.run(*crash, code=None)
    wait_until(
        lambda: any(c["RestartCount"] for c in running.containers("worker")), timeout_s=60, what="a restarted container"
    )
    finish(running, expected)


def test_redis_is_restarted(running: Stack, expected: dict[str, str]) -> None:
    running.compose("restart", "redis")
    finish(running, expected)


def test_the_machine_is_rebooted(running: Stack, expected: dict[str, str]) -> None:
    # Pretended: all containers and the network go, the volume of Redis and the folders stay.
    running.make("down")
    assert not running.compose("ps", "-q").split()
    running.make("up", "WORKERS=3")
    finish(running, expected)


def test_make_down_says_what_it_stopped_and_nothing_is_left(stack: Stack) -> None:
    assert "with docker compose" in stack.make("down").stderr
    assert not stack.compose("ps", "-aq").split()
    assert stack.make("scale", "WORKERS=2", code=2).stderr.startswith("nothing is up here")
