"""The files that break image programs, over and over: each accounted for, the workers alive, in bounded memory."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.chaos.harness import progress, sized, watch_memory
from tests.factories import Ruiji, picture

#: What a CPU worker takes at most, by docs/reliability.md: 300 MB and 11 bytes for each of the allowed pixels.
RSS_BOUND_MB = 300 + 11 * 89.5


def nasty_folder(media: Path, source: Path) -> list[str]:
    """The nasty files, and what no archive can hold: folders, links and pipes that look like images, and odd names."""
    shutil.copytree(source, media)
    # 88 million pixels in 90 kB, to be turned upright: as much memory as any allowed image takes.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (9400, 9400)).save(media / "near-the-limit.png", exif=exif)
    outside = picture(media.parent / "outside.png")
    (media / "folder.jpg").mkdir()
    (media / "dangling.jpg").symlink_to("nowhere.jpg")
    (media / "loop.jpg").symlink_to("loop.jpg")
    (media / "leads-out.png").symlink_to(outside)
    (media / "out-folder").symlink_to(media.parent)
    os.mkfifo(media / "pipe.jpg")
    for number, name in enumerate(
        ('"quoted".png', "it's.png", "$(touch x).png", "-rf.png", "ünï ☃.png", "a;b&c|d.png")
    ):
        picture(media / name, number)
    paths = [str(p.relative_to(media)) for p in media.rglob("*") if not p.is_dir() or p.name == "folder.jpg"]
    return sorted({*paths, "out-folder/outside.png", "gone.jpg"}, key=str.encode)


@pytest.mark.parametrize("batch", ["1", "8"])
def test_the_nasty_set(ruiji: Ruiji, shared_data: Path, redis_url: str, batch: str) -> None:
    paths = nasty_folder(ruiji.media, shared_data / "nasty")
    (ruiji.media / "objects.txt").write_text("".join(f"{path}\n" for path in paths))
    ruiji.environment = {
        "RUIJI_REDIS_URL": redis_url,
        "RUIJI_SHARD_ROWS": "100",
        "RUIJI_OBJECT_ID": "path",
        "RUIJI_BATCH_IMAGES": batch,
    }
    results = []
    for number in range(sized(1, 3)):
        ruiji.features = ruiji.features.with_name(f"features-{number}")
        ruiji("enqueue")
        for _ in range(2):
            ruiji.start("worker", "--processes", "1")
        # The kernel's high-water mark of each process, looked at until the end.
        peak, count = watch_memory(lambda: progress(ruiji) is None)
        print(f"the highest resident size of a worker process: {peak:.0f} MB")
        assert RSS_BOUND_MB / 2 < peak < RSS_BOUND_MB
        assert count == 4, "two embed and two reduce processes, none of them a replacement"
        ruiji.stop_all()
        failures = {
            entry["path"]: entry["reason"]
            for entry in map(json.loads, ruiji("failures", "--format", "jsonl", code=3).stdout.splitlines())
        }
        rows = [p for f in sorted(ruiji.gallery.glob("0*.paths.txt")) for p in f.read_text().splitlines()]
        assert sorted([*rows, *failures], key=str.encode) == paths, "every file is a row or a failure"
        assert ruiji("verify").stdout == ""
        results.append((rows, failures, ruiji.shard_digests()))
    assert all(result == results[0] for result in results), "the same every time"
    _, failures, _ = results[0]
    assert failures["folder.jpg"] == failures["loop.jpg"] == failures["pipe.jpg"] == "not-a-file"
    assert failures["dangling.jpg"] == failures["gone.jpg"] == "missing"
    assert failures["leads-out.png"] == failures["out-folder/outside.png"] == "outside-media"
    assert failures["synthetic/bomb_900Mpx_1bit.png"] == "too-large"
    assert failures["synthetic/zero_byte.jpg"] == failures["synthetic/html_as_jpg.jpg"] == "undecodable"
    assert failures["synthetic/half_photo.jpg"] == "truncated"
    assert {"$(touch x).png", '"quoted".png', "-rf.png", "synthetic/name with spaces é漢字.jpg"} <= set(rows)
