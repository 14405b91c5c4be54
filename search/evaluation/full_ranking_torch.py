"""The scan of `full_ranking` with torch, for CUDA; on torch's CPU it is the same code, for tests.

In float64 as on the CPU, so its bound holds and the answer is the same bit for bit. What decides stays on the host.
"""

from collections.abc import Callable

import numpy as np
import torch

from search.arrays import Float32, Float64
from search.evaluation.full_ranking import Products
from search.ranking.torch_scan import torch_device


def torch_products(device: str) -> Callable[[Float64], Products]:
    """Dot products on a torch device.

    Args:
        device: `cuda` or `cpu`.

    Raises:
        UsageError: CUDA was asked for and torch has none that works.
    """
    chosen = torch_device(device)

    def make_products(units: Float64) -> Products:
        queries = torch.from_numpy(units).to(chosen)

        def products(rows: Float32) -> Float64:
            # A copy: torch warns about read-only arrays such as a mapped shard. It is widened on the device.
            block = torch.from_numpy(np.array(rows)).to(chosen).double()
            dots: Float64 = (queries @ block.T).cpu().numpy()
            return dots

        return products

    return make_products
