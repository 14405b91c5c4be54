"""Messages that ruiji did not send, secrets, and file modes: what a worker must refuse, and what must not leak."""

import ast
import base64
import json
import os
import pickle
import stat
from pathlib import Path

import pytest

from pipeline.gallery import read_gallery
from pipeline.plans.files import open_plan
from pipeline.plans.plan import Plan
from pipeline.queue.app import make_app
from pipeline.queue.connection import connect
from pipeline.queue.keys import embed_queue, reduce_queue
from tests.factories import Ruiji, picture, pictures, tiny_model, wait_until


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self._path,)


def forged(plan: Plan, args: object, name: str = "ruiji.embed", **headers: object) -> dict[str, object]:
    """A message like the producer's own, with any arguments."""
    body = base64.b64encode(json.dumps([args, {}, {}]).encode()).decode()
    properties = {
        "correlation_id": "x",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": embed_queue(plan.gallery_id)},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": os.urandom(8).hex(),
    }
    return {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": name, "id": f"forged.{os.urandom(4).hex()}", "root_id": "x", **headers},
        "properties": properties,
    }


def test_messages_that_ruiji_did_not_send_harm_nothing(
    ruiji: Ruiji, redis_url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = pictures(ruiji.media, 20)
    secret = picture(tmp_path / "secret.png")
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "10", "RUIJI_STALL_TIMEOUT_S": "4"}
    ruiji("enqueue")
    plan = open_plan(ruiji.gallery)
    assert plan is not None
    pickled = forged(plan, [])
    pickled["body"] = base64.b64encode(pickle.dumps([[Bomb(tmp_path / "exploded")], {}, {}])).decode()
    pickled["content-type"], pickled["content-encoding"] = "application/x-python-serialize", "binary"
    misshapen = forged(plan, [])
    misshapen["body"] = base64.b64encode(b"[]").decode()
    messages = [
        pickled,
        forged(plan, [plan.plan_id, 0, "../secret.png"]),
        forged(plan, [plan.plan_id, 0, str(secret)]),
        forged(plan, [plan.plan_id, 99, paths[0]]),
        forged(plan, [plan.plan_id, -1, paths[0]]),
        forged(plan, [plan.plan_id, "zero", paths[0]]),
        forged(plan, [plan.plan_id, 0, {"path": paths[0]}]),
        forged(plan, [plan.plan_id]),
        forged(plan, ["../../../../etc", 0, paths[0]]),
        forged(plan, "no list"),
        # Not a line of the segment: the name of a healthy object elsewhere, and names that are no file's.
        forged(plan, [plan.plan_id, 0, f"nowhere/{paths[0].rpartition('/')[2]}"]),
        forged(plan, [plan.plan_id, 1, plan.paths(plan.segments[0])[0]]),
        forged(plan, [plan.plan_id, 0, "....png"]),
        forged(plan, [plan.plan_id, 0, "a" * 300 + ".png"]),
        misshapen,
        forged(plan, ["id"], name="os.system"),
    ]
    client = connect(redis_url)
    for message in messages:
        client.rpush(embed_queue(plan.gallery_id), json.dumps(message))
    for args in ([plan.plan_id, 99], [plan.plan_id, "x"], []):
        client.rpush(reduce_queue(plan.gallery_id), json.dumps(forged(plan, args, name="ruiji.reduce")))
    ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait")
    ruiji.stop_all()
    assert not (tmp_path / "exploded").exists()
    assert json.loads(ruiji("status", "--json").stdout)["done"] == 20
    assert not list(ruiji.gallery.rglob("*secret*"))
    assert not list(tmp_path.rglob("*.error.json"))
    assert ruiji("verify").stdout == ""
    assert client.llen(embed_queue(plan.gallery_id)) == 0, "none of them comes back for ever"
    output = capfd.readouterr().err
    assert "task_refused" in output and "process_died" not in output
    assert "batch_failed" not in output and "machine_fault" not in output


def test_a_worker_of_another_model_or_without_a_state_folder_refuses_to_start(
    ruiji: Ruiji, redis_url: str, tmp_path: Path
) -> None:
    pictures(ruiji.media, 3)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    (tmp_path / "file").write_text("")
    assert "--state-dir" in ruiji("worker", "--state-dir", str(tmp_path / "file"), code=1).stderr
    tiny_model(ruiji.model, seed=1)
    assert "belongs to the model" in ruiji("worker", "--processes", "1", "--role", "embed", code=4).stderr


def test_only_json_is_accepted(redis_url: str) -> None:
    app = make_app(redis_url, "0123456789abcdef", visibility_timeout_s=60)
    assert set(app.conf.accept_content) <= {"json", "msgpack"}
    assert set(app.conf.result_accept_content or app.conf.accept_content) <= {"json", "msgpack"}
    assert {app.conf.task_serializer, app.conf.result_serializer} <= {"json", "msgpack"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_secret_is_logged_and_no_line_is_written_per_image(
    ruiji: Ruiji, capfd: pytest.CaptureFixture[str], log_format: str
) -> None:
    paths = pictures(ruiji.media, 12)
    (ruiji.media / paths[3]).write_text("no image")
    ruiji.environment = {"RUIJI_LOG_FORMAT": log_format}
    server = ruiji.start("redis")
    url_file = ruiji.state / "redis.url"
    wait_until(url_file.exists, what="Redis")
    url = url_file.read_text().strip()
    password = url.partition("@")[0].rpartition(":")[2]
    said = [ruiji("enqueue").stderr]
    worker = ruiji.start("worker", "--processes", "1")
    said.append(ruiji("enqueue", "--wait", code=3).stderr)
    server.terminate()
    server.wait(timeout=180)
    said.append(ruiji("status", "--json", "--redis-url", url, code=3).stderr)
    worker.terminate()
    worker.wait(timeout=180)
    output = "".join([*said, *capfd.readouterr()])
    assert password not in output
    assert "object_failed" in output and paths[3] in output and "undecodable" in output
    assert not any(path in output for path in paths if path != paths[3])
    if log_format == "json":
        (failed,) = [line for line in output.splitlines() if "object_failed" in line]
        event = json.loads(failed)
        assert (event["event"], event["path"], event["reason"], event["attempts"]) == (
            "object_failed",
            paths[3],
            "undecodable",
            1,
        )


def test_files_are_made_with_sane_modes(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 5)
    ruiji("run", "--workers", "1", "--keep-features")
    assert read_gallery(ruiji.gallery) is not None
    umask = os.umask(0)
    os.umask(umask)
    for path in ruiji.features.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
    for path in ruiji.state.rglob("*"):
        if path.name in ("in-hand", "redis") or path.suffix == ".url":
            assert not path.stat().st_mode & 0o077, path


def test_no_array_is_read_with_pickle() -> None:
    root = Path(__file__).resolve().parents[2]
    for package in ("pipeline", "workers", "search"):
        for file in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "np.save"):
                    assert "allow_pickle=False" in ast.unparse(node), f"{file}:{node.lineno}"
                if isinstance(node, ast.Import | ast.ImportFrom):
                    assert "pickle" not in ast.unparse(node), f"{file}:{node.lineno}"
