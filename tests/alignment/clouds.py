"""Point clouds for the tests of alignment."""

from typing import Any

import numpy as np
import torch


def rotation(d: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def types(sizes: dict[int, int], d: int = 11, spread: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """(cells, d) around the centre of each type, which is the same for every seed, and (cells,) the types."""
    centres = 3 * torch.randn(10, d, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    clouds = [centres[t] + spread * torch.randn(n, d, generator=generator) for t, n in sizes.items()]
    return torch.cat(clouds), np.repeat(list(sizes), list(sizes.values()))


def real_cells(path, n_components: int, *, seed: int = 0) -> torch.Tensor:
    """(cells, n_components) PCA of log-normalized counts, cells in random order."""
    import anndata as ad

    adata: Any = ad.read_h5ad(path)
    counts = np.asarray(adata.X.todense(), dtype=np.float64)
    expression = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    expression -= expression.mean(axis=0)
    axes = np.linalg.eigh(expression.T @ expression).eigenvectors[:, ::-1][:, :n_components]
    order = np.random.default_rng(seed).permutation(len(expression))
    return torch.tensor(expression[order] @ axes, dtype=torch.float32)
