"""A network over the genes of a model: names matched, every edge once, scores symmetric."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..tokenization.gene_ids import examples
from .edge_tables import EdgeTable
from .genes import GeneNames


@dataclass(frozen=True)
class GraphReport:
    """What became of an edge table.

    Rows are the table's edges, names its genes; genes are those of the model, matched if the table names them.
    """

    name: str
    n_genes: int
    n_matched_genes: int
    n_rows: int
    n_matched_rows: int
    n_names: int
    n_matched_names: int
    n_self_loops: int
    n_repeated: int
    n_asymmetric: int
    n_below_score: int
    left_out: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        genes, edges = self.n_matched_names / self.n_names, self.n_matched_rows / self.n_rows
        parts = [
            f"{self.name}: {self.n_matched_names:,} of {self.n_names:,} genes ({genes:.1%}) and "
            f"{self.n_matched_rows:,} of {self.n_rows:,} edges ({edges:.1%}) matched",
            f"it has {self.n_matched_genes:,} of the {self.n_genes:,} genes given "
            f"({self.n_matched_genes / self.n_genes:.1%})",
        ]
        counts = {
            "below min_score": self.n_below_score,
            "self-loops removed": self.n_self_loops,
            "repeated edges removed": self.n_repeated,
            "asymmetric edges made symmetric (the larger score)": self.n_asymmetric,
            **{f"rows {reason}": n for reason, n in self.left_out.items()},
        }
        return "; ".join([*parts, *(f"{n:,} {what}" for what, n in counts.items() if n)])


@dataclass(frozen=True)
class GeneGraph:
    """An undirected network over genes, as `set_graph` of a gene-graph model takes it.

    genes   the genes of the model, connected or not
    pairs   (edges, 2) int32 positions in `genes`, smaller first, sorted, each once
    scores  (edges,) float32 as read; ones where the table had none
    report  what became of the table
    """

    genes: GeneNames
    pairs: np.ndarray
    scores: np.ndarray
    report: GraphReport

    def degrees(self) -> np.ndarray:
        """(genes,) neighbours of each gene."""
        return np.bincount(self.pairs.ravel(), minlength=len(self.genes))

    def connected(self) -> "GeneGraph":
        """The network over the genes with a neighbour only (the paper's 1,817 of 20,499)."""
        kept = np.flatnonzero(self.degrees())
        place = np.full(len(self.genes), -1, dtype=np.int32)
        place[kept] = np.arange(len(kept), dtype=np.int32)
        return replace(self, genes=self.genes.select(kept), pairs=place[self.pairs])

    def shuffled(self, seed: int) -> "GeneGraph":
        """The same network with its connected genes exchanged at random: a control without biology.

        Degrees, clusters and scores stay, on other genes.
        """
        kept = np.flatnonzero(self.degrees())
        place = np.arange(len(self.genes), dtype=np.int32)
        place[kept] = np.random.default_rng(seed).permutation(kept)
        pairs = np.sort(place[self.pairs], axis=1)
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        return replace(self, pairs=pairs[order], scores=self.scores[order])

    def rewired(self, seed: int, *, rounds: int = 30) -> "GeneGraph":
        """Other edges, each gene with as many neighbours as before: a control that leaves the hubs where they are.

        Two edges exchange an end unless that repeats an edge or joins a gene to itself, each `rounds` times on average
        (Maslov & Sneppen 2002). Scores stay with one of their genes.
        """
        rng, n = np.random.default_rng(seed), len(self.genes)
        ends = self.pairs.astype(np.int64)
        half = len(ends) // 2
        for _ in range(rounds):
            order = rng.permutation(len(ends))
            one, other = order[:half], order[half : 2 * half]
            flip = rng.random(len(ends)) < 0.5
            ends[flip] = ends[flip, ::-1]
            a = np.stack([ends[one, 0], ends[other, 1]], axis=1)
            b = np.stack([ends[other, 0], ends[one, 1]], axis=1)
            there = _keys(ends, n)
            keys = np.concatenate([_keys(a, n), _keys(b, n)])
            _, of_key, times = np.unique(np.concatenate([there, keys]), return_inverse=True, return_counts=True)
            free = (times[of_key[len(there) :]] == 1) & (np.concatenate([a, b])[:, 0] != np.concatenate([a, b])[:, 1])
            both = free[:half] & free[half:]
            ends[one[both]], ends[other[both]] = a[both], b[both]
        pairs = np.sort(ends, axis=1).astype(np.int32)
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        return replace(self, pairs=pairs[order], scores=self.scores[order])

    def config_options(self) -> dict[str, Any]:
        """Fields of `GeneGraphConfig` that say which genes a model of this graph has."""
        return self.genes.config_options()


def align_edges(
    table: EdgeTable, genes: GeneNames, *, aliases: Any = None, min_score: float | None = None
) -> GeneGraph:
    """The network over `genes`: its names resolved, self-loops and repetitions removed, directions joined.

    aliases    further names of the genes: mapping, or table with columns alias and ensembl_id
    min_score  leaves out edges below it, in the table's unit (STRING: 0 to 1,000)
    An edge that the table has in both directions, or repeatedly, gets its largest score.
    Raises     ValueError if the table names none of the genes, has no edge between two of them, or has no scores to
               compare with min_score
    """
    match = genes.resolver(aliases).match(table.genes)
    if match.n_matched == 0:
        raise ValueError(
            f"None of the {len(table.genes):,} genes of {table.name} is among the {len(genes):,} given: it calls them "
            f"e.g. {examples(table.genes)}, they are e.g. {examples(genes.ids)}"
            f"{'' if genes.symbols is None else ' with symbols ' + examples(s for s in genes.symbols if s)}. Pass "
            "genes with symbols (gene_names of an AnnData that has them), or aliases=, a table of alias and "
            "ensembl_id; map genes of another species to orthologs first."
        )
    a, b = match.index_g[table.a], match.index_g[table.b]
    matched = (a >= 0) & (b >= 0)
    high = np.ones(len(a), dtype=bool)
    if min_score is not None:
        if table.scores is None:
            raise ValueError(f"{table.name} has no scores to compare with min_score={min_score}.")
        high = table.scores >= min_score
    loop = matched & high & (a == b)
    kept = matched & high & ~loop
    if not kept.any():
        raise ValueError(
            f"{table.name}: no edge joins two different genes of the {len(genes):,} given"
            f"{'' if min_score is None else f' with a score of {min_score} or more'}; {match.n_matched:,} of its "
            f"{len(table.genes):,} genes are among them, {int(matched.sum()):,} of its {len(a):,} edges have both ends "
            f"there, {int(loop.sum()):,} are self-loops."
        )
    scores = np.ones(int(kept.sum()), np.float32) if table.scores is None else table.scores[kept]
    pairs, pair_scores, n_repeated, n_asymmetric = _undirected(a[kept], b[kept], scores, len(genes))
    report = GraphReport(
        table.name,
        n_genes=len(genes),
        n_matched_genes=match.n_matched - match.n_collapsed,
        n_rows=len(a),
        n_matched_rows=int(matched.sum()),
        n_names=len(table.genes),
        n_matched_names=match.n_matched,
        n_self_loops=int(loop.sum()),
        n_repeated=n_repeated,
        n_asymmetric=n_asymmetric,
        n_below_score=int((matched & ~high).sum()),
        left_out=table.left_out,
    )
    return GeneGraph(genes, pairs, pair_scores, report)


def _keys(pairs: np.ndarray, n_genes: int) -> np.ndarray:
    """(edges,) one number a pair, whatever its direction."""
    return pairs.min(axis=1) * n_genes + pairs.max(axis=1)


def _undirected(a: np.ndarray, b: np.ndarray, scores: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(pairs, their largest scores, edges repeated in one direction, asymmetric pairs).

    A pair is asymmetric if its directions have different scores, or if it has one direction in a table where others
    have two: a table that lists each pair once means both.
    """
    directed, of_row = np.unique(a * n + b, return_inverse=True)
    best = np.full(len(directed), -np.inf, np.float32)
    np.maximum.at(best, of_row, scores)
    low, high = np.minimum(directed // n, directed % n), np.maximum(directed // n, directed % n)
    keys, of_edge, directions = np.unique(low * n + high, return_inverse=True, return_counts=True)
    largest, smallest = np.full(len(keys), -np.inf, np.float32), np.full(len(keys), np.inf, np.float32)
    np.maximum.at(largest, of_edge, best)
    np.minimum.at(smallest, of_edge, best)
    asymmetric = (largest > smallest) | ((directions == 1) & (directions == 2).any())
    pairs = np.stack([keys // n, keys % n], axis=1).astype(np.int32)
    return pairs, largest, len(a) - len(directed), int(asymmetric.sum())
