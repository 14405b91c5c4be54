"""Which versions of libraries are at work here."""

import sys
from collections.abc import Iterable
from functools import cache

from pipeline.errors import RuijiError

#: The version of a library that is not there.
NONE = "none"


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a feature's bits.

    Raises:
        RuijiError: ONNX Runtime is not installed, so nothing could carry out what is enqueued here.
    """
    return {
        "numpy": _version("numpy", "numpy"),
        "pillow": _version("PIL", "pillow"),
        # Decodes most JPEGs.
        "simplejpeg": _version("simplejpeg", "simplejpeg"),
        # If it is missing, pictures fail that are decoded elsewhere.
        "pi-heif": heif_decoder() or NONE,
        # Both builds compute the same on a CPU; which one it is stands in the worker's log.
        "onnxruntime": _version("onnxruntime", "onnxruntime", "onnxruntime-gpu"),
    }


def heif_decoder() -> str | None:
    """Version of pi-heif, which decodes HEIF (HEIC); None if the extra `heic` is not installed."""
    return _installed("pi-heif")


def installed_versions() -> dict[str, str]:
    """Versions of ruiji and of the libraries that can change a feature or a ranking, by package name, as installed.

    Reads package metadata and imports none of them. A package that is not installed is left out; of ONNX Runtime the
    build that is installed is named.
    """
    packages = ("ruiji", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow", "simplejpeg", "pi-heif", "torch")
    return {package: version for package in packages if (version := _installed(package)) is not None}


def other_versions(made: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Libraries of which a plan or record names another version than there is here, by name: theirs, and ours.

    Args:
        made: what it names. A library that it does not name, being older, counts as equal.

    Raises:
        RuijiError: as `library_versions`.
    """
    here = library_versions()
    return {name: (version, here.get(name, NONE)) for name, version in made.items() if here.get(name) != version}


def are_mixed(sets: Iterable[dict[str, str]]) -> bool:
    """Whether any two sets of versions name different ones of a library."""
    named: dict[str, str] = {}
    return any(named.setdefault(name, version) != version for made in sets for name, version in made.items())


def _version(module: str, *packages: str) -> str:
    # What is loaded says it at once; to look up what is installed takes longer than a search.
    if module in sys.modules:
        return str(sys.modules[module].__version__)
    for package in packages:
        version = _installed(package)
        if version is not None:
            return version
    raise RuijiError(f"{packages[0]} is not installed here; run make setup, or pip install 'ruiji[cpu]'")


def _installed(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
