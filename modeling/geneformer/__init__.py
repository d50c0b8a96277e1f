"""Geneformer: a BERT encoder over rank-value tokens (Theodoris et al., Nature 2023).

Lazy, because transformers asks for the configuration while its model base classes are half-way imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_geneformer import PRESETS as PRESETS
    from .configuration_geneformer import GeneformerConfig as GeneformerConfig
    from .modeling_geneformer import GeneformerForMaskedLM as GeneformerForMaskedLM
    from .modeling_geneformer import (
        GeneformerForMultiTaskSequenceClassification as GeneformerForMultiTaskSequenceClassification,
    )
    from .modeling_geneformer import GeneformerForSequenceClassification as GeneformerForSequenceClassification
    from .modeling_geneformer import GeneformerForTokenClassification as GeneformerForTokenClassification
    from .modeling_geneformer import GeneformerModel as GeneformerModel
    from .modeling_geneformer import GeneformerPreTrainedModel as GeneformerPreTrainedModel

_HOME = {
    "PRESETS": "configuration_geneformer",
    "GeneformerConfig": "configuration_geneformer",
    "GeneformerForMaskedLM": "modeling_geneformer",
    "GeneformerForMultiTaskSequenceClassification": "modeling_geneformer",
    "GeneformerForSequenceClassification": "modeling_geneformer",
    "GeneformerForTokenClassification": "modeling_geneformer",
    "GeneformerModel": "modeling_geneformer",
    "GeneformerPreTrainedModel": "modeling_geneformer",
}
# The names of _HOME, spelled out for type checkers
__all__ = [
    "PRESETS",
    "GeneformerConfig",
    "GeneformerForMaskedLM",
    "GeneformerForMultiTaskSequenceClassification",
    "GeneformerForSequenceClassification",
    "GeneformerForTokenClassification",
    "GeneformerModel",
    "GeneformerPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
