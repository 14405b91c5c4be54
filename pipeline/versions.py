"""Which versions of libraries are at work here."""

import sys
from functools import cache

from pipeline.errors import RuijiError


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a feature's bits.

    Raises:
        RuijiError: ONNX Runtime is not installed, so nothing could carry out what is enqueued here.
    """
    return {
        "numpy": _version("numpy", "numpy"),
        "pillow": _version("PIL", "pillow"),
        # Both builds compute the same on a CPU; which one it is stands in the worker's log.
        "onnxruntime": _version("onnxruntime", "onnxruntime", "onnxruntime-gpu"),
    }


def _version(module: str, *packages: str) -> str:
    # What is loaded says it at once; to look up what is installed takes longer than a search.
    if module in sys.modules:
        return str(sys.modules[module].__version__)
    from importlib import metadata

    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    raise RuijiError(f"{packages[0]} is not installed here; run make setup, or pip install 'ruiji[cpu]'")
