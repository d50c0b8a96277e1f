"""Which genes, and which edges of the network, speak for each class of a gene-graph classifier.

A gene's importance is its expression times the gradient of a class's logit (input x gradient); an edge's is its weight
in the graph times the gradient of the logit with respect to that weight (attention x gradient), that is what the
neighbour's message over this edge adds to the logit, to first order. The logit of a class is taken relative to the mean
of all logits, since what raises all alike tells no cells apart.
"""

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm.auto import tqdm

from ..cell_stream import evaluating
from ..tokenization.count_matrix import open_counts
from ..tokenization.gene_ids import examples
from .expression import iter_expression
from .genes import GeneNames


def gene_importance(
    source: Any,
    model: Any,
    *,
    labels: Any = None,
    layer: str | None = None,
    top_edges: int = 1000,
    cells_per_batch: int = 64,
    progress: bool = True,
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(genes, edges): importance of each gene and of the most important edges for each class, mean over its cells.

    source           AnnData with raw counts, or the path of a count file
    model            GeneGraphForSequenceClassification with gene_ids in its configuration
    labels           column of obs with the class of each cell; by default that which the model predicts. Cells whose
                     label is none of the model's are left out
    top_edges        rows of the table of edges for each class and graph
    cells_per_batch  memory is that of one backward pass over so many cells, and a few numbers for each edge and class
    options          gene_ids, cells, aliases as of `read_expression`
    Returns          genes: label, gene_id, gene_symbol, importance, expression (mean), n_cells; the most important
                     first. edges: label, graph ("individual" or "global"), layer, gene, neighbor, gene_symbol,
                     neighbor_symbol, importance, weight (mean), n_cells; what `neighbor` sends to `gene`, those of the
                     largest absolute importance first; empty for a model without smoothing
    Raises           ValueError for labels that are not in obs or of which none is the model's, and as `read_expression`
    """
    names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    genes = GeneNames.of_config(model.config)
    sums = _Sums(model, len(names))
    with open_counts(source, layer=layer) as matrix, evaluating(model) as device:
        chosen = options.get("cells")
        known = None if labels is None else _codes(matrix, labels, names, chosen)
        n_cells = matrix.n_cells if chosen is None else int(np.sum(chosen))
        with tqdm(total=n_cells, desc="importance", unit="cell", disable=not progress) as bar:
            for rows, block in iter_expression(matrix, model, **options):
                for start in range(0, len(rows), cells_per_batch):
                    batch = slice(start, start + cells_per_batch)
                    codes = None if known is None else known[rows[batch]]
                    sums.add(block[batch], codes, device)
                bar.update(len(rows))
    return _gene_table(sums, names, genes), _edge_table(sums, names, genes, top_edges)


def _codes(matrix: Any, column: str, names: list[str], chosen: np.ndarray | None) -> np.ndarray:
    """(cells,) class of each cell, -1 where its label is none of the model's; some of the chosen cells have one."""
    if column not in matrix.obs:
        raise ValueError(
            f"{matrix.name}: obs has no column {column!r}; it has {', '.join(map(str, matrix.obs)) or 'none'}."
        )
    found = matrix.obs[column].astype(str)
    codes = pd.Categorical(found, categories=names).codes.astype(np.int64)
    if (codes if chosen is None else codes[chosen]).max(initial=-1) < 0:
        found = found if chosen is None else found[chosen]
        raise ValueError(
            f"{matrix.name}: no label in obs[{column!r}] (e.g. {examples(found.unique())}) is one of the model's "
            f"({examples(names)})."
        )
    return codes


class _Sums:
    """Sums of importances over the cells of each class, in float64 on the CPU."""

    def __init__(self, model: Any, n_labels: int):
        self.model = model
        self.n_cells = np.zeros(n_labels, dtype=np.int64)
        self.gene = np.zeros((n_labels, model.config.n_genes))
        self.expression = np.zeros_like(self.gene)
        # (graph, layer) -> importances and weights, (classes, edges)
        self.edge: dict[tuple[str, int], np.ndarray] = {}
        self.weight: dict[tuple[str, int], np.ndarray] = {}
        self.pattern: Any = None

    def add(self, expression: sp.csr_matrix, codes: np.ndarray | None, device: Any) -> None:
        """Adds cells; `codes` (cells,) are their classes, -1 to leave one out, None for what the model predicts."""
        if codes is not None:
            expression, codes = expression[codes >= 0], codes[codes >= 0]
        if not expression.shape[0]:
            return
        encoder, head = self.model.gene_graph, self.model.classifier
        x = torch.from_numpy(expression.toarray()).to(device).requires_grad_()
        output = encoder(x, output_smoothings=True)
        logits = head(output.last_hidden_state)
        label = logits.argmax(dim=-1) if codes is None else torch.from_numpy(codes).to(device)
        relative = logits.gather(1, label.unsqueeze(1)).squeeze(1) - logits.mean(dim=-1)
        smoothings = output.smoothings
        gradients = torch.autograd.grad(relative.sum(), [x, *(s.smoothed for s in smoothings)])
        # (classes, cells) ones where a cell is of a class: a product with it sums by class.
        member = torch.nn.functional.one_hot(label, len(self.n_cells)).t().to(x.dtype)
        x = x.detach()
        self.n_cells += member.sum(dim=1).long().cpu().numpy()
        self.gene += (member @ (x * gradients[0])).double().cpu().numpy()
        self.expression += (member @ x).double().cpu().numpy()
        with torch.no_grad():
            for smoothing, gradient in zip(smoothings, gradients[1:], strict=True):
                self._add_edges(smoothing, gradient, member)

    def _add_edges(self, smoothing: Any, gradient: torch.Tensor, member: torch.Tensor) -> None:
        edges = self.model.gene_graph.network.edges()
        self.pattern = edges.one_cell
        key = smoothing.kind, smoothing.layer
        empty = np.zeros((len(self.n_cells), len(edges)))
        total, weight = self.edge.setdefault(key, empty), self.weight.setdefault(key, empty.copy())
        for cells, pattern in edges.blocks(len(gradient)):
            weights = self.model.gene_graph.edge_weights(smoothing, cells, pattern)
            sent = weights * pattern.dots(gradient[cells].flatten(0, 1), smoothing.features[cells].flatten(0, 1))
            for sums, values in ((total, sent), (weight, weights)):
                sums += (member[:, cells] @ values.view(-1, len(edges)).to(member.dtype)).double().cpu().numpy()


def _gene_table(sums: _Sums, names: list[str], genes: GeneNames) -> pd.DataFrame:
    tables = []
    for k, name in enumerate(names):
        n = int(sums.n_cells[k])
        if n:
            table = pd.DataFrame(
                {
                    "label": name,
                    "gene_id": genes.ids,
                    "gene_symbol": genes.labels(),
                    "importance": sums.gene[k] / n,
                    "expression": sums.expression[k] / n,
                    "n_cells": n,
                }
            )
            tables.append(table.sort_values("importance", ascending=False, kind="stable"))
    columns = ["label", "gene_id", "gene_symbol", "importance", "expression", "n_cells"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=pd.Index(columns))


def _edge_table(sums: _Sums, names: list[str], genes: GeneNames, top_edges: int) -> pd.DataFrame:
    ids, symbols = np.array(genes.ids, dtype=object), np.array(genes.labels(), dtype=object)
    tables = []
    for k, name in enumerate(names):
        n = int(sums.n_cells[k])
        for (graph, layer), totals in sums.edge.items() if n else ():
            top = np.argsort(-np.abs(totals[k]), kind="stable")[:top_edges]
            gene, neighbor = (x.cpu().numpy()[top] for x in (sums.pattern.rows, sums.pattern.columns))
            tables.append(
                pd.DataFrame(
                    {
                        "label": name,
                        "graph": graph,
                        "layer": layer,
                        "gene": ids[gene],
                        "neighbor": ids[neighbor],
                        "gene_symbol": symbols[gene],
                        "neighbor_symbol": symbols[neighbor],
                        "importance": totals[k][top] / n,
                        "weight": sums.weight[graph, layer][k][top] / n,
                        "n_cells": n,
                    }
                )
            )
    columns = ["label", "graph", "layer", "gene", "neighbor", "gene_symbol", "neighbor_symbol"]
    columns += ["importance", "weight", "n_cells"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=pd.Index(columns))
