"""The service in its container: up with everything else, before there is a gallery, and for this machine alone."""

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.queue.embedded import free_port
from tests.compose.stack import Stack
from tests.factories import picture, pictures, wait_until

ODD_PASSWORD = "quote\" back\\slash $x 'single' \\n % #"


class Page:
    """Asks the published service."""

    def __init__(self, stack: Stack, port: int) -> None:
        self.port = port
        self.token = (stack.folder / "secrets" / "web_token").read_text()

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Authorization": f"Bearer {self.token}", **headers}
        connection.request(method, path, b"{}" if method == "POST" else None, sent)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def json(self, path: str) -> Any:
        status, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)

    def roles(self) -> set[str]:
        """Of the worker processes that are there."""
        return {one["role"] for one in self.json("/runs")["status"]["workers"]}


@pytest.fixture(scope="module")
def up(new_stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, Page, list[str]]:
    """An installation with the service, in which nothing was enqueued yet; one of its 30 pictures is broken."""
    media = tmp_path_factory.mktemp("serve") / "media"
    paths = pictures(media, 30)
    (media / paths[7]).write_text("<html>")
    stack, port = new_stack(media), free_port()
    stack.set(RUIJI_SHARD_ROWS="10", RUIJI_WEB_PORT=str(port))
    # What a user chose, with all that a shell or Redis' configuration could take for something else.
    (stack.folder / "secrets").mkdir()
    (stack.folder / "secrets" / "redis_password").write_text(ODD_PASSWORD + " \n")
    (stack.folder / "secrets" / "redis_password").chmod(0o600)
    (stack.folder / "docker-compose.override.yml").write_text("services: {serve: {labels: {added: by-a-user}}}\n")
    said = stack.make("up", "WORKERS=1", "SERVE=1").stderr
    assert f"the page: http://127.0.0.1:{port}; its token is in secrets/web_token" in said
    return stack, Page(stack, port), paths


def test_from_an_empty_folder_to_look_alikes_and_a_retry(up: tuple[Stack, Page, list[str]]) -> None:
    stack, page, paths = up
    health = page.json("/healthz")
    assert (health["status"], health["coming"], health["galleries"]) == ("ok", ["tiny"], [])
    stack.make("enqueue", "ARGS=--wait", code=None)
    wait_until(lambda: page.json("/healthz")["coming"] == [], what="the gallery")
    wait_until(lambda: page.json("/healthz")["galleries"][0]["objects"] == 29, what="all shards")
    name = Path(paths[0]).name
    assert len(page.json(f"/similar/{name}")["similarImages"]) == 10
    status, body = page.ask(f"/thumbs/{name}")
    assert status == 200 and body.startswith(b"\x89PNG")
    # Redis is asked, over the containers' network, and its workers are told. Each reports by itself, after its start.
    assert page.json("/runs")["without_redis"] is None
    wait_until(lambda: page.roles() == {"embed", "reduce"}, what="the workers' reports")
    assert [one["path"] for one in page.json("/failures")["failures"]] == [paths[7]]

    picture(stack.media / paths[7], 7)
    headers = {"Origin": f"http://127.0.0.1:{page.port}", "Content-Type": "application/json"}
    status, body = page.ask("/retry", "POST", **headers)
    assert (status, json.loads(body)["objects"]) == (200, 1)
    wait_until(lambda: page.json("/healthz")["galleries"][0]["objects"] == 30, what="the mended picture")


def test_what_a_user_adds_to_compose_holds(up: tuple[Stack, Page, list[str]]) -> None:
    stack, _, _ = up
    (serve,) = stack.containers("serve")
    assert serve["Config"]["Labels"]["added"] == "by-a-user"
    assert (stack.folder / "secrets" / "redis_password").read_text().strip() == ODD_PASSWORD


def test_who_has_no_token_gets_nothing_and_it_stands_nowhere(up: tuple[Stack, Page, list[str]]) -> None:
    stack, page, _ = up
    for given in ("", "Bearer ", "Bearer wrong-wrong-wrong-wrong"):
        assert page.ask("/healthz", Authorization=given)[0] == 401
    assert page.ask("/login")[0] == 200
    file = stack.folder / "secrets" / "web_token"
    assert len(page.token) > 20 and file.stat().st_mode & 0o077 == 0
    everything = json.dumps(stack.containers("serve"))
    everything += stack.compose("logs", "--no-color") + stack.compose("top") + stack.compose("config")
    assert "ruiji serve" in everything and page.token not in everything


def test_it_is_published_on_loopback_alone_and_writes_nowhere_but_to_the_features(
    up: tuple[Stack, Page, list[str]],
) -> None:
    stack, page, _ = up
    (container,) = stack.containers("serve")
    ports = container["NetworkSettings"]["Ports"]
    assert ports == {f"{page.port}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(page.port)}]}
    attempt = f"id -u; touch {stack.media}/x; touch {stack.model.parent}/x; touch /opt/ruiji/x"
    answer = stack.compose("exec", "serve", "sh", "-c", f"({attempt}; true) 2>&1").splitlines()
    assert answer[0] != "0" and len(answer) == 4
    assert all("Read-only file system" in line for line in answer[1:])


def test_it_stays_with_a_later_up_and_goes_with_down(up: tuple[Stack, Page, list[str]]) -> None:
    stack, page, _ = up
    assert "the page: " in stack.make("up", "WORKERS=1").stderr
    assert page.ask("/healthz")[0] == 200
    stack.make("down")
    project = f"label=com.docker.compose.project={stack.settings['COMPOSE_PROJECT_NAME']}"
    assert stack.run("docker", "ps", "-q", "--filter", project).stdout == ""
