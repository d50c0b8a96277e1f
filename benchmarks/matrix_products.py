"""The limit of inference: how many operations the matrix products of the layers take, and how fast this machine is."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np


def operations(config: Any, lengths: Sequence[int] | np.ndarray, n_layers: int) -> float:
    """Multiplications and additions in the matrix products of the first layers, for cells of these lengths.

    A layer takes 8 d^2 + 4 d f + 4 t d for each of the t tokens of a cell: the projections of attention, the two
    products of the feed-forward block, scores and their products with values. d width, f feed-forward width
    """
    d, f = config.hidden_size, config.intermediate_size
    t = np.asarray(lengths, dtype=np.float64)
    return float(n_layers * (t * (8 * d * d + 4 * d * f + 4 * t * d)).sum())


def product_gflops(hidden_size: int, intermediate_size: int) -> dict[str, float]:
    """10^9 operations/s of a float32 linear layer on 4,096 tokens: as torch computes it by default, and by oneDNN."""
    import torch

    from cellglot.onednn import OneDNNLinear

    x, weight = torch.randn(4096, hidden_size), torch.randn(intermediate_size, hidden_size)

    def gflops() -> float:
        times = []
        for _ in range(40):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        return 2 * x.numel() * len(weight) / float(np.median(times)) / 1e9

    with torch.inference_mode():
        default = gflops()
        with OneDNNLinear():
            return {"default": default, "onednn": gflops()}
