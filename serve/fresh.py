"""What takes time to read, and changes: read at most once in a while, however many ask."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

_T = TypeVar("_T")
#: A reading is believed for a second, and for so many times as long as it took: this much of one core at most is spent.
_AGE_S, _TIMES = 1.0, 10.0


@dataclass
class _Reading(Generic[_T]):
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    value: _T | None = None
    until: float = 0.0


class Fresh(Generic[_T]):
    """A function of a gallery's folder; to be used in one event loop."""

    def __init__(self, read: Callable[[Path], _T]) -> None:
        self._read = read
        self._readings: dict[Path, _Reading[_T]] = {}

    async def get(self, folder: Path) -> _T:
        """What was read a moment ago, or is read now in a thread.

        Raises:
            RuijiError: as the function raises it.
        """
        reading = self._readings.setdefault(folder, _Reading())
        async with reading.lock:
            began = time.monotonic()
            if reading.value is None or began >= reading.until:
                reading.value = await asyncio.to_thread(self._read, folder)
                now = time.monotonic()
                reading.until = now + max(_AGE_S, _TIMES * (now - began))
            return reading.value

    def forget(self, folder: Path) -> None:
        """Read it anew for whoever asks next; it was changed."""
        if folder in self._readings:
            self._readings[folder].until = 0.0
