"""Single-cell genomics as language: models, tokenizers and tools that load with transformers' Auto classes.

Importing this package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelFor...`, `AutoTokenizer` and
`AutoFeatureExtractor`. Everything is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import registration as _registration  # noqa: F401 (imported for its effect)

__version__ = "0.1.0"

_HOME = {
    "CrossSpeciesConfig": "modeling.cross_species",
    "CrossSpeciesForMaskedReconstruction": "modeling.cross_species",
    "CrossSpeciesForTranslation": "modeling.cross_species",
    "CrossSpeciesModel": "modeling.cross_species",
    "GeneformerConfig": "modeling.geneformer",
    "GeneformerForMaskedLM": "modeling.geneformer",
    "GeneformerForMultiTaskSequenceClassification": "modeling.geneformer",
    "GeneformerForSequenceClassification": "modeling.geneformer",
    "GeneformerForTokenClassification": "modeling.geneformer",
    "GeneformerModel": "modeling.geneformer",
    "PCAProjectionFeatureExtractor": "tokenization.pca_projection",
    "RankValueTokenizer": "tokenization.rank_value",
    "SaucieConfig": "modeling.baselines",
    "SaucieModel": "modeling.baselines",
    "classify_cells": "classification",
    "embed_cells": "embedding",
    "embed_genes": "gene_embeddings",
    "perturb_cells": "perturb",
    "translate_cells": "translation",
}
# The names of _HOME, spelled out for type checkers
__all__ = [
    "CrossSpeciesConfig",
    "CrossSpeciesForMaskedReconstruction",
    "CrossSpeciesForTranslation",
    "CrossSpeciesModel",
    "GeneformerConfig",
    "GeneformerForMaskedLM",
    "GeneformerForMultiTaskSequenceClassification",
    "GeneformerForSequenceClassification",
    "GeneformerForTokenClassification",
    "GeneformerModel",
    "PCAProjectionFeatureExtractor",
    "RankValueTokenizer",
    "SaucieConfig",
    "SaucieModel",
    "__version__",
    "classify_cells",
    "embed_cells",
    "embed_genes",
    "perturb_cells",
    "translate_cells",
]

if TYPE_CHECKING:
    from .classification import classify_cells as classify_cells
    from .embedding import embed_cells as embed_cells
    from .gene_embeddings import embed_genes as embed_genes
    from .modeling.baselines import SaucieConfig as SaucieConfig
    from .modeling.baselines import SaucieModel as SaucieModel
    from .modeling.cross_species import CrossSpeciesConfig as CrossSpeciesConfig
    from .modeling.cross_species import CrossSpeciesForMaskedReconstruction as CrossSpeciesForMaskedReconstruction
    from .modeling.cross_species import CrossSpeciesForTranslation as CrossSpeciesForTranslation
    from .modeling.cross_species import CrossSpeciesModel as CrossSpeciesModel
    from .modeling.geneformer import GeneformerConfig as GeneformerConfig
    from .modeling.geneformer import GeneformerForMaskedLM as GeneformerForMaskedLM
    from .modeling.geneformer import (
        GeneformerForMultiTaskSequenceClassification as GeneformerForMultiTaskSequenceClassification,
    )
    from .modeling.geneformer import GeneformerForSequenceClassification as GeneformerForSequenceClassification
    from .modeling.geneformer import GeneformerForTokenClassification as GeneformerForTokenClassification
    from .modeling.geneformer import GeneformerModel as GeneformerModel
    from .perturb import perturb_cells as perturb_cells
    from .tokenization.pca_projection import PCAProjectionFeatureExtractor as PCAProjectionFeatureExtractor
    from .tokenization.rank_value import RankValueTokenizer as RankValueTokenizer
    from .translation import translate_cells as translate_cells


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cellglot' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
