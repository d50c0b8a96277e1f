"""Attention that genes and ranks receive, summed over cells while the model runs.

Attention received by the gene at position k of a cell, for one head with weights w (rows sum to 1):

    a_k = t * mean over genes q != k of w[q, k]

t is the number of tokens in the cell, so that 1 is what even attention gives, whatever the length. Special tokens take
part in the softmax, but are counted neither as readers q nor as read k. A gene's attention to itself is left out: it
says nothing about the others. A gene's value is the mean over the cells that hold it.

The weights of a 2,048-gene cell in 12 layers of 12 heads take 2.4 GB. Here only a block of rows of one layer exists at
a time, computed from the layer's own queries and keys; the model itself runs as it is, with any attention
implementation.

Axes: l layers, h heads, t tokens, g genes of the vocabulary, b blocks of ranks.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..cell_stream import check_model, encoded_blocks, evaluating
from ..tokenization.count_matrix import open_counts

# Weights held at a time: 64 MB in float32, about 200 MB with what the softmax needs
MAX_WEIGHTS = 2**24
# Ranks that count as one when asking what attention a gene's ranks alone would give it: single at the top, where
# attention may fall steeply, later a sixteenth of the rank, at the most so many
RANKS_PER_BLOCK = 16


@dataclass
class AttentionStatistics:
    """Sums over cells of the attention received. `by_gene` and `by_rank` make tables of them."""

    genes: list[str]
    attention_lhg: np.ndarray
    attention_lht: np.ndarray  # by rank, 0 the highest
    n_cells_g: np.ndarray
    rank_sum_g: np.ndarray
    rank_blocks_gb: np.ndarray  # how often each gene stood in each block of ranks
    block_of_rank_t: np.ndarray
    n_cells_t: np.ndarray  # cells that have that many genes
    n_cells: int = 0
    # Cells of no gene or one: no gene attends to another
    n_skipped: int = 0

    @classmethod
    def zeros(cls, genes: Sequence[str], config: Any) -> "AttentionStatistics":
        h, t, g = config.num_attention_heads, config.max_position_embeddings, len(genes)
        blocks = _block_of_rank(t)
        return cls(
            list(genes),
            np.zeros((config.num_hidden_layers, h, g)),
            np.zeros((config.num_hidden_layers, h, t)),
            np.zeros(g, dtype=np.int64),
            np.zeros(g, dtype=np.int64),
            np.zeros((g, blocks[-1] + 1), dtype=np.int32),
            blocks,
            np.zeros(t, dtype=np.int64),
        )

    def add(self, layer: int, genes: np.ndarray, received_ht: np.ndarray) -> None:
        """Attention in one layer to a cell's genes (positions in the vocabulary), in order of rank."""
        self.attention_lhg[layer][:, genes] += received_ht
        self.attention_lht[layer][:, : len(genes)] += received_ht

    def add_cell(self, genes: np.ndarray) -> None:
        ranks = np.arange(len(genes))
        self.n_cells += 1
        self.n_cells_g[genes] += 1
        self.rank_sum_g[genes] += ranks
        self.rank_blocks_gb[genes, self.block_of_rank_t[ranks]] += 1
        self.n_cells_t[: len(genes)] += 1

    def by_gene(self) -> Any:
        """Attention that each gene receives from each head.

        Returns  pandas DataFrame: layer and head (from 0), gene, attention (1: as from a head that attends evenly),
                 expected (what the gene's ranks alone would give it: the mean over all genes at these ranks, of
                 which up to 16 neighbours count as one), n_cells that hold the gene, mean_rank (1 the highest)
        """
        import pandas as pd

        held = np.flatnonzero(self.n_cells_g)
        n = self.n_cells_g[held]
        attention = self.attention_lhg[:, :, held] / n
        expected = self._by_block() @ (self.rank_blocks_gb[held] / n[:, None]).T
        layers, heads, genes = attention.shape
        return pd.DataFrame(
            {
                "layer": np.repeat(np.arange(layers), heads * genes),
                "head": np.tile(np.repeat(np.arange(heads), genes), layers),
                "gene": np.tile(np.array(self.genes, dtype=object)[held], layers * heads),
                "attention": attention.ravel(),
                "expected": expected.ravel(),
                "n_cells": np.tile(n, layers * heads),
                "mean_rank": np.tile(self.rank_sum_g[held] / n + 1, layers * heads),
            }
        )

    def by_rank(self, n_bins: int = 32) -> Any:
        """Attention that each range of ranks receives from each head.

        n_bins   ranges, of equal width up to the longest cell
        Returns  pandas DataFrame: layer, head, first_rank and last_rank (1 the highest), attention (mean over the
                 tokens there; 1 as above), n_tokens
        """
        import pandas as pd

        longest = int((self.n_cells_t > 0).sum())
        if not 1 <= n_bins <= longest:
            raise ValueError(
                f"Expected n_bins between 1 and the {longest:,} ranks of the longest cell, found {n_bins}."
            )
        edges = np.linspace(0, longest, n_bins + 1).round().astype(int)
        n_tokens = np.add.reduceat(self.n_cells_t[:longest], edges[:-1])
        attention = np.add.reduceat(self.attention_lht[:, :, :longest], edges[:-1], axis=2) / n_tokens
        layers, heads, _ = attention.shape
        return pd.DataFrame(
            {
                "layer": np.repeat(np.arange(layers), heads * n_bins),
                "head": np.tile(np.repeat(np.arange(heads), n_bins), layers),
                "first_rank": np.tile(edges[:-1] + 1, layers * heads),
                "last_rank": np.tile(edges[1:], layers * heads),
                "attention": attention.ravel(),
                "n_tokens": np.tile(n_tokens, layers * heads),
            }
        )

    def _by_block(self) -> np.ndarray:
        """(l, h, b) mean attention in each block of ranks; 0 where no cell reaches."""
        starts = np.flatnonzero(np.diff(self.block_of_rank_t, prepend=-1))
        n_tokens = np.add.reduceat(self.n_cells_t, starts)
        return np.add.reduceat(self.attention_lht, starts, axis=2) / np.maximum(n_tokens, 1)


def _block_of_rank(t: int) -> np.ndarray:
    """(t,) block of each rank, from 0."""
    blocks, start = np.empty(t, dtype=np.int64), 0
    for block in range(t):
        width = int(np.clip(start // 16, 1, RANKS_PER_BLOCK))
        blocks[start : start + width] = block
        start += width
        if start >= t:
            break
    return blocks


def attention_to_genes(cells_or_adata: Any, model: Any, tokenizer: Any, **options: Any) -> Any:
    """Table of the attention that genes receive: `collect_attention(...).by_gene()`."""
    return collect_attention(cells_or_adata, model, tokenizer, **options).by_gene()


def attention_by_rank(cells_or_adata: Any, model: Any, tokenizer: Any, *, n_bins: int = 32, **options: Any) -> Any:
    """Table of the attention that ranks receive: `collect_attention(...).by_rank(n_bins)`."""
    return collect_attention(cells_or_adata, model, tokenizer, **options).by_rank(n_bins)


@torch.inference_mode()
def collect_attention(
    cells_or_adata: Any,
    model: Any,
    tokenizer: Any,
    *,
    max_cells: int | None = None,
    seed: int = 0,
    counts_layer: str | None = None,
    progress: bool = True,
    **encode_options: Any,
) -> AttentionStatistics:
    """Attention that genes and ranks receive in each head, over cells.

    cells_or_adata  AnnData, or a file of counts; or token ids: a sequence of arrays, or a Dataset with `input_ids`
    model           a Geneformer with or without a head; runs where its weights are, and is left as it was
    max_cells       draws that many at random, by seed
    counts_layer    of an AnnData or file: None for X, "raw" for `raw`, else the layer with raw counts
    encode_options  further ones of `RankValueTokenizer.iter_encoded`, e.g. cells= (a mask)
    Raises          ValueError if model and tokenizer do not belong together, a cell is longer than the model's context
                    or is no cell, or no cell has two genes
    """
    encoder = check_model(model, tokenizer)
    if max_cells is not None and max_cells < 1:
        raise ValueError(f"Expected max_cells of at least 1, found {max_cells}.")
    statistics = AttentionStatistics.zeros(list(tokenizer.gene_medians), encoder.config)
    # Position in the vocabulary of genes, by token id; -1 for special tokens
    gene_of_token = np.full(len(tokenizer), -1)
    gene_of_token[tokenizer.gene_token_ids] = np.arange(len(statistics.genes))
    device = next(encoder.parameters()).device
    rng = np.random.default_rng(seed)
    opened = _opened(cells_or_adata, encoder, tokenizer, max_cells, rng, counts_layer, encode_options)
    with opened as (n, stream):
        with evaluating(encoder), tqdm(total=n, desc="attention", unit="cell", disable=not progress) as bar:
            for ids in stream:
                is_gene = _checked(ids, gene_of_token, encoder.config) >= 0
                if is_gene.sum() < 2:
                    statistics.n_skipped += 1
                else:
                    _add_cell(statistics, encoder, ids, gene_of_token[ids[is_gene]], is_gene, device)
                bar.update()
    if not statistics.n_cells:
        raise ValueError(
            f"None of the {statistics.n_skipped:,} cells has two genes of the vocabulary: there is no attention of one "
            "gene to another."
        )
    return statistics


def _add_cell(
    statistics: AttentionStatistics,
    encoder: Any,
    ids: np.ndarray,
    genes: np.ndarray,
    is_gene: np.ndarray,
    device: torch.device,
) -> None:
    reads = torch.from_numpy(is_gene).to(device)

    def reduce(layer: int, module: Any, x: torch.Tensor) -> None:
        heads = encoder.config.num_attention_heads
        q, k = (f(x[0]).view(x.shape[1], heads, -1).transpose(0, 1) for f in (module.query, module.key))
        received = attention_received(q, k, module.scaling, reads)
        statistics.add(layer, genes, received.cpu().numpy())

    handles = [
        layer.attention.self.register_forward_pre_hook(lambda module, args, i=i: reduce(i, module, args[0]))
        for i, layer in enumerate(encoder.encoder.layer)
    ]
    try:
        encoder(torch.from_numpy(ids.astype(np.int64))[None].to(device))
    finally:
        for handle in handles:
            handle.remove()
    statistics.add_cell(genes)


def attention_received(
    query: torch.Tensor, key: torch.Tensor, scaling: float, reads: torch.Tensor, *, max_weights: int = MAX_WEIGHTS
) -> torch.Tensor:
    """Attention that each gene of a cell receives from its other genes, 1 on average where attention is even.

    query, key   (h, t, d/h) of one cell
    reads        (t,) True for genes, False for special tokens, which neither read nor are reported
    max_weights  weights held at a time
    Returns      (h, genes) float32
    """
    h, t, _ = query.shape
    rows = max(max_weights // (h * t), 1)
    positions = reads.nonzero().squeeze(1)
    received = torch.zeros(h, t, dtype=torch.float32, device=query.device)
    for block in positions.split(rows):
        weights = torch.softmax((query[:, block] @ key.transpose(1, 2)).float() * scaling, dim=-1)
        weights[:, torch.arange(len(block), device=block.device), block] = 0  # of a gene to itself
        received += weights.sum(dim=1)
    return received[:, positions] * (t / (len(positions) - 1))


def _checked(ids: np.ndarray, gene_of_token: np.ndarray, config: Any) -> np.ndarray:
    """Genes of a cell's tokens, -1 for special ones. Raises ValueError for what is no cell this model can read."""
    if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"Expected a cell as a list of token ids, found {ids.dtype} of shape {ids.shape}.")
    if len(ids) > config.max_position_embeddings:
        raise ValueError(
            f"A cell has {len(ids):,} tokens, but this model reads {config.max_position_embeddings:,} at the most. "
            "Encode the cells with max_length=..., which keeps the highest-ranked genes."
        )
    ids = ids.astype(np.int64)
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(gene_of_token)):
        raise ValueError(
            f"Expected token ids from 0 to {len(gene_of_token) - 1:,}, found {ids.min():,} to {ids.max():,}: these "
            "cells were encoded with another vocabulary."
        )
    if (ids == config.pad_token_id).any():
        raise ValueError("A cell holds <pad>: pass cells without padding, each at its own length.")
    genes = gene_of_token[ids]
    if len(np.unique(genes[genes >= 0])) != (genes >= 0).sum():
        raise ValueError("A cell holds a gene twice: a rank-value encoding has each gene once.")
    return genes


@contextlib.contextmanager
def _opened(
    cells: Any,
    encoder: Any,
    tokenizer: Any,
    max_cells: int | None,
    rng: np.random.Generator,
    counts_layer: str | None,
    encode_options: dict[str, Any],
) -> Iterator[tuple[int, Iterable[np.ndarray]]]:
    """(number of cells, their token ids), drawn at random in the order they come."""
    if isinstance(cells, str) or hasattr(cells, "__fspath__") or hasattr(cells, "obs"):
        with open_counts(cells, layer=counts_layer) as matrix:
            options = dict(encode_options)
            mask = matrix.passing_cells(options.pop("cells", None))
            chosen = np.arange(matrix.n_cells) if mask is None else np.flatnonzero(mask)
            chosen = _drawn(chosen, max_cells, rng)
            drawn = np.zeros(matrix.n_cells, dtype=bool)
            drawn[chosen] = True
            blocks = encoded_blocks(matrix, encoder, tokenizer, {**options, "cells": drawn})
            yield len(chosen), (ids for block in blocks for ids in block)
        return
    if encode_options or counts_layer is not None:
        names = [*encode_options, *(["counts_layer"] if counts_layer is not None else [])]
        raise ValueError(f"{', '.join(names)} apply to counts; these cells are token ids already.")
    if hasattr(cells, "column_names"):
        if "input_ids" not in cells.column_names:
            raise ValueError(f"Expected a column input_ids, found {', '.join(cells.column_names)}.")
        cells = cells["input_ids"]
    chosen = _drawn(np.arange(len(cells)), max_cells, rng)
    # A cell without tokens is a list without a type.
    yield len(chosen), (np.asarray(cells[int(i)], dtype=None if len(cells[int(i)]) else np.int64) for i in chosen)


def _drawn(cells: np.ndarray, max_cells: int | None, rng: np.random.Generator) -> np.ndarray:
    if max_cells is None or max_cells >= len(cells):
        return cells
    return np.sort(rng.choice(cells, max_cells, replace=False))
