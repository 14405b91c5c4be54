"""What a worker process reports of itself."""

import json
from pathlib import Path

import pytest

from pipeline.choices import ObjectIds, Role
from pipeline.gallery import GalleryInfo
from pipeline.queue.claims import Claims
from pipeline.queue.connection import connect
from tests.factories import wait_until
from workers import heartbeat
from workers.embed import DONE
from workers.heartbeat import GalleryWatch, Heartbeat, Report
from workers.ledger import Ledger
from workers.process import wait_for_gallery
from workers.readiness import Readiness


def test_a_report_tells_the_time_of_the_images_that_it_counts(redis_url: str) -> None:
    client, ledger = connect(redis_url), Ledger()
    report = Report(client, "0123456789abcdef", "embed", ledger)
    ledger.add("encode", 1.0)
    report.count([DONE] * 10)
    # Of a batch that is not at its end.
    ledger.add("encode", 5.0)
    report.send("working")
    (key,) = client.keys("ruiji:0123456789abcdef:worker:*")
    told = json.loads(client.get(key))
    assert (told["images"], told["ms_per_image"]["encode"], told["state"]) == (10, 100.0, "working")
    report.send("idle")
    told = json.loads(client.get(key))
    assert (told["images"], told["images_per_s"], told["ms_per_image"]["encode"]) == (10, 0.0, 100.0)
    report.remove()
    assert client.keys() == []


def test_a_process_reports_itself_at_once(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A run of a few images is over before a second report.
    monkeypatch.setattr(heartbeat, "_HEARTBEAT_S", 3600.0)
    client, gallery_id = connect(redis_url), "0123456789abcdef"
    claims = Claims(client, gallery_id, visibility_timeout_s=4 * 3600.0)
    report = Report(client, gallery_id, Role.embed, Ledger())
    beats = Heartbeat(report, claims, Readiness(tmp_path), GalleryWatch(tmp_path, gallery_id))
    beats.start()
    wait_until(lambda: client.keys("ruiji:0123456789abcdef:worker:*"), what="a report")
    beats.leave()
    beats.join()
    assert client.keys() == []


def test_a_process_that_waits_for_a_gallery_says_once_in_which_folder_it_looks(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gallery = GalleryInfo("0123456789abcdef", "f" * 64, 12, "tiny", ObjectIds.basename)
    looks = iter([None, None, gallery])
    monkeypatch.setattr("workers.process.read_gallery", lambda folder: next(looks))
    monkeypatch.setattr("workers.process.time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "workers")
    assert wait_for_gallery(Path("typo/tiny"), connect(redis_url), Readiness(tmp_path)) is gallery
    (told,) = caplog.records
    assert told.__dict__["event"] == "waiting_for_gallery"
    assert f"into {tmp_path}/typo/tiny yet" in told.getMessage() and "check --feature-dir" in told.getMessage()
