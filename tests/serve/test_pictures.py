"""Uploads and thumbnails: decoded beside the service, by processes that may die of it."""

import asyncio
import io
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline import layout
from pipeline.errors import ImageError
from pipeline.plans.closing import close_plan
from pipeline.plans.plan import Limits
from pipeline.segments import reduce_segment
from search.views.thumbnail import Thumbnail
from serve.decoders import Decoders
from serve.thumbnails import Thumbnails
from tests.factories import Ruiji, picture, pictures, wait_until
from tests.pipeline.galleries import embed, fail, plan_for
from tests.search.galleries import write_article_shard
from tests.serve.conftest import Answer, Served, start, write_served_gallery
from tests.workers.poison import POISON_PATH, poison


def thumb(served: Served, object_id: str, query: str = "", **headers: str) -> Answer:
    return served.get(f"/thumbs/{quote(object_id, safe='', errors='surrogateescape')}{query}", **headers)


def is_placeholder(answer: Answer, reason: str) -> bool:
    kind = answer.headers["content-type"]
    return answer.status == 200 and kind == "image/svg+xml" and answer.headers["x-ruiji-reason"] == reason


def nasty_files() -> dict[str, bytes]:
    """Bytes that break image programs, made here."""
    made: dict[str, bytes] = {"empty": b"", "zeros": bytes(1000), "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(buffer, form)
        whole = buffer.getvalue()
        made[f"{form} cut"] = whole[: len(whole) // 2]
        broken = bytearray(whole)
        broken[len(whole) // 3 : len(whole) // 3 + 40] = os.urandom(40)
        made[f"{form} broken"] = bytes(broken)
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    made["bomb"] = bomb.getvalue()
    made["program"] = b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file\n"
    return made


def test_nasty_uploads_are_refused_or_answered_and_kill_nothing(served: Served) -> None:
    pids = served.decoders()
    for name, data in nasty_files().items():
        answer = served.search(data)
        assert answer.status in (200, 422), name
        if answer.status == 422:
            assert answer.error, name
    assert "30000 x 30000 pixels are more than the limit" in served.search(nasty_files()["bomb"]).error
    assert served.decoders() == pids
    assert "Traceback" not in served.log.read_text()


def test_the_nasty_files_kill_nothing(served: Served, shared_data: Path) -> None:
    files = [path for path in sorted((shared_data / "nasty").iterdir()) if path.is_file()]
    assert len(files) > 100
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda path: served.search(path.read_bytes(), "?k=1"), files))
    assert {answer.status for answer in answers} == {200, 422}
    assert served.search(picture(served.log.parent / "x.png").read_bytes()).status == 200


@pytest.mark.parametrize(("kind", "reason"), [("segfault", "ended the process"), ("endless", "longer than 2 s")])
def test_an_upload_that_takes_its_decoder_along_fails_alone(
    ruiji: Ruiji, tmp_path: Path, kind: str, reason: str
) -> None:
    ruiji.environment["PYTHONPATH"] = POISON_PATH
    write_served_gallery(ruiji)
    served = start(ruiji, "--max-image-s", "2")
    good = picture(tmp_path / "good.png", 3).read_bytes()
    poisoned = poison(tmp_path / "bad.png", kind).read_bytes()
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(served.search, [good, poisoned, good, poisoned, good, good]))
    assert [answer.status for answer in answers] == [200, 422, 200, 422, 200, 200]
    assert reason in answers[1].error and reason in answers[3].error
    # They were replaced, and the log says why.
    assert served.search(good).status == 200
    log = served.log.read_text()
    assert "Traceback" not in log and log.count("warning: a process that decodes pictures ended") == 2
    assert "after 2 s with one picture" in log if kind == "endless" else "it said: Fatal Python error" in log


def test_an_upload_that_takes_all_memory_is_refused(ruiji: Ruiji, tmp_path: Path) -> None:
    ruiji.environment["PYTHONPATH"] = POISON_PATH
    write_served_gallery(ruiji)
    served = start(ruiji, "--max-image-mb", "256")
    answer = served.search(poison(tmp_path / "bad.png", "hog").read_bytes())
    assert (answer.status, "memory" in answer.error) == (422, True)
    assert served.search(picture(tmp_path / "good.png").read_bytes()).status == 200


def test_a_decoder_that_is_killed_is_replaced(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve()
    for pid in served.decoders():
        psutil.Process(pid).kill()
    good = picture(tmp_path / "good.png", 3).read_bytes()
    wait_until(lambda: served.search(good).status == 200, what="a decoder")
    assert [served.search(good).status for _ in range(8)] == [200] * 8


def test_a_picture_that_is_waited_for_by_nobody_is_not_decoded(tmp_path: Path) -> None:
    picture(tmp_path / "small.png")
    picture(tmp_path / "large.png", 1, (400, 400))
    kept: dict[str, tuple[int, str | None]] = {}

    async def ask() -> tuple[int, Thumbnail]:
        decoders = Decoders(Limits(10**6, 10, 512), 1)
        await decoders.start()

        def thumbnail(name: str, place: str) -> "asyncio.Task[Thumbnail]":
            file = tmp_path / "kept" / place
            asked = (f"{tmp_path}/{name}", 128, str(tmp_path), file)
            return asyncio.create_task(decoders.thumbnail(*asked, lambda *told: kept.update({place: told})))

        (pid,) = decoders.pids
        # One stands still, and the others wait behind it.
        os.kill(pid, signal.SIGSTOP)
        tasks = [thumbnail("small.png", str(n)) for n in range(20)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        waiting = decoders.pending
        os.kill(pid, signal.SIGCONT)
        # Nobody takes the answer to the one that was in hand for his own.
        other = await thumbnail("large.png", "other")
        await decoders.close()
        return waiting, other

    waiting, other = asyncio.run(ask())
    assert waiting == 1 and other.kind == "jpeg"
    # That one is kept, and counted.
    assert kept.keys() == {"0", "other"} == {file.name for file in (tmp_path / "kept").iterdir()}
    assert kept["other"] == (len(other.data), None)


def test_thumbnails_are_small_upright_and_kept(serve: Callable[..., Served], ruiji: Ruiji) -> None:
    served = serve()
    one = served.get("/objects?count=1").json()["objects"][0]
    path = ruiji.media / one["path"]
    image = Image.new("RGB", (3000, 2000), "red")
    image.paste("blue", (0, 0, 1500, 2000))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, "JPEG", exif=exif)
    for size in (128, 256, 512):
        answer = thumb(served, one["object_id"], f"?size={size}")
        assert answer.headers["content-type"] == "image/jpeg"
        assert answer.headers["cache-control"] == "private, no-cache"
        with Image.open(io.BytesIO(answer.body)) as made:
            assert made.size == (round(size * 2 / 3), size)
            top, bottom = made.getpixel((10, 10)), made.getpixel((10, size - 10))
        assert isinstance(top, tuple) and isinstance(bottom, tuple) and top[2] > 200 and bottom[0] > 200
        assert thumb(served, one["object_id"], f"?size={size}").body == answer.body
    kept = [file for file in layout.thumbnails_folder(ruiji.gallery).rglob("*") if file.is_file()]
    assert len(kept) == 3
    # A file that a power failure cut off is made again, and so is one of another picture.
    whole = thumb(served, one["object_id"]).body
    for file in kept:
        os.truncate(file, 100)
    assert thumb(served, one["object_id"]).body == whole
    # A browser that has one asks whether it is still that.
    tag = thumb(served, one["object_id"]).headers["etag"]
    unchanged = thumb(served, one["object_id"], If_None_Match=f'"other", {tag}')
    assert (unchanged.status, unchanged.body, unchanged.headers["etag"]) == (304, b"", tag)
    Image.new("RGB", (900, 900), "green").save(path, "JPEG")
    changed = thumb(served, one["object_id"], If_None_Match=tag)
    assert changed.status == 200 and changed.body != whole
    assert thumb(served, one["object_id"], "?size=300").status == 422
    # Nobody else minds what is there.
    ruiji("verify")
    assert ruiji("search", "--id", one["object_id"]).stdout


def test_a_thumbnail_never_leads_out_of_the_media_folder(serve: Callable[..., Served], ruiji: Ruiji) -> None:
    served = serve()
    outside = picture(ruiji.media.parent / "outside.png", 1, (400, 400))
    first, second, third = served.get("/objects?count=3").json()["objects"]
    for one in (first, second):
        (ruiji.media / one["path"]).unlink()
    (ruiji.media / first["path"]).symlink_to(outside)
    os.mkfifo(ruiji.media / second["path"])
    for one in (first, second):
        assert is_placeholder(thumb(served, one["object_id"]), "undecodable")
    (ruiji.media / third["path"]).unlink()
    assert is_placeholder(thumb(served, third["object_id"]), "missing")
    assert thumb(served, "nobody").status == 404

    write_article_shard(ruiji.features / "article", 0, np.eye(3, 12, dtype=np.float32), ["../outside.png", "b", "c"])
    wait_until(lambda: served.get("/objects?gallery=article").status == 200, what="the new gallery")
    assert is_placeholder(thumb(served, "../outside.png", "?gallery=article"), "missing")


def test_pictures_that_killed_their_worker_are_not_decoded_again(ruiji: Ruiji, tmp_path: Path) -> None:
    paths = pictures(ruiji.media, 8)
    plan = plan_for(tmp_path, ruiji.model, paths, 8)
    assert plan is not None
    embed(plan, paths[:4])
    for path, reason in zip(paths[4:], ("crashed-worker", "memory", "timeout", "undecodable"), strict=True):
        fail(plan, path, reason)
    assert not reduce_segment(plan, plan.segments[0], lambda: None).missing
    close_plan(plan)
    ruiji.environment["PYTHONPATH"] = POISON_PATH
    for path in paths[4:7]:
        poison(ruiji.media / path, "endless")
    served = start(ruiji)
    pids = served.decoders()
    ids = [Path(path).name for path in paths]
    for object_id, reason in zip(ids[4:7], ("crashed-worker", "memory", "timeout"), strict=True):
        assert is_placeholder(thumb(served, object_id), reason)
    # Another reason says nothing against a look.
    assert thumb(served, ids[7]).headers["content-type"] == "image/png"
    assert served.decoders() == pids
    body = served.get("/failures?count=3").json()
    assert (body["total"], body["next"], [one["object_id"] for one in body["failures"]]) == (4, 3, ids[4:7])
    assert body["failures"][0] == {
        "object_id": ids[4],
        "path": paths[4],
        "reason": "crashed-worker",
        "message": "in our words",
        "shard": 0,
    }


def test_a_picture_that_kills_its_thumbnails_decoder_is_tried_once(ruiji: Ruiji) -> None:
    paths = write_served_gallery(ruiji)
    ruiji.environment["PYTHONPATH"] = POISON_PATH
    poison(ruiji.media / paths[0], "segfault")
    served = start(ruiji)
    object_id = Path(paths[0]).name
    assert is_placeholder(thumb(served, object_id), "crashed-worker")
    pids = served.decoders()
    assert is_placeholder(thumb(served, object_id), "crashed-worker")
    assert served.decoders() == pids


def test_the_cache_stays_within_its_bound_and_the_last_used_stay(tmp_path: Path) -> None:
    media = tmp_path / "media"
    for seed in range(30):
        picture(media / f"{seed}.png", seed, (600, 600))

    async def ask() -> tuple[Thumbnail, int, float]:
        decoders = Decoders(Limits(10**6, 10, 512), 1)
        await decoders.start()
        thumbnails = Thumbnails(tmp_path / "gallery", media, decoders, most_bytes=100_000)
        first = await thumbnails.get(lambda: "0.png", 256)
        for seed in range(30):
            await thumbnails.get(lambda seed=seed: f"{seed}.png", 256)
            await thumbnails.get(lambda: "0.png", 256)
        files = [path for path in layout.thumbnails_folder(tmp_path / "gallery").rglob("*") if path.is_file()]
        with pytest.raises(ImageError, match="cannot be opened"):
            await thumbnails.get(lambda: "none.png", 256)
        await decoders.close()
        return first, sum(path.stat().st_size for path in files), len(files)

    first, size, count = asyncio.run(ask())
    assert size <= 100_000 and count > 3
    assert first.data in [
        path.read_bytes() for path in layout.thumbnails_folder(tmp_path / "gallery").rglob("*") if path.is_file()
    ]


def test_a_cache_that_cannot_be_written_to_is_said_once(serve: Callable[..., Served], ruiji: Ruiji) -> None:
    served = serve()
    shutil.rmtree(ruiji.gallery / "cache", ignore_errors=True)
    (ruiji.gallery / "cache").write_text("in the way")
    for one in served.get("/objects?count=3").json()["objects"]:
        assert thumb(served, one["object_id"]).headers["content-type"] == "image/png"
    assert served.log.read_text().count("warning: small pictures are not kept: cannot write ") == 1


def test_without_a_media_folder_it_says_so(ruiji: Ruiji) -> None:
    write_served_gallery(ruiji)
    ruiji.environment["RUIJI_MEDIA_DIR"] = ""
    served = start(ruiji)
    assert served.get("/healthz").json()["media"] is False
    answer = thumb(served, served.get("/objects?count=1").json()["objects"][0]["object_id"])
    assert (answer.status, "--media-dir" in answer.error) == (409, True)
    ruiji.environment["RUIJI_MEDIA_DIR"] = str(ruiji.media / "nowhere")
    assert "does not exist" in ruiji("serve", code=2).stderr
