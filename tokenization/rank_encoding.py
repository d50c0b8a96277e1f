"""Rank-value encoding: a cell as its genes in order of how much they distinguish it.

value_g = x_g / n_counts * 10,000 / median_g in float64, genes in descending order of value.
Source: Theodoris et al., Nature 2023, Methods, "Rank value encoding". The order of operations is that of the released
code, because the order of the last bit decides ties.

Ties keep the vocabulary's order of token ids (the original leaves their order to an unstable sort).

Axis letters: n cells, g genes of the file, v genes of the vocabulary in ascending order of token id.
"""

import numpy as np
import scipy.sparse as sp

TARGET_SUM = 10_000


def rank_value_tokens(
    counts_v: np.ndarray,
    n_counts: float,
    medians_v: np.ndarray,
    token_ids_v: np.ndarray,
    *,
    max_genes: int | None = None,
) -> np.ndarray:
    """Token ids of one cell's genes, most distinctive first.

    counts_v     (genes,) raw counts of the vocabulary's genes
    n_counts     total counts of the cell, over all genes
    medians_v    (genes,) corpus-wide non-zero median of counts per 10,000
    token_ids_v  (genes,) ascending
    Returns      (<= max_genes,) int32
    """
    detected = np.flatnonzero(counts_v > 0)
    values = counts_v[detected].astype(np.float64) / n_counts * TARGET_SUM / medians_v[detected]
    order = np.argsort(-values, kind="stable")[:max_genes]
    return token_ids_v[detected[order]].astype(np.int32)


def rank_value_block(
    counts_ng: sp.csr_matrix,
    n_counts_n: np.ndarray,
    selector_gv: sp.csr_matrix,
    medians_v: np.ndarray,
    token_ids_v: np.ndarray,
    *,
    max_genes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the genes of a block of cells, laid end to end.

    counts_ng    (cells, genes of the file) raw counts
    n_counts_n   (cells,) total counts of each cell
    selector_gv  (genes of the file, genes of the vocabulary) one where a column means a gene; columns that mean the
                 same gene are summed by the product
    Returns      (tokens,) int32 and (cells + 1,) int64 offsets of the cells in it
    """
    counts_nv = sp.csr_matrix(counts_ng.astype(np.float64) @ selector_gv)
    counts_nv.eliminate_zeros()
    counts_nv.sort_indices()
    indptr, genes = counts_nv.indptr, counts_nv.indices
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # A cell without counts has no values to divide; a value too large for float64 is infinite, and first.
        values = counts_nv.data / np.repeat(n_counts_n, np.diff(indptr)) * TARGET_SUM / medians_v[genes]
    np.negative(values, out=values)
    lengths = np.minimum(np.diff(indptr), max_genes)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.empty(offsets[-1], dtype=np.int32)
    for n, length in enumerate(lengths):
        first, last = indptr[n], indptr[n + 1]
        order = np.argsort(values[first:last], kind="stable")[:length]
        tokens[offsets[n] : offsets[n + 1]] = token_ids_v[genes[first:last][order]]
    return tokens, offsets
