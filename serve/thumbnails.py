"""Small pictures of a gallery's objects, kept on the disk within a bound."""

import asyncio
import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path

from pipeline import layout
from pipeline.choices import Reason
from pipeline.errors import ImageError, MachineFault
from pipeline.store import write_atomic
from pipeline.streams import note
from search.views.thumbnail import Thumbnail
from serve.decoders import Decoders

#: The longer side, in pixels, that can be asked for: for a list, a grid, and one picture.
SIDES = (128, 256, 512)
#: Bytes that the pictures of one gallery may take; at 10 kB each some 25,000.
MOST_BYTES = 256 << 20
#: Reasons of failed objects whose pictures are not decoded again, for people neither.
DEADLY = frozenset({Reason.crashed_worker, Reason.memory, Reason.timeout})
#: Changes whenever the same file would give another picture.
_VERSION = 1
_JPEG, _JPEG_END, _PNG, _PNG_END = b"\xff\xd8", b"\xff\xd9", b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class Thumbnails:
    """The small pictures of one gallery."""

    def __init__(self, folder: Path, media_dir: Path, decoders: Decoders, most_bytes: int = MOST_BYTES) -> None:
        self._decoders, self._cache = decoders, _Cache(layout.thumbnails_folder(folder), most_bytes)
        self._media = os.path.realpath(media_dir)
        # Files that took their decoder along, by all that a picture is made of: not tried again.
        self._deadly: dict[str, ImageError] = {}

    async def get(self, path: str, side: int) -> Thumbnail:
        """The small picture of an object.

        Args:
            path: relative to the media folder, as the gallery has it.
            side: one of `SIDES`.

        Raises:
            ImageError: it has none; says why.
            MachineFault: there is no process to decode it. Busy: too many pictures wait already.
        """
        digest, kept = await asyncio.to_thread(self._look, path, side)
        if kept is not None:
            return kept
        if digest in self._deadly:
            raise self._deadly[digest]
        try:
            made = await self._decoders.thumbnail(f"{self._media}/{path}", side, self._media)
        except ImageError as error:
            if error.reason in DEADLY:
                self._deadly[digest] = error
            raise
        await asyncio.to_thread(self._cache.write, digest, made)
        return made

    def _look(self, path: str, side: int) -> tuple[str, Thumbnail | None]:
        """What a picture is kept under, and the picture if it is."""
        try:
            status = os.stat(f"{self._media}/{path}")
        except OSError as error:
            raise ImageError(f"its picture cannot be opened: {error.strerror}", Reason.missing) from None
        made_of = (_VERSION, path, side, status.st_size, status.st_mtime_ns)
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:40]
        return digest, self._cache.read(digest)


class _Cache:
    """Pictures as files; those that nobody asked for longest go first."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._lock = threading.Lock()
        # Unknown before the first look. Another service may write here too: each look counts anew.
        self._bytes: int | None = None
        self._said = False

    def read(self, digest: str) -> Thumbnail | None:
        file = layout.thumbnail_file(self._folder, digest)
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

    def write(self, digest: str, made: Thumbnail) -> None:
        """Keep a picture, if the folder can be written to; if it cannot, say so once."""
        try:
            write_atomic(layout.thumbnail_file(self._folder, digest), [made.data])
        except MachineFault as error:
            if not self._said:
                note(f"warning: small pictures are not kept: {error}")
            self._said = True
            return
        with self._lock:
            if self._bytes is not None:
                self._bytes += len(made.data)
            if self._bytes is None or self._bytes > self._most_bytes:
                self._bytes = self._make_room()

    def _make_room(self) -> int:
        """Remove the oldest down to nine tenths of the bound if it is exceeded; returns how many bytes there are."""
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
