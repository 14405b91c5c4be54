"""Pictures are decoded in a few child processes that stay warm: a decoder that crashes or hangs takes no service along.

The limits are those of an image that is suspected of killing workers (`workers.suspects`): memory, and a time after
which its process is ended. A process that died is replaced for the next picture, and the log has its last words.
"""

import asyncio
import json
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
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
#: Bytes of an answer that are read ahead: the pixels of one picture.
_READ_AHEAD = 1 << 20


class Decoders:
    """A pool of decoding processes; to be used in one event loop.

    Attributes:
        processes: how many there are at most.
    """

    def __init__(self, limits: Limits, processes: int) -> None:
        self.processes = processes
        self._limits = limits
        self._turns = asyncio.Semaphore(processes)
        self._children: set[_Child] = set()
        self._idle: list[_Child] = []
        self._pending = 0

    @property
    def pending(self) -> int:
        """Pictures that are being decoded or wait for it."""
        return self._pending

    @property
    def pids(self) -> list[int]:
        """Of the processes that are running."""
        return [child.pid for child in self._children]

    async def start(self) -> None:
        """Start all processes, so that the first pictures do not wait for them."""
        self._idle += await asyncio.gather(*(self._started() for _ in range(self.processes)))

    async def pixels(self, data: bytes, spec: ModelSpec) -> NDArray[np.uint8]:
        """The bytes of an image file as a model wants them, uint8[h, w, c]; as `workers.decode.images.decode`.

        Raises:
            ImageError: it cannot be decoded, or (`memory`, `timeout`, `crashed-worker`) took its decoder along.
            MachineFault: there is no process to decode it.
            Busy: too many pictures wait already.
        """
        head, body = await self._asked({"bytes": len(data), "spec": asdict(spec)}, data)
        return np.frombuffer(body, np.uint8).reshape(head["shape"])

    async def thumbnail(
        self, path: str, side: int, inside: str, file: Path, kept: Callable[[int, str | None], None]
    ) -> Thumbnail:
        """As `search.views.thumbnail.make_thumbnail`; the process that makes it keeps it in a file, too.

        Args:
            path: of the picture.
            inside: a folder, resolved, which the file must lie in once all links are followed.
            file: where it is kept.
            kept: called with its bytes and why it could not be kept, also if nobody waits for it any more.

        Raises:
            ImageError, MachineFault, Busy: as `pixels`.
        """
        request = {"path": path, "side": side, "inside": inside, "file": str(file)}
        head, body = await self._asked(request, b"", lambda head, body: kept(len(body), head["unkept"]))
        return Thumbnail(body, head["kind"])

    async def _asked(
        self,
        request: dict[str, Any],
        data: bytes,
        answered: Callable[[dict[str, Any], bytes], None] = lambda head, body: None,
    ) -> tuple[dict[str, Any], bytes]:
        """One request of some child; a call that is cancelled before its turn costs nothing.

        Args:
            answered: called with the answer, also if the call was cancelled after its turn had come.
        """
        if self._pending >= MOST_WAITING:
            raise Busy(f"{MOST_WAITING} pictures are waiting already; try again in a second")
        self._pending += 1
        try:
            await self._turns.acquire()
        except BaseException:
            self._pending -= 1
            raise
        # Not cancelled with the call: the answer must not be taken for that to the next request.
        asking = asyncio.create_task(self._ask(request, data, answered))
        asking.add_done_callback(self._done)
        await asyncio.wait([asking])
        return asking.result()

    def _done(self, asking: "asyncio.Task[Any]") -> None:
        self._pending -= 1
        self._turns.release()
        if not asking.cancelled():
            # If nobody waits any more, nobody takes its failure either.
            asking.exception()

    async def _ask(
        self, request: dict[str, Any], data: bytes, answered: Callable[[dict[str, Any], bytes], None]
    ) -> tuple[dict[str, Any], bytes]:
        child = await self._child()
        try:
            head, body = await child.ask(request, data)
        finally:
            if child.lives:
                self._idle.append(child)
            else:
                self._children.discard(child)
        if "fault" in head:
            raise MachineFault(head["fault"])
        if "reason" in head:
            raise ImageError(head["message"], Reason(head["reason"]))
        answered(head, body)
        return head, body

    async def _child(self) -> "_Child":
        """A child that has nothing in hand, started if there is none."""
        while self._idle:
            child = self._idle.pop()
            if child.lives:
                return child
            self._children.discard(child)
            await child.end()
        return await self._started()

    async def _started(self) -> "_Child":
        child = await _Child.start(self._limits)
        self._children.add(child)
        return child

    async def close(self) -> None:
        """End all processes; what they have in hand fails."""
        await asyncio.gather(*(child.end() for child in self._children))


class _Child:
    """One decoding process, at the other end of a socket."""

    def __init__(
        self,
        limits: Limits,
        process: "subprocess.Popen[bytes]",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._limits, self._process, self._reader, self._writer = limits, process, reader, writer
        self.pid = process.pid
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    @classmethod
    async def start(cls, limits: Limits) -> "_Child":
        """A new one, once it is ready.

        Raises:
            MachineFault: it cannot be started, or ended at once.
        """
        ours, its = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_READ_AHEAD)
        try:
            command = python_command("serve.decoder", json.dumps(asdict(limits)))
            process = start_child(command, stdin=its, stdout=its, stderr=subprocess.PIPE)
        except OSError as error:
            writer.close()
            raise MachineFault(f"no process that decodes pictures can be started: {error.strerror}") from None
        finally:
            its.close()
        child = cls(limits, process, reader, writer)
        # The clock of a picture starts only now: a slow start is not its fault.
        if await reader.readline() != READY:
            await child.end()
            await asyncio.to_thread(child._tell, "when it started")
            raise MachineFault(f"a process that decodes pictures ended with {process.returncode} when it started")
        return child

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    async def ask(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Its answer: head and body.

        Raises:
            ImageError: the child died, or took too long and was ended.
        """
        try:
            async with asyncio.timeout(self._limits.max_image_s):
                head, body = await self._exchange(request, data)
        except TimeoutError:
            raise await self._lost(given_up=True) from None
        # What is no answer of ours comes from a child that a picture has broken.
        except (OSError, EOFError, ValueError):
            raise await self._lost(given_up=False) from None
        if head.get("reason") == Reason.memory:
            # What it has left is no measure for the next picture.
            await self.end()
        return head, body

    async def _exchange(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        self._writer.writelines([json.dumps(request).encode() + b"\n", data])
        await self._writer.drain()
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        head: dict[str, Any] = json.loads(line)
        return head, await self._reader.readexactly(head["bytes"])

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

    async def _lost(self, given_up: bool) -> ImageError:
        """Why there is no answer."""
        await self.end()
        when = f"after {self._limits.max_image_s} s with one picture" if given_up else "with a picture in hand"
        await asyncio.to_thread(self._tell, when)
        if given_up:
            return ImageError(f"decoding it takes longer than {self._limits.max_image_s} s", Reason.timeout)
        # The kernel's way of ending what takes too much memory.
        if self._process.returncode == -signal.SIGKILL:
            return ImageError("decoding it takes too much memory", Reason.memory)
        return ImageError("it ended the process that decoded it", Reason.crashed_worker)

    async def end(self) -> None:
        """End the process, and let nobody wait for it."""
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        self._writer.close()
        # What was not written yet has no reader any more.
        with suppress(OSError):
            await self._writer.wait_closed()
