"""One batch, paths to files: what every object ends as, and what is not its fault."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from pipeline.errors import MachineFault
from pipeline.model import load_model
from pipeline.plans.plan import Plan
from pipeline.segments import reduce_segment
from tests.pipeline.galleries import new_plan
from workers.decode import images
from workers.decode.ahead import Decoders
from workers.decode.images import Decoded, decode_whole
from workers.embed import DONE, FAILED, LATE, SKIPPED, Job, embed_batch
from workers.encoder import Encoder
from workers.ledger import Ledger


@pytest.fixture
def plan(tmp_path: Path, model_path: Path) -> Plan:
    """Four objects in one segment."""
    return new_plan(tmp_path, model_path, 4)


@pytest.fixture
def encoder(model_path: Path) -> Encoder:
    return Encoder(load_model(model_path), "cpu")


def jobs(plan: Plan) -> list[Job]:
    return [Job(plan.segments[0], path) for path in plan.paths(plan.segments[0])]


def failure(plan: Plan, job: Job) -> str | None:
    error = plan.error(plan.scheme.object_id(job.path))
    return error[0] if error else None


def test_every_object_ends_as_a_feature_or_a_failure(tmp_path: Path, plan: Plan, encoder: Encoder) -> None:
    batch = jobs(plan)
    (tmp_path / "media" / batch[1].path).write_text("no image")
    (tmp_path / "media" / batch[2].path).unlink()
    assert embed_batch(plan, batch, encoder, tmp_path / "media") == [DONE, FAILED, FAILED, DONE]
    assert [failure(plan, job) for job in batch] == [None, "undecodable", "missing", None]
    assert plan.feature(plan.segments[0], batch[0].path.rpartition("/")[2]) is not None


def digests(plan: Plan, batch: list[Job]) -> list[bytes]:
    found = [plan.feature(job.segment, plan.scheme.object_id(job.path)) for job in batch]
    return [embedded.digest for embedded in found if embedded is not None]


@pytest.mark.parametrize("whole", [True, False], ids=["in memory", "by the decoder"])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_feature_has_the_digest_of_its_file(
    tmp_path: Path, plan: Plan, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, whole: bool, ahead: bool
) -> None:
    if not whole:
        monkeypatch.setattr("workers.decode.files.READ_WHOLE_BYTES", 0)
    batch = jobs(plan)
    (tmp_path / "media" / batch[2].path).write_bytes((tmp_path / "media" / batch[1].path).read_bytes())
    expected = [hashlib.sha256((tmp_path / "media" / job.path).read_bytes()).digest() for job in batch]
    decoders = Decoders(2, encoder.model.spec) if ahead else None
    embed_batch(plan, batch, encoder, tmp_path / "media", decoders=decoders)
    assert digests(plan, batch) == expected
    assert expected[1] == expected[2] != expected[0]
    reduce_segment(plan, plan.segments[0], lambda: None)
    assert np.load(plan.folder / "0000.digests.npy").tolist() == [list(digest) for digest in expected]


def test_a_digest_is_of_the_bytes_that_were_decoded(tmp_path: Path, plan: Plan, encoder: Encoder) -> None:
    batch = jobs(plan)[:1]
    image = tmp_path / "media" / batch[0].path
    before = image.read_bytes()

    def decode(*arguments: Any) -> Decoded:
        # It was read by now; somebody saves another picture under its name.
        image.write_bytes(b"another picture")
        return decode_whole(*arguments)

    assert embed_batch(plan, batch, encoder, tmp_path / "media", decode_file=decode) == [DONE]
    assert digests(plan, batch) == [hashlib.sha256(before).digest()]


@pytest.mark.parametrize("change", ["longer", "same size"])
def test_a_large_file_that_changes_while_it_is_read_has_no_row(
    tmp_path: Path, plan: Plan, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr("workers.decode.files.READ_WHOLE_BYTES", 0)
    batch = jobs(plan)[:1]
    image = tmp_path / "media" / batch[0].path
    os.utime(image, (1, 1))

    real = images.decode

    def decode(*arguments: Any) -> NDArray[np.uint8]:
        pixels = real(*arguments)
        image.write_bytes(image.read_bytes() + b"more" * (change == "longer"))
        return pixels

    monkeypatch.setattr(images, "decode", decode)
    assert embed_batch(plan, batch, encoder, tmp_path / "media") == [FAILED]
    assert failure(plan, batch[0]) == "truncated"
    monkeypatch.undo()
    assert embed_batch(plan, jobs(plan)[1:], encoder, tmp_path / "media") == [DONE] * 3


def test_what_is_done_is_not_done_again(tmp_path: Path, plan: Plan, encoder: Encoder) -> None:
    (tmp_path / "media" / jobs(plan)[1].path).write_text("no image")
    embed_batch(plan, jobs(plan), encoder, tmp_path / "media")
    assert embed_batch(plan, jobs(plan), encoder, tmp_path / "media") == [SKIPPED] * 4


def test_a_truncated_feature_file_is_made_again(tmp_path: Path, plan: Plan, encoder: Encoder) -> None:
    embed_batch(plan, jobs(plan), encoder, tmp_path / "media")
    path = plan.feature_file(plan.scheme.object_id(jobs(plan)[0].path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert embed_batch(plan, jobs(plan), encoder, tmp_path / "media")[0] == DONE
    assert path.read_bytes() == whole


def test_a_late_duplicate_leaves_nothing_behind(tmp_path: Path, plan: Plan, encoder: Encoder) -> None:
    embed_batch(plan, jobs(plan), encoder, tmp_path / "media")
    reduce_segment(plan, plan.segments[0], lambda: None)
    assert embed_batch(plan, jobs(plan), encoder, tmp_path / "media") == [LATE] * 4
    assert not list(plan.folder.glob("??/??/*"))


def test_a_shard_published_while_its_last_duplicate_computes_leaves_nothing_behind(
    tmp_path: Path, plan: Plan, encoder: Encoder
) -> None:
    class Slow(Encoder):
        """Computes so slowly that the shard is published meanwhile by others."""

        def encode(self, pixels: np.ndarray) -> np.ndarray:
            embed_batch(plan, jobs(plan), encoder, tmp_path / "media")
            reduce_segment(plan, plan.segments[0], lambda: None)
            return super().encode(pixels)

    assert embed_batch(plan, jobs(plan), Slow(encoder.model, "cpu"), tmp_path / "media") == [LATE] * 4
    assert not list(plan.folder.glob("??/??/*"))


def test_a_media_folder_that_is_gone_fails_no_object(tmp_path: Path, plan: Plan, encoder: Encoder) -> None:
    (tmp_path / "media").rename(tmp_path / "away")
    (tmp_path / "media").mkdir()
    with pytest.raises(MachineFault, match="is gone"):
        embed_batch(plan, jobs(plan), encoder, tmp_path / "media")
    assert [failure(plan, job) for job in jobs(plan)] == [None] * 4


def test_nothing_outside_the_media_folder_is_read(tmp_path: Path, plan: Plan, encoder: Encoder) -> None:
    batch = jobs(plan)
    image = tmp_path / "media" / batch[0].path
    image.rename(tmp_path / "secret.png")
    image.symlink_to(tmp_path / "secret.png")
    inside = tmp_path / "media" / batch[1].path
    inside.rename(tmp_path / "media" / "real.png")
    inside.symlink_to(tmp_path / "media" / "real.png")
    assert embed_batch(plan, batch[:2], encoder, tmp_path / "media") == [FAILED, DONE]
    assert failure(plan, batch[0]) == "outside-media"


def test_features_that_are_not_finite_are_a_failure(tmp_path: Path, plan: Plan, model_path: Path) -> None:
    graph = onnx.load(model_path)
    broken = numpy_helper.to_array(graph.graph.initializer[0]) * np.float32(np.inf)
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(broken, "weights"))
    onnx.save(graph, tmp_path / "broken.onnx")
    encoder = Encoder(load_model(tmp_path / "broken.onnx"), "cpu")
    assert embed_batch(plan, jobs(plan), encoder, tmp_path / "media") == [FAILED] * 4
    assert failure(plan, jobs(plan)[0]) == "not-finite"


def test_decoding_ahead_in_threads_changes_no_outcome_and_no_bit(
    tmp_path: Path, plan: Plan, model_path: Path, encoder: Encoder
) -> None:
    batch = jobs(plan)
    (tmp_path / "media" / batch[1].path).write_text("no image")
    ledger = Ledger()
    fused = Encoder(load_model(model_path), "cpu", batch_images=4)
    decoders = Decoders(3, encoder.model.spec)
    outcomes = embed_batch(plan, batch, fused, tmp_path / "media", ledger, decoders)
    assert outcomes == [DONE, FAILED, DONE, DONE]
    ahead = [plan.feature_file(plan.scheme.object_id(job.path)) for job in batch if outcomes[batch.index(job)] == DONE]
    bits = [path.read_bytes() for path in ahead]
    for path in ahead:
        path.unlink()
    embed_batch(plan, batch, encoder, tmp_path / "media")
    assert [path.read_bytes() for path in ahead] == bits
    assert all(ledger.seconds()[stage] > 0 for stage in ("read", "decode", "wait", "encode", "write"))
