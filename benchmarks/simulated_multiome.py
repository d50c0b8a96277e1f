"""Simulated cells with two modalities: every feature there by chance, in the shapes of real data."""

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

CELLS_AT_ONCE = 1_000


def sparse_counts(n_cells: int, n_features: int, density: float, highest: int, seed: int) -> sp.csr_matrix:
    """(cells, features) float32 CSR: each entry there with one probability, as a count from 1 to `highest`."""
    rng = np.random.default_rng(seed)
    indices, lengths = [], []
    for start in range(0, n_cells, CELLS_AT_ONCE):
        n = min(CELLS_AT_ONCE, n_cells - start)
        entries = int(n * n_features * density * 1.05) + 1_000
        # Waiting times of a Bernoulli process, laid over the cells' rows end to end
        places = np.cumsum(rng.geometric(density, entries)) - 1
        assert places[-1] >= n * n_features
        places = places[: np.searchsorted(places, n * n_features)]
        indices.append((places % n_features).astype(np.int32))
        lengths.append(np.bincount(places // n_features, minlength=n))
    columns = np.concatenate(indices)
    data = rng.integers(1, highest, len(columns), dtype=np.int16, endpoint=True).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return sp.csr_matrix((data, columns, offsets), shape=(n_cells, n_features))


def generate_multiome(
    work: Path,
    n_cells: int,
    n_genes: int,
    n_peaks: int,
    *,
    gene_density: float,
    highest_count: int,
    peak_density: float,
    seed: int,
) -> tuple[Path, Path]:
    """`.h5ad` files of expression and of binary accessibility of the same cells, made unless they are there."""
    paths = []
    for name, n_features, density, highest in (
        ("genes", n_genes, gene_density, highest_count),
        ("peaks", n_peaks, peak_density, 1),
    ):
        path = work / f"{name}-{n_cells}x{n_features}-{density}-{highest}-{seed}.h5ad"
        paths.append(path)
        if path.exists():
            continue
        names = (
            [f"GENE{i}" for i in range(n_features)]
            if name == "genes"
            else [f"chr{1 + i * 22 // n_features}-{1_000 * i + 1}-{1_000 * i + 901}" for i in range(n_features)]
        )
        adata = ad.AnnData(
            sparse_counts(n_cells, n_features, density, highest, seed),
            obs=pd.DataFrame(index=pd.Index([f"cell{i}" for i in range(n_cells)])),
            var=pd.DataFrame(index=pd.Index(names)),
        )
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        adata.write_h5ad(partial)
        os.replace(partial, path)
    return paths[0], paths[1]
