"""Reference losses of masked-gene prediction: what the corpus' statistics alone would give.

A model that has learned anything about cells must beat the frequency of genes (unigram), and one that has learned more
than where in a cell a gene tends to stand must beat the frequency at each rank (rank-binned unigram).

All in nats per gene. Both references are fitted on training cells and scored on every gene of other cells.
"""

from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np

Cells = Iterable[Sequence[int] | np.ndarray]


def unigram_cross_entropy(
    train: Cells, validation: Cells, gene_token_ids: np.ndarray, *, pseudocount: float = 1.0
) -> float:
    """Mean -log p(gene), p being the training frequency.

    train, validation  token ids of each cell, in order of rank; special tokens are left out
    gene_token_ids     (genes,) ascending
    pseudocount        added to the count of every gene, so that an unseen one has a probability
    """
    _, genes = _bins_and_genes(validation, gene_token_ids, 1)
    frequency = _frequency(_bins_and_genes(train, gene_token_ids, 1)[1], len(gene_token_ids), pseudocount)
    return float(-np.log(frequency[genes]).mean())


def rank_binned_cross_entropy(
    train: Cells,
    validation: Cells,
    gene_token_ids: np.ndarray,
    *,
    n_bins: Sequence[int] = (5, 20),
    backoff: Sequence[float] = (100, 1_000, 10_000),
    pseudocount: float = 1.0,
) -> float:
    """Mean -log p(gene | bin of its rank), ranks being relative to the cell's number of genes.

    n_bins   equal parts of a cell's ranking
    backoff  weight, in genes, of the overall frequency mixed into each bin's: a bin holds few genes of each kind
    Of several values those are taken that do best on every fifth training cell after fitting on the others, so that the
    reference is a strong one for small and large vocabularies alike. The other arguments are those of
    `unigram_cross_entropy`.
    """
    train = list(train)
    choices = list(product(n_bins, backoff))
    if len(choices) > 1:
        inner, held_out = [cell for i, cell in enumerate(train) if i % 5], train[::5]
        losses = [_rank_binned(inner, held_out, gene_token_ids, *choice, pseudocount) for choice in choices]
        choices = [choices[int(np.argmin(losses))]]
    return _rank_binned(train, validation, gene_token_ids, *choices[0], pseudocount)


def _rank_binned(
    train: Cells, validation: Cells, gene_token_ids: np.ndarray, n_bins: int, backoff: float, pseudocount: float
) -> float:
    n_genes = len(gene_token_ids)
    train_bins, train_genes = _bins_and_genes(train, gene_token_ids, n_bins)
    bins, genes = _bins_and_genes(validation, gene_token_ids, n_bins)
    overall = _frequency(train_genes, n_genes, pseudocount)
    counts = np.bincount(train_bins * n_genes + train_genes, minlength=n_bins * n_genes).reshape(n_bins, n_genes)
    in_bin = counts.sum(axis=1)
    return float(-np.log((counts[bins, genes] + backoff * overall[genes]) / (in_bin[bins] + backoff)).mean())


def _frequency(genes: np.ndarray, n_genes: int, pseudocount: float) -> np.ndarray:
    counts = np.bincount(genes, minlength=n_genes) + pseudocount
    return counts / counts.sum()


def _bins_and_genes(cells: Cells, gene_token_ids: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank bin and position in gene_token_ids of every gene of every cell."""
    bins, genes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for cell in cells:
        tokens = np.asarray(cell)
        tokens = tokens[tokens >= gene_token_ids[0]]
        genes.append(np.searchsorted(gene_token_ids, tokens))
        bins.append(np.arange(len(tokens)) * n_bins // max(len(tokens), 1))
    return np.concatenate(bins), np.concatenate(genes)
