"""Files damaged, folders gone, disks full: healed without a person, and nothing of it counts against an image."""

import contextlib
import json
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.chaos.conftest import COUNT, ROWS, Undisturbed, finish
from tests.chaos.harness import progress, sized, wait_for_progress
from tests.factories import Ruiji, pictures, wait_until

RNG = random.Random(11)


def test_features_truncated_and_deleted_while_running(disturbed: Ruiji, undisturbed: Undisturbed) -> None:
    disturbed("enqueue")
    disturbed.start("worker", "--processes", "2")
    damaged: set[str] = set()
    while progress(disturbed) is not None:
        there: list[Path] = []
        # At the end of the plan the folders go while they are listed.
        with contextlib.suppress(FileNotFoundError):
            there += disturbed.gallery.glob("??/??/*.npy")
        for path in there:
            if path.name not in damaged and RNG.random() < 0.02:
                with contextlib.suppress(OSError):
                    if RNG.random() < 0.5:
                        path.unlink()
                    else:
                        os.truncate(path, RNG.randrange(path.stat().st_size))
                    damaged.add(path.name)
        time.sleep(0.02)
    assert len(damaged) >= COUNT * 0.01, "enough was damaged to tell"
    finish(disturbed, undisturbed)


def test_the_media_folder_renamed_away(ruiji: Ruiji, redis_url: str, undisturbed: Undisturbed) -> None:
    count = sized(400, 5000)
    pictures(ruiji.media, count, size=(800, 600), distinct=5)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": str(ROWS)}
    ruiji("enqueue")
    ruiji.start("worker", "--processes", "2")
    for _ in range(2):
        assert wait_for_progress(ruiji)
        ruiji.media.rename(ruiji.media.with_name("away"))
        time.sleep(sized(3, 20))
        ruiji.media.with_name("away").rename(ruiji.media)
    ruiji("enqueue", "--wait", timeout_s=600)
    status = json.loads(ruiji("status", "--json").stdout)
    assert (status["done"], status["failed"]) == (count, 0)
    assert ruiji("verify").stdout == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs, which only root may")
def test_a_disk_that_is_full_for_a_while(disturbed: Ruiji, undisturbed: Undisturbed) -> None:
    disturbed.features.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disturbed.features)]
    if subprocess.run(command).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        disturbed("enqueue")
        disturbed.start("worker", "--processes", "2")
        assert wait_for_progress(disturbed)
        filler = disturbed.features / "filler"
        deadline = time.monotonic() + sized(6, 20)
        with filler.open("ab", buffering=0) as file:
            while time.monotonic() < deadline:
                # Also what becomes free meanwhile is taken.
                with contextlib.suppress(OSError):
                    while file.write(bytes(1 << 16)):
                        pass
                time.sleep(0.05)
        stuck = disturbed.status()
        assert stuck.plan is not None and stuck.failed == 0
        wait_until(lambda: "waiting" in str(disturbed.status().workers), what="workers that wait for space")
        filler.unlink()
        finish(disturbed, undisturbed)
    finally:
        disturbed.stop_all()
        subprocess.run(["umount", "-l", str(disturbed.features)], check=True)
