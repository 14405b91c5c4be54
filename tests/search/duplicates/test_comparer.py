"""What a worker that compares does if its GPU fails: no panel is to blame, and other GPUs go on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from pipeline.choices import Device
from pipeline.errors import DeviceFault, UsageError
from pipeline.gallery import require_gallery
from pipeline.layout import gallery_folder
from pipeline.model import load_model
from pipeline.queue.comparisons import Comparisons, PanelTask
from pipeline.queue.connection import connect
from pipeline.worker_settings import WorkerSettings
from search.duplicates import comparer
from search.duplicates.comparer import Comparer, Comparing
from search.duplicates.panels import Comparison, panels_of
from search.gallery.opening import open_gallery
from tests.cuda.pretended import uuid
from tests.search.galleries import write_gallery
from workers.devices import DEVICE_FAILED
from workers.heartbeat import GalleryWatch, Heartbeat
from workers.work import Given


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return connect(redis_url)


@pytest.fixture
def given(tmp_path: Path, model_path: Path, redis_url: str, client: redis.Redis) -> Given:
    """A worker's process that has a GPU, and a gallery of 300 rows."""
    folder = gallery_folder(tmp_path / "features", model_path)
    rows = np.random.default_rng(0).standard_normal((300, 12), np.float32)
    write_gallery(folder, load_model(model_path), rows, [f"{number}.jpg" for number in range(300)], 100)
    settings = WorkerSettings(
        media_dir=tmp_path,
        feature_dir=tmp_path / "features",
        model=model_path,
        redis_url=redis_url,
        state_dir=tmp_path,
        gpu=uuid("a"),
    )
    return Given(settings, require_gallery(folder), client)


@pytest.mark.parametrize("fault", [DeviceFault("the GPU failed"), UsageError("3 MB of the GPU's memory are free")])
def test_a_gpu_that_fails_ends_its_process_and_is_no_panels_fault(
    given: Given, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    ended: list[int] = []

    def fails(*_: object) -> Comparison:
        raise fault

    monkeypatch.setattr(comparer, "end_process", ended.append)
    monkeypatch.setattr("search.duplicates.comparer._Opened.comparison", fails)
    panel = next(panels_of(open_gallery(given.settings.folder).whole(), 100))
    task = PanelTask(100, panel.number, panel.end, panel.key, 0.9)
    asked = Comparisons(client, given.gallery.gallery_id)
    asked.ask([task.name])
    heartbeat = Heartbeat(None, None, None, GalleryWatch(given.settings.folder, given.gallery.gallery_id))  # type: ignore[arg-type]
    compare = Comparer(given, Device.cuda, heartbeat)
    for _ in range(6):
        with pytest.raises(DeviceFault, match=str(fault)):
            compare(100, panel.number, panel.end, panel.key, 0.9)
    assert set(ended) == {DEVICE_FAILED}
    seen = asked.seen([task])[task]
    assert (seen.begun, seen.fault, seen.given_up) == (0, None, False)


def test_a_gpu_that_refuses_when_the_process_starts_is_given_up_not_the_worker(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses() -> None:
        raise UsageError("--device cuda: no CUDA device that works") from RuntimeError("No CUDA GPUs are available")

    def lacks() -> None:
        raise UsageError("--device cuda ranks with torch, which is not installed")

    cuda = Given(replace(given.settings, device=Device.cuda), given.gallery, given.client)
    monkeypatch.setattr(comparer, "check_cuda", refuses)
    with pytest.raises(DeviceFault, match=uuid("a")):
        Comparing(cuda)
    assert Comparing(given).device is Device.cpu
    monkeypatch.setattr(comparer, "check_cuda", lacks)
    with pytest.raises(UsageError, match="not installed"):
        Comparing(cuda)
