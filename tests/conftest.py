"""Fixtures: a clean environment, a real Redis, the command line as a user runs it."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.queue.connection import connect
from pipeline.queue.embedded import embedded_redis
from tests import properties
from tests.factories import Ruiji, tiny_model

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

properties.set_up()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the settings of the person who runs it."""
    for name in [name for name in os.environ if name.startswith("RUIJI_")]:
        monkeypatch.delenv(name)
    # What `make test ARGS=…` was given is not for the make of a test.
    for name in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)
    # A shell lets what it starts in the background ignore Ctrl-C, and so all that that starts in turn.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one real Redis for all tests."""
    with embedded_redis(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of an empty Redis."""
    client = connect(redis_server)
    client.flushall()
    client.close()
    return redis_server


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real ONNX graph of a few kB with the article's contract: 8 x 8 RGB to 12 values."""
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture
def shared_data() -> Path:
    """The photos, models and golden features of the development machines."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared test data beside the checkout, which is not here")
    return SHARED


@pytest.fixture
def ruiji(tmp_path: Path, model_path: Path) -> Iterator[Ruiji]:
    """The command line on a media folder, a feature folder and the tiny model of this test's own."""
    model = tmp_path / model_path.name
    shutil.copy(model_path, model)
    command = Ruiji(tmp_path / "media", tmp_path / "features", model, tmp_path / "state", ROOT)
    yield command
    command.stop_all()
