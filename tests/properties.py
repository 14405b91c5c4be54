"""What property tests try: always the same examples, or new ones by the thousand (`make fuzz`)."""

import os
from unittest import mock

from hypothesis import HealthCheck, settings
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
