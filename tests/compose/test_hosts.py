"""Two installations that share only Redis, over TLS, and the folders: as on two hosts, with networks of their own."""

import shutil
import socket
from collections.abc import Callable

import pytest

from pipeline.queue.embedded import free_port
from tests.compose.stack import Stack
from tests.factories import pictures, wait_until


def own_address() -> str:
    """This machine's address on its way out; containers reach it too."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # Sends nothing.
        return str(probe.getsockname()[0])


@pytest.fixture(scope="module")
def hosts(new_stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, Stack]:
    """One with Redis, a reducer and a worker; and one that joined it with two workers."""
    media = tmp_path_factory.mktemp("pictures") / "media"
    pictures(media, 120, size=(1600, 1200), distinct=4)
    first = new_stack(media)
    second = new_stack(media, first.features, first.model)
    port = str(free_port())
    address = own_address()
    for host in (first, second):
        host.set(REDIS_HOST=address, REDIS_PORT=port, RUIJI_SHARD_ROWS="40")
    first.make("certificates", f"REDIS_HOST={address}")
    first.make("up", "WORKERS=1")
    refused = second.make("join", "WORKERS=2", code=2).stderr
    assert "copy it from" in refused
    (second.folder / "secrets").mkdir()
    for name in ("redis_password", "redis_ca"):
        # As whoever copies them, root perhaps, has them; `make join` sees to it that containers can read them.
        (second.folder / "secrets" / name).touch(mode=0o600)
        shutil.copyfile(first.folder / "secrets" / name, second.folder / "secrets" / name)
    nowhere = second.make("join", "REDIS_HOST=nowhere.invalid", code=2).stderr
    assert "containers do not find the host nowhere.invalid" in nowhere and "Healthy" not in nowhere
    assert f"nothing answers at {address}, port 1 " in second.make("join", "REDIS_PORT=1", code=2).stderr
    second.make("join", "WORKERS=2")
    return first, second


def test_workers_of_both_hosts_take_part_over_tls(hosts: tuple[Stack, Stack]) -> None:
    first, second = hosts
    assert [len(first.containers(service)) for service in ("redis", "reducer", "worker")] == [1, 2, 1]
    assert [len(second.containers(service)) for service in ("redis", "reducer", "worker")] == [0, 0, 2]
    networks = {
        name
        for host in hosts
        for container in host.containers("worker")
        for name in container["NetworkSettings"]["Networks"]
    }
    assert len(networks) == 2, "each in a network of its own"
    first.make("enqueue")
    wait_until(lambda: not first.running(), timeout_s=120, what="the end of the run")
    status = second.status()  # Everything is seen from there too.
    assert (status["done"], status["failed"]) == (120, 0)
    images = second.embedded(120)
    assert len(images) == 3 and all(images.values())


def test_without_tls_or_with_another_ca_there_is_no_way_in(hosts: tuple[Stack, Stack]) -> None:
    _, second = hosts
    plain = f"redis://{second.settings['REDIS_HOST']}:{second.settings['REDIS_PORT']}/0"
    # The CA that this host trusts is another's, so there is no making a certificate with it here.
    assert "ca_key" in second.make("certificates", "REDIS_HOST=elsewhere", code=2).stderr
    (second.folder / "secrets" / "redis_ca").unlink()
    second.make("certificates", "REDIS_HOST=elsewhere")
    answer = second.make("status", code=None).stderr
    assert "certificate verify failed" in answer
    answer = second.make("status", f"ARGS=--redis-url {plain}", code=None).stderr
    assert "cannot reach Redis" in answer


def test_near_duplicates_are_compared_in_a_container_that_goes_down_with_the_rest(hosts: tuple[Stack, Stack]) -> None:
    first, _ = hosts
    first.compose("--profile", "compare", "up", "-d", "--scale", "comparer=1", "comparer")
    answer = first.make("-s", "ruiji", "ARGS=near-duplicates --distributed --format paths").stdout
    assert len(answer.split()) == 120, "of each picture there are thirty"
    assert len(first.containers("comparer")) == 1
    first.make("down")
    assert first.containers("comparer") == []
