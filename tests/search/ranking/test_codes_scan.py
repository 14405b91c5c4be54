"""The scan of codes gives the same hits bit for bit, however its integers are multiplied."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

import search.ranking.codes_scan as codes_scan_module
from pipeline import compiled as libraries
from pipeline.errors import RuijiError
from search.arrays import Float32
from search.options import Metric, Precision
from search.ranking import compiled
from search.ranking.codes_scan import (
    CodesMultiply,
    CompiledCodesMultiply,
    MakeCodesMultiply,
    NumpyCodesMultiply,
    codes_scan,
)
from search.ranking.compiled import CodeQueries
from search.ranking.planner import Library, Way
from search.ranking.rank import rank
from search.ranking.scan import Batch
from tests.sanitized import run_sanitized
from tests.search.galleries import in_memory
from tests.search.ranking.test_rank import KINDS, check_bounds, features_of, ids_of, queries_of

SOURCE = Path(__file__).parents[3] / "search" / "ranking" / "_codes.c"
NO_TORCH = "torch is not installed; `make test-all` installs it"


def by_torch() -> MakeCodesMultiply:
    torch_scans = pytest.importorskip("search.ranking.torch_arithmetic", reason=NO_TORCH)
    if not torch_scans.sums_integers(64):
        pytest.skip("torch does not multiply integers exactly on this CPU")
    multiply: MakeCodesMultiply = torch_scans.TorchCodesMultiply
    return multiply


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled library without AVX2."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    made = tmp_path_factory.mktemp("plain") / "plain.so"
    subprocess.run(["cc", "-O2", "-DRUIJI_PLAIN", "-shared", "-fPIC", "-o", made, SOURCE], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "find_spec", lambda name: SimpleNamespace(origin=str(made)))
        library = compiled._codes.__wrapped__()
    assert isinstance(library, ctypes.CDLL)
    return library


@pytest.fixture(params=["numpy", "torch", "compiled", "plain"])
def multiply(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeCodesMultiply:
    if request.param == "numpy":
        return NumpyCodesMultiply
    if request.param == "torch":
        return by_torch()
    use_library(request.param, request, monkeypatch)
    return CompiledCodesMultiply


@pytest.fixture(params=["compiled", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_library(request.param, request, monkeypatch)


def use_library(which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # However many the machine has, so that rows are shared out.
    monkeypatch.setattr(codes_scan_module, "cores", lambda: 2)
    if which == "plain":
        plain = request.getfixturevalue("plain")
        monkeypatch.setattr(compiled, "_codes", lambda: plain)
    elif not compiled.has_codes():
        pytest.skip("this CPU has no AVX2, or it was not compiled")


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
    hits = rank(gallery, query, 20, scan=codes_scan(multiply))[0]
    assert {hit.row for hit in hits} != set(alone.tolist())
    assert hits == rank(gallery, query, 20)[0]


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
from search.arrays import Float32
from search.options import Metric, Precision
from search.ranking.planner import Library, Way
from search.ranking.rank import rank
from search.ranking.torch_arithmetic import sums_integers
from tests.sanitized import run_sanitized
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


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 100, 1280, 4099, 1 << 17])
def test_compiled_sums_are_exact_up_to_the_largest(d: int) -> None:
    rng = np.random.default_rng(d)
    # Of one value: the largest sums. Of one value that is not zero: the largest integer. And any.
    units = rng.standard_normal((7, d)).astype(np.float32)
    units[0], units[1], units[2, 1:] = 1, -1, 0
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    codes = rng.integers(-127, 128, (21, d)).astype(np.int8)
    # A damaged file could have -128.
    codes[0], codes[1], codes[2] = 127, -127, -128
    for count in range(1, 8):
        queries = CodeQueries.of(units[:count])
        sums = queries.integers.astype(np.int64) @ codes.T.astype(np.int64)
        assert np.abs(sums).max() < 1 << 31
        for rows in (1, 2, 3, 15, 16, 17, 21):
            # What lies beside the columns is not touched.
            products = np.full((count, 40), np.nan, np.float32)
            queries.multiply(codes[:rows], products[:, 5 : 5 + rows])
            expected = sums[:, :rows].astype(np.float32) * queries.steps[:, np.newaxis]
            assert np.array_equal(products[:, 5 : 5 + rows], expected)
            assert np.isnan(products[:, :5]).all() and np.isnan(products[:, 5 + rows :]).all()


@pytest.mark.parametrize("d", [1, 16, 1280, 1 << 17])
def test_little_is_lost_of_a_query(d: int) -> None:
    units = np.abs(np.random.default_rng(d).standard_normal((20, d)).astype(np.float32))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    queries = CodeQueries.of(units)
    lost = np.linalg.norm(units - queries.integers * queries.steps[:, np.newaxis].astype(np.float64), axis=1)
    assert lost.max() == pytest.approx(queries.loss) and queries.loss < (1e-4 if d <= 1280 else 4e-3)


def test_what_is_compiled_reads_and_writes_nothing_else(tmp_path: Path) -> None:
    program = """
        #include <stdint.h>
        #include <stdlib.h>
        int ruiji_multiplies_codes(void);
        void ruiji_multiply_codes(int64_t, int64_t, const int8_t *, int64_t, const int16_t *, const float *, float *,
                                  int64_t);
        int main(void) {
            if (!ruiji_multiplies_codes()) return 0;
            for (int64_t length = 1; length < 70; length += 1 + length / 9)
                for (int64_t count = 1; count < 19; count++)
                    for (int64_t asked = 1; asked < 8; asked++) {
                        int8_t *rows = malloc(count * length);
                        int16_t *queries = malloc(asked * length * 2);
                        float *steps = malloc(asked * 4), *products = malloc(asked * count * 4);
                        for (int64_t i = 0; i < count * length; i++) rows[i] = 2;
                        for (int64_t i = 0; i < asked * length; i++) queries[i] = -3;
                        for (int64_t i = 0; i < asked; i++) steps[i] = 0.5;
                        ruiji_multiply_codes(count, length, rows, asked, queries, steps, products, count);
                        for (int64_t i = 0; i < asked * count; i++)
                            if (products[i] != -3.0f * length) return 1;
                        free(rows), free(queries), free(steps), free(products);
                    }
            return 0;
        }
        """
    for options in ([], ["-DRUIJI_PLAIN"]):
        run_sanitized(tmp_path, program, SOURCE, *options)


def test_many_queries_take_fewer_rows_at_once(multiply: MakeCodesMultiply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes_scan_module, "_PRODUCTS_AT_ONCE", 1000)
    rows: list[int] = []

    def make(units: Float32) -> CodesMultiply:
        inner = multiply(units)

        class Multiply:
            query_loss = inner.query_loss

            def __call__(self, parts: Sequence[NDArray[np.int8]]) -> Float32:
                products = inner(parts)
                rows.append(products.shape[1])
                return products

        return Multiply()

    features = features_of("random", 400, 64)
    gallery, queries = in_memory(features, cuts=(7, 9, 100, 300)), features_of("positive", 20, 64)
    for count, most in ((1, 400), (3, 333), (20, 50)):
        rows.clear()
        assert rank(gallery, queries[:count], 5, scan=codes_scan(make)) == rank(gallery, queries[:count], 5)
        assert sum(rows) == 400 and most / 2 < max(rows) <= most
    assert rows[:3] == [9, 50, 41], "small shards share a block, others are cut"


def test_what_is_compiled_comes_before_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of("random")
    made = []

    class Multiply(NumpyCodesMultiply):
        def __init__(self, units: Float32) -> None:
            made.append(len(units))
            super().__init__(units)

    monkeypatch.setattr(codes_scan_module, "CompiledCodesMultiply", Multiply)
    for there, expected in ((True, [3]), (False, [])):
        monkeypatch.setattr(codes_scan_module, "has_codes", lambda there=there: there)
        made.clear()
        assert rank(in_memory(features), features[:3], 5, scan=codes_scan()) == rank(
            in_memory(features), features[:3], 5
        )
        assert made == expected
