"""What breaks things on purpose: a Redis that can be killed, a network that can be cut, worker processes to kill."""

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from pipeline.children import start_child
from pipeline.errors import BrokerUnavailable
from pipeline.queue.connection import connect
from pipeline.queue.embedded import find_server, free_port
from tests.factories import Ruiji, kill, wait_until, worker_processes

#: The table's full numbers (`make chaos`) or the short form that fits into every change's checks.
LONG = os.environ.get("CHAOS") == "long"


def sized(short: int, long: int) -> int:
    """A number of the short or of the long form."""
    return long if LONG else short


@dataclass
class Server:
    """A Redis on a port and with a password that stay the same, with an append-only file as in production."""

    folder: Path
    port: int
    password: str
    _process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        settings = f'bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\ndir "{self.folder}"\n'
        settings += 'appendonly yes\nmaxmemory-policy noeviction\nsave ""\n'
        self._process = start_child([find_server(), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin is not None
        self._process.stdin.write(settings.encode())
        self._process.stdin.close()
        wait_until(self.answers, what="Redis")

    def answers(self) -> bool:
        try:
            connect(self.url).close()
        except BrokerUnavailable:
            return False
        return True

    def kill(self) -> None:
        """As a power cut would end it: up to a second of its append-only file is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """It answers nothing any more; connections are still taken."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def replace_by_an_empty_one(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)
        self.start()


@contextlib.contextmanager
def redis_server(folder: Path, password: str | None = None) -> Iterator[Server]:
    """A Redis of this test's own."""
    server = Server(folder, free_port(), password or secrets.token_urlsafe(16))
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Network:
    """A TCP relay to a server on this machine, which can be cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._whole = threading.Event()
        self._whole.set()
        self._open: list[socket.socket] = []
        self._pumps: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_for(self, seconds: float) -> None:
        """Nothing passes meanwhile, as where a cable is pulled: connections hang, new ones too; then all are reset."""
        self._whole.clear()
        time.sleep(seconds)
        self._reset()
        self._whole.set()

    def lead_to(self, port: int) -> None:
        """New connections reach another server, as after a failover behind one address; open ones stay."""
        self._target = port

    def close(self) -> None:
        self._whole.set()
        self._listener.close()
        self._reset()
        for pump in self._pumps:
            pump.join()

    def _reset(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._whole.wait()
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                self._pumps.append(threading.Thread(target=self._pump, args=(source, target), daemon=True))
                self._pumps[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with source:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    self._whole.wait()
                    target.sendall(data)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)


def kill_one(role: str, rng: random.Random) -> bool:
    """Kill -9 a process of a role, if there is one."""
    found = worker_processes(role)
    if found:
        kill(rng.choice(found))
    return bool(found)


def progress(ruiji: Ruiji) -> int | None:
    """Objects that are done or failed, None once the plan is closed."""
    try:
        status = ruiji.status()
    except (redis.RedisError, BrokerUnavailable):
        return -1
    return None if status.plan is None else status.done + status.failed


def wait_for_progress(ruiji: Ruiji) -> bool:
    """Wait until more is done than now; False where the run is over by then."""
    before = progress(ruiji)
    now: list[int | None] = [before]

    def moved() -> bool:
        now[0] = progress(ruiji)
        return now[0] is None or now[0] > (before or 0)

    wait_until(moved, timeout_s=120, what="progress")
    return now[0] is not None


def watch_memory(condition: Callable[[], bool]) -> tuple[float, int]:
    """The highest resident size of any worker process until the condition holds, in MB, and how many there were."""
    peak, seen = 0, set()
    while not condition():
        for role in ("embed", "reduce"):
            for process in worker_processes(role):
                with contextlib.suppress(OSError, IndexError):
                    text = Path(f"/proc/{process.pid}/status").read_text()
                    seen.add(process.pid)
                    peak = max(peak, int(text.partition("VmHWM:")[2].split()[0]))
        time.sleep(0.1)
    return peak / 1000, len(seen)
