"""Curves of an evaluation as a picture; the one place that needs matplotlib."""

from pathlib import Path

import numpy as np

from pipeline.errors import UsageError
from pipeline.targets import writing
from search.evaluation.metrics import RECALL_LEVELS
from search.evaluation.scores import CMC_RANKS, Scores

ENDINGS = (".png", ".svg", ".pdf")
_INK, _FAINT, _LINE = "#1c1c1e", "#d2d2d7", "#0a6ebd"


def check_plot(target: Path) -> None:
    """Check, before any work, that curves can be drawn.

    Raises:
        UsageError: the name has another ending, or matplotlib is missing.
    """
    if target.suffix.lower() not in ENDINGS:
        raise UsageError(f"cannot draw curves to {target}: its name must end in {', '.join(ENDINGS)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--plot draws with matplotlib, which cannot be imported ({error}); install ruiji's extra `plot`, or "
            "just  pip install matplotlib"
        ) from None


def draw_curves(target: Path, scores: Scores) -> None:
    """Draw the CMC and the precision-recall curve side by side.

    Raises:
        RuijiError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    # No pyplot: it keeps global state and looks for a display.
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(np.arange(1, CMC_RANKS + 1), scores.cmc, color=_LINE, linewidth=2, marker=".")
    left.set(title="CMC", xlabel="rank k", ylabel="queries with a match among the first k", xlim=(0, CMC_RANKS))
    # What is worth seeing of a good model lies in the last percent.
    left.set_ylim(min(0.95, np.floor(scores.cmc[0] * 20) / 20), 1.001)
    right.plot(RECALL_LEVELS / 100, scores.precision, color=_LINE, linewidth=2)
    right.set(title="Precision-recall", xlabel="recall", ylabel="mean interpolated precision", xlim=(0, 1))
    right.set_ylim(0, 1.01)
    for axes in (left, right):
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    with writing(target) as file:
        figure.savefig(file, dpi=150, format=target.suffix[1:].lower())
