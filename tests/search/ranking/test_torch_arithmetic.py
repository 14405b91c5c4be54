"""The torch scan gives the same hits bit for bit; on torch's CPU always, on CUDA where there is one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")

from pipeline.errors import DeviceFault, MachineFault, UsageError  # noqa: E402
from search.duplicates.groups import find_groups  # noqa: E402
from search.gallery.shards import Block, Gallery  # noqa: E402
from search.options import Metric, Precision  # noqa: E402
from search.ranking import torch_arithmetic  # noqa: E402
from search.ranking.arithmetic import is_dense  # noqa: E402
from search.ranking.rank import rank  # noqa: E402
from search.ranking.scan import Batch  # noqa: E402
from search.ranking.torch_arithmetic import TorchArithmetic, TorchScan  # noqa: E402
from tests.search.galleries import in_memory  # noqa: E402
from tests.search.ranking.test_rank import KINDS, check_bounds, check_parts, features_of, ids_of, queries_of  # noqa: E402

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [Precision.float32, Precision.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_and_numpy_give_the_same_ranking(kind: str, precision: Precision, device: str) -> None:
    features = features_of(kind)
    gallery = in_memory(features, ids_of(len(features)), cuts=(100, 200))
    queries = queries_of(features)
    resident = TorchScan(gallery, device, precision, resident=True, block_rows=73)
    staged = TorchScan(gallery, device, precision, block_rows=30, staged=True)
    # Parts of 8, 8, 16, 32 … rows.
    in_parts = TorchScan(gallery, device, precision, resident=True, products_at_once=8 * len(queries))
    for metric in Metric:
        for k in (1, 10, 1000):
            expected = rank(gallery, queries, k, metric)
            assert rank(gallery, queries, k, metric, resident) == expected
            assert rank(gallery, queries, k, metric, staged) == expected
            assert rank(gallery, queries, k, metric, in_parts) == expected
        assert rank(gallery, queries[:1], 10, metric, resident) == rank(gallery, queries[:1], 10, metric)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [Precision.float32, Precision.bfloat16])
@pytest.mark.parametrize("resident", [False, True])
def test_a_scan_for_a_part_of_what_there_is_finds_the_same(resident: bool, precision: Precision, device: str) -> None:
    check_parts(TorchArithmetic(device, precision, resident=resident).scan)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", [False, True], ids=["streamed", "kept"])
@pytest.mark.parametrize("kind", ["random", "positive", "near_duplicates"])
def test_bfloat16_stays_within_its_error_bound(kind: str, resident: bool, device: str) -> None:
    for d in (3, 64, 1280):
        rows, queries = features_of(kind, 400, d), features_of("positive", 20, d)
        gallery = in_memory(rows)
        for metric in Metric:
            batch = Batch(queries, 400, metric)
            scan = TorchScan(gallery, device, Precision.bfloat16, resident=resident)
            (found,) = scan(gallery, batch, np.full(20, -np.inf))
            assert len(found.rows) == 20 * 400
            check_bounds(found, batch, rows)


@pytest.mark.parametrize("products", [1, 600, 10**6])
def test_the_first_block_leaves_most_rows_out(products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.ranking.torch_arithmetic._PRODUCTS", products)
    rows, queries = features_of("random", 400, 64), features_of("positive", 20, 64)
    gallery = in_memory(rows)
    (found,) = TorchScan(gallery, "cpu", Precision.bfloat16)(
        gallery, Batch(queries, 25, Metric.cosine), np.full(20, -np.inf)
    )
    assert 25 * 20 <= len(found.rows) < 50 * 20


def test_bfloat16_alone_would_rank_near_duplicates_wrongly() -> None:
    features = features_of("near_duplicates", 1000, 64)
    query = features_of("random", 1, 64)
    units = torch.from_numpy(features / np.linalg.norm(features, axis=1, keepdims=True)).bfloat16()
    alone = (torch.from_numpy(query).bfloat16() @ units.T).float().topk(20).indices[0]
    gallery = in_memory(features)
    hits = rank(gallery, query, 20, scan=TorchScan(gallery, "cpu", Precision.bfloat16))[0]
    assert {hit.row for hit in hits} != set(alone.tolist())
    assert hits == rank(gallery, query, 20)[0]


def test_a_pass_that_was_broken_off_is_not_kept() -> None:
    features = features_of("random")
    gallery = in_memory(features)
    scan = TorchScan(gallery, "cpu", resident=True, block_rows=50)
    next(scan(gallery, Batch(features[:2], 5, Metric.cosine), np.full(2, -np.inf)))
    for _ in range(2):
        assert rank(gallery, features[:2], 5, scan=scan) == rank(gallery, features[:2], 5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_permitted_tensorfloat32_is_not_used_and_stays_permitted(device: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        features = features_of("near_duplicates", 1000, 256)
        gallery = in_memory(features)
        assert rank(gallery, features[:3], 20, scan=TorchScan(gallery, device)) == rank(gallery, features[:3], 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_precision_that_was_chosen_for_one_backend_is_neither_used_nor_lost() -> None:
    # Then torch no longer answers which precision counts for all of them.
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
    try:
        features = features_of("near_duplicates", 1000, 256)
        gallery = in_memory(features)
        assert rank(gallery, features[:3], 20, scan=TorchScan(gallery, "cpu")) == rank(gallery, features[:3], 20)
        assert (cuda.fp32_precision, cpu.fp32_precision) == ("tf32", "bf16")
        with torch_arithmetic._full_sums():
            assert (cuda.fp32_precision, cpu.fp32_precision) == ("ieee", "ieee")
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MachineFault, "does not suffice"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore"), DeviceFault, "failed"),
    ],
)
def test_a_fault_of_the_device_is_one_line_that_says_whose_it_is(
    error: Exception, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(torch_arithmetic, "_products", fails)
    features = features_of("random", 300, 64)
    gallery = in_memory(features)
    for precision in (Precision.float32, Precision.bfloat16):
        arithmetic = TorchArithmetic("cpu", precision)
        with pytest.raises(kind, match=words) as caught:
            rank(gallery, features[:3], 20, scan=arithmetic.scan)
        assert type(caught.value) is kind and "\n" not in str(caught.value)
    with pytest.raises(kind, match=words):
        find_groups(gallery, 0.9, arithmetic=TorchArithmetic("cpu", Precision.bfloat16))


def test_buffers_are_no_longer_than_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of("random", 300, 64)
    gallery = in_memory(features, cuts=(100, 200))
    made, empty = [], torch.empty

    def noted(*size: Any, **rest: Any) -> torch.Tensor:
        made.append(size[0])
        return empty(*size, **rest)

    monkeypatch.setattr(torch, "empty", noted)
    scan = TorchScan(gallery, "cpu", block_rows=10_000, staged=True)
    assert rank(gallery, features[:3], 20, scan=scan) == rank(gallery, features[:3], 20)
    assert made == [(100, 64)] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_an_error_and_no_fallback() -> None:
    with pytest.raises(UsageError, match="--device cuda"):
        TorchScan(in_memory(np.ones((2, 4), np.float32)), "cuda")


def matrix_units(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """As AMX multiplies rows whose length is no multiple of 32: what lies behind a row meets zeros, and NaN stays."""
    product = TRUE_PRODUCT(rows, others)
    bad = ~rows.float().isfinite().all(dim=1)
    product[:-1][bad[1:]] = torch.nan
    return product


TRUE_PRODUCT = torch_arithmetic._matrix_product
NEIGHBOURS = {"nan": np.nan, "infinite": -np.inf, "huge": np.float32(3.4e38), "zero": 0.0}


@pytest.mark.parametrize("way", ["streamed", "staged", "kept"])
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_a_row_is_found_beside_one_that_cannot_be_multiplied(
    neighbour: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.ranking.torch_arithmetic._matrix_product", matrix_units)
    features = features_of("random", 200, 100)
    features[101, 0] = NEIGHBOURS[neighbour]
    features[150:153] = NEIGHBOURS[neighbour]
    gallery = in_memory(features, ids_of(200))
    usable = np.isfinite(features).all(axis=1) & features.any(axis=1)
    queries = np.concatenate([features[usable][90:110], features[149:150]])
    scan = TorchScan(gallery, "cpu", Precision.bfloat16, resident=way == "kept", staged=way == "staged", block_rows=77)
    for metric in Metric:
        for k in (1, 10):
            for _ in range(2):
                assert rank(gallery, queries, k, metric, scan) == rank(gallery, queries, k, metric)
    # The huge one is rankable, and the nearest to itself.
    if neighbour == "huge":
        assert rank(gallery, features[101:102], 1, scan=scan)[0][0].row == 101


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [Precision.float32, Precision.bfloat16])
@pytest.mark.parametrize("kind", ["bad_rows", "extremes"])
def test_only_finite_values_are_multiplied(
    kind: str, precision: Precision, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        assert rows.to(others.dtype).isfinite().all()
        assert others.isfinite().all()
        return TRUE_PRODUCT(rows, others)

    monkeypatch.setattr("search.ranking.torch_arithmetic._matrix_product", watched)
    features = features_of(kind)
    gallery = in_memory(features, cuts=(100,))
    queries = queries_of(features)
    for resident in (False, True):
        scan = TorchScan(gallery, device, precision, resident=resident, block_rows=60)
        for metric in Metric:
            assert rank(gallery, queries, 5, metric, scan) == rank(gallery, queries, 5, metric)
    multiply = TorchArithmetic(device, Precision.bfloat16)
    found = find_groups(gallery, 0.3, arithmetic=multiply, panel_rows=90, tile_rows=33)
    assert list(found) == list(find_groups(gallery, 0.3))


@pytest.mark.parametrize("told", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_a_product_that_is_no_number_hides_no_row(kind: str, told: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        product = TRUE_PRODUCT(rows, others)
        product[::7] = told
        return product

    features = features_of(kind)
    gallery = in_memory(features, cuts=(100,))
    queries = queries_of(features)
    want = [rank(gallery, queries, k, metric) for k in (1, 10) for metric in Metric]
    groups = list(find_groups(gallery, 0.9))
    monkeypatch.setattr("search.ranking.torch_arithmetic._matrix_product", broken)
    scan = TorchScan(gallery, "cpu", Precision.bfloat16, block_rows=60)
    assert [rank(gallery, queries, k, metric, scan) for k in (1, 10) for metric in Metric] == want
    if np.isnan(told):
        multiply = TorchArithmetic("cpu", Precision.bfloat16)
        assert list(find_groups(gallery, 0.9, arithmetic=multiply, panel_rows=90, tile_rows=33)) == groups


@pytest.mark.parametrize("device", DEVICES)
def test_threads_that_come_first_make_one_copy_and_another_gallery_another(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    blocks = Gallery.blocks

    def watched(gallery: Gallery, block_rows: int) -> Iterator[Block]:
        read.append(gallery)
        return blocks(gallery, block_rows)

    features = features_of("near_duplicates", 300, 64)
    galleries = [in_memory(features), in_memory(features[50:])]
    expected = [rank(gallery, features[60:70], 5) for gallery in galleries]
    arithmetic = TorchArithmetic(device, Precision.bfloat16, resident=True, block_rows=40)
    monkeypatch.setattr(Gallery, "blocks", watched)
    for gallery, want in zip(galleries, expected, strict=True):
        # So that all threads meet one scan.
        list(arithmetic.scan(gallery, Batch(features[:1], 1, Metric.cosine), np.full(1, -np.inf)))
        with ThreadPoolExecutor(4) as threads:
            running = [threads.submit(rank, gallery, features[60:70], 5, scan=arithmetic.scan) for _ in range(8)]
            assert all(one.result() == want for one in running)
    assert [one is gallery for one, gallery in zip(read, galleries, strict=True)] == [True, True]


def test_threads_that_come_at_once_make_one_copy() -> None:
    features = features_of("near_duplicates", 300, 64)
    gallery = in_memory(features)
    scan = TorchScan(gallery, "cpu", Precision.bfloat16, resident=True, block_rows=40)
    want = rank(gallery, features[:10], 5)
    with ThreadPoolExecutor(4) as threads:
        assert all(one == want for one in threads.map(lambda _: rank(gallery, features[:10], 5, scan=scan), range(8)))
    kept = scan._kept
    assert kept is not None and len(kept.features) == 300
    rank(gallery, features[:1], 5, scan=scan)
    assert scan._kept is kept


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.5])
def test_looking_by_groups_finds_what_a_comparison_finds(share: float) -> None:
    for rows, columns in ((1, 3), (15, 1), (16, 40), (17, 7), (1000, 50)):
        rng = np.random.default_rng([rows, columns])
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        values[rng.random(values.shape) < 0.001] = np.nan
        values[rng.random(values.shape) < 0.001] = -np.inf
        cut = np.float32(np.nanquantile(values[np.isfinite(values)], 1 - share))
        each = (cut + rng.standard_normal(columns) / 4).astype(np.float32)
        for least in (each, np.broadcast_to(each, values.shape).copy(), np.full(columns, values.max())):
            i, j = torch_arithmetic._reaching(torch.from_numpy(values), torch.from_numpy(least))
            wanted = np.nonzero(~(values < least))
            assert np.array_equal(i, wanted[0]) and np.array_equal(j, wanted[1])
        found = torch_arithmetic._near(torch.from_numpy(values), float(cut))
        wanted = np.nonzero(~(values < cut))
        if found is None:
            assert is_dense(len(wanted[0]), values.size)
        else:
            assert np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1])


@pytest.mark.parametrize("precision", [Precision.float32, Precision.bfloat16])
def test_what_is_kept_is_counted(precision: Precision) -> None:
    features = features_of("random", 300, 64)
    gallery = in_memory(features)
    arithmetic = TorchArithmetic("cpu", precision, resident=True)
    assert arithmetic.kept_bytes() == 0 and not arithmetic.holds(gallery)
    counted = []
    for part in arithmetic.scan(gallery, Batch(features[:3], 5, Metric.cosine), np.full(3, -np.inf)):
        counted.append((len(part.rows) > 0, arithmetic.holds(gallery), arithmetic.keeps(gallery)))
        assert arithmetic.kept_bytes() == 300 * 64 * (4 if precision is Precision.float32 else 2)
    assert counted == [(True, True, False)] * len(counted) and arithmetic.keeps(gallery)
    assert not TorchArithmetic("cpu", precision).holds(gallery)
