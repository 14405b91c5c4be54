"""`ruiji run` and its parts as a user types them, in processes of their own, on real files."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.plans.files import open_plan
from tests.factories import Ruiji, picture, pictures, tiny_model, wait_until


def run(ruiji: Ruiji, *arguments: str, code: int = 0) -> str:
    return ruiji("run", "--workers", "1", "--shard-rows", "10", *arguments, code=code).stderr


def test_run_makes_shards_in_list_order_and_a_second_run_embeds_nothing(ruiji: Ruiji) -> None:
    paths = pictures(ruiji.media, 25)
    run(ruiji)
    ids = [np.load(ruiji.gallery / f"000{n}.object_ids.npy", allow_pickle=False).tolist() for n in range(3)]
    assert [len(part) for part in ids] == [10, 10, 5]
    assert [object_id for part in ids for object_id in part] == [path.rsplit("/")[-1] for path in paths]
    assert np.load(ruiji.gallery / "0002.features.npy", allow_pickle=False).shape == (5, 12)
    digests = np.concatenate([np.load(ruiji.gallery / f"000{n}.digests.npy", allow_pickle=False) for n in range(3)])
    assert [row.tobytes() for row in digests] == [
        hashlib.sha256((ruiji.media / path).read_bytes()).digest() for path in paths
    ]
    assert not list(ruiji.gallery.glob("??")), "the per-image files and their folders are gone"

    before = ruiji.shard_digests()
    assert "segment_armed" not in run(ruiji)
    assert ruiji.shard_digests() == before


def test_the_workers_of_a_run_write_events_as_it_does(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 3)
    lines = [line for line in run(ruiji, "--log-format", "json").splitlines() if '"worker_ready"' in line]
    ready = {event["role"]: event for event in map(json.loads, lines)}
    assert ready["reduce"]["resize"] == "-"
    assert ready["embed"]["resize"].startswith(("compiled", "by Pillow: "))
    assert ready["embed"]["simplejpeg"]


def test_a_deleted_shard_is_made_again_under_its_number_with_the_same_bytes(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 25)
    run(ruiji)
    before = ruiji.shard_digests()
    for path in ruiji.gallery.glob("0001.*"):
        path.unlink()
    output = run(ruiji)
    assert "shard=1 images=10 of=10" in output
    assert "shard=0" not in output and "shard=2" not in output
    assert ruiji.shard_digests() == before


def test_new_images_become_new_shards_and_removed_ones_are_stale(ruiji: Ruiji) -> None:
    paths = pictures(ruiji.media, 12)
    run(ruiji)
    before = ruiji.shard_digests()
    picture(ruiji.media / "new.png", 99)
    (ruiji.media / "objects.txt").write_text("".join(f"{p}\n" for p in sorted([*paths[1:], "new.png"])))
    run(ruiji)
    after = ruiji.shard_digests()
    assert {name: after[name] for name in before} == before
    assert (ruiji.gallery / "0002.paths.txt").read_text() == "new.png\n"
    status = json.loads(ruiji("status", "--json").stdout)
    assert (status["objects"], status["done"], status["stale"]) == (12, 12, 1)


def test_without_a_list_one_is_made_in_the_gallery_folder(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 3)
    (ruiji.media / "objects.txt").unlink()
    picture(ruiji.media / "UPPER.PNG", 7)
    (ruiji.media / "notes.txt").write_text("no image")
    run(ruiji)
    assert len((ruiji.gallery / "0000.paths.txt").read_text().splitlines()) == 4
    assert not (ruiji.media / "objects.txt").exists()
    # A new photo needs no new list either.
    picture(ruiji.media / "later.png", 8)
    run(ruiji)
    assert (ruiji.gallery / "0001.paths.txt").read_text() == "later.png\n"


def test_bad_images_are_failed_with_a_reason_and_the_exit_code_says_so(ruiji: Ruiji) -> None:
    paths = pictures(ruiji.media, 12)
    (ruiji.media / paths[3]).write_text("<html>")
    (ruiji.media / paths[5]).unlink()
    whole = (ruiji.media / paths[7]).read_bytes()
    (ruiji.media / paths[7]).write_bytes(whole[: len(whole) // 2])
    run(ruiji, code=3)
    record = json.loads((ruiji.gallery / "0000.json").read_text())
    reasons = {failure["path"]: failure["reason"] for failure in record["failed"]}
    assert reasons == {paths[3]: "undecodable", paths[5]: "missing", paths[7]: "truncated"}
    assert record["rows"] == 7
    assert (ruiji.gallery / "0000.paths.txt").read_text().splitlines() == [
        path for number, path in enumerate(paths[:10]) if number not in (3, 5, 7)
    ]
    status = json.loads(ruiji("status", "--json", code=3).stdout)
    assert (status["done"], status["failed"], status["running"] + status["pending"]) == (9, 3, 0)
    # They are in the record: running again does not try them again.
    assert "segment_armed" not in run(ruiji, code=3)


def test_any_number_of_workers_batch_size_and_list_order_give_the_same_bytes(ruiji: Ruiji, tmp_path: Path) -> None:
    paths = pictures(ruiji.media, 40)
    run(ruiji)
    expected = ruiji.shard_digests()
    (ruiji.media / "objects.txt").write_text("".join(f"{p}\r\n" for p in [*reversed(paths), paths[0]]))
    for workers, batch in (("1", "7"), ("3", "1")):
        other = Ruiji(ruiji.media, tmp_path / f"features-{workers}", ruiji.model, ruiji.state, ruiji.root)
        other.environment = {"RUIJI_BATCH_IMAGES": batch}
        output = other("run", "--workers", workers, "--shard-rows", "10").stderr
        assert "sorted by bytes, as LC_ALL=C sort does" in output
        assert other.shard_digests() == expected


def test_the_parts_work_by_themselves(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 25)
    (ruiji.media / "objects.txt").unlink()
    ruiji("list", str(ruiji.media))
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "10"}
    assert "20 tasks published now" in ruiji("enqueue").stderr
    status = json.loads(ruiji("status", "--json", code=3).stdout)
    assert (status["objects"], status["pending"]) == (25, 25)
    # Again, on the open plan: it carries on, and publishes nothing twice.
    assert "continues" in (again := ruiji("enqueue").stderr) and "0 tasks published now" in again
    ruiji.start("worker", "--role", "embed", "--processes", "1")
    wait_until(lambda: any(w.images for w in ruiji.status().workers), what="an image that is done")
    assert "ms per image: read" in ruiji("status", code=3).stdout
    ruiji.start("worker", "--role", "reduce")
    ruiji("enqueue", "--wait")
    assert json.loads(ruiji("status", "--json").stdout)["done"] == 25
    assert len(list(ruiji.gallery.glob("000?.json"))) == 3


def test_another_list_on_an_open_plan_is_refused_until_it_is_cancelled(ruiji: Ruiji, redis_url: str) -> None:
    paths = pictures(ruiji.media, 12)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "10"}
    ruiji("enqueue")
    (ruiji.media / "objects.txt").write_text(paths[0] + "\n")
    assert "ruiji cancel" in ruiji("enqueue", code=4).stderr
    ruiji("cancel")
    assert "1 of 1 object to do in 1 shard, 1 task" in ruiji("enqueue").stderr
    assert "no plan is open" not in ruiji("cancel").stderr
    assert "no plan is open" in ruiji("cancel").stderr


def test_a_list_that_has_to_wait_for_a_retry_is_enqueued_after_it(ruiji: Ruiji, redis_url: str) -> None:
    paths = pictures(ruiji.media, 9)
    (ruiji.media / "objects.txt").write_text("\n".join([*paths, "zz-comes-later.png\n"]))
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait", code=3)
    ruiji.stop_all()
    picture(ruiji.media / "zz-comes-later.png", 9)
    ruiji("retry")
    picture(ruiji.media / "zz-new.png", 10)
    ruiji("list", str(ruiji.media))
    said = ruiji("enqueue", code=3).stderr
    assert "this plan tries failed objects again, and nothing of the list: enqueue the list again" in said
    ruiji.start("worker", "--processes", "1")
    said = ruiji("enqueue", "--wait").stderr
    assert "1 of 11 objects to do in 1 shard" in said.rpartition(" opened: ")[2]
    assert json.loads(ruiji("status", "--json").stdout)["done"] == 11


def test_a_run_that_is_cancelled_ends(ruiji: Ruiji, tmp_path: Path) -> None:
    pictures(ruiji.media, 60)
    running = ruiji.start("run", "--workers", "1", errors=tmp_path / "said")
    wait_until(lambda: ruiji.gallery.exists() and open_plan(ruiji.gallery) is not None, what="a plan")
    ruiji("cancel")
    assert running.wait(timeout=60) == 3
    assert "the plan was cancelled; ruiji run continues with what is left" in (tmp_path / "said").read_text()
    assert open_plan(ruiji.gallery) is None
    assert "60 done, 0 failed of 60" in run(ruiji)


def test_a_run_whose_log_is_full_ends_as_any_other(ruiji: Ruiji) -> None:
    ruiji.media.mkdir(exist_ok=True)
    # What is said of them is more than a pipe holds.
    for number in range(600):
        (ruiji.media / f"{number:03d}-is-no-picture-and-has-a-long-name-{'x' * 60}.png").write_bytes(b"x")
    picture(ruiji.media / "a.png", 1)
    running = ruiji.start("run", "--workers", "1", errors=Path("/dev/full"))
    assert running.wait(timeout=120) == 3
    assert "1 done, 600 failed" in ruiji("status", code=3).stdout


def test_a_list_that_can_be_read_only_once_is_refused_before_anything_is_done(ruiji: Ruiji, tmp_path: Path) -> None:
    pictures(ruiji.media, 3)
    done = ruiji.shell('ruiji run --workers 1 --list <(find media -name "*.png" -printf "%P\\n")')
    assert done.returncode == 2
    assert b"write it into a file first" in done.stderr
    assert not ruiji.gallery.exists()


def test_an_unmounted_media_folder_pauses_the_run_and_fails_no_image(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 10)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    away = ruiji.media.with_name("away")
    ruiji.media.rename(away)
    ruiji.media.mkdir()
    ruiji.start("worker", "--processes", "1")

    wait_until(lambda: "waiting" in str(ruiji.status().workers), what="a worker that waits for its folder")
    ruiji.media.rmdir()
    away.rename(ruiji.media)
    ruiji("enqueue", "--wait")
    assert json.loads(ruiji("status", "--json").stdout)["failed"] == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no object list"),
        (b"", "is empty"),
        (b"/etc/passwd\n", "line 1"),
        (b"../a.png\n", "nothing outside"),
        (b"x/same.png\ny/same.png\n", "x/same.png"),
        (b"a\x01.png\n", "control character"),
        (b"\xff\xfe.png\n", "UTF-8"),
        (b"nowhere.png\n", "is it mounted"),
    ],
)
def test_a_bad_list_is_refused_with_what_to_do(ruiji: Ruiji, redis_url: str, content: bytes | None, words: str) -> None:
    ruiji.media.mkdir()
    if content is not None:
        (ruiji.media / "objects.txt").write_bytes(content)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    refused = ruiji("enqueue", code=None)
    assert refused.returncode in (1, 2)
    assert words in refused.stderr and "Traceback" not in refused.stderr
    assert open_plan(ruiji.gallery) is None


def test_a_wrong_model_redis_or_folder_is_refused_with_what_to_do(ruiji: Ruiji, redis_url: str, tmp_path: Path) -> None:
    pictures(ruiji.media, 3)
    refused = ruiji("enqueue", "--redis-url", "redis://:sesame@127.0.0.1:1/0", code=1).stderr
    assert "127.0.0.1:1" in refused and "ruiji redis" in refused and "sesame" not in refused
    assert "ruiji redis" in ruiji("enqueue", code=2).stderr
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    assert "no model" in ruiji("enqueue", "--model", str(tmp_path / "none.onnx"), code=2).stderr
    assert "not an ONNX" in ruiji("enqueue", "--model", str(ruiji.media / "objects.txt"), code=2).stderr
    (tmp_path / "file").write_text("")
    assert "cannot write" in ruiji("enqueue", "--feature-dir", str(tmp_path / "file"), code=1).stderr
    run(ruiji)
    tiny_model(ruiji.model, seed=1)
    assert "another --feature-dir" in ruiji("enqueue", code=4).stderr


def test_a_folder_of_the_articles_shards_is_not_added_to(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 3)
    ruiji.gallery.mkdir(parents=True)
    np.save(ruiji.gallery / "0000.features.npy", np.ones((1, 12), np.float32))
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    assert "did not make" in ruiji("enqueue", code=4).stderr


def test_golden_features_come_out_of_the_whole_pipeline(ruiji: Ruiji, shared_data: Path) -> None:
    for name, golden in (
        ("mobilenet_v3_large_100_224_feature_vector", "mobilenet_v3_large"),
        ("mobilenet_v2_100_224_feature_vector", "mobilenet_v2"),
    ):
        ruiji.media = shared_data / "photos"
        ruiji.model = ruiji.features.parent / f"{name}.onnx"
        shutil.copy(shared_data / "models" / f"{name}.onnx", ruiji.model)
        ruiji("run", "--shard-rows", "100")
        shards = [f"{ruiji.gallery}/000{n}" for n in range(3)]
        ids = np.concatenate([np.load(f"{shard}.object_ids.npy", allow_pickle=False) for shard in shards])
        features = np.concatenate([np.load(f"{shard}.features.npy", allow_pickle=False) for shard in shards])
        assert ids.tolist() == np.load(shared_data / "golden" / f"{golden}.object_ids.npy", allow_pickle=False).tolist()
        expected = np.load(shared_data / "golden" / f"{golden}.features.npy", allow_pickle=False)
        assert np.abs(features - expected).max() <= 1e-4


def test_the_embedded_redis_is_found_by_the_other_commands(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 5)
    server = ruiji.start("redis")
    wait_until((ruiji.state / "redis.url").exists, what="the address of the embedded Redis")
    assert (ruiji.state / "redis.url").stat().st_mode & 0o077 == 0
    ruiji("enqueue")
    ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait")
    ruiji.stop_all()
    assert server.returncode == 0
    assert not (ruiji.state / "redis.url").exists()


def test_a_photo_and_a_scaled_copy_of_it_find_it_first(ruiji: Ruiji, shared_data: Path, tmp_path: Path) -> None:
    ruiji.media = shared_data / "photos"
    ruiji.model = tmp_path / "mobilenet.onnx"
    shutil.copy(shared_data / "models" / "mobilenet_v3_large_100_224_feature_vector.onnx", ruiji.model)
    ruiji("run", "--shard-rows", "100")
    for line in (shared_data / "photos" / "objects.txt").read_text().splitlines()[::60]:
        photo = shared_data / "photos" / line
        with Image.open(photo) as image:
            image.convert("RGB").resize((image.width // 2, image.height // 2)).save(tmp_path / "copy.jpg", quality=85)
        answers = json.loads(
            ruiji("search", str(photo), str(tmp_path / "copy.jpg"), "-k", "3", "--format", "json").stdout
        )
        assert [answer["hits"][0]["object_id"] for answer in answers] == [photo.name, photo.name]
        assert answers[0]["hits"][0]["similarity"] == pytest.approx(1, abs=1e-6)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs, which only root may")
def test_a_full_disk_pauses_the_run_and_nothing_half_written_counts(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 30)
    run(ruiji)
    expected = ruiji.shard_digests()
    ruiji.features = ruiji.features.with_name("small")
    ruiji.features.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(ruiji.features)]).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "10"}
        ruiji("enqueue")
        filler = ruiji.features / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        ruiji.start("worker", "--processes", "1")

        wait_until(lambda: "waiting" in str(ruiji.status().workers), what="a worker that waits for space")
        filler.unlink()
        ruiji("enqueue", "--wait")
        assert ruiji.shard_digests() == expected
    finally:
        ruiji.stop_all()
        subprocess.run(["umount", "-l", str(ruiji.features)], check=True)
