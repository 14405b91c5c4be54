"""Images that kill whoever decodes them, in processes that were started with `POISON_PATH` as `PYTHONPATH`.

No such image is known for today's Pillow, so `poisoned/sitecustomize.py` makes one of any file that
begins with these bytes.
"""

import os
from pathlib import Path

from tests.conftest import ROOT

POISON_PATH = f"{Path(__file__).parent / 'poisoned'}{os.pathsep}{ROOT}"


def poison(path: Path, kind: str) -> Path:
    """Write an image that is a `segfault`, a `hog` of memory, or `endless`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(b"POISON " + kind.encode())
    return path
