"""Responses to drugs: a transformer over expression, condition encoders, a decoder (Tan, Wang, Zhang).

Lazy, because transformers asks for the configuration while its model base classes are half-way imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_drug_response import PRESETS as PRESETS
    from .configuration_drug_response import DrugResponseConfig as DrugResponseConfig
    from .modeling_drug_response import DrugResponseForConditionalGeneration as DrugResponseForConditionalGeneration
    from .modeling_drug_response import DrugResponseForPreTraining as DrugResponseForPreTraining
    from .modeling_drug_response import DrugResponseModel as DrugResponseModel
    from .modeling_drug_response import DrugResponsePreTrainedModel as DrugResponsePreTrainedModel

_HOME = {
    "PRESETS": "configuration_drug_response",
    "DrugResponseConfig": "configuration_drug_response",
    "DrugResponseForConditionalGeneration": "modeling_drug_response",
    "DrugResponseForPreTraining": "modeling_drug_response",
    "DrugResponseModel": "modeling_drug_response",
    "DrugResponsePreTrainedModel": "modeling_drug_response",
}
# The names of _HOME, spelled out for type checkers
__all__ = [
    "PRESETS",
    "DrugResponseConfig",
    "DrugResponseForConditionalGeneration",
    "DrugResponseForPreTraining",
    "DrugResponseModel",
    "DrugResponsePreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
