"""The libraries that are compiled when ruiji is installed, if there is a compiler.

They are no Python extensions, so that a compiler is all that they take. Without them Python does the same, more slowly.
"""

import ctypes
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any


def load(name: str, functions: Mapping[str, Sequence[Any]]) -> ctypes.CDLL | str:
    """A library by its module's name, or why it cannot be used.

    Args:
        functions: which it must have, and the ctypes of their arguments.
    """
    found = find_spec(name)
    if found is None or found.origin is None:
        return (
            "there was no C compiler when ruiji was installed;"
            " install gcc and libc6-dev, then ruiji again (make clean setup)"
        )
    try:
        library = ctypes.CDLL(found.origin)
        for function, arguments in functions.items():
            getattr(library, function).argtypes = arguments
    except (OSError, AttributeError) as error:  # Made for another machine, or another version of ruiji.
        return f"the compiled library does not belong to this ruiji ({error}); install ruiji again (make clean setup)"
    return library
