"""Multiome T5: gene expression <-> chromatin accessibility (Lee et al., "Translating the Code of Life").

Lazy, because transformers asks for the configuration while its model base classes are half-way imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_multiome import PRESETS as PRESETS
    from .configuration_multiome import MultiomeT5Config as MultiomeT5Config
    from .modeling_multiome import MultiomeT5EncoderModel as MultiomeT5EncoderModel
    from .modeling_multiome import MultiomeT5ForConditionalGeneration as MultiomeT5ForConditionalGeneration
    from .modeling_multiome import MultiomeT5ForFeaturePrediction as MultiomeT5ForFeaturePrediction
    from .prediction_multiome import iter_predictions as iter_predictions

_HOME = {
    "PRESETS": "configuration_multiome",
    "MultiomeT5Config": "configuration_multiome",
    "MultiomeT5EncoderModel": "modeling_multiome",
    "MultiomeT5ForConditionalGeneration": "modeling_multiome",
    "MultiomeT5ForFeaturePrediction": "modeling_multiome",
    "iter_predictions": "prediction_multiome",
}
# The names of _HOME, spelled out for type checkers
__all__ = [
    "PRESETS",
    "MultiomeT5Config",
    "MultiomeT5EncoderModel",
    "MultiomeT5ForConditionalGeneration",
    "MultiomeT5ForFeaturePrediction",
    "iter_predictions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
