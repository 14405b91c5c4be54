"""Failed objects tried again, broken shards made again, the doctor: as a user types them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.factories import Ruiji, picture, pictures


@pytest.fixture
def failed(ruiji: Ruiji) -> list[str]:
    """A finished run of 25 pictures in shards of ten, of which three failed; returns the paths."""
    paths = pictures(ruiji.media, 25)
    (ruiji.media / paths[3]).write_text("<html>")
    (ruiji.media / paths[12]).unlink()
    (ruiji.media / paths[13]).unlink()
    ruiji("run", "--workers", "1", "--shard-rows", "10", code=3)
    return paths


def listed(ruiji: Ruiji, code: int = 3) -> dict[str, str]:
    lines = ruiji("failures", "--format", "jsonl", code=code).stdout.splitlines()
    return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


def test_failed_objects_are_listed_and_tried_again(ruiji: Ruiji, failed: list[str], redis_url: str) -> None:
    assert listed(ruiji) == {failed[3]: "undecodable", failed[12]: "missing", failed[13]: "missing"}
    assert ruiji("failures", "--format", "csv", code=3).stdout.splitlines()[0] == "object_id,path,reason,message,shard"
    before = ruiji.shard_digests()
    for number in (3, 12):
        picture(ruiji.media / failed[number], number)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "10"}
    ruiji.start("worker", "--processes", "1")
    assert "none of the 25 objects failed as timeout" in ruiji("retry", "--reason", "timeout").stderr
    assert "2 of 25 objects to do" in ruiji("retry", "--reason", "missing", "--wait", code=3).stderr
    assert listed(ruiji) == {failed[3]: "undecodable", failed[13]: "missing"}
    assert (ruiji.gallery / "0003.paths.txt").read_text() == f"{failed[12]}\n"
    ruiji("retry", "--wait", code=3)
    assert listed(ruiji) == {failed[13]: "missing"}
    ruiji("retry", "--wait", code=3)
    assert not (ruiji.gallery / "0005.json").exists(), "all failed again: no empty shard"
    status = json.loads(ruiji("status", "--json", code=3).stdout)
    assert (status["done"], status["failed"], status["pending"], status["running"]) == (24, 1, 0, 0)
    assert {name: digest for name, digest in ruiji.shard_digests().items() if name in before} == before
    picture(ruiji.media / failed[13], 13)
    ruiji("retry", "--wait")
    assert listed(ruiji, code=0) == {}
    assert json.loads(ruiji("status", "--json").stdout)["done"] == 25
    assert ruiji("verify").stdout == ""


def test_without_a_redis_the_next_run_tries_again(ruiji: Ruiji, failed: list[str]) -> None:
    picture(ruiji.media / failed[3], 3)
    assert "ruiji run carries out the plan" in ruiji("retry", "--shard-rows", "10").stderr
    ruiji("run", "--workers", "1", "--shard-rows", "10", code=3)
    assert set(listed(ruiji)) == {failed[12], failed[13]}
    assert (ruiji.gallery / "0003.paths.txt").read_text() == f"{failed[3]}\n"


def test_a_retry_waits_for_the_open_plan(ruiji: Ruiji, failed: list[str], redis_url: str) -> None:
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    picture(ruiji.media / "new.png")
    with (ruiji.media / "objects.txt").open("a") as file:
        file.write("new.png\n")
    ruiji("enqueue", "--shard-rows", "10")
    assert "never tried" in ruiji("retry", "--shard-rows", "10", code=4).stderr


def test_a_broken_shard_is_found_and_made_again(ruiji: Ruiji, failed: list[str], redis_url: str) -> None:
    before = ruiji.shard_digests()
    path = ruiji.gallery / "0001.features.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (ruiji.gallery / "0002.paths.txt").unlink()
    (ruiji.gallery / ".tmp-1-x").write_text("left over")
    found = ruiji("verify", code=4).stdout
    assert "0001" in found and "0002" in found and ".tmp-1-x" in found
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji.start("worker", "--processes", "1")
    told = ruiji("verify", "--repair").stderr
    assert "10 objects of 1 shard are to be embedded again" in told
    # The running worker finds the plan on the disk by itself.
    ruiji("status", "--watch", code=3)
    assert ruiji.shard_digests() == before
    assert ruiji("verify").stdout.split()[:2] == ["leftover", "run/broken/0001:"], "the broken one was set aside"
    ruiji("verify", "--repair")
    assert ruiji("verify").stdout == ""
    # A picture under an old name is another matter: no run looks at it again.
    picture(ruiji.media / failed[20], 99)
    assert "nothing to do" in ruiji("enqueue").stderr
    assert ruiji("verify", "--pictures", code=4).stdout.startswith(f"changed       {failed[20]}: ")
    ruiji("verify", "--pictures", "--repair")
    ruiji("status", "--watch", code=3)
    assert "similarity" in ruiji("search", str(ruiji.media / failed[20]), "-k", "1", "--min-similarity", "0.999").stdout
    assert "changed" not in ruiji("verify", "--pictures", "--repair").stdout


def test_the_doctor_says_what_is_wrong(ruiji: Ruiji, failed: list[str], redis_url: str, tmp_path: Path) -> None:
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    assert "cosine at least 1.0000000" in ruiji("doctor").stdout
    np.save(ruiji.gallery / "0000.features.npy", np.ones((9, 12), np.float32))
    assert "wrong features" in ruiji("doctor", code=4).stdout
    ruiji.environment = {}
    assert "warn  redis" in ruiji("doctor", code=4).stdout


def test_workers_find_the_gallery_that_was_made_anew_in_their_folder(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 6)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait")
    shutil.rmtree(ruiji.gallery)
    ruiji("enqueue", "--wait")
    assert ruiji.status().done == 6
