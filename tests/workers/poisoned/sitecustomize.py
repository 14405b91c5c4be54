"""Python runs this at its start: it makes `PIL.Image.open` meet poison. See `tests/workers/poison.py`."""

import signal

from PIL import Image

_open = Image.open
#: So much a decoder takes before the system would end it.
_HOG_BYTES = 1 << 30


def _poisoned(file, *args, **kwargs):  # type: ignore[no-untyped-def]
    begin = file.read(32)
    file.seek(0)
    if begin == b"POISON segfault":
        # In this thread, as a real one: a signal to the process would let the thread go on for a moment.
        signal.raise_signal(signal.SIGSEGV)
    if begin == b"POISON hog":
        taken = []
        while sum(map(len, taken)) < _HOG_BYTES:
            taken.append(bytearray(64 << 20))
        signal.raise_signal(signal.SIGKILL)
    while begin == b"POISON endless":
        pass
    return _open(file, *args, **kwargs)


Image.open = _poisoned
