"""The paths of a shard's rows: mapped, because as strings those of a large gallery would take gigabytes."""

import mmap
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np


class Paths(Sequence[str]):
    """The lines of a file. In memory is where each begins, mostly 4 bytes per line."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        """Look for the ends of lines.

        Args:
            data: of the file; each line ends with a newline.

        Raises:
            UnicodeDecodeError: it is not UTF-8.
        """
        data[:].decode()
        self._data = data
        begins = np.append(0, np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1)
        self._begins = begins.astype(np.min_scalar_type(len(data)))

    def __len__(self) -> int:
        return len(self._begins) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        """The path of one row, or of some."""
        if isinstance(row, slice):
            return self.at(range(*row.indices(len(self))))
        place = range(len(self))[row]
        return self._data[self._begins[place] : self._begins[place + 1] - 1].decode()

    def at(self, rows: Sequence[int]) -> list[str]:
        """The paths of some rows, none negative."""
        places = np.array(rows, np.int64)
        begins, ends = self._begins[places].tolist(), self._begins[places + 1].tolist()
        return [self._data[begin : end - 1].decode() for begin, end in zip(begins, ends, strict=True)]

    def __iter__(self) -> Iterator[str]:
        # Split at once, which is quicker than line by line.
        return iter(self._data[:].decode().split("\n")[:-1])
