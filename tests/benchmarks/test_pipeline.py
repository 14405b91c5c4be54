"""What benchmarks start: it finds its packages, and nobody waits for what has ended."""

from pathlib import Path

import pytest

from benchmarks.pipeline import Ruiji, ruiji, wait_until


def test_a_command_that_failed_ends_the_wait(tmp_path: Path, model_path: Path) -> None:
    with ruiji(tmp_path, model_path, tmp_path) as running:
        running.start("worker", "--no-such-option")
        with pytest.raises(RuntimeError, match=r"ruiji worker ended with 2.*no-such-option"):
            wait_until(lambda: False, "the workers", running.check)
        with pytest.raises(RuntimeError, match="ruiji worker ended with 2"):
            running.finished()


def test_a_plan_that_cannot_come_is_not_waited_for(tmp_path: Path, model_path: Path) -> None:
    with (
        ruiji(tmp_path, model_path, tmp_path) as running,
        pytest.raises(RuntimeError, match=r"ruiji enqueue ended with 2.*no Redis"),
    ):
        running.enqueue(tmp_path / "no-such-list")


def test_what_is_started_has_this_checkout_and_the_packages_of_its_parent(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "sitecustomize.py").write_text("from pathlib import Path\nPath('found').touch()\n")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    running = Ruiji(tmp_path, model_path, tmp_path)
    running.run("--version")
    assert (tmp_path / "found").exists()
