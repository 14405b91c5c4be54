"""Small pictures of a gallery's objects, kept on the disk within a bound."""

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline import layout
from pipeline.choices import Reason
from pipeline.errors import ImageError
from pipeline.streams import note
from search.views.thumbnail import Thumbnail
from serve.decoders import Decoders

#: Bytes that the pictures of one gallery may take; at 10 kB each some 25,000.
MOST_BYTES = 256 << 20
#: Reasons of failed objects whose pictures are not decoded again, for people neither.
DEADLY = frozenset({Reason.crashed_worker, Reason.memory, Reason.timeout})
#: Changes whenever the same file would give another picture.
_VERSION = 2
_JPEG, _JPEG_END, _PNG, _PNG_END = b"\xff\xd8", b"\xff\xd9", b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class Thumbnails:
    """The small pictures of one gallery."""

    def __init__(self, folder: Path, media_dir: Path, decoders: Decoders, most_bytes: int = MOST_BYTES) -> None:
        self._decoders, self._cache = decoders, _Cache(layout.thumbnails_folder(folder), most_bytes)
        self._media = os.path.realpath(media_dir)
        # Files that took their decoder along, by all that a picture is made of: not tried again.
        self._deadly: dict[str, ImageError] = {}

    async def get(self, find: Callable[[], str], side: int) -> Thumbnail:
        """The small picture of an object.

        Args:
            find: gives its path relative to the media folder, as the gallery has it; called in a thread.
            side: the longer one, in pixels: a `serve.bodies.Side`.

        Raises:
            ImageError: it has none; says why.
            MachineFault: there is no process to decode it. Busy: too many pictures wait already.
            RuijiError: as `find` raises it.
        """
        path, digest, kept = await asyncio.to_thread(self._look, find, side)
        if kept is not None:
            return kept
        if digest in self._deadly:
            raise self._deadly[digest]
        try:
            made = await self._decoders.thumbnail(path, side, self._media, self._cache.file(digest), self._cache.note)
        except ImageError as error:
            if error.reason in DEADLY:
                self._deadly[digest] = error
            raise
        if self._cache.is_full:
            await asyncio.to_thread(self._cache.make_room)
        return made

    def _look(self, find: Callable[[], str], side: int) -> tuple[str, str, Thumbnail | None]:
        """Where a picture is, what its small one is kept under, and that if it is."""
        relative = find()
        path = f"{self._media}/{relative}"
        try:
            status = os.stat(path)
        except OSError as error:
            raise ImageError(f"its picture cannot be opened: {error.strerror}", Reason.missing) from None
        made_of = (_VERSION, relative, side, status.st_size, status.st_mtime_ns)
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:40]
        return path, digest, self._cache.read(digest)


class _Cache:
    """Pictures as files; those that nobody asked for longest go first."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._lock = threading.Lock()
        # Unknown before the first look. Another service may write here too: each look counts anew.
        self._bytes: int | None = None
        self._said = False

    def file(self, digest: str) -> Path:
        """Where a picture is kept."""
        return layout.thumbnail_file(self._folder, digest)

    def read(self, digest: str) -> Thumbnail | None:
        file = self.file(digest)
        try:
            data = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        # Not fsynced: after a power failure a file can be cut off.
        if data.startswith(_JPEG) and data.endswith(_JPEG_END):
            return Thumbnail(data, "jpeg")
        if data.startswith(_PNG) and data.endswith(_PNG_END):
            return Thumbnail(data, "png")
        return None

    def note(self, size: int, unkept: str | None) -> None:
        """Count a picture that was written; say once if the folder cannot be written to."""
        if unkept is None:
            self._bytes = None if self._bytes is None else self._bytes + size
        elif not self._said:
            note(f"warning: small pictures are not kept: {unkept}")
            self._said = True

    @property
    def is_full(self) -> bool:
        """Whether there may be more than the bound allows."""
        return self._bytes is None or self._bytes > self._most_bytes

    def make_room(self) -> None:
        """Remove the oldest down to nine tenths of the bound if it is exceeded."""
        with self._lock:
            if self.is_full:
                self._bytes = self._left()

    def _left(self) -> int:
        """How many bytes there are, once there is room."""
        found = []
        for place, _, names in os.walk(self._folder):
            for name in names:
                with suppress(OSError):
                    status = os.stat(f"{place}/{name}")
                    found.append((status.st_mtime_ns, status.st_size, f"{place}/{name}"))
        total = sum(size for _, size, _ in found)
        if total <= self._most_bytes:
            return total
        for _, size, path in sorted(found):
            if total <= self._most_bytes * 9 // 10:
                break
            with suppress(OSError):
                os.unlink(path)
            total -= size
        return total
