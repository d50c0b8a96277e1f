"""Log-normalized expression of cells over a fixed list of genes, in sparse blocks, from whatever the cells come in.

counts -> counts of `target_sum` a cell -> log(1 + x). Genes are matched by name, so that their order does not matter.

Axis letters: n cells, g genes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from .count_matrix import CELLS_PER_BLOCK, CountMatrix, check_counts, open_counts
from .gene_ids import GENE_ID_COLUMNS, GENE_SYMBOL_COLUMNS, GeneMatch, GeneResolver, canonical_id, examples, is_named
from .parquet_counts import is_parquet_corpus, parquet_counts


@contextlib.contextmanager
def open_cells(cells: Any, *, layer: str | None = None, gene_ids: Sequence[str] | None = None) -> Iterator[CountMatrix]:
    """The count matrix of cells, open while the context lasts.

    cells     as of `open_counts`, or a Parquet corpus (its folder or one of its files), or counts (cells, genes) as
              NumPy array, SciPy sparse matrix or torch tensor
    gene_ids  (genes,) names of the columns, for counts only
    Raises    as `open_counts`; ValueError where names are not as many as columns
    """
    if isinstance(cells, str | Path) and is_parquet_corpus(Path(cells)):
        yield parquet_counts(Path(cells))
    elif sp.issparse(cells) or isinstance(cells, np.ndarray) or hasattr(cells, "to_sparse_csr"):
        yield _from_counts(cells, gene_ids)
    else:
        with open_counts(cells, layer=layer) as matrix:
            yield matrix


def _from_counts(counts: Any, gene_ids: Sequence[str] | None) -> CountMatrix:
    import pandas as pd

    if hasattr(counts, "to_sparse_csr"):
        counts = _from_tensor(counts.detach().cpu())
    dense_or_sparse: Any = counts if sp.issparse(counts) else np.atleast_2d(counts)
    rows = sp.csr_matrix(dense_or_sparse)
    names = [] if gene_ids is None else [str(gene) for gene in gene_ids]
    if len(names) != rows.shape[1]:
        raise ValueError(f"Counts have {rows.shape[1]:,} columns, but gene_ids names {len(names):,}: name each column.")
    obs, var = pd.DataFrame(index=pd.RangeIndex(rows.shape[0]).astype(str)), pd.DataFrame(index=pd.Index(names))
    return CountMatrix("counts", obs, var, lambda start, stop: rows[start:stop], {}, concurrent=True)


def _from_tensor(counts: Any) -> Any:
    """A tensor's values as NumPy has them, or SciPy if it is sparse."""
    import torch

    if counts.layout is torch.strided:
        return counts.numpy()
    rows = counts.to_sparse_csr()
    parts = (rows.values().numpy(), rows.col_indices().numpy(), rows.crow_indices().numpy())
    return sp.csr_matrix(parts, shape=tuple(rows.shape))


@dataclass(frozen=True)
class LogExpression:
    """How counts become expression over `resolver.vocabulary`; what a fit and its projections must agree on.

    target_sum        counts a cell is scaled to, over all its genes (`CountMatrix.cell_totals`); None: not scaled
    allow_fractional  whether values may be other than integers (expected counts of a quantifier)
    """

    resolver: GeneResolver
    target_sum: float | None
    allow_fractional: bool = False

    def match(self, matrix: CountMatrix, column: str | None = None) -> GeneMatch:
        """Which gene each column of a matrix means, by a column of `var` or the known one that matches most."""
        if column is not None:
            return self.resolver.match(matrix.gene_names(column))
        known = [name for name in (*GENE_ID_COLUMNS, *GENE_SYMBOL_COLUMNS) if name in matrix.var]
        candidates = [matrix.gene_names(name) for name in known] + [[str(name) for name in matrix.var.index]]
        return max((self.resolver.match(names) for names in candidates), key=lambda match: match.n_matched)

    def blocks(
        self,
        matrix: CountMatrix,
        match: GeneMatch,
        cells: np.ndarray | None = None,
        cells_per_block: int = CELLS_PER_BLOCK,
    ) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """(cell positions, expression) in file order: CSR float32 (cells, genes of the vocabulary).

        cells   boolean mask of the cells wanted, None for all
        Raises  ValueError for values that are no counts (see `check_counts`), or not integers unless they may be
        """
        n_genes, summed = len(self.resolver.vocabulary), match.n_collapsed > 0
        for rows, counts in matrix.blocks(cells, cells_per_block):
            check_counts(matrix, rows, counts, allow_normalized=True)
            if not self.allow_fractional and (counts.data != np.rint(counts.data)).any():
                value = counts.data[counts.data != np.rint(counts.data)][0]
                raise ValueError(
                    f"{matrix.name}: expected raw counts, found {value:g}: normalized or log-transformed values would "
                    "be transformed twice. Pass the layer with counts, or allow_fractional=True if these are expected "
                    "counts of a quantifier."
                )
            totals = matrix.cell_totals(rows, counts)
            yield rows, self._transformed(counts, totals, match.index_g, n_genes, summed)

    def _transformed(
        self, counts_ng: sp.csr_matrix, totals_n: np.ndarray, index_g: np.ndarray, n_genes: int, summed: bool
    ) -> sp.csr_matrix:
        genes = index_g[counts_ng.indices]
        # Stored zeros are no detected genes.
        known = (genes >= 0) & (counts_ng.data != 0)
        indptr = np.concatenate([[0], np.cumsum(known)])[counts_ng.indptr]
        values = counts_ng.data[known].astype(np.float32)
        expression = sp.csr_matrix((values, genes[known].astype(np.int32), indptr), (counts_ng.shape[0], n_genes))
        if summed or not counts_ng.has_canonical_format:
            expression.sum_duplicates()
        if self.target_sum is not None:
            # A cell without counts has nothing to scale.
            factors = np.divide(self.target_sum, totals_n, out=np.zeros(len(totals_n)), where=totals_n > 0)
            expression.data *= np.repeat(factors.astype(np.float32), np.diff(expression.indptr))
        np.log1p(expression.data, out=expression.data)
        return expression


def common_genes(names_of_files: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Genes that every file names, in the order of the first, Ensembl ids without version.

    names_of_files  (name of the file, its gene names) of each
    Raises          ValueError if there is none
    """
    genes = list(dict.fromkeys(canonical_id(name) for name in names_of_files[0][1] if is_named(name)))
    for _, names in names_of_files[1:]:
        here = {canonical_id(name) for name in names}
        genes = [gene for gene in genes if gene in here]
    if not genes:
        told = "; ".join(f"{file}: {examples(names)}" for file, names in names_of_files[:3])
        raise ValueError(
            f"{len(names_of_files):,} file(s) of one source have no gene in common ({told}). Name the columns of `var` "
            "that hold the same kind of identifier with gene_ids=, or fit them as sources of their own."
        )
    return genes


def symbols_of(matrix: CountMatrix) -> list[str]:
    """What people call the genes: the first of the columns of `var` with symbols, else its index."""
    column = next((name for name in GENE_SYMBOL_COLUMNS if name in matrix.var), None)
    return [str(name) for name in (matrix.var.index if column is None else matrix.var[column])]
