"""Single-cell genomics as language: models, tokenizers and tools that load with transformers' Auto classes.

Importing this package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelFor...`, `AutoTokenizer`,
`AutoFeatureExtractor` and `AutoProcessor`. Everything is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import registration as _registration  # noqa: F401 (imported for its effect)

__version__ = "0.1.0"

_HOME = {
    "BinarizedStringProcessor": "tokenization.binarized_string",
    "CpaConfig": "modeling.baselines",
    "CpaModel": "modeling.baselines",
    "CrossSpeciesConfig": "modeling.cross_species",
    "CrossSpeciesForMaskedReconstruction": "modeling.cross_species",
    "CrossSpeciesForTranslation": "modeling.cross_species",
    "CrossSpeciesModel": "modeling.cross_species",
    "CvaeConfig": "modeling.baselines",
    "CvaeModel": "modeling.baselines",
    "DrugResponseConfig": "modeling.drug_response",
    "DrugResponseForConditionalGeneration": "modeling.drug_response",
    "DrugResponseForPreTraining": "modeling.drug_response",
    "DrugResponseModel": "modeling.drug_response",
    "ExpressionFeatureExtractor": "tokenization.expression_features",
    "GeneGraphConfig": "modeling.gene_graph",
    "GeneGraphForReconstruction": "modeling.gene_graph",
    "GeneGraphForSequenceClassification": "modeling.gene_graph",
    "GeneGraphModel": "modeling.gene_graph",
    "GeneformerConfig": "modeling.geneformer",
    "GeneformerForMaskedLM": "modeling.geneformer",
    "GeneformerForMultiTaskSequenceClassification": "modeling.geneformer",
    "GeneformerForSequenceClassification": "modeling.geneformer",
    "GeneformerForTokenClassification": "modeling.geneformer",
    "GeneformerModel": "modeling.geneformer",
    "MultiomeT5Config": "modeling.multiome",
    "MultiomeT5EncoderModel": "modeling.multiome",
    "MultiomeT5ForConditionalGeneration": "modeling.multiome",
    "MultiomeT5ForFeaturePrediction": "modeling.multiome",
    "PCAProjectionFeatureExtractor": "tokenization.pca_projection",
    "RankValueTokenizer": "tokenization.rank_value",
    "SaucieConfig": "modeling.baselines",
    "SaucieModel": "modeling.baselines",
    "align_edges": "gene_graph",
    "classify_cells": "classification",
    "classify_expression": "gene_graph",
    "embed_cells": "embedding",
    "embed_genes": "gene_embeddings",
    "gene_importance": "gene_graph",
    "gene_names": "gene_graph",
    "perturb_cells": "perturb",
    "predict_response": "drug_response",
    "plot_importance_network": "gene_graph",
    "read_edges": "gene_graph",
    "read_expression": "gene_graph",
    "read_responses": "drug_response",
    "translate_cells": "translation",
}
# The names of _HOME, spelled out for type checkers
__all__ = [
    "BinarizedStringProcessor",
    "CpaConfig",
    "CpaModel",
    "CrossSpeciesConfig",
    "CrossSpeciesForMaskedReconstruction",
    "CrossSpeciesForTranslation",
    "CrossSpeciesModel",
    "CvaeConfig",
    "CvaeModel",
    "DrugResponseConfig",
    "DrugResponseForConditionalGeneration",
    "DrugResponseForPreTraining",
    "DrugResponseModel",
    "ExpressionFeatureExtractor",
    "GeneGraphConfig",
    "GeneGraphForReconstruction",
    "GeneGraphForSequenceClassification",
    "GeneGraphModel",
    "GeneformerConfig",
    "GeneformerForMaskedLM",
    "GeneformerForMultiTaskSequenceClassification",
    "GeneformerForSequenceClassification",
    "GeneformerForTokenClassification",
    "GeneformerModel",
    "MultiomeT5Config",
    "MultiomeT5EncoderModel",
    "MultiomeT5ForConditionalGeneration",
    "MultiomeT5ForFeaturePrediction",
    "PCAProjectionFeatureExtractor",
    "RankValueTokenizer",
    "SaucieConfig",
    "SaucieModel",
    "__version__",
    "align_edges",
    "classify_cells",
    "classify_expression",
    "embed_cells",
    "embed_genes",
    "gene_importance",
    "gene_names",
    "perturb_cells",
    "plot_importance_network",
    "predict_response",
    "read_edges",
    "read_expression",
    "read_responses",
    "translate_cells",
]

if TYPE_CHECKING:
    from .classification import classify_cells as classify_cells
    from .drug_response import predict_response as predict_response
    from .drug_response import read_responses as read_responses
    from .embedding import embed_cells as embed_cells
    from .gene_embeddings import embed_genes as embed_genes
    from .gene_graph import align_edges as align_edges
    from .gene_graph import classify_expression as classify_expression
    from .gene_graph import gene_importance as gene_importance
    from .gene_graph import gene_names as gene_names
    from .gene_graph import plot_importance_network as plot_importance_network
    from .gene_graph import read_edges as read_edges
    from .gene_graph import read_expression as read_expression
    from .modeling.baselines import CpaConfig as CpaConfig
    from .modeling.baselines import CpaModel as CpaModel
    from .modeling.baselines import CvaeConfig as CvaeConfig
    from .modeling.baselines import CvaeModel as CvaeModel
    from .modeling.baselines import SaucieConfig as SaucieConfig
    from .modeling.baselines import SaucieModel as SaucieModel
    from .modeling.cross_species import CrossSpeciesConfig as CrossSpeciesConfig
    from .modeling.cross_species import CrossSpeciesForMaskedReconstruction as CrossSpeciesForMaskedReconstruction
    from .modeling.cross_species import CrossSpeciesForTranslation as CrossSpeciesForTranslation
    from .modeling.cross_species import CrossSpeciesModel as CrossSpeciesModel
    from .modeling.drug_response import DrugResponseConfig as DrugResponseConfig
    from .modeling.drug_response import DrugResponseForConditionalGeneration as DrugResponseForConditionalGeneration
    from .modeling.drug_response import DrugResponseForPreTraining as DrugResponseForPreTraining
    from .modeling.drug_response import DrugResponseModel as DrugResponseModel
    from .modeling.gene_graph import GeneGraphConfig as GeneGraphConfig
    from .modeling.gene_graph import GeneGraphForReconstruction as GeneGraphForReconstruction
    from .modeling.gene_graph import GeneGraphForSequenceClassification as GeneGraphForSequenceClassification
    from .modeling.gene_graph import GeneGraphModel as GeneGraphModel
    from .modeling.geneformer import GeneformerConfig as GeneformerConfig
    from .modeling.geneformer import GeneformerForMaskedLM as GeneformerForMaskedLM
    from .modeling.geneformer import (
        GeneformerForMultiTaskSequenceClassification as GeneformerForMultiTaskSequenceClassification,
    )
    from .modeling.geneformer import GeneformerForSequenceClassification as GeneformerForSequenceClassification
    from .modeling.geneformer import GeneformerForTokenClassification as GeneformerForTokenClassification
    from .modeling.geneformer import GeneformerModel as GeneformerModel
    from .modeling.multiome import MultiomeT5Config as MultiomeT5Config
    from .modeling.multiome import MultiomeT5EncoderModel as MultiomeT5EncoderModel
    from .modeling.multiome import MultiomeT5ForConditionalGeneration as MultiomeT5ForConditionalGeneration
    from .modeling.multiome import MultiomeT5ForFeaturePrediction as MultiomeT5ForFeaturePrediction
    from .perturb import perturb_cells as perturb_cells
    from .tokenization.binarized_string import BinarizedStringProcessor as BinarizedStringProcessor
    from .tokenization.expression_features import ExpressionFeatureExtractor as ExpressionFeatureExtractor
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
