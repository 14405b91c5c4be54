"""The compiled cosine has the bits of numpy's, and what does not have them is not used."""

import ctypes
import os
import shutil
import signal
import subprocess
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import compiled as libraries
from search.options import Metric
from search.ranking import compiled, exact
from search.ranking.codes_scan import codes_scan
from search.ranking.exact import exact_similarities_at, exact_similarities_to, squared_norms
from search.ranking.rank import rank
from search.ranking.threads import in_threads
from tests.sanitized import run_sanitized
from tests.search.galleries import in_memory
from tests.search.ranking.test_rank import KINDS, features_of, ids_of, queries_of

SOURCE = Path(__file__).parents[3] / "search" / "ranking" / "_exact.c"
CPU = Path("/proc/cpuinfo")
needs_compiled = pytest.mark.skipif(not compiled.has_exact(), reason="it was not compiled")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize("name", ["exact", "matrix_units"])
def test_it_was_compiled_where_there_is_a_compiler(name: str) -> None:
    assert find_spec(f"search.ranking._{name}"), "install ruiji again: make clean setup"


def test_it_is_used_where_it_was_compiled() -> None:
    assert compiled.has_exact() == (find_spec("search.ranking._exact") is not None)


@needs_compiled
@pytest.mark.parametrize("d", [*range(1, 20), 127, 128, 129, 135, 136, 255, 256, 257, 511, 768, 1000, 1280, 4097])
def test_its_cosines_have_numpys_bits(d: int) -> None:
    rng = np.random.default_rng(d)
    queries = rng.normal(size=(3, d)).astype(np.float32)
    rows = (rng.normal(size=(300, d)) * 10.0 ** rng.integers(-30, 30, (300, 1))).astype(np.float32)
    # As near to 1 and -1 as can be, where cosines are clipped.
    rows[:3], rows[3:6], rows[6:9] = queries, -queries, 3 * queries
    numbers, places = rng.integers(0, 3, 300), rng.permutation(300)
    numbers[places < 9] = places[places < 9] % 3
    squares, gallery = squared_norms(queries), in_memory(rows, cuts=(100, 101))
    taken = exact_similarities_at(queries, squares, numbers, gallery.addresses(places))
    assert taken.tobytes() == exact_similarities_to(queries, squares, numbers, rows[places]).tobytes()
    assert (taken[places < 3] == 1).all() and (taken[(places >= 3) & (places < 6)] == -1).all()


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize("machine", ["", "avx2"])
def test_each_machines_code_has_the_same_bits(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CPU.exists() or machine not in CPU.read_text():
        pytest.skip(f"this CPU has no {machine}")
    command = ["cc", "-O3", "-ffp-contract=off", "-DFOR_EACH_MACHINE=", *([f"-m{machine}"] if machine else [])]
    subprocess.run([*command, "-shared", "-fPIC", "-o", tmp_path / "x.so", SOURCE, "-lm"], check=True)
    monkeypatch.setattr(libraries, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "x.so")))
    library = compiled._exact.__wrapped__()
    assert library is not None
    monkeypatch.setattr(compiled, "_exact", lambda: library)
    for d in (1, 7, 8, 33, 128, 136, 1280):
        test_its_cosines_have_numpys_bits(d)


def test_it_reads_and_writes_nothing_else(tmp_path: Path) -> None:
    program = """
        #include <stdint.h>
        #include <stdlib.h>
        void ruiji_cosines_of_pairs(int64_t, int64_t, const float *const *, const float *, const double *,
                                    const int64_t *, double *);
        int main(void) {
            for (int64_t length = 1; length < 400; length += 1 + length / 9) {
                const float **rows = malloc(9 * sizeof *rows);
                float *queries = malloc(2 * length * 4);
                double *squares = malloc(2 * 8), *cosines = malloc(9 * 8);
                int64_t *numbers = malloc(9 * 8);
                for (int64_t i = 0; i < 2 * length; i++) queries[i] = 1;
                squares[0] = squares[1] = (double)length;
                for (int row = 0; row < 9; row++) {
                    float *values = malloc(length * 4);
                    for (int64_t i = 0; i < length; i++) values[i] = 3;
                    rows[row] = values, numbers[row] = row % 2;
                }
                ruiji_cosines_of_pairs(9, length, rows, queries, squares, numbers, cosines);
                for (int row = 0; row < 9; row++) {
                    if (cosines[row] != 1) return 1;
                    free((void *)rows[row]);
                }
                free(rows), free(queries), free(squares), free(cosines), free(numbers);
            }
            return 0;
        }
        """
    run_sanitized(tmp_path, program, SOURCE)


def test_a_forked_child_has_threads_of_its_own() -> None:
    features = features_of("random", 3000)
    gallery, queries = in_memory(features), queries_of(features)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # From 3.12 on Python warns of what is tried here.
        warnings.simplefilter("ignore")
        patch.setattr(exact, "_PAIRS_OF_A_THREAD", 1)
        expected = rank(gallery, queries, 50)
        child = os.fork()
        if child == 0:
            same = False
            try:
                signal.alarm(60)
                same = rank(gallery, queries, 50) == expected
            finally:
                os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_what_a_share_raises_comes_once_all_have_ended() -> None:
    ended = []

    def work(number: int) -> None:
        if number == 0:
            raise ValueError("the first")
        time.sleep(0.2)
        ended.append(number)

    with pytest.raises(ValueError, match="the first"):
        in_threads(work, [0, 1])
    assert ended == [1]
    with pytest.raises(ValueError, match="the first"):
        in_threads(work, [1, 0])


@needs_compiled
@pytest.mark.parametrize("kind", KINDS)
def test_hits_are_the_same_without_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(kind)
    gallery, queries = in_memory(features, ids_of(len(features)), cuts=(100, 200)), queries_of(features)
    # What codes leave in doubt is narrowed in float32 first without it.
    questions = [(k, metric, scan) for k in (1, 10, 1000) for metric in Metric for scan in (None, codes_scan())]
    monkeypatch.setattr(exact, "_PAIRS_OF_A_THREAD", 7)
    with_it = [rank(gallery, queries, *question) for question in questions]
    monkeypatch.setattr(compiled, "_exact", lambda: None)
    assert [rank(gallery, queries, *question) for question in questions] == with_it


def test_no_row_is_looked_for_beyond_the_gallery() -> None:
    gallery = in_memory(features_of("random", 20), cuts=(7,))
    assert gallery.addresses(np.empty(0, np.int64)).tolist() == []
    begins = [shard.features.ctypes.data for shard in gallery.shards]
    assert gallery.addresses(np.array([0, 6, 7])).tolist() == [begins[0], begins[0] + 6 * 4 * 33, begins[1]]
    for row in (-1, 20):
        with pytest.raises(IndexError, match="20 rows"):
            gallery.addresses(np.array([3, row]))


def test_a_library_that_adds_up_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def almost(count: int, length: int, *arrays: object) -> None:
        ctypes.memset(arrays[-1], 0, 8 * count)

    library = SimpleNamespace(ruiji_cosines_of_pairs=almost)
    monkeypatch.setattr(compiled, "load", lambda name, functions: library)
    assert compiled._exact.__wrapped__() is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_libraries_of_another_version_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.c").write_text("int ruiji_matrix_units(void) { return 1; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "x.so", tmp_path / "x.c"], check=True)
    monkeypatch.setattr(libraries, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "x.so")))
    assert compiled._exact.__wrapped__() is None
    assert compiled._matrix_units.__wrapped__() is None
