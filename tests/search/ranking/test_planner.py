"""Which way each kind of question takes, on every kind of machine."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

import search.gallery.shards as gallery_module
from pipeline.choices import Device
from pipeline.errors import UsageError
from pipeline.model import load_model
from search.gallery.opening import open_gallery
from search.gallery.shards import Gallery
from search.options import Metric, Precision
from search.ranking.arithmetic import Arithmetic
from search.ranking.planner import Bfloat16Units, Library, Machine, Planner, Purpose, Question, Way, choose_way
from search.ranking.rank import rank
from tests.factories import tiny_model
from tests.search.galleries import in_memory, write_gallery
from tests.search.ranking.test_rank import features_of

ROOT = Path(__file__).parents[3]
SMALL, LARGE = 100_000, 20_000_000
UNITS = Bfloat16Units("units", matrix=True, products=50_000_000)
BARE = Machine(Device.auto, torch=False, torch_loaded=False, bfloat16=None, int8=False, memory_bytes=16 << 30)
STRONG = Machine(Device.auto, torch=True, torch_loaded=False, bfloat16=UNITS, int8=True, memory_bytes=16 << 30)
GPU = Machine(
    Device.cuda, torch=True, torch_loaded=True, bfloat16=None, int8=False, memory_bytes=0, device_free_bytes=80 << 30
)


def plan(machine: Machine, rows: int, queries: int, metric: Metric = Metric.cosine) -> Way:
    return choose_way(Question(rows, 1280, queries, metric), machine)


@pytest.mark.parametrize(
    ("machine", "rows", "queries", "torch", "said"),
    [
        (BARE, SMALL, 10_000, False, "no bfloat16 units"),
        (dataclasses.replace(STRONG, torch=False), SMALL, 10_000, False, "not installed"),
        (STRONG, SMALL, 15, False, "rounding the gallery"),
        (STRONG, SMALL, 100, False, "less time than importing torch"),
        (STRONG, SMALL, 1000, True, "1,000 queries are worth"),
        (dataclasses.replace(STRONG, torch_loaded=True), SMALL, 16, True, "16 queries are worth"),
    ],
)
def test_a_cpu_takes_torch_only_where_it_pays(
    machine: Machine, rows: int, queries: int, torch: bool, said: str
) -> None:
    chosen = plan(machine, rows, queries)
    assert (chosen.library is Library.torch, chosen.device) == (torch, "cpu")
    assert chosen.precision is (Precision.bfloat16 if torch else Precision.float32)
    assert said in str(chosen)


def test_a_second_copy_is_kept_only_for_more_than_one_pass_and_where_it_fits() -> None:
    assert not plan(STRONG, SMALL, 1000).resident
    assert plan(STRONG, SMALL, 1001).resident
    assert not plan(STRONG, LARGE, 1001).resident


@pytest.mark.parametrize(
    ("queries", "kept", "matrix", "way"),
    [
        (15, False, True, "torch on cpu, int8"),
        (16, False, True, "torch on cpu, bfloat16, gallery kept"),
        (1, True, True, "torch on cpu, bfloat16, gallery kept"),
        (1, True, False, "torch on cpu, int8"),
        (128, True, False, "torch on cpu, int8"),
    ],
)
def test_matrix_units_take_rows_that_are_kept_rather_than_codes(
    queries: int, kept: bool, matrix: bool, way: str
) -> None:
    units = dataclasses.replace(UNITS, matrix=matrix)
    machine = dataclasses.replace(STRONG, torch_loaded=True, bfloat16=units)
    question = Question(SMALL, 1280, queries, coded=True, lasting=True, kept=kept)
    assert str(choose_way(question, machine)).startswith(way)
    # Features that have left memory are read for neither: the copy answers if it is there, and codes if it is not.
    gone = choose_way(dataclasses.replace(question, in_memory=False), machine)
    assert str(gone).startswith(way if kept or not matrix else "torch on cpu, int8")
    # A copy that does not fit is not kept, and one that would serve a single question neither.
    assert choose_way(dataclasses.replace(question, rows=LARGE, kept=False), machine).precision is Precision.int8
    assert choose_way(dataclasses.replace(question, lasting=False, kept=False), machine).precision is Precision.int8


@pytest.mark.parametrize(
    ("queries", "lasting", "way"),
    [
        (47, False, "numpy on cpu, float32"),
        (48, False, "matrix units on cpu, bfloat16, blocks"),
        (15, True, "numpy on cpu, float32"),
        (16, True, "matrix units on cpu, bfloat16, gallery kept"),
        (1001, False, "matrix units on cpu, bfloat16, gallery kept"),
    ],
)
def test_what_is_compiled_for_matrix_units_needs_no_torch(queries: int, lasting: bool, way: str) -> None:
    machine = dataclasses.replace(STRONG, torch=False, compiled=True)
    question = Question(SMALL, 1280, queries, lasting=lasting)
    assert str(choose_way(question, machine)).startswith(way)
    assert str(choose_way(dataclasses.replace(question, kept=True), machine)).startswith("matrix units on cpu")
    # It finds hits by cosine, in galleries whose rows it can count.
    many = dataclasses.replace(question, rows=1 << 31)
    for other in (dataclasses.replace(question, metric=Metric.euclidean), many):
        assert choose_way(other, machine).library is Library.numpy
    assert choose_way(many, dataclasses.replace(machine, torch=True)).library is not Library.compiled
    pairs = dataclasses.replace(question, purpose=Purpose.pairs)
    assert choose_way(pairs, machine).library is Library.numpy


@pytest.mark.parametrize(
    ("machine", "in_memory", "queries", "way"),
    [
        (STRONG, True, 1, "numpy on cpu, float32"),
        (STRONG, False, 1, "numpy on cpu, int8"),
        (STRONG, False, 64, "numpy on cpu, int8"),
        (STRONG, False, 65, "numpy on cpu, float32"),
        (BARE, False, 1, "numpy on cpu, int8"),
        (dataclasses.replace(STRONG, torch_loaded=True), True, 128, "torch on cpu, int8"),
        (dataclasses.replace(STRONG, torch_loaded=True), True, 129, "torch on cpu, bfloat16"),
        (dataclasses.replace(STRONG, torch_loaded=True, int8=False), True, 3, "numpy on cpu, float32"),
        (dataclasses.replace(STRONG, torch_loaded=True, int8=False), False, 3, "numpy on cpu, int8"),
        (GPU, False, 1, "torch on cuda, float32"),
    ],
)
def test_kept_codes_are_read_where_few_queries_ask(machine: Machine, in_memory: bool, queries: int, way: str) -> None:
    question = Question(SMALL, 1280, queries, Metric.cosine, coded=True, in_memory=in_memory)
    assert str(choose_way(question, machine)).startswith(way)
    assert choose_way(dataclasses.replace(question, metric=Metric.euclidean), machine).precision is Precision.float32
    assert choose_way(dataclasses.replace(question, coded=False), machine).precision is not Precision.int8


@pytest.mark.parametrize(
    ("machine", "queries", "way"),
    [
        (BARE, 1, "numpy on cpu, int8"),
        (BARE, 64, "numpy on cpu, int8"),
        (BARE, 65, "numpy on cpu, float32"),
        (STRONG, 64, "numpy on cpu, int8"),
        (dataclasses.replace(STRONG, torch_loaded=True), 16, "numpy on cpu, int8"),
        (dataclasses.replace(STRONG, torch_loaded=True), 17, "torch on cpu, int8"),
        (dataclasses.replace(STRONG, torch_loaded=True, int8=False), 15, "numpy on cpu, int8"),
        (dataclasses.replace(STRONG, torch=False, compiled=True), 47, "numpy on cpu, int8"),
        (dataclasses.replace(STRONG, torch=False, compiled=True), 48, "matrix units on cpu, bfloat16, blocks"),
    ],
)
def test_what_is_compiled_multiplies_kept_codes(machine: Machine, queries: int, way: str) -> None:
    machine = dataclasses.replace(machine, codes=True)
    question = Question(SMALL, 1280, queries, Metric.cosine, coded=True)
    chosen = choose_way(question, machine)
    assert str(chosen).startswith(way)
    by_codes = way == "numpy on cpu, int8"
    assert ("what is compiled" in chosen.why) == by_codes
    # Codes that would come from the disk are no quicker than features that are in memory; if these would too, they are.
    far = dataclasses.replace(question, codes_in_memory=False)
    assert "what is compiled" not in choose_way(far, machine).why
    assert ("what is compiled" in choose_way(dataclasses.replace(far, in_memory=False), machine).why) == by_codes
    for other in ({"metric": Metric.euclidean}, {"coded": False}, {"length": 1 + (1 << 17)}):
        assert "what is compiled" not in choose_way(dataclasses.replace(question, **other), machine).why


@pytest.mark.parametrize(
    ("codes", "features", "by_codes"),
    [(20, True, True), (11, True, True), (10, True, False), (0, True, False), (0, False, True)],
)
def test_codes_are_read_where_most_are_in_memory(
    codes: int, features: bool, by_codes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model(tmp_path / "model.onnx", length=64))
    write_gallery(tmp_path, model, features_of("random", 20, 64), [f"{row}.jpg" for row in range(20)], 7)
    for shard in open_gallery(tmp_path).shards:
        shard.keep()
    asked: list[None] = []

    def row_in_memory(row: NDArray[Any]) -> bool:
        if row.dtype != np.int8:
            return features
        asked.append(None)
        return len(asked) <= codes

    monkeypatch.setattr(gallery_module, "row_in_memory", row_in_memory)
    monkeypatch.setattr("search.ranking.planner.look_at_machine", lambda device: dataclasses.replace(BARE, codes=True))
    way = Planner(Device.cpu).way(open_gallery(tmp_path), Purpose.hits, 3)
    assert ("what is compiled" in way.why) == by_codes and len(asked) == 20
    # In a process that stays they are there the next time.
    stays = Planner(Device.cpu, lasting=True).way(open_gallery(tmp_path), Purpose.hits, 3)
    assert "what is compiled" in stays.why


@pytest.mark.parametrize("metric", [Metric.cosine, Metric.euclidean])
def test_no_codes_are_made_to_plan(metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_model(tmp_path / "model.onnx", length=64))
    write_gallery(tmp_path, model, features_of("random", 20, 64), [f"{row}.jpg" for row in range(20)], 7)
    for shard in open_gallery(tmp_path).shards:
        shard.keep()
    for scales in (tmp_path / "cache").glob("*.scales.npy"):
        damaged = bytearray(scales.read_bytes())
        damaged[-20] ^= 1
        scales.write_bytes(damaged)
    made: list[None] = []
    monkeypatch.setattr("search.gallery.codes.codes_of", lambda *features: made.append(None))
    monkeypatch.setattr("search.ranking.planner.look_at_machine", lambda device: dataclasses.replace(BARE, codes=True))
    way = Planner(Device.cpu).way(open_gallery(tmp_path), Purpose.hits, 3, metric)
    assert not made and way.precision is Precision.float32


def test_matrix_units_that_have_rows_kept_come_before_what_is_compiled_for_codes() -> None:
    machine = dataclasses.replace(STRONG, torch=False, compiled=True, codes=True)
    question = Question(SMALL, 1280, 1, coded=True, lasting=True)
    assert choose_way(question, machine).precision is Precision.int8
    assert choose_way(dataclasses.replace(question, kept=True), machine).library is Library.compiled
    assert choose_way(dataclasses.replace(question, queries=16), machine).library is Library.compiled
    # Units that nothing here can use do not count.
    useless = choose_way(dataclasses.replace(question, queries=16), dataclasses.replace(machine, compiled=False))
    assert (useless.library, useless.precision) == (Library.numpy, Precision.int8)


def test_rows_whose_products_could_overflow_are_not_multiplied_as_integers() -> None:
    loaded = dataclasses.replace(STRONG, torch_loaded=True)
    assert choose_way(Question(100, 1 << 17, 1, Metric.cosine, coded=True), loaded).library is Library.torch
    assert choose_way(Question(100, 1 + (1 << 17), 1, Metric.cosine, coded=True), loaded).library is Library.numpy


def test_euclidean_distances_are_never_scanned_in_bfloat16() -> None:
    assert plan(STRONG, SMALL, 10_000, Metric.euclidean).library is Library.numpy
    assert plan(GPU, SMALL, 10_000, Metric.euclidean).precision is Precision.float32


def test_cuda_always_takes_torch_and_keeps_what_fits_and_is_used_again() -> None:
    one = plan(GPU, SMALL, 1)
    assert (one.library, one.device, one.precision, one.resident) == (Library.torch, "cuda", Precision.float32, False)
    assert not plan(GPU, SMALL, 4000).resident
    assert plan(GPU, SMALL, 5000).resident
    assert not plan(GPU, 30 * LARGE, 5000).resident
    assert plan(GPU, SMALL, 4000).precision is Precision.bfloat16


def test_a_card_that_only_emulates_bfloat16_multiplies_float32() -> None:
    old = dataclasses.replace(GPU, device_bfloat16=False)
    assert plan(old, SMALL, 4000).precision is Precision.float32
    kept = choose_way(Question(SMALL, 1280, 1, lasting=True), old)
    assert (kept.precision, kept.resident) == (Precision.float32, True)


def test_cuda_without_torch_is_refused() -> None:
    with pytest.raises(UsageError, match="not installed"):
        plan(dataclasses.replace(GPU, torch=False), SMALL, 1)


def test_a_process_that_stays_keeps_rows_that_fit() -> None:
    loaded = dataclasses.replace(STRONG, torch_loaded=True)
    stays = Question(SMALL, 1280, 100, lasting=True)
    assert choose_way(stays, loaded).resident
    assert not choose_way(dataclasses.replace(stays, rows=LARGE), loaded).resident
    # On CUDA half the bytes are half the time, also for one query.
    one = choose_way(dataclasses.replace(stays, queries=1), GPU)
    assert (one.precision, one.resident) == (Precision.bfloat16, True)
    euclidean = choose_way(dataclasses.replace(stays, metric=Metric.euclidean), GPU)
    assert (euclidean.precision, euclidean.resident) == (Precision.float32, True)


def test_pairs_and_evaluations_are_planned_by_the_same_rules() -> None:
    pairs = Question(SMALL, 1280, SMALL, purpose=Purpose.pairs)
    places = Question(SMALL, 1280, 1000, purpose=Purpose.places)
    assert str(choose_way(pairs, BARE)).startswith("tiles with numpy in float32: ")
    assert str(choose_way(pairs, STRONG)).startswith("tiles with torch on cpu in bfloat16: ")
    assert str(choose_way(pairs, GPU)).startswith("tiles with torch on cuda in bfloat16: ")
    for machine, device in ((BARE, "cpu"), (STRONG, "cpu"), (GPU, "cuda")):
        way = choose_way(places, machine)
        assert (way.precision, way.device) == (Precision.float64, device)
        assert way.library is (Library.torch if device == "cuda" else Library.numpy)
        assert not way.resident
    for question in (pairs, places):
        with pytest.raises(UsageError, match="not installed"):
            choose_way(question, dataclasses.replace(GPU, torch=False))


def test_one_copy_is_kept_however_many_queries_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")
    loaded = dataclasses.replace(STRONG, torch_loaded=True)
    monkeypatch.setattr("search.ranking.planner.look_at_machine", lambda device: loaded)
    gallery = in_memory(features_of("random", 300, 64))
    planner = Planner(Device.cpu, lasting=True)
    ways = [planner.way(gallery, Purpose.hits, queries) for queries in (16, 100)]
    assert planner.arithmetic(ways[0]) is planner.arithmetic(ways[1])
    # Whoever comes before the first has begun waits for its copy.
    assert planner.arithmetic(planner.way(gallery, Purpose.hits, 50)) is planner.arithmetic(ways[0])
    assert not Planner(Device.cpu).way(gallery, Purpose.hits, 50).resident
    # One that has grown is kept only if it still fits.
    monkeypatch.setattr(
        "search.ranking.planner.look_at_machine",
        lambda device: dataclasses.replace(loaded, memory_bytes=4 * 2 * 300 * 64),
    )
    assert planner.way(gallery, Purpose.hits, 50).resident
    assert not planner.way(in_memory(features_of("random", 301, 64)), Purpose.hits, 50).resident


def test_what_is_kept_on_a_device_is_room_for_what_comes_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, grown = (in_memory(np.zeros((rows, 64), np.float32)) for rows in (1_000_000, 3_000_000))
    planner, kept = Planner(Device.cuda, lasting=True), 2 * gallery.rows * gallery.length
    free = [600 << 20]
    monkeypatch.setattr(
        "search.ranking.planner.look_at_machine", lambda device: dataclasses.replace(GPU, device_free_bytes=free[0])
    )
    way = planner.way(gallery, Purpose.hits, 50)
    assert way.resident and not planner.way(grown, Purpose.hits, 50).resident
    held = SimpleNamespace(keeps=lambda one: one is gallery, holds=lambda one: one is gallery, kept_bytes=lambda: kept)

    def answered(asked: Gallery) -> Way:
        planner._kept.clear()
        planner._kept[way] = cast(Arithmetic, held)
        return planner.way(asked, Purpose.hits, 50)

    free[0] -= kept
    # What is free now would not do for as much again, but the copy goes if another comes.
    again = dataclasses.replace(gallery)
    assert not Planner(Device.cuda, lasting=True).way(again, Purpose.hits, 50).resident
    assert answered(gallery) is way and way in planner._kept
    for asked in (again, grown):
        answer = answered(asked)
        assert answer.resident == (asked is again)
        # As if it had never been there, and so it must not be.
        free[0] += kept
        fresh = Planner(Device.cuda, lasting=True).way(asked, Purpose.hits, 50)
        assert (answer, answer.products_at_once) == (fresh, fresh.products_at_once)
        free[0] -= kept
        assert not planner._kept


def test_rows_that_many_queries_had_kept_serve_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")
    loaded = dataclasses.replace(STRONG, torch_loaded=True)
    monkeypatch.setattr("search.ranking.planner.look_at_machine", lambda device: loaded)
    features = features_of("random", 300, 64)
    gallery, other = in_memory(features), in_memory(features)
    planner = Planner(Device.cpu, lasting=True)
    alone = planner.way(gallery, Purpose.hits, 1)
    assert alone.precision is Precision.float32
    many = planner.arithmetic(planner.way(gallery, Purpose.hits, 16))
    assert planner.way(gallery, Purpose.hits, 1) == alone, "nothing is kept before the first pass"
    rank(gallery, features[:16], 5, scan=many.scan)
    way = planner.way(gallery, Purpose.hits, 1)
    assert way.precision is Precision.bfloat16 and planner.arithmetic(way) is many
    assert "rows that are rounded once" in str(way)
    assert planner.way(other, Purpose.hits, 1) == alone
    kept = rank(gallery, features[:1], 20, scan=many.scan)
    assert kept == rank(gallery, features[:1], 20)


@pytest.mark.parametrize("gigabytes", [1, 6, 80, 140])
def test_what_a_search_on_cuda_takes_follows_from_what_is_free(gigabytes: int) -> None:
    free = gigabytes * 10**9
    machine = dataclasses.replace(GPU, device_free_bytes=free)
    # Rows that just may stay, and rows that may not.
    for rows in (int(0.6 * free) // 2560, free // 2560):
        way = plan(machine, rows, 100_000)
        kept = 2560 * rows if way.resident else 0
        assert way.products_at_once is not None
        taken = kept + 24 * 1280 * way.block_rows + 6 * 1280 * way.queries_at_once + 48 * way.products_at_once
        assert taken <= 0.98 * free
        assert way.resident == (rows < free // 2560 and gigabytes > 1)
    with pytest.raises(UsageError, match="GPU's memory are free"):
        plan(dataclasses.replace(GPU, device_free_bytes=100 << 20), 1000, 1)


def test_a_copy_on_cuda_is_found_again_though_less_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = in_memory(features_of("random", 300, 64))
    planner = Planner(Device.cuda, lasting=True)
    monkeypatch.setattr("search.ranking.planner.look_at_machine", lambda device: GPU)
    first = planner.way(gallery, Purpose.hits, 1)
    planner._kept[first] = cast(
        Arithmetic, SimpleNamespace(keeps=lambda one: True, holds=lambda one: one is gallery, kept_bytes=lambda: 1)
    )
    less = dataclasses.replace(GPU, device_free_bytes=1 << 30)
    monkeypatch.setattr("search.ranking.planner.look_at_machine", lambda device: less)
    # With the sizes that were planned for it.
    assert planner.way(gallery, Purpose.hits, 1000) is first


def test_threads_of_a_process_that_compares_sleep_while_they_wait() -> None:
    """As libgomp says itself what it read when torch was loaded."""
    pytest.importorskip("torch")
    code = "from search.ranking.planner import wait_asleep; wait_asleep(); import torch"
    for chosen, told in ((None, "PASSIVE"), ("active", "ACTIVE")):
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        env |= {"OMP_DISPLAY_ENV": "true", **({} if chosen is None else {"OMP_WAIT_POLICY": chosen})}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, text=True)
        assert f"OMP_WAIT_POLICY = '{told}'" in done.stderr
