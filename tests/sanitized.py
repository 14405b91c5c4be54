"""Compiles a C file with a program that uses it, every read and write checked by the compiler's own sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def run_sanitized(folder: Path, program: str, source: Path, *options: str, arguments: tuple[str, ...] = ()) -> None:
    """Compile without a warning, run in the folder, and expect that nothing is found; skips without a compiler.

    Args:
        program: has `main`, which returns 0.
        options: of the compiler.
        arguments: of the program.
    """
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    (folder / "main.c").write_text(program)
    command = ["cc", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", *options]
    checked = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        [*command, *checked, "main.c", source, "-lm", "-o", "x"], capture_output=True, text=True, cwd=folder
    )
    if "asan" in built.stderr:
        pytest.skip("the compiler has no sanitizers here")
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([folder / "x", *arguments], capture_output=True, text=True, cwd=folder, env=environment)
    assert ran.returncode == 0, (ran.returncode, ran.stderr)
