"""Near-duplicates on many machines: whatever dies or is lost, the answer is that of one machine, byte for byte."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import layout
from pipeline.gallery import require_gallery
from pipeline.model import load_model
from pipeline.queue.comparisons import ASKED_S
from pipeline.queue.connection import connect
from pipeline.queue.keys import compare_key, compare_queue, place_key
from tests.conftest import ROOT
from tests.factories import Ruiji, kill, only_line, wait_until, worker_processes
from tests.search.galleries import write_article_shard, write_gallery, write_shard

PANELS, PANEL_ROWS, LENGTH = 12, 150, 12
ROWS = PANELS * PANEL_ROWS
#: Short, so that what a dead worker held comes back soon, and small, so that there are many panels.
CHANGED = {
    "RUIJI_VISIBILITY_TIMEOUT_S": "3",
    "RUIJI_STALL_TIMEOUT_S": "4",
    "TEST_PANEL_ROWS": str(PANEL_ROWS),
    "PYTHONPATH": f"{Path(__file__).parent / 'disturbed'}{os.pathsep}{ROOT}",
}
#: A Python with numpy and Celery takes a second to start, on a machine that does much else a minute.
START_S = 240.0
FIND = ("near-duplicates", "--threshold", "0.999", "--format", "json")


def some_rows(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Random rows of which every third is a copy, equal or a little different."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, LENGTH), np.float32)
    copies = rng.permutation(count)[: count // 3]
    rows[copies] = rows[rng.integers(0, count, len(copies))]
    some = copies[::2]
    rows[some] += np.float32(0.01) * rng.standard_normal((len(some), LENGTH), np.float32)
    return rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> "Undisturbed":
    """A gallery, and what one machine answers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    paths = [f"{row % 7}/{row:06d}.jpg" for row in range(ROWS)]
    command = Ruiji(folder / "media", folder / "features", folder / "tiny.onnx", folder / "state", ROOT)
    write_gallery(command.gallery, load_model(model_path), some_rows(ROWS), paths, PANEL_ROWS)
    command.environment = CHANGED
    answer = command(*FIND).stdout
    files = pair_files(command)
    assert len(files) == PANELS and json.loads(answer)
    forget_pairs(command)
    return Undisturbed(command.features, answer, files)


@pytest.fixture
def comparing(ruiji: Ruiji, redis_url: str, undisturbed: "Undisturbed") -> Ruiji:
    """That gallery, a Redis, and no worker yet. Neither images nor the model's file are needed."""
    shutil.copytree(undisturbed.features, ruiji.features)
    ruiji.model.unlink()
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, **CHANGED}
    return ruiji


@dataclass(frozen=True)
class Undisturbed:
    """What one machine has.

    Attributes:
        answer: on stdout.
        files: digests of the files of pairs, by name.
    """

    features: Path
    answer: str
    files: dict[str, str]


def pair_files(ruiji: Ruiji) -> dict[str, str]:
    """Digests of the files of pairs, by name."""
    cache = layout.cache_folder(ruiji.gallery)
    names = sorted(name for name in os.listdir(cache) if layout.panel_of(name))
    return {name: hashlib.sha256((cache / name).read_bytes()).hexdigest() for name in names}


def forget_pairs(ruiji: Ruiji) -> None:
    for name in pair_files(ruiji):
        (layout.cache_folder(ruiji.gallery) / name).unlink()


def start_workers(ruiji: Ruiji, count: int = 2) -> list["subprocess.Popen[str]"]:
    """Workers that are there before anybody asks."""
    started = [ruiji.start("worker", "--role", "compare", "--threads", "1") for _ in range(count)]
    wait_until(lambda: len(ruiji.status().workers) == count, START_S, what="the workers")
    return started


@pytest.fixture
def begun(comparing: Ruiji, tmp_path: Path) -> Path:
    """A file that gets the number of each panel that a worker begins."""
    comparing.environment["TEST_BEGUN"] = str(tmp_path / "begun")
    (tmp_path / "begun").touch()
    return tmp_path / "begun"


def test_two_workers_give_the_answer_of_one_machine_and_its_files(
    comparing: Ruiji, begun: Path, redis_url: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    # Nobody dies here, so that no panel may be begun twice, however slow the machine is.
    comparing.environment |= {"TEST_TILE_S": "0.1", "RUIJI_VISIBILITY_TIMEOUT_S": "60"}
    start_workers(comparing)
    cache = layout.cache_folder(comparing.gallery)
    cache.mkdir(exist_ok=True)
    # Of rows that are no more: whoever has something compared removes it.
    layout.pairs_file(cache, 0, "0" * 16, 0.95, 0).touch()
    # Two who ask for the same share the work.
    asking = [comparing.start(*FIND, "--distributed", answer=tmp_path / f"answer{n}") for n in range(2)]
    wait_until(
        lambda: [worker.state for worker in comparing.status().workers] == ["working"] * 2,
        timeout_s=START_S,
        what="both",
    )
    assert 0 < comparing.status().comparing <= PANELS
    assert [process.wait(START_S) for process in asking] == [0, 0]
    assert {(tmp_path / f"answer{n}").read_text() for n in range(2)} == {undisturbed.answer}
    assert pair_files(comparing) == undisturbed.files
    assert Counter(begun.read_text().split()) == Counter(map(str, range(PANELS)))
    # What is there serves for every filter and any higher threshold; no worker is needed.
    comparing.stop_all()
    for more in (["--where", "path=1/"], ["--threshold", "0.99999"]):
        assert comparing(*FIND, *more, "--distributed").stdout == comparing(*FIND, *more).stdout != undisturbed.answer
    client = connect(redis_url)
    left = {key.split(":")[-1] for key in map(str, client.scan_iter())}
    assert left <= {"place", "asked"}
    assert comparing.status().comparing == 0


def _goes_on(begun: Path, before: str, asking: "subprocess.Popen[str]") -> bool:
    return begun.read_text() != before or asking.poll() is not None


def test_killed_workers_and_clients_a_redis_that_forgets_and_damaged_files_cost_time_only(
    comparing: Ruiji, begun: Path, redis_url: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    comparing.environment["TEST_TILE_S"] = "0.2"
    workers, client, chance = start_workers(comparing), connect(redis_url), random.Random(7)

    def ask() -> "subprocess.Popen[str]":
        return comparing.start(*FIND, "--distributed", answer=tmp_path / "answer", errors=tmp_path / "errors")

    asking, dealt = ask(), []
    for blow in ("process", "damage", "client", "redis", "worker", "damage", "process", "client", "redis", "process"):
        before = begun.read_text()
        # Some panel is in hand now that was not at the last blow.
        wait_until(partial(_goes_on, begun, before, asking), timeout_s=START_S, what="work")
        time.sleep(chance.uniform(0, 0.5))
        found = sorted(pair_files(comparing))
        if asking.poll() is not None:
            break
        if blow == "process" and (victims := worker_processes("compare")):
            kill(chance.choice(victims))
        elif blow == "worker":
            workers[0].kill()
            workers[0] = comparing.start("worker", "--role", "compare", "--threads", "1")
        elif blow == "redis":
            client.flushall()
        elif blow == "client":
            asking.kill()
            asking.wait()
            asking = ask()
        elif found:
            path = layout.cache_folder(comparing.gallery) / chance.choice(found)
            data = bytearray(path.read_bytes())
            data[chance.randrange(len(data))] ^= 1
            path.write_bytes(data)
        dealt.append(blow)
    assert {"process", "redis", "client"} <= set(dealt), dealt
    assert asking.wait(START_S) == 0, (tmp_path / "errors").read_text()
    assert (tmp_path / "answer").read_text() == undisturbed.answer
    # A file that was damaged after it was read is found out by the next one who reads it.
    comparing(*FIND)
    assert pair_files(comparing) == undisturbed.files


def test_a_worker_that_is_told_to_stop_gives_its_panel_back_at_once(
    comparing: Ruiji, begun: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    comparing.environment["TEST_TILE_S"] = "0.5"
    (first,) = start_workers(comparing, 1)
    asking = comparing.start(*FIND, "--distributed", answer=tmp_path / "answer")
    wait_until(begun.read_text, START_S, what="a panel")
    first.send_signal(signal.SIGTERM)
    # The last panel, which comes first, takes 6 s.
    assert first.wait(START_S) == 0
    assert pair_files(comparing) == {}
    comparing.environment["TEST_TILE_S"] = "0"
    comparing.start("worker", "--role", "compare", "--threads", "1")
    assert asking.wait(START_S) == 0
    assert (tmp_path / "answer").read_text() == undisturbed.answer


def test_without_workers_it_says_so_and_what_nobody_waits_for_is_dropped(
    comparing: Ruiji, begun: Path, redis_url: str, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    asking = comparing.start(*FIND, "--distributed", errors=tmp_path / "errors")
    wait_until(
        lambda: "no worker with the role compare is running" in (tmp_path / "errors").read_text(),
        timeout_s=START_S,
        what="it",
    )
    assert f"\nnear-duplicates: {PANELS} panels left to compare\n" in comparing("status", code=3).stdout
    asking.send_signal(signal.SIGINT)
    assert asking.wait(START_S) == 130
    assert (tmp_path / "errors").read_text().splitlines()[-1] == "interrupted; run it again to continue"
    client, gallery_id = connect(redis_url), require_gallery(comparing.gallery).gallery_id
    assert client.llen(compare_queue(gallery_id)) == PANELS
    assert 0 < client.ttl(compare_queue(gallery_id)) <= 2 * ASKED_S
    # As after that time.
    client.delete(compare_key(gallery_id, "asked"))
    start_workers(comparing, 1)
    wait_until(lambda: not client.exists(compare_queue(gallery_id)), timeout_s=START_S, what="the queue's end")
    assert not begun.read_text() and pair_files(comparing) == {}
    assert comparing(*FIND, "--distributed").stdout == undisturbed.answer


def test_a_worker_with_other_shards_ends_and_others_do_the_work(
    comparing: Ruiji,
    begun: Path,
    redis_url: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    undisturbed: Undisturbed,
) -> None:
    other = Ruiji(comparing.media, tmp_path / "other", comparing.model, tmp_path / "other-state", ROOT)
    other.environment = comparing.environment
    shutil.copytree(comparing.features, other.features)
    record = layout.record_file(other.gallery, 3)
    changed = json.loads(record.read_text())
    changed["sha256"][layout.FEATURES] = "0" * 64
    record.write_text(json.dumps(changed))
    client, gallery_id = connect(redis_url), require_gallery(comparing.gallery).gallery_id
    asking = comparing.start(*FIND, "--distributed", answer=tmp_path / "answer")
    wait_until(lambda: client.exists(compare_queue(gallery_id)), timeout_s=START_S, what="the tasks")
    # On another host: there the original is not to be seen.
    client.delete(place_key(gallery_id))
    wrong = other.start("worker", "--role", "compare", "--threads", "1")
    assert wrong.wait(START_S) == 4
    assert "has not the shards" in capfd.readouterr().err
    # Panels before that shard are the same.
    assert set(begun.read_text().split()) <= {"0", "1", "2"}
    client.delete(place_key(gallery_id))
    start_workers(comparing, 1)
    assert asking.wait(START_S) == 0
    assert (tmp_path / "answer").read_text() == undisturbed.answer and pair_files(comparing) == undisturbed.files
    other.stop_all()


@pytest.mark.parametrize("poison", ["dies", pytest.param("fails", marks=pytest.mark.slow)])
def test_a_poison_panel_ends_after_five_tries_and_is_named(
    comparing: Ruiji, begun: Path, poison: str, undisturbed: Undisturbed
) -> None:
    comparing.environment["TEST_POISON"] = f"3:{poison}"
    start_workers(comparing)
    done = comparing(*FIND, "--distributed", code=1)
    (named,) = (line for line in done.stderr.splitlines() if line.startswith("panel "))
    assert named.startswith("panel 3 (rows 450 to 600) was begun 5 times, and no worker got it done; ")
    assert ("ValueError: this panel is poison" in named) is (poison == "fails")
    assert done.stderr.splitlines()[-1].startswith("error: workers could not compare 1 of 12 panels")
    assert done.stdout == "" and Counter(begun.read_text().split())["3"] == 5
    assert len(pair_files(comparing)) == PANELS - 1
    # Whoever asks anew wants another try; the rest is kept.
    comparing.stop_all()
    del comparing.environment["TEST_POISON"]
    start_workers(comparing)
    assert comparing(*FIND, "--distributed").stdout == undisturbed.answer and pair_files(comparing) == undisturbed.files
    assert Counter(begun.read_text().split())["3"] == 6


def test_shards_that_come_meanwhile_do_not_disturb_it(comparing: Ruiji, redis_url: str, tmp_path: Path) -> None:
    # The last panel is smaller than others, so it is another one with more shards.
    last = [layout.record_file(comparing.gallery, number) for number in (PANELS - 1, PANELS)]
    paths = [f"new/{row}.jpg" for row in range(2 * PANEL_ROWS)]
    fingerprint = require_gallery(comparing.gallery).fingerprint
    last[0].unlink()
    write_shard(comparing.gallery, PANELS - 1, some_rows(PANEL_ROWS // 2, 1), paths[: PANEL_ROWS // 2], fingerprint)
    write_shard(comparing.gallery, PANELS, some_rows(PANEL_ROWS, 2), paths[PANEL_ROWS:], fingerprint)
    later = last[1].read_bytes()
    last[1].unlink()
    answer = comparing(*FIND).stdout
    forget_pairs(comparing)
    asking = comparing.start(*FIND, "--distributed", answer=tmp_path / "answer")
    client, gallery_id = connect(redis_url), require_gallery(comparing.gallery).gallery_id
    wait_until(lambda: client.exists(compare_queue(gallery_id)), timeout_s=START_S, what="the tasks")
    last[1].write_bytes(later)
    start_workers(comparing, 1)
    assert asking.wait(START_S) == 0
    assert (tmp_path / "answer").read_text() == answer
    assert comparing(*FIND, "--distributed").stdout == comparing(*FIND).stdout != answer


def test_what_cannot_be_asked_of_workers_is_refused(comparing: Ruiji, tmp_path: Path) -> None:
    assert "--decided" in only_line(comparing("near-duplicates", "--decided", "--distributed", code=2).stderr)
    write_article_shard(tmp_path / "article", 0, some_rows(20), [f"{row}.jpg" for row in range(20)])
    folder = ("--feature-dir", str(tmp_path / "article"))
    comparing.environment["RUIJI_MODEL"] = ""
    refused = comparing("near-duplicates", "--distributed", *folder, code=2).stderr
    assert "has no gallery.json" in refused.splitlines()[-1]
