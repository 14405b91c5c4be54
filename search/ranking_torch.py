"""The float32 scan of `ranking` with torch: for CUDA; on torch's CPU it is the same code, for tests.

Only candidates come from here. The bound on their error and the decision in float64 are those of `search.ranking`, on
the host, so the answer is the same bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import UsageError
from search.gallery import Gallery
from search.options import Metric
from search.ranking import Products, Ranking, rank


def rank_torch(
    gallery: Gallery,
    queries: NDArray[np.float32],
    top_k: int,
    metric: Metric = Metric.cosine,
    *,
    device: str = "cuda",
    block_rows: int | None = None,
) -> Ranking:
    """As `search.ranking.rank`, with the scan on a torch device; the gallery is streamed to it in blocks.

    Args:
        device: `cuda` or `cpu`.

    Raises:
        UsageError: CUDA was asked for and torch has none that works.
        QueryError: a query is zero, not finite, or of another length than the gallery.
    """
    with _full_float32():
        return rank(gallery, queries, top_k, metric, block_rows=block_rows, make_products=_maker(torch_device(device)))


def torch_device(name: str) -> torch.device:
    """A torch device that works.

    Raises:
        UsageError: CUDA was asked for and torch has none that works.
    """
    if name == "cuda":
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"--device cuda: torch {torch.__version__} has no CUDA device that works "
                f"({str(error).splitlines()[0]}); use --device cpu, or set up with make setup ACCEL=gpu"
            ) from None
    return torch.device(name)


@contextmanager
def _full_float32() -> Iterator[None]:
    # TensorFloat-32 has 10 bits of mantissa and would break the error bound.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _maker(device: torch.device) -> Callable[[NDArray[np.float32]], Products]:
    def make_products(units: NDArray[np.float32]) -> Products:
        queries = torch.from_numpy(units).to(device)

        def products(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            # A copy: torch warns about read-only arrays such as a mapped shard, and the device needs its own anyway.
            block = torch.from_numpy(np.array(rows)).to(device)
            dots = (queries @ block.T).cpu().numpy()
            squares = torch.einsum("ij,ij->i", block, block).cpu().numpy()
            return dots, squares

        return products

    return make_products
