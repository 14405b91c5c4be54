"""`--scale worker=N` spreads over the GPUs, which are pretended: every replica finds a driver that names two."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compose.stack import Stack
from tests.conftest import ROOT
from tests.cuda.pretended import BUSY, H200, PretendedCuda, uuid
from tests.factories import wait_until

OVERRIDE = """
services:
  worker:
    environment:
      RUIJI_DEVICE: cuda
      RUIJI_SLOTS: 1
      RUIJI_SLOTS_PER_DEVICE: 2
      PRETENDED_CUDA: /cuda
      LD_LIBRARY_PATH: /cuda
      PYTHONPATH: /cuda
    volumes: ["./cuda:/cuda:ro"]
"""
#: What the processes of a container are shown.
SHOWN = "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep '^CUDA_VISIBLE_DEVICES=' | sort -u"


@pytest.fixture
def stack(new_stack: Callable[..., Stack], tmp_path: Path) -> Stack:
    """Four workers that wait for their first enqueue: their model would want a real device."""
    (tmp_path / "media").mkdir()
    stack = new_stack(tmp_path / "media")
    (stack.folder / "pretended.yml").write_text(OVERRIDE)
    PretendedCuda(stack.folder / "cuda", ROOT).have(H200, BUSY)
    stack.set(COMPOSE_FILE="docker-compose.yml:pretended.yml")
    stack.make("up", "WORKERS=4")
    return stack


def shown(stack: Stack) -> Counter[str]:
    """How many containers are shown each device."""
    return Counter(
        line.partition("=")[2]
        for container in stack.containers("worker")
        for line in stack.run("docker", "exec", container["Id"], "sh", "-c", SHOWN, code=None).stdout.splitlines()
    )


def test_replicas_spread_and_a_killed_ones_slot_goes_to_the_one_that_waits(stack: Stack) -> None:
    assert shown(stack) == {uuid("a"): 2, uuid("b"): 2}
    killed = stack.containers("worker")[0]
    # Without a slot a worker cannot take a task: it is never called healthy.
    stack.compose("up", "-d", "--no-deps", "--no-recreate", "--scale", "worker=5", "worker")
    wait_until(lambda: "slot_waiting" in stack.compose("logs", "worker"), what="a worker that waits for a slot")
    assert [c["State"]["Health"]["Status"] for c in stack.containers("worker")].count("healthy") == 4
    stack.run("docker", "kill", killed["Id"])
    assert sum(shown(stack).values()) == 3
    wait_until(lambda: shown(stack) == {uuid("a"): 2, uuid("b"): 2}, timeout_s=60, what="the dead worker's slot, taken")
