"""Mouse <-> human translation: an encoder and decoder over PCA projections (Pang & Tegnér, ICML WCB 2020).

Lazy, because transformers asks for the configuration while its model base classes are half-way imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_cross_species import PRESETS as PRESETS
    from .configuration_cross_species import CrossSpeciesConfig as CrossSpeciesConfig
    from .modeling_cross_species import CrossSpeciesForMaskedReconstruction as CrossSpeciesForMaskedReconstruction
    from .modeling_cross_species import CrossSpeciesForTranslation as CrossSpeciesForTranslation
    from .modeling_cross_species import CrossSpeciesModel as CrossSpeciesModel
    from .modeling_cross_species import CrossSpeciesPreTrainedModel as CrossSpeciesPreTrainedModel

_HOME = {
    "PRESETS": "configuration_cross_species",
    "CrossSpeciesConfig": "configuration_cross_species",
    "CrossSpeciesForMaskedReconstruction": "modeling_cross_species",
    "CrossSpeciesForTranslation": "modeling_cross_species",
    "CrossSpeciesModel": "modeling_cross_species",
    "CrossSpeciesPreTrainedModel": "modeling_cross_species",
}
# The names of _HOME, spelled out for type checkers
__all__ = [
    "PRESETS",
    "CrossSpeciesConfig",
    "CrossSpeciesForMaskedReconstruction",
    "CrossSpeciesForTranslation",
    "CrossSpeciesModel",
    "CrossSpeciesPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
