"""Work that is shared out among the cores; what is called lets go of Python's lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def cores() -> int:
    """That this thread may use now; it can change."""
    return len(os.sched_getaffinity(0))


def parts_of(count: int, shares: int, whole: int = 1) -> list[slice]:
    """About equal parts, at most so many, none empty; all but the last a multiple of so many."""
    step = max(1, -(-count // (shares * whole))) * whole
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def in_threads(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """What a function gives for each item; it must not call this again."""
    if not items:
        return []
    others = [_threads().submit(function, item) for item in items[1:]]
    try:
        first = function(items[0])
    finally:
        # Else they would go on with arrays that the caller thinks are its own again.
        wait(others)
    return [first, *(other.result() for other in others)]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores())


# A child has none of the threads.
os.register_at_fork(after_in_child=_threads.cache_clear)
