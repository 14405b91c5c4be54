"""Python runs this at its start: it changes what `tests/search/duplicates/test_distributed.py` asks for by variables.

`TEST_PANEL_ROWS`: how whoever asks cuts a gallery. `TEST_TILE_S`: a pause at each tile. `TEST_BEGUN`: a file that gets
a line for each panel that a worker begins. `TEST_POISON`: a panel's number, and what it does to the worker's process
that compares it, `dies` or `fails`.
"""

import os
import signal
import sys
import time

import search.duplicates.pairs as pairs

_find = pairs.find_pairs
_number, _, _what = os.environ.get("TEST_POISON", "-1:").partition(":")


def _disturbed(sides, panels, *given):  # type: ignore[no-untyped-def]
    in_worker = "worker-process" in sys.argv
    if in_worker and "TEST_BEGUN" in os.environ:
        with open(os.environ["TEST_BEGUN"], "a") as file:
            file.write("".join(f"{panel}\n" for panel in panels))
    for one in _find(sides, panels, *given):
        yield one
        time.sleep(float(os.environ.get("TEST_TILE_S", "0")))
        if in_worker and int(_number) in panels:
            if _what == "fails":
                raise ValueError("this panel is poison")
            os.kill(os.getpid(), signal.SIGKILL)


pairs.find_pairs = _disturbed

# Those who import it later have this one.
import search.duplicates.panels  # noqa: E402

search.duplicates.panels.PANEL_ROWS = int(os.environ.get("TEST_PANEL_ROWS", search.duplicates.panels.PANEL_ROWS))
