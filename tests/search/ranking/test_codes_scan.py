"""The scan of codes gives the same hits bit for bit, however its integers are multiplied."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pipeline.errors import RuijiError
from search.options import Metric, Precision
from search.ranking.codes_scan import MakeCodesMultiply, NumpyCodesMultiply, codes_scan
from search.ranking.planner import Library, Way
from search.ranking.rank import rank
from search.ranking.scan import Batch
from tests.search.galleries import in_memory
from tests.search.ranking.test_rank import KINDS, check_bounds, features_of, ids_of, queries_of

NO_TORCH = "torch is not installed; `make test-all` installs it"


def by_torch() -> MakeCodesMultiply:
    torch_scans = pytest.importorskip("search.ranking.torch_arithmetic", reason=NO_TORCH)
    if not torch_scans.sums_integers(64):
        pytest.skip("torch does not multiply integers exactly on this CPU")
    multiply: MakeCodesMultiply = torch_scans.TorchCodesMultiply
    return multiply


@pytest.fixture(params=["numpy", "torch"])
def multiply(request: pytest.FixtureRequest) -> MakeCodesMultiply:
    return NumpyCodesMultiply if request.param == "numpy" else by_torch()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_features_give_the_same_ranking(kind: str, multiply: MakeCodesMultiply) -> None:
    features = features_of(kind)
    gallery = in_memory(features, ids_of(len(features)), cuts=(100, 200))
    queries = queries_of(features)
    for metric in Metric:
        for k in (1, 10, 100, 1000):
            expected = rank(gallery, queries, k, metric)
            for block_rows in (None, 30):
                assert rank(gallery, queries, k, metric, codes_scan(multiply, block_rows)) == expected
        assert rank(gallery, queries[:1], 10, metric, codes_scan(multiply)) == rank(gallery, queries[:1], 10, metric)


@pytest.mark.parametrize("kind", ["random", "positive", "near_duplicates"])
@pytest.mark.parametrize("d", [2, 3, 64, 1280])
def test_they_stay_within_their_error_bound(kind: str, d: int, multiply: MakeCodesMultiply) -> None:
    rows, queries = features_of(kind, 400, d), features_of("positive", 20, d)
    # Exact in the first digit, so that nothing is left for a second.
    queries[0] = 1
    for metric in Metric:
        batch = Batch(queries, 400, metric)
        (found,) = codes_scan(multiply)(in_memory(rows), batch, np.full(20, -np.inf))
        assert len(found.rows) == 20 * 400
        check_bounds(found, batch, rows)


def test_codes_alone_would_rank_near_duplicates_wrongly(multiply: MakeCodesMultiply) -> None:
    features, query = features_of("near_duplicates", 1000, 64), features_of("random", 1, 64)
    gallery = in_memory(features)
    codes = gallery.shards[0].codes.part(slice(None))
    alone = np.argsort(-(query @ codes.integers.T * codes.scales)[0], kind="stable")[:20]
    hits = rank(gallery, query, 20, scan=codes_scan(multiply)).hits[0]
    assert {hit.row for hit in hits} != set(alone.tolist())
    assert hits == rank(gallery, query, 20).hits[0]


def test_the_first_block_leaves_most_rows_out(multiply: MakeCodesMultiply) -> None:
    rows, queries = features_of("random", 4000, 64), features_of("positive", 20, 64)
    (found,) = codes_scan(multiply)(in_memory(rows), Batch(queries, 25, Metric.cosine), np.full(20, -np.inf))
    assert 25 * 20 <= len(found.rows) < 60 * 20


def test_rows_of_one_value_are_left_to_numpy() -> None:
    torch_scans = pytest.importorskip("search.ranking.torch_arithmetic", reason=NO_TORCH)
    # oneDNN refuses them, and torch does not tell. Without AVX-512 torch 2.13 does not ask oneDNN.
    assert "avx512f" not in cpu_flags() or not torch_scans.sums_integers(1)
    features = features_of("random", 50, 1)
    gallery = in_memory(features)
    way = Way(Library.torch, "cpu", Precision.int8, False, 20, 10, "")
    assert rank(gallery, features[:3], 10, scan=way.arithmetic().scan) == rank(gallery, features[:3], 10)


def test_wrong_sums_are_an_error_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = by_torch()
    products = sys.modules["search.ranking.torch_arithmetic"]._integer_products
    monkeypatch.setattr(
        "search.ranking.torch_arithmetic._integer_products", lambda rows, others: products(rows, others) + 1
    )
    features = features_of("random", 50)
    with pytest.raises(RuijiError, match="multiplies integers wrongly"):
        rank(in_memory(features), features[:3], 10, scan=codes_scan(multiply))


def test_a_cpu_that_saturates_sums_is_noticed_and_answers_the_same() -> None:
    pytest.importorskip("torch", reason=NO_TORCH)
    script = """
import sys
from pipeline.errors import RuijiError
from search.options import Metric, Precision
from search.ranking.planner import Library, Way
from search.ranking.rank import rank
from search.ranking.torch_arithmetic import sums_integers
from tests.search.galleries import in_memory
from tests.search.ranking.test_rank import features_of
features = features_of("positive", 2000, 1280)
gallery = in_memory(features)
way = Way(Library.torch, "cpu", Precision.int8, False, 500, 10, "")
assert rank(gallery, features[:3], 20, scan=way.arithmetic().scan) == rank(gallery, features[:3], 20)
print(sums_integers(1280))
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    # Without AVX-512 torch 2.13 makes these sums itself, exactly.
    assert run.stdout.strip() in (("False",) if "avx512f" in cpu_flags() else ("False", "True"))


def cpu_flags() -> str:
    with open("/proc/cpuinfo") as file:
        return file.read()
