"""What a new user types is there: variables, make targets, compose files, locks."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Set by `ruiji worker` for its own processes only.
INTERNAL = {"RUIJI_THREADS"}


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


@pytest.mark.parametrize("lock", ["bench", "cpu", "demo", "dev", "gpu"])
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
@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "docker-compose.gpu.yml"]])
def test_compose_accepts_the_files(files: list[str]) -> None:
    command = ["docker", "compose", *(part for name in files for part in ("-f", name)), "--profile", "cli", "config"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "unknown" in answer.stderr or "is not a docker command" in answer.stderr:
        pytest.skip("this docker has no compose")
    assert answer.returncode == 0, answer.stderr
    assert "published" not in answer.stdout, "nothing is published to the network"
