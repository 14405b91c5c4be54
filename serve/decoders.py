"""Pictures are decoded in a few child processes that stay warm: a decoder that crashes or hangs takes no service along.

The limits are those of an image that is suspected of killing workers (`workers.suspects`): memory, and a time after
which its process is ended. A process that died is replaced for the next picture, and the log has its last words.
"""

import asyncio
import json
import signal
import subprocess
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.children import python_command, start_child
from pipeline.choices import Reason
from pipeline.errors import ImageError, MachineFault
from pipeline.logs import clipped
from pipeline.plans.plan import Limits
from pipeline.spec import ModelSpec
from pipeline.streams import note
from search.views.thumbnail import Thumbnail
from serve.decoder import READY
from serve.searches import Busy

#: Pictures that may wait.
MOST_WAITING = 256
#: Lines that are kept of what a process says: a traceback, and not all that a library has against a picture.
_LAST_LINES = 20


class Decoders:
    """A pool of decoding processes; to be used in one event loop.

    Attributes:
        processes: how many there are at most.
    """

    def __init__(self, limits: Limits, processes: int) -> None:
        self.processes = processes
        self._limits = limits
        self._threads = ThreadPoolExecutor(processes, "decode")
        self._own = threading.local()
        self._children: set[_Child] = set()
        self._pending = 0

    @property
    def pending(self) -> int:
        """Pictures that are being decoded or wait for it."""
        return self._pending

    @property
    def pids(self) -> list[int]:
        """Of the processes that are running."""
        return [child.pid for child in tuple(self._children)]

    async def start(self) -> None:
        """Start all processes, so that the first pictures do not wait for them."""
        together = threading.Barrier(self.processes)

        def start() -> None:
            self._child()
            together.wait()

        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._threads, start) for _ in range(self.processes)))

    async def pixels(self, data: bytes, spec: ModelSpec) -> NDArray[np.uint8]:
        """The bytes of an image file as a model wants them, uint8[h, w, c]; as `workers.decode.images.decode`.

        Raises:
            ImageError: it cannot be decoded, or (`memory`, `timeout`, `crashed-worker`) took its decoder along.
            MachineFault: there is no process to decode it.
            Busy: too many pictures wait already.
        """
        head, body = await self._asked({"bytes": len(data), "spec": asdict(spec)}, data)
        return np.frombuffer(body, np.uint8).reshape(head["shape"])

    async def thumbnail(self, path: str, side: int, inside: str) -> Thumbnail:
        """As `search.views.thumbnail.make_thumbnail`.

        Args:
            path: of the picture.
            inside: a folder, resolved, which the file must lie in once all links are followed.

        Raises:
            ImageError, MachineFault, Busy: as `pixels`.
        """
        head, body = await self._asked({"path": path, "side": side, "inside": inside}, b"")
        return Thumbnail(body, head["kind"])

    async def _asked(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """One request of some child; a call that is cancelled before its turn costs nothing."""
        if self._pending >= MOST_WAITING:
            raise Busy(f"{MOST_WAITING} pictures are waiting already; try again in a second")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, request, data)
        finally:
            self._pending -= 1

    def _ask(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        head, body = self._child().ask(request, data)
        if "fault" in head:
            raise MachineFault(head["fault"])
        if "reason" in head:
            raise ImageError(head["message"], Reason(head["reason"]))
        return head, body

    def _child(self) -> "_Child":
        """The child of this thread, started if there is none."""
        child: _Child | None = getattr(self._own, "child", None)
        if child is None or not child.lives:
            if child is not None:
                self._children.discard(child)
            child = self._own.child = _Child(self._limits)
            self._children.add(child)
        return child

    def close(self) -> None:
        """End all processes; what they have in hand fails."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in tuple(self._children):
            child.end()


class _Child:
    """One decoding process."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._process = start_child(
            python_command("serve.decoder", json.dumps(asdict(limits))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.pid = self._process.pid
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()
        assert self._process.stdout is not None
        # The clock of a picture starts only now: a slow start is not its fault.
        if self._process.stdout.readline() != READY:
            self.end()
            self._tell("when it started")
            raise MachineFault(f"a process that decodes pictures ended with {self._process.returncode} when it started")

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Its answer: head and body.

        Raises:
            ImageError: the child died, or took too long and was ended.
        """
        given_up = threading.Event()

        def give_up() -> None:
            given_up.set()
            self._process.kill()

        clock = threading.Timer(self._limits.max_image_s, give_up)
        clock.start()
        try:
            return self._exchange(request, data)
        except (OSError, EOFError):
            raise self._lost(given_up.is_set()) from None
        finally:
            clock.cancel()

    def _exchange(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request).encode() + b"\n" + data)
        stdin.flush()
        line = stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        head: dict[str, Any] = json.loads(line)
        body = stdout.read(head["bytes"])
        if len(body) != head["bytes"]:
            raise EOFError
        if head.get("reason") == Reason.memory:
            # What it has left is no measure for the next picture.
            self.end()
        return head, body

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._said.append(clipped(line.decode(errors="backslashreplace").rstrip()))

    def _tell(self, when: str) -> None:
        """Write into the log that the process ended, and what it said last."""
        # Until all is read that it wrote; a child of its own could still hold the pipe.
        self._listening.join(1)
        note(f"warning: a process that decodes pictures ended with {self._process.returncode} {when}")
        for line in tuple(self._said):
            note(f"  it said: {line}")

    def _lost(self, given_up: bool) -> ImageError:
        """Why there is no answer."""
        self.end()
        self._tell(f"after {self._limits.max_image_s} s with one picture" if given_up else "with a picture in hand")
        if given_up:
            return ImageError(f"decoding it takes longer than {self._limits.max_image_s} s", Reason.timeout)
        # The kernel's way of ending what takes too much memory.
        if self._process.returncode == -signal.SIGKILL:
            return ImageError("decoding it takes too much memory", Reason.memory)
        return ImageError("it ended the process that decoded it", Reason.crashed_worker)

    def end(self) -> None:
        """End the process, and let nobody wait for it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # What was not written yet has no reader any more.
                with suppress(OSError):
                    pipe.close()
