"""A Docker engine: one that answers, else one that the development machines know how to start, else none."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compose.stack import Stack
from tests.conftest import ROOT
from tests.factories import tiny_model

STARTER = ROOT.parent / "shared" / "tools" / "compose-engine.sh"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts containers."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.compose)


def answers() -> bool:
    commands = (["docker", "version"], ["docker", "compose", "version"])
    try:
        return all(subprocess.run(command, capture_output=True).returncode == 0 for command in commands)
    except FileNotFoundError:
        return False


@pytest.fixture(scope="session")
def engine() -> Iterator[None]:
    """A Docker engine with compose v2."""
    if answers():
        yield
        return
    if not STARTER.exists():
        pytest.skip("no Docker engine with compose v2 answers here")
    started = subprocess.run([STARTER, "start"], capture_output=True, text=True, timeout=600)
    if started.returncode or not answers():
        pytest.skip(f"no Docker engine could be started: {started.stderr[-300:]}")
    yield
    subprocess.run([STARTER, "stop"], capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def new_stack(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Stack]]:
    """Makes installations; the tiny model and a feature folder of its own unless others are given."""
    stacks: list[Stack] = []

    def make(media: Path, features: Path | None = None, model: Path | None = None) -> Stack:
        folder = tmp_path_factory.mktemp("host")
        project = f"ruiji-test-{os.getpid()}-{folder.name}"
        model = model or tiny_model(folder / "model" / "tiny.onnx")
        stacks.append(Stack(folder / "ruiji", project, media, features or folder / "features", model))
        return stacks[-1]

    yield make
    for stack in stacks:
        stack.remove()
