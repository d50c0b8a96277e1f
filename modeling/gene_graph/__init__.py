"""Gene-graph classifier: fully connected layers over genes smoothed along a gene network.

Lazy, because transformers asks for the configuration while its model base classes are half-way imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_gene_graph import GeneGraphConfig as GeneGraphConfig
    from .modeling_gene_graph import GeneGraphForReconstruction as GeneGraphForReconstruction
    from .modeling_gene_graph import GeneGraphForSequenceClassification as GeneGraphForSequenceClassification
    from .modeling_gene_graph import GeneGraphModel as GeneGraphModel
    from .modeling_gene_graph import GeneGraphPreTrainedModel as GeneGraphPreTrainedModel

_HOME = {
    "GeneGraphConfig": "configuration_gene_graph",
    "GeneGraphForReconstruction": "modeling_gene_graph",
    "GeneGraphForSequenceClassification": "modeling_gene_graph",
    "GeneGraphModel": "modeling_gene_graph",
    "GeneGraphPreTrainedModel": "modeling_gene_graph",
}
# The names of _HOME, spelled out for type checkers
__all__ = [
    "GeneGraphConfig",
    "GeneGraphForReconstruction",
    "GeneGraphForSequenceClassification",
    "GeneGraphModel",
    "GeneGraphPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
