"""Imports point one way, and nobody pays for what they do not use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"numpy", "torch", "onnxruntime", "onnx", "celery", "PIL", "redis"}


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['ruiji', '--help']\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    for command in (
        "list",
        "enqueue",
        "run",
        "worker",
        "status",
        "search",
        "cancel",
        "redis",
        "model",
        "retry",
        "doctor",
    ):
        assert command in done.stdout
    assert "worker-process" not in done.stdout


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("pipeline", {"workers", "search", "onnxruntime", "torch"}), ("workers", {"search", "torch"})],
)
def test_packages_import_only_what_lies_below_them(package: str, forbidden: set[str]) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.partition(".")[0] for name in names} & forbidden, path


def test_search_reaches_the_workers_in_one_place() -> None:
    users = {path.name for path in (ROOT / "search").rglob("*.py") if "from workers" in path.read_text()}
    assert users == {"queries.py"}
