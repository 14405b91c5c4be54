"""What a new user types is there: variables, make targets, compose files, locks."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Set by `ruiji worker` for its own processes only.
INTERNAL = {"RUIJI_IN_HAND"}


def test_the_example_environment_names_every_variable_and_no_other() -> None:
    variables = set(re.findall(r'envvar="(RUIJI_\w+)"', (ROOT / "pipeline" / "settings.py").read_text())) - INTERNAL
    example = set(re.findall(r"^#?(RUIJI_\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert example == variables


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
    for block in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block.splitlines()[0]


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker command line")
@pytest.mark.parametrize("profile", ["", "cli"])
@pytest.mark.parametrize("hosts", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_compose_accepts_every_combination_of_files_and_profiles(gpu: bool, hosts: bool, profile: str) -> None:
    files = ["docker-compose.yml", *["docker-compose.gpu.yml"] * gpu, *["docker-compose.hosts.yml"] * hosts]
    settings = {
        name: f"/somewhere/{name}" for name in ("RUIJI_MEDIA_DIR", "RUIJI_FEATURE_DIR", "RUIJI_MODEL", "MODEL_DIR")
    }
    settings |= {"COMPOSE_FILE": ":".join(files), "COMPOSE_PROFILES": profile, "REDIS_HOST": "gpu-a"}
    command = ["docker", "compose", "config", "--format", "json"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings})
    if "unknown" in answer.stderr or "is not a docker command" in answer.stderr:
        pytest.skip("this docker has no compose")
    assert answer.returncode == 0, answer.stderr
    services = json.loads(answer.stdout)["services"]
    assert set(services) == {"redis", "worker", "reducer"} | ({"cli", "list"} if profile else set())
    assert {name for name, service in services.items() if "ports" in service} == ({"redis"} if hosts else set())
    assert ("deploy" in services["worker"]) == gpu
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        if name != "redis":
            assert service["user"] == "1000:1000"
            assert service["image"] == ("ruiji:gpu" if gpu else "ruiji:cpu")
