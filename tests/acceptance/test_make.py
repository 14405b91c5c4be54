"""The make targets that work with containers too, on a machine without an engine; `tests/compose` has the others."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.stack import Stack
from tests.conftest import ROOT
from tests.factories import pictures


@pytest.fixture
def stack(tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """A clone whose virtual environment is filled already, where no Docker engine answers."""
    if not (ROOT / ".venv" / "bin" / "ruiji").exists():
        pytest.skip("needs the .venv that make fills")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    pictures(tmp_path / "media", 12)
    (tmp_path / "media" / "objects.txt").unlink()
    stack = Stack(tmp_path / "ruiji", "none", tmp_path / "media", tmp_path / "features", model_path)
    (stack.folder / ".venv").symlink_to(ROOT / ".venv")
    stack.set(RUIJI_STATE_DIR=str(tmp_path / "state"))
    yield stack
    stack.make("down")


def test_without_an_engine_the_same_targets_work_on_this_machine_and_say_so(stack: Stack) -> None:
    assert "nothing is up here" in stack.make("scale", "WORKERS=2", code=2).stderr
    up = stack.make("up", "WORKERS=1").stderr
    assert "on this machine" in up and "1 embed processes" in up
    stack.make("list")
    assert "12 done, 0 failed" in stack.make("enqueue", "ARGS=--wait").stderr
    assert stack.status()["done"] == 12
    query = sorted(stack.media.rglob("*.png"))[3]
    answer = stack.make("-s", "search", f"QUERY={query}", "ARGS=-k 1 --format paths")
    assert answer.stdout.splitlines() == [str(query)] and "on this machine" in answer.stderr
    assert "2 embed processes" in stack.make("scale", "WORKERS=2").stderr
    assert "on this machine" in stack.make("down").stderr
    assert not (stack.folder / ".up").exists() and not (stack.folder.parent / "state" / "redis.url").exists()


def test_after_a_reboot_the_numbers_of_old_processes_are_strangers(stack: Stack) -> None:
    notes = stack.folder / ".up"
    notes.mkdir()
    (notes / "with").write_text("mode=here\n")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "ruiji"]) as stranger:
        try:
            for name in ("redis", "worker"):
                (notes / f"{name}.pid").write_text(f"{stranger.pid}\n")
            assert "1 embed processes" in stack.make("up", "WORKERS=1").stderr
            stack.make("list")
            assert "12 done" in stack.make("enqueue", "ARGS=--wait").stderr
            stack.make("down")
            assert stranger.poll() is None
        finally:
            stranger.kill()
