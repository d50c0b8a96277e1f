"""Published methods that ours are compared with, as transformers models: SAUCIE (Amodio et al., Nature Methods 2019).

Lazy, because transformers asks for the configuration while its model base classes are half-way imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_saucie import SaucieConfig as SaucieConfig
    from .modeling_saucie import SaucieModel as SaucieModel

_HOME = {
    "SaucieConfig": "configuration_saucie",
    "SaucieModel": "modeling_saucie",
}
# The names of _HOME, spelled out for type checkers
__all__ = ["SaucieConfig", "SaucieModel"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
