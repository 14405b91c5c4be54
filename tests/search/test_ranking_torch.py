"""The torch scan gives the same hits bit for bit; on torch's CPU always, on CUDA where there is one."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")

from pipeline.errors import UsageError  # noqa: E402
from search.options import Metric  # noqa: E402
from search.ranking import rank  # noqa: E402
from search.ranking_torch import rank_torch  # noqa: E402
from tests.search.galleries import in_memory  # noqa: E402
from tests.search.test_ranking import KINDS, features_of, ids_of, queries_of  # noqa: E402

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_and_numpy_give_the_same_ranking(kind: str, device: str) -> None:
    features = features_of(kind)
    gallery = in_memory(features, ids_of(len(features)), cuts=(100, 200))
    queries = queries_of(features)
    for metric in Metric:
        for k in (10, 1000):
            expected = rank(gallery, queries, k, metric)
            assert rank_torch(gallery, queries, k, metric, device=device, block_rows=73) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_a_permitted_tensorfloat32_is_not_used_and_stays_permitted(device: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        features = features_of("near_duplicates", 1000, 256)
        gallery = in_memory(features)
        assert rank_torch(gallery, features[:3], 20, device=device) == rank(gallery, features[:3], 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_an_error_and_no_fallback() -> None:
    features = np.ones((2, 4), np.float32)
    with pytest.raises(UsageError, match="--device cuda"):
        rank_torch(in_memory(features), features, 1)
