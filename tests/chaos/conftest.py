"""Fixtures: the undisturbed run that every disturbed one is compared with, and a Redis to maltreat."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.harness import Server, redis_server, sized
from tests.conftest import ROOT
from tests.factories import Ruiji, pictures

#: Pictures that take some 40 ms each: enough to be disturbed in the middle.
COUNT = sized(240, 5000)
ROWS = sized(40, 250)
#: Short, so that what a dead worker held comes back soon; both are documented settings.
FAST = {"RUIJI_VISIBILITY_TIMEOUT_S": "3", "RUIJI_STALL_TIMEOUT_S": "4", "RUIJI_SHARD_ROWS": str(ROWS)}
SHIPPED = {"RUIJI_SHARD_ROWS": str(ROWS)}


@dataclass
class Undisturbed:
    """A finished run: its files, and how long it took with two embed processes, start-up included."""

    command: Ruiji
    seconds: float


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder takes minutes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Undisturbed:
    """A finished run over all pictures."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pictures(folder / "media", COUNT, size=(1600, 1200), distinct=10)
    shutil.copy(model_path, folder)
    command = Ruiji(folder / "media", folder / "features", folder / model_path.name, folder / "state", ROOT)
    started = time.monotonic()
    # As `finish` waits: on a busy machine 5,000 pictures take more than a command usually may.
    command("run", "--workers", "2", "--shard-rows", str(ROWS), timeout_s=1200)
    return Undisturbed(command, time.monotonic() - started)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Redis of this test's own."""
    with redis_server(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def disturbed(ruiji: Ruiji, server: Server, undisturbed: Undisturbed) -> Ruiji:
    """The same pictures, to be worked on with short timeouts."""
    ruiji.media = undisturbed.command.media
    ruiji.environment = {**FAST, "RUIJI_REDIS_URL": server.url}
    return ruiji


def finish(ruiji: Ruiji, undisturbed: Undisturbed, timeout_s: float = 600) -> None:
    """Wait for the end; nothing lost, nothing failed, every shard once and with the undisturbed bytes."""
    ruiji("enqueue", "--wait", timeout_s=timeout_s)
    assert ruiji.shard_digests() == undisturbed.command.shard_digests()
    status = json.loads(ruiji("status", "--json").stdout)
    assert (status["done"], status["failed"], status["pending"], status["running"]) == (COUNT, 0, 0, 0)
    assert ruiji("verify").stdout == "", "no leftovers, no gaps"
