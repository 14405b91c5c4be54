"""What tests are made of: tiny models, pictures, and the command line as a user runs it."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pipeline.queue.connection import connect
from pipeline.status import Status, StatusReader


def tiny_model(
    path: Path,
    *,
    size: int = 8,
    channels: int = 3,
    layout: str = "NHWC",
    length: int = 12,
    batch: int | str = "n",
    input_name: str = "inputs:0",
    output_name: str = "feature_vector",
    seed: int = 0,
) -> Path:
    """Write a real ONNX graph: pixels, flattened, times a fixed random matrix."""
    weights = np.random.default_rng(seed).normal(size=(size * size * channels, length)).astype(np.float32)
    shape = [batch, size, size, channels] if layout == "NHWC" else [batch, channels, size, size]
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", [input_name], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "weights"], [output_name]),
        ],
        "tiny",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, [batch, length])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (16, 12)) -> Path:
    """Write a smooth random picture; equal seeds give equal pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size).save(path)
    return path


def pictures(media_dir: Path, count: int, size: tuple[int, int] = (16, 12), distinct: int | None = None) -> list[str]:
    """Write pictures in the article's nested layout and their sorted `objects.txt`; returns the paths.

    With `distinct` only so many are drawn; the others are links to them, which is quicker for large ones.
    """
    paths = []
    for number in range(count):
        name = hashlib.sha1(str(number).encode()).hexdigest() + ".png"
        paths.append(f"object/{name[0:2]}/{name[2:4]}/{name}")
        if distinct is None or number < distinct:
            picture(media_dir / paths[-1], number, size)
        else:
            (media_dir / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
            os.link(media_dir / paths[number % distinct], media_dir / paths[-1])
    paths.sort()
    (media_dir / "objects.txt").write_text("".join(f"{path}\n" for path in paths))
    return paths


def wait_until(condition: Callable[[], object], timeout_s: float = 180.0, what: str = "the condition") -> None:
    """Poll until the condition holds; fail loudly where it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.05)


def processes_below(pid: int | None = None) -> list[psutil.Process]:
    """The processes that a process started (by default this one), and theirs; empty once it has ended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def worker_processes(role: str, pid: int | None = None) -> list[psutil.Process]:
    """Living worker processes of a role among `processes_below`."""
    found = []
    for process in processes_below(pid):
        with suppress(psutil.Error):
            if "worker-process" in (command := process.cmdline()) and command[-1] == role:
                found.append(process)
    return found


def kill(process: psutil.Process) -> None:
    """Kill a process, which may have ended by itself."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def only_line(errors: str | bytes) -> str:
    """What a command said on stderr, which has to be one line that begins with `error: `."""
    text = errors if isinstance(errors, str) else errors.decode()
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


@dataclass
class Ruiji:
    """Runs `ruiji` sub-commands in processes of their own."""

    media: Path
    features: Path
    model: Path
    state: Path
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    _started: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def gallery(self) -> Path:
        """The gallery folder."""
        return self.features / self.model.stem

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "RUIJI_MEDIA_DIR": str(self.media),
            "RUIJI_FEATURE_DIR": str(self.features),
            "RUIJI_MODEL": str(self.model),
            "RUIJI_STATE_DIR": str(self.state),
            **self.environment,
        }

    def __call__(
        self, *arguments: str, code: int | None = 0, stdin: str | None = None, timeout_s: float = 240
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end and check its exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            env=self._environment(),
            cwd=self.media.parent,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def shell(self, script: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
        """Run a shell script in which `ruiji` is the command, below the media folder's parent."""
        function = f'ruiji() {{ "{sys.executable}" -m pipeline "$@"; }}\n'
        return subprocess.run(
            ["bash", "-c", function + script],
            env=self._environment() | environment,
            cwd=self.media.parent,
            capture_output=True,
            timeout=240,
        )

    def start(self, *arguments: str, answer: Path | None = None, errors: Path | None = None) -> "subprocess.Popen[str]":
        """Start a command that stays; its output goes to the test's own, or to files if they are given."""
        with (
            answer.open("w") if answer is not None else nullcontext() as stdout,
            errors.open("w") if errors is not None else nullcontext() as stderr,
        ):
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *arguments],
                env=self._environment(),
                cwd=self.media.parent,
                text=True,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def stop_all(self) -> None:
        """Stop what is still running, as an orderly shutdown."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._started:
            process.wait(timeout=180)

    def status(self) -> Status:
        """The accounting, read in this process: quick enough to poll while workers work."""
        client = connect(self.environment["RUIJI_REDIS_URL"])
        try:
            return StatusReader(self.gallery, client).read()
        finally:
            client.close()

    def shard_digests(self) -> dict[str, str]:
        """sha256 of every file of every shard, records included, by name."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.gallery.iterdir())
            if path.is_file() and path.name[:4].isdigit()
        }
