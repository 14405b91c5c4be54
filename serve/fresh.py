"""What takes time to read, and changes: read at most once in a while, however many ask."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

_T = TypeVar("_T")
#: A reading is believed for a second, and for so many times the CPU time that it took: this much of one core at most is
#: spent. To wait for a Redis that does not answer costs nothing, and is over as soon as it does.
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
            if reading.value is not None and time.monotonic() < reading.until:
                return reading.value
            reading.value, cpu_s = value, _ = await asyncio.to_thread(self._measured, folder)
            reading.until = time.monotonic() + max(_AGE_S, _TIMES * cpu_s)
            return value

    def _measured(self, folder: Path) -> tuple[_T, float]:
        began = time.thread_time()
        return self._read(folder), time.thread_time() - began

    def forget(self, folder: Path) -> None:
        """Read it anew for whoever asks next; it was changed."""
        if folder in self._readings:
            self._readings[folder].until = 0.0
