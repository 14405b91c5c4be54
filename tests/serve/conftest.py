"""A real service, as `ruiji serve` starts it, on a real gallery."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pipeline.model import load_model
from search.queries import embed_images, load_encoder
from tests.factories import Ruiji, pictures, wait_until
from tests.search.galleries import write_gallery

COUNT = 40
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        said: str = self.json()["error"]
        return said


@dataclass
class Served:
    """A service that is running."""

    process: "subprocess.Popen[str]"
    port: int
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send a request; `_` in a header's name stands for `-`."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {**self.headers, **named})
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def similar(self, object_id: str, query: str = "") -> Answer:
        return self.get(f"/similar/{quote(object_id, safe='', errors='surrogateescape')}{query}")

    def search(self, data: bytes, query: str = "", **headers: str) -> Answer:
        """Send a picture as a browser's form does."""
        body = (
            b'--sep\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n--sep--\r\n"
        )
        sent = {"Origin": self.origin, "Content_Type": "multipart/form-data; boundary=sep", **headers}
        return self.ask("POST", f"/search{query}", body, **sent)

    def metric(self, name: str) -> float:
        """The value of a metric without labels, or the first of those with these labels."""
        text = self.get("/metrics").body.decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, text
        return float(found[1])

    def decoders(self) -> list[int]:
        """The processes that decode."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        # Each was started by a thread of the pool.
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += (task / "children").read_text().split()
        return sorted({int(child) for child in children})

    def raw(self) -> socket.socket:
        """A connection of its own, for what no client sends."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


def write_served_gallery(ruiji: Ruiji, count: int = COUNT, shard_rows: int = 16) -> list[str]:
    """Pictures, and a gallery with the features of its model; returns their paths."""
    paths = pictures(ruiji.media, count)
    model = load_model(ruiji.model)
    features = embed_images([ruiji.media / path for path in paths], model, load_encoder(model, "cpu"), 10**6).features
    write_gallery(ruiji.gallery, model, features, paths, shard_rows)
    return paths


def start(ruiji: Ruiji, *arguments: str, log: Path | None = None) -> Served:
    """Start a service and wait until it answers."""
    log = log or ruiji.media.parent / "serve.log"
    process = ruiji.start("serve", "--port", "0", *arguments, errors=log)

    def address() -> "re.Match[str] | None":
        assert process.poll() is None, log.read_text()
        return re.search(r"^http://\S+:(\d+) answers", log.read_text(), re.MULTILINE)

    wait_until(address, what="the service's start")
    found = address()
    assert found
    return Served(process, int(found[1]), log)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[Ruiji]:
    """A media folder with a gallery, for the tests of one file."""
    base = tmp_path_factory.mktemp("world")
    model = base / model_path.name
    model.write_bytes(model_path.read_bytes())
    ruiji = Ruiji(base / "media", base / "features", model, base / "state", ROOT)
    write_served_gallery(ruiji)
    yield ruiji
    ruiji.stop_all()


@pytest.fixture(scope="module")
def served(world: Ruiji) -> Served:
    """A service on that gallery."""
    return start(world)


@pytest.fixture
def serve(ruiji: Ruiji) -> Callable[..., Served]:
    """Starts services on a gallery of this test's own."""
    write_served_gallery(ruiji)
    return lambda *arguments: start(ruiji, *arguments)
