"""What is kept beside the shards to search them sooner, and can be deleted at any time.

`G/cache/NNNN.<key>.<kind>.npy`, one array a file. The key is taken from the shard's record (or, for an article's shard,
from size and time of its file), so that what was made of other rows is never read.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import MachineFault
from pipeline.store import write_atomic


@dataclass(frozen=True)
class ShardCache:
    """Where the arrays made of one shard are kept.

    Attributes:
        folder: the gallery's cache folder.
        shard: the shard's name, e.g. `0007`.
        key: changes whenever the shard's rows do.
    """

    folder: Path
    shard: str
    key: str

    def path(self, kind: str) -> Path:
        """The file of one kind of array."""
        return self.folder / f"{self.shard}.{self.key}.{kind}.npy"

    def read(self, kind: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """An array, mapped, or None where there is no such file, or a damaged one."""
        try:
            array = np.asarray(np.load(self.path(kind), mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return None
        fits = array.dtype == np.dtype(dtype) and array.shape == shape and array.flags.c_contiguous
        return array if fits else None

    def write(self, kind: str, array: NDArray[Any]) -> bool:
        """Keep an array and remove what was made of earlier rows; False where the folder cannot be written to."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        try:
            self.folder.mkdir(exist_ok=True)
            for name in os.listdir(self.folder):
                if name.startswith(f"{self.shard}.") and not name.startswith(f"{self.shard}.{self.key}."):
                    (self.folder / name).unlink(missing_ok=True)
            write_atomic(self.path(kind), [header.getvalue(), array.reshape(-1).view(np.uint8).data])
        except (OSError, MachineFault):
            return False
        return True
