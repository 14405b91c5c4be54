"""Kinds of Redis that ruiji cannot work with are refused in one line; users with the documented rights suffice."""

import contextlib
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.children import start_child
from pipeline.errors import RuijiError, UsageError
from pipeline.queue.connection import connect
from pipeline.queue.embedded import embedded_redis, find_server, free_port
from pipeline.settings import resolve_redis_url
from tests.conftest import ROOT
from tests.factories import Ruiji, pictures, wait_until


@pytest.fixture
def old_redis() -> Iterator[str]:
    """What a client sees of a Redis 6.0, as far as it may go."""
    info = b"redis_version:6.0.16\r\nredis_mode:standalone\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                # A client may go in the middle of an answer.
                with contextlib.suppress(OSError), peer, peer.makefile("rwb") as stream:
                    while line := stream.readline():
                        words = [(stream.readline(), stream.readline().strip())[1] for _ in range(int(line[1:]))]
                        answer = b"$%d\r\n%s\r\n" % (len(info), info) if words[0] == b"INFO" else b"+OK\r\n"
                        stream.write(b"%1\r\n$5\r\nproto\r\n:3\r\n" if words[0] == b"HELLO" else answer)
                        stream.flush()

        threading.Thread(target=serve, daemon=True).start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A real server in cluster mode."""
    ports = [str(free_port()) for _ in range(2)]
    settings = ["--port", ports[0], "--cluster-enabled", "yes", "--cluster-port", ports[1], "--dir", str(tmp_path)]
    process = start_child([find_server(), *settings, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        url = f"redis://127.0.0.1:{ports[0]}/0"

        def up() -> bool:
            try:
                connect(url)
            except UsageError:
                return True
            except RuijiError:
                return False
            return True

        wait_until(up, what="the cluster")
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("kind", "words"), [("old_redis", "6.2 or later"), ("cluster", "cluster mode")])
def test_what_would_never_end_is_refused_at_once(
    ruiji: Ruiji, kind: str, words: str, request: pytest.FixtureRequest
) -> None:
    pictures(ruiji.media, 2)
    ruiji.environment = {"RUIJI_REDIS_URL": request.getfixturevalue(kind)}
    for command in (["enqueue"], ["worker", "--processes", "1"]):
        said = ruiji(*command, code=2).stderr
        assert words in said and said.count("error:") == said.count("\n") == 1, said
    assert words in ruiji("doctor", code=1).stdout


def documented_rights() -> list[str]:
    """The line of docs/deployment.md."""
    (line,) = re.findall(r"ACL SETUSER ruiji (.*)", (ROOT / "docs" / "deployment.md").read_text())
    return [str(word) for word in line.split()]


@pytest.fixture
def user(redis_url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a user with the documented rights; its password is in a file."""
    client = connect(redis_url)
    client.execute_command("ACL", "SETUSER", "ruiji", "reset", *documented_rights())
    (tmp_path / "password").write_text("PASSWORD\n")
    yield "redis://ruiji@" + redis_url.rpartition("@")[2]
    client.execute_command("ACL", "DELUSER", "ruiji")


def test_a_user_with_the_documented_rights_does_all_and_its_password_may_be_in_a_file(
    ruiji: Ruiji, redis_url: str, user: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = pictures(ruiji.media, 12)
    (ruiji.media / paths[0]).write_text("broken")
    ruiji.environment = {"RUIJI_REDIS_URL": user, "RUIJI_REDIS_PASSWORD_FILE": str(tmp_path / "password")}
    ruiji.environment |= {"RUIJI_SHARD_ROWS": "5", "RUIJI_VISIBILITY_TIMEOUT_S": "4"}
    ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait", code=3)
    client = connect(redis_url)

    def settled() -> bool:
        left = {str(key): client.ttl(key) for key in client.scan_iter()}
        markers = {key: ttl for key, ttl in left.items() if re.fullmatch(r"celery-taskset-meta-.*\.c", key)}
        rest = all(":worker:" in key or key.endswith(":place") for key in left.keys() - markers)
        return rest and len(markers) == 3 and all(0 < ttl <= 300 for ttl in markers.values())

    wait_until(settled, what="a Redis with no more than three markers and who is at work")
    ruiji.stop_all()
    assert all(str(key).endswith((".c", ":place")) for key in client.scan_iter())
    assert ruiji("doctor", code=None).stdout.startswith(("ok", "warn"))
    assert "NOPERM" not in capfd.readouterr().err


@pytest.mark.parametrize("lost", ["~ruiji:*", "~embed.*", "~celery-taskset-meta-*", "~reduce.*"])
def test_a_right_that_is_missing_ends_a_worker_in_one_line(
    ruiji: Ruiji, redis_url: str, user: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], lost: str
) -> None:
    pictures(ruiji.media, 6)
    client = connect(redis_url)
    rights = [right for right in documented_rights() if right != lost]
    client.execute_command("ACL", "SETUSER", "ruiji", "reset", *rights)
    limited = {"RUIJI_REDIS_URL": user, "RUIJI_REDIS_PASSWORD_FILE": str(tmp_path / "password")}
    if lost != "~reduce.*":
        ruiji.environment = limited
        refused = ruiji("enqueue", code=2).stderr.splitlines()
        assert "docs/deployment.md" in refused[-1] and "error:" in refused[-1]
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    ruiji.environment = limited
    done = ruiji("worker", "--processes", "1", code=2, timeout_s=60)
    refused = [line for line in done.stderr.splitlines() if "docs/deployment.md" in line]
    assert 1 <= len(refused) <= 2 and "Traceback" not in done.stderr, done.stderr


def test_a_password_that_is_changed_ends_who_has_the_old_one(
    ruiji: Ruiji, redis_url: str, user: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures(ruiji.media, 2)
    client = connect(redis_url)
    ruiji.environment = {"RUIJI_REDIS_URL": user, "RUIJI_REDIS_PASSWORD_FILE": str(tmp_path / "password")}
    # Nobody reduces, so that it waits.
    waiting = ruiji.start("enqueue", "--wait")
    worker = ruiji.start("worker", "--processes", "1", "--role", "embed")
    wait_until(lambda: len(list(ruiji.gallery.glob("??/??/*.npy"))) == 2, what="two features")
    client.execute_command("ACL", "SETUSER", "ruiji", "resetpass", ">OTHER")
    client.execute_command("CLIENT", "KILL", "USER", "ruiji")
    assert (worker.wait(60), waiting.wait(60)) == (2, 2)
    refused = [line for line in capfd.readouterr().err.splitlines() if "RUIJI_REDIS_PASSWORD_FILE" in line]
    assert ["redis_refuses" in line for line in refused].count(False) == 1 and 2 <= len(refused) <= 3, refused


def test_a_damaged_append_only_file_names_the_way_out(tmp_path: Path) -> None:
    with embedded_redis(tmp_path / "redis") as (url, _):
        connect(url).set("a", "b")
    (log,) = (tmp_path / "redis" / "appendonlydir").glob("*.incr.aof")
    log.write_bytes(b"nonsense" + log.read_bytes())
    with (
        pytest.raises(RuijiError, match=r"remove .*redis/appendonlydir: nothing is lost"),
        embedded_redis(tmp_path / "redis"),
    ):
        pass


def test_a_user_in_the_url_keeps_its_name_when_the_password_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("p@ss/word\n")
    for url, whole in (
        ("redis://app@h:1/0", "redis://app:p%40ss%2Fword@h:1/0"),
        ("redis://h:1/0", "redis://:p%40ss%2Fword@h:1/0"),
        ("redis://app:own@h:1/0", "redis://app:own@h:1/0"),
    ):
        assert resolve_redis_url(url, tmp_path / "password", None) == whole


def test_what_passes_is_told_in_a_few_lines_and_waited_for(
    ruiji: Ruiji, redis_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pictures(ruiji.media, 3000, distinct=20)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "500"}
    client = connect(redis_url)
    ruiji("enqueue")
    worker = ruiji.start("worker", "--processes", "1")
    wait_until(lambda: ruiji.status().done > 100, what="some work")
    capfd.readouterr()
    try:
        client.replicaof("127.0.0.1", 1)
        time.sleep(6)
        client.replicaof("NO", "ONE")
        time.sleep(3)
        client.config_set("maxmemory", "1mb")
        time.sleep(6)
    finally:
        client.replicaof("NO", "ONE")
        client.config_set("maxmemory", "0")
    for _ in range(5):
        client.client_kill_filter(_type="normal", skipme=True)
        time.sleep(0.5)
    wait_until(lambda: ruiji.status().plan is None, what="the plan's end")
    assert worker.poll() is None
    ruiji.stop_all()
    lines = [line for line in capfd.readouterr().err.splitlines() if " info " not in line]
    assert any("redis_away" in line for line in lines)
    assert len(lines) <= 40 and not any("Traceback" in line or "Deprecation" in line for line in lines), "\n".join(
        lines
    )
    assert max(map(len, lines)) < 300


def test_a_cancelled_plan_leaves_nothing_once_the_next_one_has_ended(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 30)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "10"}
    ruiji("enqueue")
    ruiji("cancel")
    ruiji("enqueue", "--shard-rows", "15")
    ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait", "--shard-rows", "15")
    client = connect(redis_url)

    def left() -> list[str]:
        return [
            key for key in map(str, client.scan_iter()) if ":worker:" not in key and not key.endswith((".c", ":place"))
        ]

    wait_until(lambda: not left(), 30, "the end of all keys")
