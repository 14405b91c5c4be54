"""The benchmark for GPUs, on the CPU: it must not break before it has seen one."""

import subprocess
import sys

import pytest

from benchmarks.data import MODEL, ROOT
from benchmarks.results import FOLDER


@pytest.mark.slow
def test_search_finds_what_a_brute_force_finds_and_a_trial_is_not_saved() -> None:
    pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")
    before = sorted((path, path.stat().st_mtime_ns) for path in FOLDER.iterdir())
    command = [sys.executable, "-m", "benchmarks.gpu", "search", "--rows", "200", "300", "--device", "cpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for figure in ("1 queries, 300 rows: right ids", "100 queries, 200 rows: a process that stays", "groups"):
        assert figure in ended.stdout
    assert sorted((path, path.stat().st_mtime_ns) for path in FOLDER.iterdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="needs the development photos and models")
def test_it_runs_to_its_end_and_a_trial_is_not_saved() -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in FOLDER.iterdir())
    command = [sys.executable, "-m", "benchmarks.gpu", "embed", "--images", "64", "--device", "cpu", "--processes", "2"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # So few images cannot hold the rate that is asked for.
    assert ended.returncode in (0, 1), ended.stderr
    for figure in ("decode, all cores: rate", "encode, batch 64: CPU", "whole pipeline: rate", "least cosine"):
        assert figure in ended.stdout
    assert "Unmeasured" in ended.stderr and "Traceback" not in ended.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in FOLDER.iterdir()) == before
