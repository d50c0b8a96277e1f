"""Published methods that ours are compared with, as transformers models: SAUCIE (Amodio et al., Nature Methods 2019),
CPA (Lotfollahi et al., Molecular Systems Biology 2023), cVAE (Sohn et al., NeurIPS 2015).

Lazy, because transformers asks for the configuration while its model base classes are half-way imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_cpa import CpaConfig as CpaConfig
    from .configuration_cvae import CvaeConfig as CvaeConfig
    from .configuration_saucie import SaucieConfig as SaucieConfig
    from .modeling_cpa import CpaModel as CpaModel
    from .modeling_cvae import CvaeModel as CvaeModel
    from .modeling_saucie import SaucieModel as SaucieModel

_HOME = {
    "CpaConfig": "configuration_cpa",
    "CpaModel": "modeling_cpa",
    "CvaeConfig": "configuration_cvae",
    "CvaeModel": "modeling_cvae",
    "SaucieConfig": "configuration_saucie",
    "SaucieModel": "modeling_saucie",
}
# The names of _HOME, spelled out for type checkers
__all__ = ["CpaConfig", "CpaModel", "CvaeConfig", "CvaeModel", "SaucieConfig", "SaucieModel"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
