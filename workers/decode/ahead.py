"""Threads that decode a batch of images, each into its place in one array."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.spec import ModelSpec

_F = TypeVar("_F")
_T = TypeVar("_T")
#: A thread reads so many images before it decodes them.
_READ_IMAGES = 4


def pixels_for(spec: ModelSpec, count: int) -> NDArray[np.uint8]:
    """Room for the pixels of so many images, uint8[count, h, w, c]."""
    return np.empty((count, spec.height, spec.width, spec.channels), np.uint8)


class Decoders:
    """The decoding threads of a process, which all of its batches share.

    A thread takes the next few images of a batch by itself until none is left. One handed over at a time would wake two
    threads for each, and they would wait for the interpreter's lock more than they decode. A few are read together
    before they are decoded: so Python is not in between, and a core's caches, which decoding fills with other things,
    cost reading once, not for each image.
    """

    def __init__(self, threads: int, spec: ModelSpec) -> None:
        self._threads, self._spec = threads, spec
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._spare: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    @contextmanager
    def batch(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """Room for a batch's pixels, whose memory the next batch uses again: new memory takes as long as copying.

        Yields:
            uint8[count, h, w, c].
        """
        with self._lock:
            whole = self._spare.pop() if self._spare else None
        if whole is None or len(whole) < count:
            # What was too small goes, so that there is never more than one for each batch at a time.
            whole = pixels_for(self._spec, count)
        try:
            yield whole[:count]
        finally:
            with self._lock:
                self._spare.append(whole)

    def run(self, read: Callable[[list[int]], list[_F]], decode: Callable[[int, _F], _T], count: int) -> list[_T]:
        """`decode(number, file)` of each number below `count` and its file, by several threads.

        Args:
            read: returns the files of some numbers.

        Raises:
            Exception: what one of them raised; what was not begun by then is not done.
        """
        numbers = iter(range(count))
        results: dict[int, _T] = {}

        def work() -> None:
            try:
                while some := list(islice(numbers, _READ_IMAGES)):
                    for number, file in zip(some, read(some), strict=True):
                        results[number] = decode(number, file)
            except BaseException:
                for _ in numbers:
                    pass
                raise

        # All end before the memory is used again.
        done, _ = wait([self._pool.submit(work) for _ in range(min(self._threads, count))])
        for future in done:
            future.result()
        return [results[number] for number in range(count)]
