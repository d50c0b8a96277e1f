"""Cells, a network and a small classifier of them."""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellglot.gene_graph import GeneGraph, GeneNames, align_edges, gene_names
from cellglot.gene_graph.edge_tables import EdgeTable
from cellglot.modeling.gene_graph import GeneGraphConfig, GeneGraphForSequenceClassification

from ..conftest import ensembl

LABELS = ["B", "NK", "T"]
N_GENES = 13


def some_cells(n_cells: int = 29, seed: int = 0) -> ad.AnnData:
    """Cells of three types; genes by Ensembl id, with symbols G1, G2, ... in the index."""
    rng = np.random.default_rng(seed)
    cell_type = np.arange(n_cells) % 3
    rate = rng.gamma(0.6, 4, size=(3, N_GENES))
    counts = rng.poisson(rate[cell_type]).astype(np.float32)
    obs = pd.DataFrame({"cell_type": np.array(LABELS)[cell_type]}, index=pd.Index([f"c{i}" for i in range(n_cells)]))
    var = pd.DataFrame({"ensembl_id": ensembl(N_GENES)}, index=pd.Index([f"G{i}" for i in range(1, N_GENES + 1)]))
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


def table_of(edges: list[tuple], *, name: str = "edges") -> EdgeTable:
    """A table of (gene, gene[, score])."""
    genes = sorted({gene for edge in edges for gene in edge[:2]})
    place = {gene: i for i, gene in enumerate(genes)}
    a, b = (np.array([place[edge[k]] for edge in edges], dtype=np.int32) for k in (0, 1))
    scores = np.array([edge[2] for edge in edges], dtype=np.float32) if len(edges[0]) == 3 else None
    return EdgeTable(name, np.array(genes, dtype=object), a, b, scores, {})


def some_graph(genes: GeneNames) -> GeneGraph:
    """A ring of the genes but the last, with two chords."""
    ring = [(f"G{i}", f"G{i % 12 + 1}", 100.0 * i) for i in range(1, 13)]
    return align_edges(table_of([*ring, ("G1", "G7", 950.0), ("G3", "G9", 50.0)]), genes)


@pytest.fixture
def cells() -> ad.AnnData:
    return some_cells()


@pytest.fixture
def model(cells) -> Any:
    return make_model(gene_names(cells))


def make_model(genes: GeneNames, **options: Any) -> Any:
    torch.manual_seed(0)
    graph = some_graph(genes)
    config = GeneGraphConfig(
        **{
            "smoothing": "both",
            "hidden_sizes": [7, 5],
            "feature_size": 6,
            "label_name": "cell_type",
            "id2label": dict(enumerate(LABELS)),
            "label2id": {label: i for i, label in enumerate(LABELS)},
            **graph.config_options(),
            **options,
        }
    )
    found: Any = GeneGraphForSequenceClassification(config)
    if config.smoothing != "none":
        found.set_graph(graph.pairs, graph.scores)
    return found
