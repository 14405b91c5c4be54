"""Matrix units give the same hits bit for bit: on a CPU that has them, and with plain C in their place on any."""

import ctypes
import itertools
import shutil
import subprocess
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import compiled as libraries
from search.options import Metric
from search.ranking import compiled, matrix_units
from search.ranking.bounds import bfloat16_margin
from search.ranking.compiled import QueryTiles, RowTiles
from search.ranking.matrix_units import MatrixUnits
from search.ranking.rank import rank, rows_within
from search.ranking.scan import Batch
from tests.sanitized import run_sanitized
from tests.search.galleries import in_memory
from tests.search.ranking.test_rank import KINDS, check_bounds, check_parts, features_of, ids_of, queries_of

SOURCE = Path(__file__).parents[3] / "search" / "ranking" / "_matrix_units.c"


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library without matrix units."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    made = tmp_path_factory.mktemp("plain") / "plain.so"
    subprocess.run(["cc", "-O2", "-DRUIJI_PLAIN", "-shared", "-fPIC", "-o", made, SOURCE, "-lm"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "find_spec", lambda name: SimpleNamespace(origin=str(made)))
        library = compiled._matrix_units.__wrapped__()
    assert isinstance(library, ctypes.CDLL)
    return library


@pytest.fixture(params=["matrix units", "plain"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # However many the machine has, so that each has as much to do.
    monkeypatch.setattr(matrix_units, "cores", lambda: 2)
    if request.param == "plain":
        library = request.getfixturevalue("plain")
        monkeypatch.setattr(compiled, "_matrix_units", lambda: library)
    elif not compiled.has_matrix_units():
        pytest.skip("this CPU has no matrix units, or they were not compiled")


@pytest.mark.parametrize("kind", KINDS)
def test_they_and_numpy_give_the_same_ranking(kind: str) -> None:
    features = features_of(kind)
    gallery = in_memory(features, ids_of(len(features)), cuts=(100, 200))
    queries = queries_of(features)
    kept, streamed = MatrixUnits(resident=True), MatrixUnits(block_rows=73)
    for metric in Metric:
        for k in (1, 10, 1000):
            expected = rank(gallery, queries, k, metric)
            assert rank(gallery, queries, k, metric, kept.scan) == expected
            assert rank(gallery, queries, k, metric, streamed.scan) == expected
        assert rank(gallery, queries[:1], 10, metric, kept.scan) == rank(gallery, queries[:1], 10, metric)


def test_a_scan_for_a_part_of_what_there_is_finds_the_same() -> None:
    check_parts(MatrixUnits(resident=True).scan)
    check_parts(MatrixUnits(block_rows=150).scan)


@pytest.mark.parametrize("d", [1, 2, 31, 32, 33, 64, 100])
def test_rows_and_queries_need_not_fill_tiles(d: int) -> None:
    for rows in (1, 15, 16, 33, 300):
        features, queries = features_of("random", rows, d), features_of("positive", 70, d)
        gallery, kept = in_memory(features, cuts=(rows // 2,)), MatrixUnits(resident=True)
        for count in (1, 15, 16, 17, 32, 33, 49, 70):
            expected = rank(gallery, queries[:count], 3)
            assert rank(gallery, queries[:count], 3, scan=kept.scan) == expected
            assert rank(gallery, queries[:count], 3, scan=MatrixUnits().scan) == expected


@pytest.mark.parametrize("resident", [False, True], ids=["streamed", "kept"])
@pytest.mark.parametrize("kind", ["random", "positive", "near_duplicates"])
def test_they_stay_within_their_error_bound(kind: str, resident: bool) -> None:
    for d in (3, 64, 1280):
        rows, queries = features_of(kind, 400, d), features_of("positive", 20, d)
        gallery, batch = in_memory(rows), Batch(queries, 400, Metric.cosine)
        parts = list(MatrixUnits(resident=resident).scan(gallery, batch, np.full(20, -np.inf)))
        assert sum(len(part.rows) for part in parts) == 20 * 400
        for part in parts:
            check_bounds(part, batch, rows)


def test_the_bound_is_of_products_that_are_not_rounded_again() -> None:
    whole, kept = bfloat16_margin(1280, 0.002, 0.002), bfloat16_margin(1280, 0.002, 0.002, rounded=False)
    assert kept.absolute == whole.absolute and (kept.relative, whole.relative > 0) == (0, True)


def test_most_rows_are_left_out_before_python_sees_them() -> None:
    rows, queries = features_of("random", 20_000, 64), features_of("positive", 20, 64)
    parts = list(
        MatrixUnits(resident=True).scan(in_memory(rows), Batch(queries, 25, Metric.cosine), np.full(20, -np.inf))
    )
    assert len(parts) == 2
    for part in parts:
        assert 25 * 20 <= len(part.rows) < 50 * 20
        assert (np.diff(part.queries) >= 0).all()


@pytest.mark.parametrize("kind", ["duplicates", "near_duplicates", "rising", "ties", "random"])
@pytest.mark.parametrize("room", [0, 300])
def test_more_rows_than_there_is_room_for_are_handed_over_before_the_rest(
    kind: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = features_of(kind, 3000)
    queries = queries_of(features)
    monkeypatch.setattr(matrix_units, "_ROOM_BYTES", room * 8 * len(queries))
    gallery = in_memory(features, ids_of(3000), cuts=(1000,))
    handed = 0
    for arithmetic in (MatrixUnits(resident=True), MatrixUnits(block_rows=700)):
        for k in (1, 20, 500, 3000):
            assert rank(gallery, queries, k, scan=arithmetic.scan) == rank(gallery, queries, k)
        handed += len(list(arithmetic.scan(gallery, Batch(queries, 3000, Metric.cosine), np.full(6, -np.inf))))
    assert handed > 4, "it was never full"


@pytest.mark.parametrize("room_bytes", [0, 32 << 20], ids=["in many calls", "in one"])
@pytest.mark.parametrize("kind", ["clustered", "random", "bad_rows"])
def test_every_row_that_reaches_a_cut_is_found(kind: str, room_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_units, "_ROOM_BYTES", room_bytes)
    features = features_of(kind, 2000)
    gallery, queries = in_memory(features, cuts=(999,)), queries_of(features)
    for least in (-1.0, 0.0, 0.2, 0.999):
        hits = rank(gallery, queries, 2000)
        expected = [sorted(hit.row for hit in some if hit.similarity >= least) for some in hits]
        for arithmetic in (MatrixUnits(), MatrixUnits(resident=True)):
            found = rows_within(gallery, queries, least, arithmetic.scan)
            assert [rows.tolist() for rows in found] == expected


def test_rows_that_are_left_out_never_come_however_poor_the_rest_is() -> None:
    features = -np.abs(features_of("random", 600))
    # What is left out would be best; of it and of what is missing to a tile the products are 0.
    features[::3] = np.nan
    features[1::3] = 0
    query = np.ones((1, features.shape[1]), np.float32)
    for arithmetic in (MatrixUnits(resident=True), MatrixUnits()):
        found = rank(in_memory(features), query, 600, scan=arithmetic.scan)[0]
        assert [hit.row for hit in found] == [hit.row for hit in rank(in_memory(features), query, 600)[0]]
        assert len(found) == 200


def test_no_row_is_passed_over_if_there_are_more_cores_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of("random", 3000)
    gallery, queries = in_memory(features), queries_of(features)
    expected = rank(gallery, queries, 10)
    for arithmetic in (MatrixUnits(resident=True), MatrixUnits(block_rows=700)):
        more = itertools.count(1)
        monkeypatch.setattr(matrix_units, "cores", lambda more=more: next(more))
        for _ in range(3):
            assert rank(gallery, queries, 10, scan=arithmetic.scan) == expected


def test_queries_may_be_in_any_order_of_memory() -> None:
    features = features_of("random", 300)
    gallery, queries = in_memory(features), queries_of(features)
    for arithmetic in (MatrixUnits(resident=True), MatrixUnits()):
        found = rank(gallery, np.asfortranarray(queries), 10, scan=arithmetic.scan)
        assert found == rank(gallery, queries, 10)


def test_rounding_is_to_the_nearest_and_of_two_to_the_even_one() -> None:
    rows = np.array([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8]], np.float32)
    tiles = RowTiles.room_for(1, 4)
    loss = tiles.put(rows, np.ones(1, np.float32), np.ones(1, bool), 0)
    bits = (np.array([1, 1 + 2**-6, 1 + 2**-7, -1], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert tiles.values[:4].tolist() == bits.tolist()
    queries = QueryTiles.of(rows)
    assert queries.values[[0, 1, 32, 33]].tolist() == bits.tolist()
    assert loss == pytest.approx(queries.loss) == pytest.approx(2**-8 * 2, rel=1e-3)


def test_several_threads_share_what_is_kept_and_only_the_last_gallery_is() -> None:
    features = features_of("clustered", 3000)
    galleries, queries = [in_memory(features), in_memory(features[::-1].copy())], queries_of(features)
    expected = [rank(gallery, queries, 10) for gallery in galleries]
    arithmetic = MatrixUnits(resident=True)
    assert not arithmetic.keeps(galleries[0])
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(rank, galleries[n % 2], queries, 10, scan=arithmetic.scan) for n in range(20)]
        assert [one.result() for one in asked] == 10 * expected
    assert rank(galleries[0], queries, 10, scan=arithmetic.scan) == expected[0]
    assert (arithmetic.holds(galleries[0]), arithmetic.holds(galleries[1])) == (True, False)
    assert (arithmetic.keeps(galleries[0]), arithmetic.keeps(galleries[1])) == (True, False)


def test_the_copy_of_before_is_gone_when_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    features, made = features_of("random", 300), list[weakref.ref[RowTiles]]()
    first, second = in_memory(features), in_memory(features)
    room_for = RowTiles.room_for

    def noted(rows: int, length: int) -> RowTiles:
        assert rows < 300 or all(one() is None for one in made), "two are in memory"
        tiles = room_for(rows, length)
        if rows == 300:
            made.append(weakref.ref(tiles))
        return tiles

    monkeypatch.setattr(RowTiles, "room_for", noted)
    arithmetic = MatrixUnits(resident=True)
    assert arithmetic.kept_bytes() == 0 and not arithmetic.holds(first)
    for gallery in (first, second):
        rank(gallery, features[:3], 10, scan=arithmetic.scan)
        # Whole tiles of 32 rows and 32 values: 33 are 64.
        assert arithmetic.kept_bytes() == 2 * 320 * 64
    assert len(made) == 2


def test_it_reads_and_writes_nothing_else(tmp_path: Path) -> None:
    """Every read and write is checked by the compiler's own sanitizers, in a program that looks for many rows."""
    program = """
        #include <math.h>
        #include <stdint.h>
        #include <stdlib.h>
        typedef struct { float sum; int32_t row; } hit;
        double ruiji_round_rows(int64_t, int64_t, const float *, const float *, const uint8_t *, uint16_t *, int64_t);
        int64_t ruiji_find_hits(const uint16_t *, int64_t, int64_t, int64_t, int64_t, const uint16_t *, int64_t,
                                int64_t, double, double *, int64_t, int32_t *, int32_t *, hit *, float *);
        static int one(int64_t rows, int64_t length, int64_t asked, int64_t k, int64_t room) {
            int64_t tiles = (length + 31) / 32, whole = (asked + 31) / 32 * 32, stops = 0, found = 0;
            float *features = malloc(rows * length * 4), *norms = malloc(rows * 4);
            hit *found_rows = malloc(asked * room * sizeof *found_rows);
            float *least = malloc(whole * 4);
            uint8_t *usable = malloc(rows);
            uint16_t *kept = calloc((rows + 31) / 32 * 32 * tiles * 32, 2), *queries = calloc(whole * tiles * 32, 2);
            int32_t *counts = malloc(asked * 4), *limits = malloc(asked * 4);
            double *cuts = malloc(asked * 8);
            for (int64_t i = 0; i < rows * length; i++) features[i] = (float)(rand() % 7 - 3);
            for (int64_t i = 0; i < rows; i++) norms[i] = (float)length, usable[i] = rand() % 9 > 0;
            for (int64_t i = 0; i < whole * tiles * 32; i++) queries[i] = (uint16_t)(0x3f80 | (rand() & 1) << 15);
            for (int64_t i = 0; i < asked; i++) counts[i] = 0, limits[i] = (int32_t)(2 * k + 32), cuts[i] = -INFINITY;
            if (!(ruiji_round_rows(rows, length, features, norms, usable, kept, 0) < 1)) return 1;
            for (int64_t from = 0; from < rows; stops++) {
                from = ruiji_find_hits(kept, rows, tiles, 5, from, queries, asked, k, 0.01, cuts, room, counts, limits,
                                  found_rows, least);
                for (int64_t i = 0; i < asked; i++)
                    for (found += counts[i]; counts[i]; counts[i]--) {
                        int32_t row = found_rows[i * room + counts[i] - 1].row;
                        if (row < 5 || row > rows + 4) return 2;
                    }
                if (stops > rows) return 3;
            }
            free(features), free(norms), free(found_rows), free(least), free(usable), free(kept), free(queries);
            free(counts), free(limits), free(cuts);
            return found == 0 && rows > 40;
        }
        int main(void) {
            for (int n = 0; n < 200; n++)
                if (one(1 + rand() % 900, 1 + rand() % 70, 1 + rand() % 40, rand() % 30, 256 + rand() % 700)) return 1;
            return 0;
        }
        """
    run_sanitized(tmp_path, program, SOURCE, "-DRUIJI_PLAIN")
