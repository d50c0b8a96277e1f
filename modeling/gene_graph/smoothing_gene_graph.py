"""Smoothing of gene features along the edges of a network, in memory proportional to edges, not to genes squared.

A matrix G (genes x genes) that is zero off the edges multiplies the features Z of each cell: either the cell's own
G = softmax over the neighbours j of q_i . z_j, or the network's scores. The graph is symmetric, so the backward pass
needs no scatter: G^T has the same edges in another order (`reverse`).

Attention is written for keys that are the values, q_i . z_j, which loses nothing: theta(z_i)^T phi(z_j) is
(phi^T theta(z_i))^T z_j, up to terms without j, which the softmax takes out. Products are torch's sparse ones,
sampled (edges from dense) and CSR (dense from edges), a few cells at a time as the blocks of one large matrix; the
backward pass computes G anew. What is held for a batch is (n, g, d), for a block of cells its edges.

Axes: n cells, g genes, d features, e directed edges.
"""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# Directed edges of the cells that are worked on together: on a CPU a few cells, so that features stay in the cache and
# threads seldom wait for each other; a GPU wants large kernels (16 million edges: 64 MiB for each vector of edges).
EDGES_AT_ONCE = {"cpu": 2**21, "cuda": 2**24}
# Columns of a product with the network's scores, for the same reason
COLUMNS_AT_ONCE = 64


class Pattern(NamedTuple):
    """Where the edges of a few cells are, each cell a block on the diagonal of one CSR matrix. All int32.

    row_starts  (cells x g + 1,)
    columns     (e,) neighbour of each edge
    rows        (e,) gene of each edge
    reverse     (e,) place of the edge the other way round
    """

    row_starts: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor
    reverse: torch.Tensor

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        """The CSR matrix with these values (e,)."""
        size = (len(self.row_starts) - 1,) * 2
        return torch.sparse_csr_tensor(self.row_starts, self.columns, values, size, check_invariants=False)

    def dots(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(e,) a_i . b_j of every edge from (cells x g, d)."""
        products = self.matrix(a.new_zeros(len(self.columns)))
        return torch.sparse.sampled_addmm(products, a, b.t(), beta=0.0, out=products).values()

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """(cells x g,) sum of the values (e,) of each gene's edges."""
        return torch.segment_reduce(values, "sum", offsets=self.row_starts, unsafe=True)

    def of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(e,) value of each edge's gene, from (cells x g,)."""
        return values.index_select(0, self.rows)


class Edges:
    """Directed edges of a symmetric graph, by gene and neighbour, on one device.

    pairs     (undirected edges, 2) different genes, each pair once
    diagonal  whether each gene is its own neighbour
    Raises    ValueError for pairs out of range, of a gene with itself, or given twice
    """

    def __init__(self, pairs: torch.Tensor, n_genes: int, diagonal: bool):
        i, j = check_pairs(pairs, n_genes).long().unbind(1)
        n, own = len(pairs), torch.arange(n_genes if diagonal else 0, device=pairs.device)
        rows, columns = torch.cat([i, j, own]), torch.cat([j, i, own])
        order = (rows * n_genes + columns).argsort()
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=pairs.device))
        there = torch.arange(n, device=pairs.device)
        partner = torch.cat([there + n, there, 2 * n + own])
        degree = torch.bincount(rows, minlength=n_genes)
        self.n_genes, self._pairs = n_genes, pairs.clone()
        # Which pair an edge comes from; n_pairs: the diagonal
        self.pair = torch.cat([there, there, own.new_full((len(own),), n)])[order]
        self.has_neighbors = degree > 0
        starts = torch.nn.functional.pad(degree.cumsum(0), (1, 0))
        self.one_cell = Pattern(*(x.int() for x in (starts, columns[order], rows[order], place[partner[order]])))
        self._stacked = self.one_cell
        with warnings.catch_warnings():
            # torch says once a process that CSR tensors are in beta.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
            self.one_cell.matrix(torch.zeros(len(order), device=pairs.device))

    def __len__(self) -> int:
        return len(self.pair)

    def are_of(self, pairs: torch.Tensor) -> bool:
        """Whether these pairs, on this device, would give the same edges."""
        return pairs.device == self._pairs.device and torch.equal(pairs, self._pairs)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """(e,) the scores (pairs,) both ways, and 1 on the diagonal."""
        return torch.cat([scores, scores.new_ones(1)]).index_select(0, self.pair)

    def blocks(self, n_cells: int) -> Iterator[tuple[slice, Pattern]]:
        """The cells of a batch a few at a time, each with the edges of that many."""
        budget = EDGES_AT_ONCE.get(self.pair.device.type, EDGES_AT_ONCE["cuda"])
        size = min(max(budget // max(len(self), 1), 1), n_cells)
        for start in range(0, n_cells, max(size, 1)):
            stop = min(start + size, n_cells)
            yield slice(start, stop), self._pattern(stop - start)

    def _pattern(self, n_cells: int) -> Pattern:
        """The edges of as many cells. The largest that was asked for is kept; a smaller one is its beginning."""
        e, g = len(self), self.n_genes
        if len(self._stacked.row_starts) - 1 < n_cells * g:
            cell = torch.arange(n_cells, device=self.pair.device, dtype=torch.int32).unsqueeze(1)
            starts, columns, rows, reverse = self.one_cell
            self._stacked = Pattern(
                torch.cat([starts[:1], (starts[1:] + cell * e).flatten()]),
                *((x + cell * step).flatten() for x, step in ((columns, g), (rows, g), (reverse, e))),
            )
        starts, *others = self._stacked
        return Pattern(starts[: n_cells * g + 1], *(x[: n_cells * e] for x in others))


def check_pairs(pairs: torch.Tensor, n_genes: int) -> torch.Tensor:
    """(edges, 2) the pairs as they are, if they are an undirected graph without self-loops.

    Raises  ValueError for pairs out of range, of a gene with itself, or given twice
    """
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise ValueError(f"Expected pairs of genes as integers (edges, 2), found {pairs.dtype} {tuple(pairs.shape)}.")
    if not len(pairs):
        raise ValueError("The graph has no edges: give it with model.set_graph(pairs, scores).")
    low, high = pairs.long().sort(dim=1).values.unbind(1)
    if int(low.min()) < 0 or int(high.max()) >= n_genes:
        raise ValueError(
            f"Expected genes 0 to {n_genes - 1:,}, found {int(low.min()):,} to {int(high.max()):,}: pairs are "
            "positions among the model's own genes, as cellglot.gene_graph.align_edges gives them."
        )
    n_loops = int((low == high).sum())
    n_repeated = len(pairs) - len((low * n_genes + high).unique())
    if n_loops or n_repeated:
        raise ValueError(
            f"The graph has {n_loops:,} self-loops and {n_repeated:,} repeated pairs among {len(pairs):,}. "
            "A model without any graph in its checkpoint gets one by model.set_graph(pairs, scores); "
            "cellglot.gene_graph.align_edges makes pairs that fit."
        )
    return pairs


def attention_of_edges(
    query: torch.Tensor, features: torch.Tensor, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e,) exp(q_i . z_j - the largest of gene i), and (cells x g,) that largest; -inf without neighbours."""
    scores = pattern.dots(query, features)
    largest = torch.segment_reduce(scores, "max", offsets=pattern.row_starts, unsafe=True)
    return scores.sub_(pattern.of_rows(largest)).exp_(), largest


class _EdgeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, features: torch.Tensor, edges: Edges) -> torch.Tensor:
        n, _, d = features.shape
        smoothed, log_sums = torch.empty_like(features), features.new_empty(features.shape[:2])
        # With a column of ones, one product gives the sum over neighbours and what it is divided by.
        with_ones = torch.cat([features, features.new_ones(1, 1, 1).expand(*features.shape[:2], 1)], dim=-1)
        for cells, pattern in edges.blocks(n):
            weights, largest = attention_of_edges(query[cells].flatten(0, 1), features[cells].flatten(0, 1), pattern)
            sums = (pattern.matrix(weights) @ with_ones[cells].flatten(0, 1)).unflatten(0, (-1, edges.n_genes))
            # Without neighbours both are 0: the smallest positive number keeps 0 / 0 away.
            total = sums[..., d:].clamp(min=torch.finfo(sums.dtype).tiny)
            torch.div(sums[..., :d], total, out=smoothed[cells])
            torch.add(total[..., 0].log(), largest.unflatten(0, (-1, edges.n_genes)), out=log_sums[cells])
        ctx.save_for_backward(query, features, smoothed, log_sums)
        ctx.edges = edges
        return smoothed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        # With P the softmax over neighbours j of s_ij = q_i . z_j, and m_i = sum_j P_ij z_j:
        #   u_ij = dL/ds_ij = P_ij (dL/dm_i . z_j - dL/dm_i . m_i)
        #   dL/dq_i = sum_j u_ij z_j        dL/dz_j = sum_i P_ij dL/dm_i + u_ij q_i
        query, features, smoothed, log_sums = ctx.saved_tensors
        gradient = gradient.contiguous()
        mean = (gradient * smoothed).sum(dim=-1)
        d_query, d_features = torch.empty_like(query), torch.empty_like(features)
        for cells, pattern in ctx.edges.blocks(len(features)):
            q, z, g = (x[cells].flatten(0, 1) for x in (query, features, gradient))
            p = pattern.dots(q, z).sub_(pattern.of_rows(log_sums[cells].flatten())).exp_()
            u = pattern.dots(g, z).sub_(pattern.of_rows(mean[cells].flatten())).mul_(p)
            d_query[cells] = (pattern.matrix(u) @ z).view_as(d_query[cells])
            backwards = pattern.matrix(p.index_select(0, pattern.reverse)) @ g
            backwards += pattern.matrix(u.index_select(0, pattern.reverse)) @ q
            d_features[cells] = backwards.view_as(d_features[cells])
        return d_query, d_features, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, weights: torch.Tensor, edges: Edges) -> torch.Tensor:
        ctx.save_for_backward(weights)
        ctx.edges = edges
        return _product(features, weights, edges)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return _product(gradient, ctx.saved_tensors[0], ctx.edges), None, None


def _product(features: torch.Tensor, weights: torch.Tensor, edges: Edges) -> torch.Tensor:
    n, g, d = features.shape
    matrix = edges.one_cell.matrix(weights)
    columns = features.transpose(0, 1).reshape(g, n * d)
    parts = [matrix @ part.contiguous() for part in columns.split(COLUMNS_AT_ONCE, dim=1)]
    return torch.cat(parts, dim=1).view(g, n, d).transpose(0, 1).contiguous()


def edge_attention(query: torch.Tensor, features: torch.Tensor, edges: Edges) -> torch.Tensor:
    """(n, g, d) mean of the neighbours' features, weighed by the softmax over neighbours of q_i . z_j; 0 without any.

    query, features  (n, g, d). Computed in float32 at least
    """
    with torch.autocast(features.device.type, enabled=False):
        query, features = at_least_float32(query), at_least_float32(features)
        return _EdgeAttention.apply(query.contiguous(), features.contiguous(), edges)  # type: ignore[return-value]


def weighted_sum(features: torch.Tensor, weights: torch.Tensor, edges: Edges) -> torch.Tensor:
    """(n, g, d) sum of the neighbours' features, weighed by constant symmetric weights (e,)."""
    with torch.autocast(features.device.type, enabled=False):
        features = at_least_float32(features)
        return _WeightedSum.apply(features, weights.to(features.dtype), edges)  # type: ignore[return-value]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


__all__ = [
    "Edges",
    "Pattern",
    "at_least_float32",
    "attention_of_edges",
    "check_pairs",
    "edge_attention",
    "weighted_sum",
]
