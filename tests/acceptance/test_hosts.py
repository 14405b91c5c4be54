"""Workers of several hosts, which share Redis and two folders: TLS, clocks that differ, files that show late.

The hosts are pretended: processes with another clock, or whose view of the feature folder lags behind. Real network
namespaces are in `tests/compose`.
"""

import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import ROOT
from tests.factories import Ruiji, pictures, wait_until

OTHER_HOST = Path(__file__).with_name("other_host")
COUNT = 60
FAST = {"RUIJI_VISIBILITY_TIMEOUT_S": "3", "RUIJI_STALL_TIMEOUT_S": "4", "RUIJI_SHARD_ROWS": "20"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Ruiji:
    """A finished run over all pictures."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pictures(folder / "media", COUNT, size=(800, 600), distinct=10)
    shutil.copy(model_path, folder)
    command = Ruiji(folder / "media", folder / "features", folder / model_path.name, folder / "state", ROOT)
    command("run", "--shard-rows", "20")
    return command


@pytest.fixture
def expected(ruiji: Ruiji, undisturbed: Ruiji) -> dict[str, str]:
    """The undisturbed shards, of the same pictures that this test's command works on."""
    ruiji.media = undisturbed.media
    return undisturbed.shard_digests()


def other_host(ruiji: Ruiji, **how: str) -> Ruiji:
    """The same command on a host of its own."""
    host = Ruiji(ruiji.media, ruiji.features, ruiji.model, ruiji.state, ruiji.root)
    host.environment = {**ruiji.environment, **how, "PYTHONPATH": f"{OTHER_HOST}:{ROOT}"}
    return host


@contextlib.contextmanager
def at_work(*started: tuple[Ruiji, tuple[str, ...]]) -> Iterator[None]:
    """Workers on their hosts while the block runs."""
    for host, arguments in started:
        host.start("worker", *arguments)
    try:
        yield
    finally:
        for host, _ in started:
            host.stop_all()


def embedded(ruiji: Ruiji) -> int:
    """Features that the live workers wrote, as they say once they have nothing more to do; 0 before."""
    workers = ruiji.status().workers
    return sum(worker.images for worker in workers) if {worker.state for worker in workers} == {"idle"} else 0


@pytest.mark.parametrize("late_s", ["0.7", pytest.param("4", marks=pytest.mark.slow)])
def test_files_that_show_late_to_the_reducer_are_not_made_again(
    ruiji: Ruiji, redis_url: str, expected: dict[str, str], late_s: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ruiji.environment = {**FAST, "RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    reducer = other_host(ruiji, OTHER_HOST_LATE_S=late_s)
    # It needs no more of the model than its name.
    reducer.model = ruiji.model.with_suffix(".d") / ruiji.model.name
    with at_work((ruiji, ("--role", "embed", "--processes", "2")), (reducer, ("--role", "reduce"))):
        ruiji("enqueue", "--wait")
        wait_until(lambda: embedded(ruiji) >= COUNT, what="the workers' reports")
        assert embedded(ruiji) == COUNT
    assert ruiji.shard_digests() == expected
    called_missing = re.findall(r"segment_incomplete.* images=([1-9]\d*)", capfd.readouterr().err)
    assert bool(called_missing) == (late_s == "4"), "within a second nothing is called missing"


def test_clocks_that_are_hours_apart_lose_nothing(ruiji: Ruiji, redis_url: str, expected: dict[str, str]) -> None:
    ruiji.environment = {**FAST, "RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    behind, ahead = other_host(ruiji, OTHER_HOST_CLOCK_S="-7200"), other_host(ruiji, OTHER_HOST_CLOCK_S="7200")
    with at_work(
        (behind, ("--role", "embed", "--processes", "1")),
        (ahead, ("--role", "embed", "--processes", "1")),
        (ahead, ("--role", "reduce")),
    ):
        ruiji("enqueue", "--wait")
    assert ruiji.shard_digests() == expected


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with a CA and the certificate of 127.0.0.1, made as a user makes them."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command line")
    (tmp_path / "deploy").mkdir()
    script = shutil.copy(ROOT / "deploy" / "stack.sh", tmp_path / "deploy")
    subprocess.run([script, "certificates", "127.0.0.1"], check=True)
    return tmp_path / "secrets"


def make_certificates(folder: Path, host: str, code: int = 0, **environment: str) -> str:
    """`make certificates` once more; returns what it says."""
    command = [folder.parent / "deploy" / "stack.sh", "certificates", host]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == code, done.stderr
    return done.stderr


def test_a_second_certificate_keeps_the_ca_that_other_hosts_trust(certificates: Path) -> None:
    ca, first = (certificates / "redis_ca").read_bytes(), (certificates / "redis_certificate").read_bytes()
    assert "the CA that is in secrets/" in make_certificates(certificates, "[fd00::1]")
    assert (certificates / "redis_ca").read_bytes() == ca
    assert (certificates / "redis_certificate").read_bytes() != first
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "redis_certificate", certificates / "redis_key")
    # As strictly as Python does from 3.13 on.
    look = ["openssl", "verify", "-x509_strict", "-CAfile", "redis_ca", "-verify_ip", "fd00::1", "redis_certificate"]
    subprocess.run(look, cwd=certificates, check=True)
    (certificates / "ca_key").unlink()
    assert "put that back" in make_certificates(certificates, "gpu-a.lan", code=2)


def test_a_ca_that_newer_pythons_refuse_is_made_anew_and_others_can_keep_theirs(certificates: Path) -> None:
    # As ruiji made it first: it does not say what its key is for.
    old = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca_key -out redis_ca -subj"
    subprocess.run(["openssl", *old.split(), "/CN=ruiji's own CA"], cwd=certificates, check=True, capture_output=True)
    shutil.copy(certificates / "redis_ca", certificates / "old_ca")
    assert "hosts with Python 3.13 or later need it" in make_certificates(certificates, "127.0.0.1")
    assert (certificates / "redis_ca").read_bytes() != (certificates / "old_ca").read_bytes()
    for check in ("-x509_strict -CAfile redis_ca", "-CAfile old_ca"):
        look = ["openssl", "verify", *check.split(), "-verify_ip", "127.0.0.1", "redis_certificate"]
        subprocess.run(look, cwd=certificates, check=True)
    assert "Python 3.13" not in make_certificates(certificates, "127.0.0.1")


def test_a_certificate_that_cannot_be_made_says_why_and_leaves_the_old_one(certificates: Path, tmp_path: Path) -> None:
    before = {name: (certificates / name).read_bytes() for name in ("redis_key", "redis_certificate")}
    assert "bad ip address" in make_certificates(certificates, "999.1.1.1", code=1)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "id", "sed", "tail", "chown"):
        (tools / name).symlink_to(shutil.which(name) or "")
    assert "no openssl: install it" in make_certificates(certificates, "gpu-a.lan", code=1, PATH=str(tools))
    assert {name: (certificates / name).read_bytes() for name in before} == before


@pytest.fixture
def tls_address(certificates: Path, redis_url: str) -> Iterator[str]:
    """`host:port` where the test's Redis is reached with TLS (the embedded one speaks none itself)."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "redis_certificate", certificates / "redis_key")
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(connection: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(connection, server_side=True) as outside,
            socket.create_connection(("127.0.0.1", urlsplit(redis_url).port)) as inside,
        ):
            back = threading.Thread(target=copy, args=(inside, outside), daemon=True)
            back.start()
            copy(outside, inside)
            back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_a_whole_run_goes_over_tls_with_a_password_and_a_ca_of_its_own(
    ruiji: Ruiji, redis_url: str, certificates: Path, tls_address: str
) -> None:
    pictures(ruiji.media, 20)
    password = certificates / "redis_password"
    password.write_text(urlsplit(redis_url).password or "")
    ca = f"ssl_ca_certs={certificates / 'redis_ca'}"
    ruiji.environment = {"RUIJI_REDIS_PASSWORD_FILE": str(password), "RUIJI_SHARD_ROWS": "10"}

    untrusted = ruiji("enqueue", "--redis-url", f"rediss://{tls_address}/0", code=1).stderr
    assert "certificate verify failed" in untrusted and "Traceback" not in untrusted
    missing = ruiji("enqueue", "--redis-url", f"rediss://{tls_address}/0?ssl_ca_certs=/nowhere", code=2).stderr
    assert "cannot read /nowhere" in missing

    ruiji.environment["RUIJI_REDIS_URL"] = f"rediss://{tls_address}/0?{ca}"
    ruiji.start("worker", "--processes", "1")
    ruiji("enqueue", "--wait")
    assert len(list(ruiji.gallery.glob("000?.json"))) == 2
