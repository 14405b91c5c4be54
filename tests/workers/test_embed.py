"""One batch, paths to files: what every object ends as, and what is not its fault."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline.errors import MachineFault
from pipeline.model import load_model
from pipeline.plans.plan import Plan
from pipeline.segments import reduce_segment
from tests.pipeline.galleries import new_plan
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
    assert plan.feature(batch[0].path.rpartition("/")[2]) is not None


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
    with ThreadPoolExecutor(3) as decoders:
        outcomes = embed_batch(plan, batch, fused, tmp_path / "media", ledger, decoders)
    assert outcomes == [DONE, FAILED, DONE, DONE]
    ahead = [plan.feature_file(plan.scheme.object_id(job.path)) for job in batch if outcomes[batch.index(job)] == DONE]
    bits = [path.read_bytes() for path in ahead]
    for path in ahead:
        path.unlink()
    embed_batch(plan, batch, encoder, tmp_path / "media")
    assert [path.read_bytes() for path in ahead] == bits
    assert all(ledger.seconds()[stage] > 0 for stage in ("read", "decode", "wait", "encode", "write"))
