"""GPUs that are not there: a driver's library that is built here, and an ONNX Runtime with a CUDA that it pretends."""

import shutil
import subprocess
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
#: By letter, see `libcuda.c`: a card of 2022, one like it with little memory left, and one of 2017.
H200 = "a 9 0 143000 142000 0 NVIDIA H200"
BUSY = "b 9 0 143000 3000 0 NVIDIA H200"
V100 = "c 7 0 32000 31000 0 Tesla V100"


def uuid(letter: str) -> str:
    """The UUID of a pretended device."""
    return f"GPU-{letter * 8}-{letter * 4}-{letter * 4}-{letter * 4}-{letter * 12}"


class PretendedCuda:
    """A folder that makes a process see GPUs.

    Attributes:
        environment: what to add to the process' environment.
        library: the driver's.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        """Build the driver; skips the test where no C compiler is."""
        if (compiler := shutil.which("gcc") or shutil.which("cc")) is None:
            pytest.skip("needs a C compiler")
        self.folder = folder
        folder.mkdir()
        self.library = folder / "libcuda.so.1"
        source = str(_HERE / "libcuda.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(self.library), source], check=True)
        shutil.copy(_HERE / "onnxruntime.py", folder)
        self.environment = {
            "PRETENDED_CUDA": str(folder),
            "LD_LIBRARY_PATH": str(folder),
            "PYTHONPATH": f"{folder}:{root}",
        }

    def have(self, *gpus: str) -> None:
        """Let these be the devices."""
        (self.folder / "gpus").write_text("".join(f"{gpu}\n" for gpu in gpus))

    def driver(self, version: int = 13_000, result: int = 0) -> None:
        """Let the driver be of a version, and say this when it is asked for devices."""
        (self.folder / "driver").write_text(f"{version} {result}\n")

    def fail(self, where: str, words: str | None) -> None:
        """Let `create` or `run` of a session fail with these words, or no longer; `absent`: without a word."""
        if words is None:
            (self.folder / where).unlink(missing_ok=True)
        else:
            (self.folder / where).write_text(words)

    def calls(self) -> list[str]:
        """What was done to devices, in order."""
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []
