"""What property tests try: always the same examples, or new ones by the thousand (`make fuzz`); odd values for all."""

import json
import os
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

#: How many times more examples than `make test` tries, none of them the same; 0: those of `make test`.
FUZZ = int(os.environ.get("FUZZ", "0"))


def examples(usual: int) -> int:
    """How many examples a test tries."""
    return usual * FUZZ or usual


def set_up() -> None:
    """Decide it for all tests: this comes before any of them is read.

    Hypothesis takes constants from all modules of ours that happen to be loaded, and so with the same seed tries other
    examples in another order of tests, or after a change elsewhere. No setting turns that off.
    """
    settings.register_profile(
        "ruiji",
        max_examples=examples(100),
        derandomize=not FUZZ,
        database=None,
        # A slow machine is no failure.
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("ruiji")
    if not FUZZ:
        mock.patch.object(providers, "is_local_module_file", return_value=False).start()


#: What a careless hand, a broken program or a damaged disk puts where something else belongs.
ODD = st.sampled_from(
    (
        *(None, True, 0, -1, 3, 2**63, 10**400, -0.5, 1e-320, 1e308, float("nan"), float("inf")),
        *("", "x", "\ud800", "a\0b", "../x", "\u0663", [], [None], ["x"], [[1]], {}, {"x": 1}),
    )
) | st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """What JSON or TOML can hold, with some of its values replaced by odd ones, or left out."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 9)):
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(changed(value[place])), *value[place + 1 :]]
    return draw(ODD)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which some were changed, left out or put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.sampled_from([start, start + 1, start + 8, len(data)]))
        data = data[:start] + draw(st.binary(max_size=8)) + data[end:]
    return data


def to_text(value: Any) -> bytes:
    """A value as JSON, as a program writes it that checks nothing."""
    return json.dumps(value).encode()
