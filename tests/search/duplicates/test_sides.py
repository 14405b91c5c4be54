"""Rows as sides of tiles: made ready once if they may stay, and for each panel if none may; the same groups."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")

from search.arrays import Float32  # noqa: E402
from search.duplicates.groups import find_groups  # noqa: E402
from search.options import Precision  # noqa: E402
from search.ranking.arithmetic import Tiles  # noqa: E402
from search.ranking.bounds import Margin  # noqa: E402
from search.ranking.torch_arithmetic import TorchArithmetic  # noqa: E402
from tests.search.galleries import in_memory  # noqa: E402
from tests.search.ranking.test_rank import features_of  # noqa: E402


class Counted(TorchArithmetic):
    """What a GPU does, on torch's CPU, with the number of rows that were made ready for it."""

    prepared = 0

    def prepare(self, units: Float32) -> tuple[object, Margin]:
        self.prepared += len(units)
        return super().prepare(units)


@pytest.mark.parametrize("kind", ["random", "near_duplicates", "clustered"])
@pytest.mark.parametrize(
    ("kept", "panels", "prepared"), [(250, 50, 250), (1000, 100, 250), (0, 125, 375), (0, 50, 750), (100, 50, 400)]
)
def test_each_row_is_made_ready_once_if_it_may_stay(kind: str, kept: int, panels: int, prepared: int) -> None:
    features = features_of(kind, 250, 32)
    gallery = in_memory(features)
    want = [(group.members, group.pairs) for group in find_groups(gallery, 0.95)]
    arithmetic = Counted("cpu", Precision.bfloat16, products_at_once=1000, tiles=Tiles(25, panels, kept))
    assert [(group.members, group.pairs) for group in find_groups(gallery, 0.95, arithmetic=arithmetic)] == want
    assert arithmetic.prepared == prepared


def test_no_row_is_read_for_a_panel_without_rows() -> None:
    features = features_of("random", 100, 32)
    features[40:60] = np.nan
    arithmetic = Counted("cpu", Precision.bfloat16, tiles=Tiles(10, 20, 100))
    assert len(find_groups(in_memory(features), 0.999999, arithmetic=arithmetic)) == 0
    assert arithmetic.prepared == 80
