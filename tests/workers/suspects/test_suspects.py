"""Images that kill their worker: found, run alone, and failed without blaming their batch mates."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline import layout
from pipeline.errors import ImageError, MachineFault
from pipeline.model import load_model
from pipeline.plans.closing import close_plan
from pipeline.plans.plan import Limits, Plan
from pipeline.segments import reduce_segment
from tests.conftest import ROOT
from tests.factories import picture
from tests.pipeline.galleries import new_plan
from tests.workers.poison import POISON_PATH, poison
from workers.decode.images import load_pixels
from workers.embed import DONE, FAILED, Job, embed_guarded
from workers.encoder import Encoder
from workers.suspects.alone import ChildDied, decode_alone
from workers.suspects.deaths import note_deaths, read_suspect, suspect_names
from workers.suspects.in_hand import InHand, left_behind, read_in_hand

LIMITS = Limits(max_pixels=10**8, max_image_s=5, max_image_mb=256)


@pytest.fixture
def encoder(model_path: Path) -> Encoder:
    return Encoder(load_model(model_path), "cpu")


@pytest.fixture
def plan(tmp_path: Path, model_path: Path) -> Plan:
    """Four objects in one segment."""
    return new_plan(tmp_path, model_path, 4)


@pytest.fixture
def poisonous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of this test meet their end at poisonous images; this process does not."""
    monkeypatch.setenv("PYTHONPATH", POISON_PATH)


def jobs(plan: Plan) -> list[Job]:
    return [Job(plan.segments[0], path) for path in plan.paths(plan.segments[0])]


def test_alone_the_pixels_are_the_same(tmp_path: Path, encoder: Encoder) -> None:
    path = picture(tmp_path / "p.png", 3, (300, 200))
    spec = encoder.model.spec
    decoded = decode_alone(path, spec, LIMITS)
    assert (decoded.pixels == load_pixels(path, spec, LIMITS.max_pixels)).all()
    assert decoded.digest == hashlib.sha256(path.read_bytes()).digest()


def test_alone_bad_files_have_the_same_reasons(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "text.jpg").write_text("<html>")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (("text.jpg", "undecodable"), ("none.jpg", "missing"), ("pipe.jpg", "not-a-file")):
        with pytest.raises(ImageError) as caught:
            decode_alone(tmp_path / name, encoder.model.spec, LIMITS)
        assert caught.value.reason == reason


def test_alone_memory_is_limited(tmp_path: Path, encoder: Encoder) -> None:
    Image.new("RGB", (6000, 6000)).save(tmp_path / "large.png")
    assert decode_alone(tmp_path / "large.png", encoder.model.spec, Limits(10**8, 60, 1024)).pixels.shape == (8, 8, 3)
    with pytest.raises(ImageError, match="more than 64 MB") as caught:
        decode_alone(tmp_path / "large.png", encoder.model.spec, Limits(10**8, 60, 64))
    assert caught.value.reason == "memory"


@pytest.mark.parametrize(("kind", "reason"), [("segfault", "crashed-worker"), ("endless", "timeout")])
def test_alone_a_crash_and_an_endless_decode_end_only_the_child(
    tmp_path: Path, encoder: Encoder, poisonous: None, kind: str, reason: str
) -> None:
    with pytest.raises(ChildDied) as caught:
        decode_alone(poison(tmp_path / "x.png", kind), encoder.model.spec, Limits(10**8, 1, 256))
    assert caught.value.reason == reason


def test_alone_a_child_that_cannot_start_is_the_machines_fault(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises((MachineFault, ChildDied)):
        decode_alone(picture(tmp_path / "p.png"), encoder.model.spec, LIMITS)


def test_only_deaths_alone_count_beyond_the_first(plan: Plan) -> None:
    paths = [job.path for job in jobs(plan)]
    assert suspect_names(plan) == frozenset()
    for _ in range(5):
        note_deaths(plan, paths, "crashed-worker", alone=False)
    assert [read_suspect(plan, path).deaths for path in paths] == [1] * 4
    note_deaths(plan, paths[:1], "timeout", alone=True)
    note_deaths(plan, paths, "crashed-worker", alone=False)
    assert [read_suspect(plan, path).deaths for path in paths] == [2, 1, 1, 1]
    close_plan(plan)
    assert not layout.suspects_folder(plan.folder, plan.plan_id).exists()


def test_what_the_system_ends_for_lack_of_memory_is_not_said_to_have_reached_the_limit(plan: Plan) -> None:
    path = jobs(plan)[0].path
    for _ in range(3):
        note_deaths(plan, [path], "memory", alone=True)
    failure = read_suspect(plan, path).failure(LIMITS)
    assert (failure.reason, failure.attempts) == ("memory", 3)
    assert "memory ran out" in str(failure) and str(LIMITS.max_image_mb) not in str(failure)


@pytest.mark.parametrize("kind", ["segfault", "hog", "endless"])
def test_the_third_death_fails_the_image_and_no_other(
    tmp_path: Path, plan: Plan, encoder: Encoder, poisonous: None, kind: str
) -> None:
    batch = jobs(plan)
    undisturbed = embed_guarded(plan, batch[:1], encoder, tmp_path / "media", InHand())
    poison(tmp_path / "media" / batch[2].path, kind)
    note_deaths(plan, [job.path for job in batch[1:]], "crashed-worker", alone=False)
    outcomes = undisturbed + embed_guarded(plan, batch[1:], encoder, tmp_path / "media", InHand())
    assert outcomes == [DONE, DONE, FAILED, DONE]
    error = plan.error(plan.scheme.object_id(batch[2].path))
    assert error is not None
    assert error[0] == {"segfault": "crashed-worker", "hog": "memory", "endless": "timeout"}[kind]
    assert suspect_names(plan) == frozenset(), "nothing is held against what is settled"
    assert reduce_segment(plan, plan.segments[0], lambda: None).rows == 3


def test_what_is_in_hand_is_told_and_taken_back(tmp_path: Path) -> None:
    hand = InHand(tmp_path / "hand")
    assert read_in_hand(tmp_path / "hand") == {}
    with hand.hold("p", ["a" * 500, "b"], 60), hand.hold("p", ["c"], 60, alone=True):
        first, second = read_in_hand(tmp_path / "hand").values()
        assert (first.paths, first.alone, first.limit_s) == (("a" * 500, "b"), False, 60)
        assert (second.paths, second.alone) == (("c",), True)
    assert read_in_hand(tmp_path / "hand") == {}
    with hand.hold("p", ["short"], 60):
        (only,) = read_in_hand(tmp_path / "hand").values()
        assert only.paths == ("short",), "what is left of the longer line does not count"
    with left_behind(tmp_path / "hand") as holds:
        assert holds is None, "its process lives"
    assert (tmp_path / "hand").stat().st_mode & 0o077 == 0


def test_a_dead_process_leaves_its_suspects_once(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from workers.suspects.in_hand import InHand\n"
        "with InHand(Path(sys.argv[1])).hold('p', ['x', 'y'], 60): print('held', flush=True); time.sleep(60)"
    )
    file = tmp_path / "hand"
    child = subprocess.Popen([sys.executable, "-c", script, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    child.kill()
    child.wait()
    child.stdout.close()
    with pytest.raises(OSError, match="disk full"), left_behind(file) as holds:
        raise OSError("disk full")
    with left_behind(file) as holds:
        assert holds is not None
        assert [hold.paths for hold in holds] == [("x", "y")]
    with left_behind(file) as holds:
        assert holds is None


def test_a_file_that_takes_longer_to_read_than_anybody_waits_is_its_own_fault(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.suspects.alone._READ_TIMEOUT_S", 10.0)
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        # It takes no space.
        file.truncate(2 << 40)
    with pytest.raises((ImageError, ChildDied)):
        decode_alone(path, encoder.model.spec, Limits(max_pixels=10**8, max_image_s=2, max_image_mb=64))
