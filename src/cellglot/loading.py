"""Model and tokenizer of a model directory, for the pipelines and the command line.

Imported while transformers is half-way imported (see `registration`), so everything else is imported on use.
"""

from pathlib import Path
from typing import Any


def find_tokenizer(path: str, revision: str = "main") -> Any:
    """The tokenizer in a model directory or repository (at a commit of it).

    Raises  ValueError if there is none; HubError, which is one, for a repository that cannot be read
    """
    from .hub import HubError, reading
    from .tokenization.rank_value import RankValueTokenizer

    try:
        with reading(path):
            return RankValueTokenizer.from_pretrained(path, revision=revision)
    except HubError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        where = f"in {path}" if path else "in the model, which comes from no directory"
        if path and not Path(path).is_dir():
            where = f"at {path}, which is no directory here, nor a repository that could be read"
        raise ValueError(
            f"No rank-value tokenizer {where}. Save it beside the model with tokenizer.save_pretrained(path), or pass "
            "tokenizer=RankValueTokenizer.from_pretrained(...)."
        ) from error


def load_encoder(path: str, device: str | None = None) -> Any:
    """The encoder of the Geneformer at a path, on a device ("cpu", "cuda:1", ...); None: a GPU where there is one.

    Raises  ValueError for a device that cannot be used, another architecture, or a repository that cannot be read
            (HubError); OSError
    """
    import torch

    from .hub import reading
    from .modeling.geneformer import GeneformerModel

    with reading(path):
        model = GeneformerModel.from_pretrained(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        # torch without CUDA says so with an assertion.
        raise ValueError(f"--device {device} cannot be used: {error}") from error
    return model


class EncoderLoader:
    """Loads the encoder of any Geneformer for `pipeline("cell-embedding", model=DIR)`."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> Any:
        from .modeling.geneformer import GeneformerModel

        _geneformer_config("cell-embedding", path, options)
        return GeneformerModel.from_pretrained(path, **options)


class ClassifierLoader:
    """Loads a classifier of cells for `pipeline("cell-classification", model=DIR)`.

    transformers would load a masked LM too, and put random weights in place of the classifier.
    """

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> Any:
        from transformers import AutoModelForSequenceClassification
        from transformers.pipelines.base import PipelineException

        from .modeling.geneformer import GeneformerForSequenceClassification

        config = _geneformer_config("cell-classification", path, options)
        saved = config.get("architectures") or []
        if not any(name.endswith("ForSequenceClassification") or "MultiTask" in name for name in saved):
            raise PipelineException(
                "cell-classification",
                path,
                f"{path} holds {' '.join(saved) or 'a model'}, which has no classifier of cells. Fine-tune it as a "
                "GeneformerForSequenceClassification first, or use pipeline('cell-embedding').",
            )
        if config["model_type"] == "bert":
            return GeneformerForSequenceClassification.from_pretrained(path, **options)
        return AutoModelForSequenceClassification.from_pretrained(path, **options)


def _geneformer_config(task: str, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint. PipelineException is what `pipeline` does not bury in a list of tracebacks."""
    from transformers import PreTrainedConfig
    from transformers.pipelines.base import PipelineException

    known = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    hub_options = {key: value for key, value in options.items() if key in known}
    config, _ = PreTrainedConfig.get_config_dict(path, **hub_options)
    if config.get("model_type") not in ("geneformer", "bert"):
        raise PipelineException(
            task,
            path,
            f"{path} holds a {config.get('model_type')!r} model; expected 'geneformer', or 'bert' as in the "
            "original's checkpoints.",
        )
    return config
