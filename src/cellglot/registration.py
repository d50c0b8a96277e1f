"""Registers cellglot's classes with transformers' Auto classes, and its pipelines with `pipeline`.

transformers has no entry points: a class is known only once somebody registers it, which needs the class and with it
torch (three seconds). So that `import cellglot` stays cheap, each Auto module is filled in right after somebody imports
it, and models by name only, as transformers does for its own. A model class cannot be imported at that moment:
transformers imports its Auto modules while its own model base classes are half-way imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple


class Method(NamedTuple):
    """What a method registers. `package` is relative to cellglot and lazy; `models` maps Auto class to model class.

    Tokenizer and feature extractor are (module, class), where a method has them.
    """

    package: str
    config: str
    models: dict[str, str | tuple[str, ...]]
    tokenizer: tuple[str, str] | None = None
    feature_extractor: tuple[str, str] | None = None
    processor: tuple[str, str] | None = None


METHODS = {
    "geneformer": Method(
        "modeling.geneformer",
        "GeneformerConfig",
        {
            "AutoModel": "GeneformerModel",
            "AutoModelForMaskedLM": "GeneformerForMaskedLM",
            # Of several, transformers takes the one that the checkpoint's `architectures` names, else the first.
            "AutoModelForSequenceClassification": (
                "GeneformerForSequenceClassification",
                "GeneformerForMultiTaskSequenceClassification",
            ),
            "AutoModelForTokenClassification": "GeneformerForTokenClassification",
        },
        tokenizer=("tokenization.rank_value", "RankValueTokenizer"),
    ),
    "cross_species": Method(
        "modeling.cross_species",
        "CrossSpeciesConfig",
        {
            "AutoModel": "CrossSpeciesModel",
            "AutoModelForPreTraining": ("CrossSpeciesForMaskedReconstruction", "CrossSpeciesForTranslation"),
        },
        feature_extractor=("tokenization.pca_projection", "PCAProjectionFeatureExtractor"),
    ),
    "drug_response": Method(
        "modeling.drug_response",
        "DrugResponseConfig",
        {
            "AutoModel": "DrugResponseModel",
            "AutoModelForPreTraining": ("DrugResponseForPreTraining", "DrugResponseForConditionalGeneration"),
        },
        feature_extractor=("tokenization.expression_features", "ExpressionFeatureExtractor"),
    ),
    "gene_graph": Method(
        "modeling.gene_graph",
        "GeneGraphConfig",
        {
            "AutoModel": "GeneGraphModel",
            "AutoModelForPreTraining": "GeneGraphForReconstruction",
            "AutoModelForSequenceClassification": "GeneGraphForSequenceClassification",
        },
    ),
    "multiome_t5": Method(
        "modeling.multiome",
        "MultiomeT5Config",
        {
            "AutoModel": "MultiomeT5EncoderModel",
            "AutoModelForSeq2SeqLM": "MultiomeT5ForConditionalGeneration",
            # A cell has many labels: its features
            "AutoModelForSequenceClassification": "MultiomeT5ForFeaturePrediction",
        },
        feature_extractor=("tokenization.binarized_features", "BinarizedFeatureExtractor"),
        processor=("tokenization.binarized_string", "BinarizedStringProcessor"),
    ),
    "cpa": Method("modeling.baselines", "CpaConfig", {"AutoModel": "CpaModel"}),
    "cvae": Method("modeling.baselines", "CvaeConfig", {"AutoModel": "CvaeModel"}),
    "saucie": Method("modeling.baselines", "SaucieConfig", {"AutoModel": "SaucieModel"}),
}

# Task -> its pipeline in `pipelines`, and what loads its model in `loading`
PIPELINES = {
    "cell-embedding": ("CellEmbeddingPipeline", "EncoderLoader"),
    "cell-classification": ("CellClassificationPipeline", "ClassifierLoader"),
}


def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def _register_configs(configuration_auto: Any) -> None:
    mapping = configuration_auto.CONFIG_MAPPING
    for model_type, method in METHODS.items():
        # `AutoConfig.register` would need the class, and one that derives from a configuration of transformers needs
        # Auto modules which are half-way imported now.
        mapping._modules[configuration_auto.model_type_to_module_name(model_type)] = _module(method.package)
        mapping._mapping[model_type] = method.config


def _register_models(modeling_auto: Any) -> None:
    for model_type, method in METHODS.items():
        for auto_name, class_name in method.models.items():
            mapping = getattr(modeling_auto, auto_name)._model_mapping
            # `AutoModel.register` would need the class itself. These are the tables it looks its own models up in.
            mapping._modules[model_type] = _module(method.package)
            mapping._reverse_config_mapping[method.config] = model_type
            mapping._model_mapping[model_type] = class_name


def _register_tokenizers(tokenization_auto: Any) -> None:
    for method in METHODS.values():
        if method.tokenizer is not None:
            config = getattr(_module(method.package), method.config)
            module, name = method.tokenizer
            tokenizer = getattr(_module(module), name)
            tokenization_auto.AutoTokenizer.register(config, fast_tokenizer_class=tokenizer, exist_ok=True)


def _register_feature_extractors(feature_extraction_auto: Any) -> None:
    for method in METHODS.values():
        if method.feature_extractor is not None:
            config = getattr(_module(method.package), method.config)
            module, name = method.feature_extractor
            extractor = getattr(_module(module), name)
            feature_extraction_auto.AutoFeatureExtractor.register(config, extractor, exist_ok=True)


def _register_processors(processing_auto: Any) -> None:
    for method in METHODS.values():
        if method.processor is not None:
            config = getattr(_module(method.package), method.config)
            module, name = method.processor
            processing_auto.AutoProcessor.register(config, getattr(_module(module), name), exist_ok=True)


def _register_pipelines(pipelines: Any) -> None:
    for task, (class_name, loader_name) in PIPELINES.items():
        # `register_pipeline` would need the class itself, and make a saved pipeline carry code along that needs the
        # rest of cellglot. This is the table it writes to, and how transformers registers its own.
        pipelines.PIPELINE_REGISTRY.supported_tasks[task] = {
            "impl": f"{__package__}.pipelines.{class_name}",
            "pt": (getattr(_module("loading"), loader_name),),
            "type": "cells",
        }


class _AfterImport(importlib.abc.MetaPathFinder):
    """Import hook: calls a function with a module right after it has been imported, once."""

    def __init__(self, callbacks: dict[str, Callable[[Any], None]]):
        self.callbacks = callbacks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        callback = self.callbacks.pop(fullname, None)
        if callback is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_call(module: ModuleType) -> None:
                execute(module)
                callback(module)

            spec.loader.exec_module = execute_then_call  # type: ignore[method-assign]
        return spec


def _register_when_imported() -> None:
    auto = "transformers.models.auto"
    callbacks: dict[str, Callable[[Any], None]] = {
        f"{auto}.configuration_auto": _register_configs,
        f"{auto}.modeling_auto": _register_models,
        f"{auto}.tokenization_auto": _register_tokenizers,
        f"{auto}.feature_extraction_auto": _register_feature_extractors,
        f"{auto}.processing_auto": _register_processors,
        "transformers.pipelines": _register_pipelines,
    }
    for name in list(callbacks):
        if name in sys.modules:
            callbacks.pop(name)(sys.modules[name])
    if callbacks:
        sys.meta_path.insert(0, _AfterImport(callbacks))


_register_when_imported()
