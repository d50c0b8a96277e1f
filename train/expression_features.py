"""Log-normalized counts over a tokenizer's genes: what a linear model sees of the cells that a network reads."""

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellglot.tokenization.count_matrix import open_counts
from cellglot.tokenization.rank_encoding import TARGET_SUM

# Genes that a linear model uses at the most: the most variable ones among training cells
MAX_GENES = 2_000


def log_expression(
    source: Any, cells: np.ndarray, tokenizer: Any, *, layer: str | None = None, gene_ids: str | None = None
) -> tuple[sp.csr_matrix, pd.DataFrame]:
    """log(1 + counts per 10,000) of the marked cells, and their obs, in file order.

    source   AnnData or count file
    cells    (cells of the source,) boolean mask
    Returns  (marked cells, genes of the vocabulary): by gene, since files differ in their columns and their order
    """
    blocks = []
    with open_counts(source, layer=layer) as matrix:
        selector = tokenizer.selector(tokenizer.match_genes(matrix, gene_ids))
        for rows, counts in matrix.blocks(cells):
            totals = np.maximum(matrix.cell_totals(rows, counts), 1)
            blocks.append((sp.diags_array(TARGET_SUM / totals) @ (counts @ selector)).log1p())
        obs = matrix.obs[cells]
    return sp.csr_matrix(sp.vstack(blocks)), obs


def variable_genes(expression: sp.csr_matrix, train: np.ndarray) -> np.ndarray:
    """(cells, <= MAX_GENES) dense log expression of the genes that vary most among the marked training cells."""
    chosen = expression[train]
    mean = np.asarray(chosen.mean(axis=0)).ravel()
    variance = np.asarray(chosen.multiply(chosen).mean(axis=0)).ravel() - mean**2
    genes = np.sort(np.argsort(-variance, kind="stable")[:MAX_GENES])
    return expression[:, genes].toarray()
