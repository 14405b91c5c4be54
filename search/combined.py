"""One query of several: the sum of their unit features."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import QueryError
from search.queries import Query

#: Below this norm a sum of unit features is rounding of float32, and points nowhere.
_CANCELLED = 1e-6


def combine(queries: Sequence[Query], minus: Sequence[Query]) -> Query:
    """One query of several.

    Its feature is the sum of the features of some, each brought to norm 1, less that of the others, in float64 and
    rounded once.

    Args:
        queries: at least one.

    Raises:
        QueryError: they cancel each other out.
    """
    total = np.sum([*(_unit(query) for query in queries), *(-_unit(query) for query in minus)], axis=0)
    name = " + ".join(query.name for query in queries) + "".join(f" - {query.name}" for query in minus)
    if np.linalg.norm(total) < _CANCELLED:
        raise QueryError(f"{name}: these cancel each other out, so nothing is left to search with")
    return Query(name, total.astype(np.float32), words=name, parts=tuple(queries))


def _unit(query: Query) -> NDArray[np.float64]:
    feature = query.feature.astype(np.float64)
    unit: NDArray[np.float64] = feature / np.linalg.norm(feature)
    return unit
