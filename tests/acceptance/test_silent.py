"""Connections that fall silent, as when the power of Redis' host or a firewall goes: nobody says good-bye."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from pipeline.queue.connection import connect
from tests.factories import Ruiji, pictures, wait_until


class Proxy:
    """Passes everything on until `hush`; then what is open stays open and silent, and what is new works or does not."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._era = 0
        self._new_ones_work = True
        self.ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def hush(self, new_ones_work: bool) -> None:
        self._new_ones_work = new_ones_work
        self._era += 1

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                client.close()
                continue
            era = self._era if self._new_ones_work else -1
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target, era), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, era: int) -> None:
        with source, target, suppress(OSError):
            while data := source.recv(1 << 16):
                if self._era != era:
                    self.ended.wait()
                    return
                target.sendall(data)

    def close(self) -> None:
        self.ended.set()
        self._server.close()


@pytest.fixture
def proxy(redis_url: str) -> Iterator[Proxy]:
    port = urlsplit(redis_url).port
    assert port is not None
    made = Proxy(port)
    yield made
    made.close()


def through(proxy: Proxy, redis_url: str) -> str:
    return redis_url.replace(f":{urlsplit(redis_url).port}/", f":{proxy.port}/")


def work_until_silent(ruiji: Ruiji, redis_url: str, proxy: Proxy, new_ones_work: bool) -> None:
    paths = pictures(ruiji.media, 3000, distinct=20)
    for path in paths[::100]:
        (ruiji.media / path).unlink()
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "500", "RUIJI_VISIBILITY_TIMEOUT_S": "16"}
    ruiji("enqueue")
    ruiji.environment["RUIJI_REDIS_URL"] = through(proxy, redis_url)
    ruiji.start("worker", "--processes", "1")
    ruiji.environment["RUIJI_REDIS_URL"] = redis_url
    wait_until(lambda: ruiji.status().done > 200, what="some work")
    proxy.hush(new_ones_work)
    assert ruiji.status().plan is not None


def test_a_worker_gives_its_silent_connections_up_and_goes_on(ruiji: Ruiji, redis_url: str, proxy: Proxy) -> None:
    work_until_silent(ruiji, redis_url, proxy, new_ones_work=True)
    wait_until(lambda: ruiji.status().plan is None, 240, "the plan's end")
    status = ruiji.status()
    assert (status.done, status.failed) == (2970, 30)


def test_a_healthy_worker_takes_over_what_a_cut_off_one_holds(ruiji: Ruiji, redis_url: str, proxy: Proxy) -> None:
    work_until_silent(ruiji, redis_url, proxy, new_ones_work=False)
    ruiji.start("worker", "--processes", "1")
    wait_until(lambda: ruiji.status().plan is None, 240, "the plan's end")
    time.sleep(10)
    assert len(ruiji.status().workers) == 2, "who is cut off is not on the list"
    keys = {str(key).split(":")[-1] for key in connect(redis_url).scan_iter("ruiji:*:worker:*")}
    assert len(keys) == 2
    proxy.close()
