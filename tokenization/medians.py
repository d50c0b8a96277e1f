"""Non-zero medians of a corpus: one streaming pass, mergeable across shards.

The factor that makes a rank-value encoding: each gene's median, over the cells where it is detected, of its counts per
10,000. Source: Theodoris et al. 2023, Methods, "Rank value encoding".
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from .count_matrix import CountMatrix, check_counts, open_counts
from .gene_ids import GeneResolver, canonical_id, is_named
from .rank_encoding import TARGET_SUM

# Values kept as they are before the sketch takes over: 12 bytes each, and twice that while they are sorted.
MAX_EXACT_VALUES = 20_000_000


class NonzeroMedians:
    """Accumulates the per-gene non-zero medians of counts per 10,000.

    Exact while no more than `max_exact_values` values have been seen. Beyond that, values are counted in bins of equal
    width on a logarithmic scale, and `relative_error` bounds how far a median can be from the exact one. Two
    accumulators over different cells merge into that of all of them.

    Memory: 12 bytes a value while exact, then 4 bytes a bin and gene (25,000 genes, 0.5%: 0.2 GB).
    """

    # Counts per 10,000 lie between 1e4 / 1e9 (one count in a cell of a billion) and 1e4 (all counts in one gene).
    LOWEST, HIGHEST = 1e-5, 1.0e4

    def __init__(self, *, max_exact_values: int = MAX_EXACT_VALUES, sketch_error: float = 0.005):
        self.max_exact_values = max_exact_values
        self.sketch_error = sketch_error
        self.n_cells = 0
        self._position: dict[str, int] = {}
        self._genes: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._n_values = 0
        self._bins_gb: np.ndarray | None = None
        # A bin spans a factor (1 + e)^2, so that its geometric middle is within a factor 1 + e of all in it.
        self._log_width = 2 * np.log1p(sketch_error)
        self._n_bins = int(np.ceil(np.log(self.HIGHEST / self.LOWEST) / self._log_width)) + 1

    @property
    def relative_error(self) -> float:
        """Bound on the relative error of each median: 0.0 while exact."""
        return 0.0 if self._bins_gb is None else self.sketch_error

    @property
    def gene_ids(self) -> list[str]:
        return list(self._position)

    def positions(self, gene_ids: Iterable[str]) -> np.ndarray:
        """The accumulator's own position of each gene, new genes added. (genes,) int64"""
        return np.array([self._position.setdefault(g, len(self._position)) for g in gene_ids], dtype=np.int64)

    def update(self, counts_ng: sp.csr_matrix, positions_g: np.ndarray, n_counts_n: np.ndarray) -> None:
        """Adds cells.

        counts_ng    (cells, genes) raw counts
        positions_g  (genes,) from `positions`; a position may repeat, then its counts are summed
        n_counts_n   (cells,) total counts of each cell
        """
        selector = sp.csr_matrix(
            (np.ones(len(positions_g)), (np.arange(len(positions_g)), positions_g)),
            shape=(len(positions_g), len(self._position)),
        )
        counts = sp.csr_matrix(counts_ng.astype(np.float64) @ selector)
        counts.eliminate_zeros()
        with np.errstate(divide="ignore"):
            values = counts.data / np.repeat(n_counts_n.astype(np.float64), np.diff(counts.indptr)) * TARGET_SUM
        self._add(counts.indices.astype(np.int32), values)
        self.n_cells += counts_ng.shape[0]

    def merge(self, other: "NonzeroMedians") -> None:
        """Adds all that another accumulator has seen. Both must have the same sketch error."""
        if other.sketch_error != self.sketch_error:
            raise ValueError(
                f"Sketch errors differ ({self.sketch_error} and {other.sketch_error}); they cannot be merged."
            )
        positions = self.positions(other.gene_ids)
        for genes, values in zip(other._genes, other._values, strict=True):
            self._add(positions[genes].astype(np.int32), values)
        if other._bins_gb is not None:
            self._to_sketch()
            assert self._bins_gb is not None
            # Row by row: indexed at once, the sum would be made in a copy of all bins.
            for position, counts in zip(positions[: len(other._bins_gb)], other._bins_gb, strict=True):
                self._bins_gb[position] += counts
        self.n_cells += other.n_cells

    def save(self, path: Path | str) -> None:
        """Writes all that was seen, as NumPy arrays."""
        arrays: dict[str, Any] = {"gene_ids": np.array(self.gene_ids, dtype=str), "n_cells": self.n_cells}
        arrays |= {"max_exact_values": self.max_exact_values, "sketch_error": self.sketch_error}
        if self._bins_gb is None:
            arrays["genes"] = np.concatenate([*self._genes, np.empty(0, dtype=np.int32)])
            arrays["values"] = np.concatenate([*self._values, np.empty(0)])
        else:
            bins_gb = sp.csr_matrix(self._bins_gb)
            arrays |= {"bins": bins_gb.data, "bin_indices": bins_gb.indices, "bin_indptr": bins_gb.indptr}
        # A file, not a name, to which NumPy would add its own ending.
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> "NonzeroMedians":
        """The accumulator that `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            loaded = cls(max_exact_values=int(arrays["max_exact_values"]), sketch_error=float(arrays["sketch_error"]))
            loaded.positions(arrays["gene_ids"].tolist())
            loaded.n_cells = int(arrays["n_cells"])
            if "values" in arrays:
                loaded._add(arrays["genes"], arrays["values"])
            else:
                bins = tuple(arrays[name] for name in ("bins", "bin_indices", "bin_indptr"))
                shape = (len(bins[2]) - 1, loaded._n_bins)
                loaded._bins_gb = sp.csr_matrix(bins, shape=shape).toarray()
        return loaded

    def medians(self) -> dict[str, float]:
        """Median of each gene that was detected in some cell."""
        names = self.gene_ids
        if self._bins_gb is not None:
            return self._sketched_medians(names)
        if not self._n_values:
            return {}
        genes, values = np.concatenate(self._genes), np.concatenate(self._values)
        order = np.argsort(genes, kind="stable")
        present, starts = np.unique(genes[order], return_index=True)
        parts = np.split(values[order], starts[1:])
        return {names[g]: float(np.median(part)) for g, part in zip(present, parts, strict=True)}

    def _add(self, genes: np.ndarray, values: np.ndarray) -> None:
        if self._bins_gb is None:
            self._genes.append(genes)
            self._values.append(values)
            self._n_values += len(values)
            if self._n_values > self.max_exact_values:
                self._to_sketch()
        else:
            self._count(genes, values)

    def _to_sketch(self) -> None:
        if self._bins_gb is None:
            self._bins_gb = np.zeros((len(self._position), self._n_bins), dtype=np.uint32)
        for genes, values in zip(self._genes, self._values, strict=True):
            self._count(genes, values)
        self._genes, self._values, self._n_values = [], [], 0
        self._grow()

    def _grow(self) -> None:
        """One row of bins for every gene seen so far."""
        assert self._bins_gb is not None
        missing = len(self._position) - len(self._bins_gb)
        if missing > 0:
            self._bins_gb = np.vstack([self._bins_gb, np.zeros((missing, self._n_bins), dtype=np.uint32)])

    def _count(self, genes: np.ndarray, values: np.ndarray) -> None:
        self._grow()
        assert self._bins_gb is not None
        bins = np.clip((np.log(values / self.LOWEST) / self._log_width).astype(np.int64), 0, self._n_bins - 1)
        # A one of another type would be converted for each value, in 25 times the time.
        np.add.at(self._bins_gb.reshape(-1), genes.astype(np.int64) * self._n_bins + bins, np.uint32(1))

    def _sketched_medians(self, names: list[str]) -> dict[str, float]:
        assert self._bins_gb is not None
        middles = self.LOWEST * np.exp((np.arange(self._n_bins) + 0.5) * self._log_width)
        medians = {}
        for name, counts in zip(names, self._bins_gb, strict=True):
            total = int(counts.sum())
            if total:
                # The two middle values (one and the same when the number of values is odd), as np.median averages them.
                below, above = np.searchsorted(np.cumsum(counts), [(total - 1) // 2, total // 2], side="right")
                medians[name] = float((middles[below] + middles[above]) / 2)
        return medians


def vocabulary_from_corpus(
    sources: Sequence[Any],
    *,
    special_tokens: Sequence[str],
    layer: str | None = None,
    gene_ids: str | None = None,
    aliases: Mapping[str, str] | None = None,
    cells: Sequence[np.ndarray | None] | None = None,
    accumulator: NonzeroMedians | None = None,
    progress: bool = True,
) -> Any:
    """Vocabulary table of a corpus: every gene detected, with its non-zero median, in one streaming pass.

    sources         AnnData objects or paths
    special_tokens  names of the tokens before the genes, which get the first ids
    gene_ids        column of `var` with gene identifiers; None picks one, Ensembl ids before symbols
    cells           per source, a boolean mask of the cells to use (the training cells), or None for all
    Returns         as of `vocabulary_table`
    """
    from tqdm.auto import tqdm

    total = accumulator or NonzeroMedians()
    for source, mask in zip(
        tqdm(sources, "medians", disable=not progress), cells or [None] * len(sources), strict=True
    ):
        with open_counts(source, layer=layer) as matrix:
            add_cells(total, matrix, gene_ids=gene_ids, aliases=aliases, cells=mask)
    return vocabulary_table(total, special_tokens)


def add_cells(
    total: NonzeroMedians,
    matrix: CountMatrix,
    *,
    gene_ids: str | None = None,
    aliases: Mapping[str, str] | None = None,
    cells: np.ndarray | None = None,
) -> None:
    """Adds the cells of a count matrix, or those of them in a boolean mask, block by block."""
    names = [canonical_id(name) for name in matrix.gene_names(gene_ids)]
    if aliases:
        resolver = GeneResolver(sorted(set(aliases.values())), aliases)
        index_g = resolver.match(names).index_g
        names = [resolver.vocabulary[i] if i >= 0 else n for n, i in zip(names, index_g, strict=True)]
    positions = total.positions(names)
    for rows, counts in matrix.blocks(matrix.passing_cells(cells)):
        check_counts(matrix, rows, counts)
        total.update(counts, positions, matrix.cell_totals(rows, counts))


def vocabulary_table(total: NonzeroMedians, special_tokens: Sequence[str]) -> Any:
    """pandas DataFrame with columns token, token_id, nonzero_median: special tokens, then genes in alphabetical order.

    Raises  ValueError if no gene was detected
    """
    import pandas as pd

    medians = {gene: median for gene, median in total.medians().items() if is_named(gene)}
    if not medians:
        raise ValueError(f"No counts above zero in {total.n_cells:,} cells: there is nothing to build a vocabulary of.")
    genes = sorted(medians)
    tokens = [*special_tokens, *genes]
    return pd.DataFrame(
        {
            "token": tokens,
            "token_id": np.arange(len(tokens)),
            "nonzero_median": [np.nan] * len(special_tokens) + [medians[gene] for gene in genes],
        }
    )
