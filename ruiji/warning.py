"""Warnings, which point to the line that called ruiji."""

import sys
import warnings


class RuijiWarning(UserWarning):
    """What is doubtful about a gallery, and does not keep it from being searched."""


def warn(text: str) -> None:
    """Warn of something doubtful."""
    # To the line that called ruiji, which is two or three calls up: the package is skipped by its name.
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "ruiji":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuijiWarning, stacklevel=level)
