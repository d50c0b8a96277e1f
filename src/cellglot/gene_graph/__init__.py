"""Gene networks and cells for gene-graph models: edge tables aligned with genes, expression, importance of genes.

genes = gene_names("pbmc.h5ad")
graph = align_edges(read_edges("pin_string.tsv.gz"), genes)
config = GeneGraphConfig(smoothing="both", num_labels=8, **graph.config_options())
model = GeneGraphForSequenceClassification(config)
model.set_graph(graph.pairs, graph.scores)
expression, obs, report = read_expression("pbmc.h5ad", model)
"""

from .alignment import GeneGraph, GraphReport, align_edges
from .classification import classify_expression
from .edge_tables import EdgeTable, read_edges
from .expression import ExpressionReport, iter_expression, read_expression
from .figures import plot_importance_network
from .genes import GeneNames, gene_names
from .interpretation import gene_importance

__all__ = [
    "EdgeTable",
    "ExpressionReport",
    "GeneGraph",
    "GeneNames",
    "GraphReport",
    "align_edges",
    "classify_expression",
    "gene_importance",
    "gene_names",
    "iter_expression",
    "plot_importance_network",
    "read_edges",
    "read_expression",
]
