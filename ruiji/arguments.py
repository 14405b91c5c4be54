"""What the Python API is given, checked: one as well as several, numbers, and words that name something."""

import operator
from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

from pipeline.errors import UsageError
from search.answers import Criteria
from search.options import Metric

_Word = TypeVar("_Word", bound=StrEnum)


def texts_of(given: str | Sequence[str]) -> list[str]:
    """Texts as a list, one as well as several."""
    return [given] if isinstance(given, str) else list(given)


def named(kind: type[_Word], name: str) -> _Word:
    """One of the words of a kind, such as a device.

    Raises:
        UsageError: there is none of that name.
    """
    try:
        return kind(name)
    except ValueError:
        raise UsageError(f"there is no {kind.__name__.lower()} {name!r}: name one of {', '.join(kind)}") from None


def whole(number: int, argument: str) -> int:
    """A whole number of any type.

    Args:
        argument: what it was given as.

    Raises:
        UsageError: it is none.
    """
    try:
        return operator.index(number)
    except TypeError:
        raise UsageError(f"{argument} must be a whole number, not {number!r}") from None


def criteria_of(
    top_k: int, metric: str, min_similarity: float | None, collapse: float | None, exclude_self: bool | None = None
) -> Criteria:
    """What hits have to meet.

    Args:
        exclude_self: None: only queries by id are left out of their hits.

    Raises:
        UsageError: one of the values cannot be used.
    """
    top_k = whole(top_k, "top_k")
    if top_k < 1:
        raise UsageError(f"top_k must be at least 1, not {top_k}")
    chosen = named(Metric, metric)
    if min_similarity is not None and not -1 <= min_similarity <= 1:
        raise UsageError(f"min_similarity must be a cosine, from -1 to 1, not {min_similarity}")
    if collapse is not None and not 0 < collapse <= 1:
        raise UsageError(f"collapse must be a cosine above 0 and at most 1, not {collapse}")
    return Criteria(
        top_k=top_k,
        metric=chosen,
        min_similarity=min_similarity,
        collapse=collapse,
        exclude_self=exclude_self,
    )
