"""Decoding one suspect in a disposable child process, with a time and a memory limit.

Only decoding meets what a file says; the model sees pixels of one fixed shape, whatever the file was.
So the child needs no model, and its pixels are the very ones that an ordinary worker makes.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.children import python_command, start_child
from pipeline.choices import Reason
from pipeline.errors import ImageError, MachineFault
from pipeline.plans.plan import Limits
from pipeline.spec import ModelSpec
from workers.decode.files import open_image
from workers.decode.heif import load_decoder
from workers.decode.images import Decoded, decode_whole

#: Starting Python and reading some of a file takes a second; on a busy machine or a slow disk some more.
_READ_TIMEOUT_S = 120.0
#: What the child says after each such part of its file, and once it has read all that it reads ahead.
_READING, _READ = b"reading\n", b"read\n"
_READ_BYTES = 16 << 20
_MB = 1 << 20


class ChildDied(Exception):
    """The child died or was ended for its time; `reason` is how."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_alone(path: Path, spec: ModelSpec, limits: Limits, altered: list[str] | None = None) -> Decoded:
    """As `open_image` and `decode_whole`, in a child process of its own.

    Args:
        altered: told, as by `decode_whole`.

    Raises:
        ImageError: as they do; reason `memory` where it took more than the limit.
        ChildDied: the child crashed, or took longer than the limit.
        MachineFault: the file could not be read at all.
    """
    request = {"path": os.fspath(path), "spec": asdict(spec), "limits": asdict(limits)}
    child = start_child(
        python_command("workers.suspects.alone"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # So that what `select` sees is all there is.
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.close()
        started: bytes | None = _READING
        while started == _READING:
            started = _line(child.stdout, time.monotonic() + _READ_TIMEOUT_S)
        if not started:
            why = f"its decoder ended with {child.wait()}" if started is not None else "reading takes too long"
            raise MachineFault(f"{path} cannot be read: {why}")
        # The clock of the image starts only now: a slow disk is not its fault.
        answer = _line(child.stdout, time.monotonic() + limits.max_image_s)
        if answer is None:
            raise ChildDied(Reason.timeout)
        if not answer:
            # The kernel's way of ending what takes too much memory.
            raise ChildDied(Reason.memory if child.wait() == -signal.SIGKILL else Reason.crashed_worker)
        value = json.loads(answer)
        if value.get("fault"):
            raise MachineFault(value["message"])
        if "reason" in value:
            raise ImageError(value["message"], Reason(value["reason"]))
        if altered is not None:
            altered += value["altered"]
        pixels = np.empty(value["shape"], dtype=np.uint8)
        _fill(pixels.data.cast("B"), child.stdout)
        return Decoded(pixels, bytes.fromhex(value["digest"]))
    except BrokenPipeError:
        raise ChildDied(Reason.crashed_worker) from None
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def _line(stream: IO[bytes], deadline: float) -> bytes | None:
    """The next line; empty if the stream has ended, None after the deadline."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        if not selector.select(max(0.0, deadline - time.monotonic())):
            return None
    # The child writes its lines whole.
    return stream.readline()


def _fill(view: memoryview, stream: IO[bytes]) -> None:
    while view:
        data = stream.read(len(view))
        if not data:
            raise ChildDied(Reason.crashed_worker)
        view[: len(data)] = data
        view = view[len(data) :]


def limit_memory(megabytes: int) -> None:
    """Let this process take so much more memory than it has now; beyond that `MemoryError` comes."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        data_pages = int(Path("/proc/self/statm").read_text().split()[5])
    except OSError:
        return  # Not Linux: the time limit and the machine's own memory remain.
    limit = data_pages * resource.getpagesize() + megabytes * _MB
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _main() -> None:
    load_decoder()
    request = json.loads(sys.stdin.readline())
    path, limits = Path(request["path"]), Limits(**request["limits"])
    spec = ModelSpec.from_values(request["spec"])
    out = sys.stdout.buffer
    for _ in _read_ahead(path, limits.max_image_mb * _MB):
        out.write(_READING)
        out.flush()
    out.write(_READ)
    out.flush()
    limit_memory(limits.max_image_mb)
    altered: list[str] = []
    try:
        with open_image(path) as file:
            decoded = decode_whole(file, spec, limits.max_pixels, altered)
    except ImageError as error:
        message = str(error)
        if error.reason is Reason.memory:
            message = f"decoding it takes more than {limits.max_image_mb} MB of memory"
        answer: dict[str, object] = {"reason": error.reason, "message": message}
    except MachineFault as error:
        answer = {"fault": True, "message": str(error)}
    else:
        told = {"shape": decoded.pixels.shape, "altered": altered, "digest": decoded.digest.hex()}
        out.write(json.dumps(told).encode() + b"\n")
        out.write(decoded.pixels.tobytes())
        out.flush()
        return
    out.write(json.dumps(answer).encode() + b"\n")
    out.flush()


def _read_ahead(path: Path, most: int) -> Iterator[None]:
    """Bring the file into the page cache, so that no disk is waited for while the image's time runs.

    Args:
        most: bytes that are read; a decoder that may take so much memory does not need more of them soon.

    Yields:
        After each part.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            for _ in range(0, most, _READ_BYTES):
                if not file.read(_READ_BYTES):
                    return
                yield
    except OSError:
        return  # `open_image` says what is wrong with it.


if __name__ == "__main__":
    _main()
