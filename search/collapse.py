"""Of hits that are near-identical to each other, only the first."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from search.arrays import Rows
from search.ranking.rank import Hit


def collapse(
    hits: Sequence[Hit],
    top_k: int,
    near: Callable[[Rows], Sequence[Rows]],
    count: Callable[[Rows], int],
    known: dict[int, Rows],
) -> list[Hit]:
    """Leave out each hit that is near-identical to one before that stays; the rest knows for how many it stands.

    Args:
        hits: best first.
        top_k: so many are enough.
        near: for some rows each the rows that are near-identical to it, itself among them.
        count: how many of some rows can be hits.
        known: what `near` has said of a row; it is added to.

    Returns:
        Hits that stay, best first; fewer than `top_k` only if there are no more.
    """
    shown: list[Hit] = []
    hidden: set[int] = set()
    for place, hit in enumerate(hits):
        if len(shown) == top_k:
            break
        if hit.row in hidden:
            continue
        if hit.row not in known:
            # All that may still be needed, in one pass.
            open_hits = [one.row for one in hits[place:] if one.row not in hidden][: top_k - len(shown)]
            rows = np.array(open_hits, np.int64)
            known.update(zip(open_hits, near(rows), strict=True))
        others = np.array([row for row in known[hit.row].tolist() if row not in hidden and row != hit.row], np.int64)
        # A hit that stays is near none that stays before it, so it is counted by none of them.
        hidden.update(others.tolist())
        shown.append(replace(hit, others=count(others)))
    return shown
