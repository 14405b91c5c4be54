"""From a fresh clone to three workers and a search answer with the README's commands; and who may see and do what."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.compose.stack import Stack
from tests.conftest import SHARED
from workers.decode.resize import NO_INSTRUCTIONS


@pytest.fixture(scope="module")
def finished(new_stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """Three workers that have made the features of the 250 photos."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared test data beside the checkout, which is not here")
    model = tmp_path_factory.mktemp("model") / "models" / "mobilenet.onnx"
    model.parent.mkdir()  # pytest's own folders are closed to the containers' user.
    shutil.copy(SHARED / "models" / "mobilenet_v3_large_100_224_feature_vector.onnx", model)
    stack = new_stack(SHARED / "photos", model=model)
    stack.set(RUIJI_SHARD_ROWS="100")
    assert "with docker compose" in stack.make("up", "WORKERS=3").stderr
    answer = stack.make("enqueue", "ARGS=--wait")
    assert "in a container of docker compose" in answer.stderr and "250 done, 0 failed" in answer.stderr
    return stack


def test_every_worker_took_part(finished: Stack) -> None:
    status = finished.status()
    assert (status["objects"], status["done"], status["failed"], status["plan"]) == (250, 250, 0, None)
    images = finished.embedded(250)
    assert len(images) == 3 and all(images.values())
    assert set(images) == {container["Config"]["Hostname"] for container in finished.containers("worker")}


def test_shards_equal_the_golden_features(finished: Stack) -> None:
    shards = [f"{finished.gallery}/000{n}" for n in range(3)]
    ids = np.concatenate([np.load(f"{shard}.object_ids.npy", allow_pickle=False) for shard in shards])
    features = np.concatenate([np.load(f"{shard}.features.npy", allow_pickle=False) for shard in shards])
    golden = f"{SHARED}/golden/mobilenet_v3_large"
    assert ids.tolist() == np.load(f"{golden}.object_ids.npy", allow_pickle=False).tolist()
    assert np.abs(features - np.load(f"{golden}.features.npy", allow_pickle=False)).max() <= 1e-4


def test_search_answers_for_a_photo_that_lies_anywhere(finished: Stack, tmp_path: Path) -> None:
    path = (finished.media / "objects.txt").read_text().splitlines()[60]
    query = tmp_path / "my photo.jpg"
    shutil.copy(finished.media / path, query)
    answer = finished.make("-s", "search", f"QUERY={query}", "ARGS=-k 2 --format paths")
    # The path of a hit is one of this machine, as it would be without containers.
    assert answer.stdout.splitlines()[0] == str(finished.media / path)


def test_the_feature_folder_was_made_and_its_files_are_the_users(finished: Stack) -> None:
    user = finished.containers("worker")[0]["Config"]["User"]
    owner = (finished.gallery / "0000.json").stat()
    assert user == f"{owner.st_uid}:{owner.st_gid}" and owner.st_uid != 0


def test_the_image_has_the_compiled_resizing(finished: Stack) -> None:
    answer = finished.compose("exec", "worker", "ruiji", "doctor", code=None)
    assert "ok    resizing   compiled" in answer or NO_INSTRUCTIONS in answer


def test_containers_are_not_root_and_write_nowhere_but_to_the_features(finished: Stack) -> None:
    attempt = f"id -u; touch {finished.media}/x; touch {finished.model.parent}/x; touch /opt/ruiji/x"
    for service in ("worker", "reducer"):
        answer = finished.compose("exec", service, "sh", "-c", f"({attempt}; true) 2>&1").splitlines()
        assert answer[0] != "0" and len(answer) == 4
        assert all("Read-only file system" in line for line in answer[1:])
    # Redis starts as root, to read the password, and becomes its own user.
    assert "Uid:\t0" not in finished.compose("exec", "redis", "grep", "Uid", "/proc/1/status")


def test_the_password_is_in_no_inspect_process_list_or_log(finished: Stack) -> None:
    password = (finished.folder / "secrets" / "redis_password").read_text()
    assert len(password) > 20 and (finished.folder / "secrets" / "redis_password").stat().st_mode & 0o077 == 0
    everything = json.dumps([finished.containers(service) for service in ("redis", "worker", "reducer")])
    everything += finished.compose("logs", "--no-color") + finished.compose("top") + finished.compose("config")
    assert "shard_published" in everything and "redis-server" in everything
    assert password not in everything


def test_redis_is_reached_with_the_password_and_from_its_own_network_only(finished: Stack) -> None:
    (redis,) = finished.containers("redis")
    assert not any(redis["NetworkSettings"]["Ports"].values()), "nothing is published"
    (network,) = redis["NetworkSettings"]["Networks"].values()
    address = (network["IPAddress"], 6379)
    probe = f"import socket; c = socket.create_connection({address}, 3); c.sendall(b'PING\\r\\n'); print(c.recv(99))"
    inside = finished.compose("exec", "worker", "python", "-c", probe)
    assert "NOAUTH" in inside
    image = finished.containers("worker")[0]["Config"]["Image"]
    outside = ["docker", "run", "--rm", "--network", "bridge", "--entrypoint", "python", image, "-c", probe]
    refused = finished.run(*outside, code=1).stderr
    assert "timed out" in refused or "unreachable" in refused or "refused" in refused


def test_enqueueing_again_has_nothing_to_do_and_the_list_can_be_made_in_a_container(
    finished: Stack, tmp_path: Path
) -> None:
    assert "nothing to do" in finished.make("enqueue").stderr
    path = (finished.media / "objects.txt").read_text().splitlines()[0]
    media = tmp_path / "media"
    (media / path).parent.mkdir(parents=True)
    shutil.copy(finished.media / path, media / path)
    user = finished.containers("worker")[0]["Config"]["User"].split(":")
    shutil.chown(media, int(user[0]), int(user[1]))
    finished.make("list", f"RUIJI_MEDIA_DIR={media}")
    assert (media / "objects.txt").read_text() == f"{path}\n"


def test_commands_in_containers_write_only_what_outlives_them(finished: Stack) -> None:
    lost = finished.make("list", "ARGS=--out /tmp/objects.txt", code=2).stderr
    assert "no permission to write to /tmp" in lost
    target = finished.features / "objects.txt"
    finished.make("list", f"ARGS=--out {target}")
    assert len(target.read_text().splitlines()) == 250
    target.unlink()
