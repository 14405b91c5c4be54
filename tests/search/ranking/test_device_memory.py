"""What is planned for a GPU's memory: on any card, and never less than the same code takes on torch's CPU."""

import weakref
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from pipeline.errors import UsageError  # noqa: E402
from search.options import Metric, Precision  # noqa: E402
from search.ranking.device_memory import ScanSizes, can_stay, pair_sizes, planned_bytes, scan_sizes  # noqa: E402
from search.ranking.scan import Batch  # noqa: E402
from search.ranking.torch_arithmetic import TorchArithmetic, TorchScan  # noqa: E402
from tests.search.galleries import in_memory  # noqa: E402
from tests.search.ranking.test_rank import features_of  # noqa: E402

#: The least that is enough.
LEAST = 450 << 20


class Live(TorchDispatchMode):
    """Bytes of all tensors that are made while it is on, and the most of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage().data_ptr()) not in self._seen:
                self._add(key, tensor.untyped_storage())
        return made

    def _add(self, key: int, storage: Any) -> None:
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def test_the_watch_sees_what_is_alive() -> None:
    with Live() as live:
        kept = torch.zeros(1000)
        view = kept[10:].view(33, 30)
        del kept
        assert live.now == 4000
        del view
        assert (live.now, live.peak) == (0, 4000)


@pytest.mark.parametrize("d", [16, 1280])
@pytest.mark.parametrize("kind", ["random", "duplicates"])
@pytest.mark.parametrize("metric", [Metric.cosine, Metric.euclidean])
@pytest.mark.parametrize("resident", [False, True], ids=["streamed", "kept"])
def test_a_scan_takes_no_more_than_was_planned(resident: bool, metric: Metric, kind: str, d: int) -> None:
    features = features_of(kind, 6000 if d == 16 else 2500, d)
    gallery = in_memory(features)
    queries = features[: 500 if d == 16 else 1000]
    precisions = [Precision.float32] if metric is Metric.euclidean else [Precision.float32, Precision.bfloat16]
    for precision in precisions:
        sizes = scan_sizes(LEAST, d, precision)
        # More than one block and more than one look, or nothing is seen here.
        assert sizes.products_at_once < len(features) * len(queries)
        for k in (1, 100, len(features)):
            scan = TorchScan(
                gallery,
                "cpu",
                precision,
                resident=resident,
                block_rows=sizes.block_rows,
                products_at_once=sizes.products_at_once,
                staged=True,
            )
            for some in (queries[:1], queries):
                # The first pass makes the copy that stays, which is not planned for here.
                kept = 4 * features.size if resident and some is not queries else 0
                with Live() as live:
                    # Cuts that never rise: each block is looked at as the first one is.
                    list(scan(gallery, Batch(some, k, metric), np.full(len(some), -np.inf)))
                # Where a mask is true is found by numpy here, and on a GPU in 64 bits each, twice.
                assert live.peak - kept + 16 * sizes.products_at_once <= planned_bytes(LEAST)


def test_sizes_fit_any_card_and_too_small_a_one_is_refused() -> None:
    for free in (LEAST, 1 << 30, 7 << 30, 80 << 30, 140 << 30):
        for d in (1, 128, 1280, 100_000):
            for precision in (Precision.bfloat16, Precision.float32):
                sizes = scan_sizes(free, d, precision)
                of_rows = 24 * d * sizes.block_rows
                assert of_rows + 6 * d * sizes.queries_at_once + 48 * sizes.products_at_once <= planned_bytes(free)
    # On a large card what is quickest is the limit.
    assert scan_sizes(140 << 30, 1280, Precision.bfloat16) == ScanSizes(52_428, 4096, 1 << 28)
    with pytest.raises(UsageError, match=r"--device cuda: 300 MB .* are free, .* --device cpu"):
        scan_sizes(300 << 20, 1280, Precision.bfloat16)


def test_rows_stay_where_they_leave_room_for_a_search() -> None:
    gb = 10**9
    assert can_stay(4 * gb, 7 * gb)
    assert not can_stay(5 * gb, 7 * gb)
    # 70 % of it would leave too little.
    assert not can_stay(6 * gb // 10, gb)
    assert can_stay(3 * gb // 10, gb)


@pytest.mark.parametrize("kind", ["random", "duplicates", "clustered"])
def test_a_comparison_of_pairs_takes_no_more_than_was_planned(kind: str) -> None:
    d = 16
    tiles, products = pair_sizes(LEAST, 10**6, d)
    features = features_of(kind, min(tiles.tile_rows, 4000), d)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    arithmetic = TorchArithmetic("cpu", Precision.bfloat16, products_at_once=products)
    assert products < len(features) ** 2
    with Live() as live:
        side, margin = arithmetic.prepare(units)
        assert live.peak <= 12 * units.size + 4096 * d
        for least in (0.0, 0.9, 1.0):
            for _ in arithmetic.near(side, side, margin.least(least)):
                pass
    # Where a mask is true is found by numpy here; for so many pairs that it would take much, a table is made instead.
    assert live.peak <= 12 * units.size + 16 * products


def test_pairs_fit_any_card() -> None:
    for free in (LEAST, 1 << 30, 7 << 30, 80 << 30):
        for rows in (10_000, 1_000_000, 100_000_000):
            for d in (1, 128, 1280, 100_000):
                tiles, products = pair_sizes(free, rows, d)
                # Where all stay, those of a pass are of these.
                kept = min(rows, tiles.kept_rows) or max(tiles.pass_rows, tiles.tile_rows)
                taken = 2 * d * kept + 14 * d * tiles.tile_rows + 16 * products
                assert taken <= planned_bytes(free) or tiles.pass_rows == 1
                assert tiles.kept_rows == 0 or rows <= tiles.kept_rows
    # A million rows stay on a card of 8 GB.
    assert pair_sizes(7 << 30, 1_000_000, 1280)[0].kept_rows >= 1_000_000
