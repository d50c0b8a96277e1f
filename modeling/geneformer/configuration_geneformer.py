"""`GeneformerConfig`: sizes and rates of a Geneformer, with presets of the published models."""

import dataclasses
import difflib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Keys of the original's BERT configurations that say nothing a Geneformer does not always do.
_BERT_ONLY_KEYS = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}

# Written into every saved configuration, so that each Auto class finds its model with trust_remote_code=True and
# without cellglot. transformers itself would name only the class that was saved, and `AutoModel` could not load a
# masked LM.
AUTO_MAP = {
    "AutoConfig": "configuration_geneformer.GeneformerConfig",
    "AutoModel": "modeling_geneformer.GeneformerModel",
    "AutoModelForMaskedLM": "modeling_geneformer.GeneformerForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_geneformer.GeneformerForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_geneformer.GeneformerForTokenClassification",
}
MULTI_TASK_CLASS = "modeling_geneformer.GeneformerForMultiTaskSequenceClassification"

PRESETS: dict[str, dict[str, Any]] = {
    # Theodoris et al. 2023, Methods, and the released config.json files
    "v1-6l": {},
    "v1-12l": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 1024},
    "v2-104m": {
        "vocab_size": 20275,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 4096,
    },
    "v2-316m": {
        "vocab_size": 20275,
        "hidden_size": 1152,
        "num_hidden_layers": 18,
        "num_attention_heads": 18,
        "intermediate_size": 4608,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 4096,
    },
    # Not published: small enough to pre-train on a laptop. No dropout: on a CPU its random numbers and the slower
    # attention it forces take more time than all the rest.
    "small": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}


@strict
class GeneformerConfig(PreTrainedConfig):
    """Configuration of a Geneformer. The defaults are the published V1 with 6 layers (10M parameters).

    Raises  on construction: a value of the wrong type, a width that the heads do not divide, or a misspelt key
    """

    model_type = "geneformer"
    _auto_class = "AutoConfig"

    # 25,424 genes + <pad> + <mask> (V1); 20,271 genes + <pad>, <mask>, <cls>, <eos> (V2)
    vocab_size: int = 25426
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "relu"
    hidden_dropout_prob: float | int = 0.02
    attention_probs_dropout_prob: float | int = 0.02
    # Tokens of a cell at the most: one learned position for each rank
    max_position_embeddings: int = 2048
    # BERT's segment embeddings: the original's checkpoints have two rows, of which only the first is ever used
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    # Dropout before a classifier; None: hidden_dropout_prob (BERT's rule)
    classifier_dropout: float | int | None = None
    # What stands for a cell before a classifier: BERT's pooler of the first token, as in the original's checkpoints
    # (<cls> in V2, in V1 the highest-ranked gene), or the mean over all tokens
    classifier_pooling: Literal["first", "mean"] = "first"
    # What a classifier's labels are of, e.g. the column "cell_type"
    label_name: str | None = None
    # Multi-task classification: labels of each task (kept in order of name), and how much its loss counts (1 if absent)
    tasks: dict[str, list[str]] | None = None
    task_weights: dict[str, float | int] | None = None

    def __post_init__(self, **kwargs: Any):
        names = [field.name for field in dataclasses.fields(self)]
        for key in kwargs:
            close = [] if key.startswith("_") else difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"GeneformerConfig has no {key!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        if self.tasks:
            # config.json is written with sorted keys, and the order of the tasks is that of the classifiers.
            self.tasks = dict(sorted(self.tasks.items()))
            # There is one Auto class for both kinds of cell classifiers.
            self.auto_map["AutoModelForSequenceClassification"] = MULTI_TASK_CLASS

    def validate_architecture(self) -> None:
        """Heads divide the width."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})."
            )

    def validate_tasks(self) -> None:
        """Every task has two labels or more, and weights are of tasks."""
        for name, labels in (self.tasks or {}).items():
            if len(set(labels)) < 2 or len(set(labels)) != len(labels):
                raise ValueError(f"Task {name!r} needs two different labels at least, found {labels}.")
        unknown = set(self.task_weights or {}) - set(self.tasks or {})
        if unknown:
            raise ValueError(f"task_weights names {sorted(unknown)}; the tasks are {list(self.tasks or {})}.")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "GeneformerConfig":
        """Configuration of a published size ("v1-6l", "v1-12l", "v2-104m", "v2-316m") or "small", fields overridden."""
        if name not in PRESETS:
            raise ValueError(f"Expected a preset among {', '.join(PRESETS)}, found {name!r}.")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The configuration file's content; one of the original Geneformer (a BERT) is read as ours.

        Raises  ValueError for another architecture, or a BERT that is no Geneformer encoder (decoder, relative
                positions)
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == "bert":
            for key, expected in _BERT_ONLY_KEYS.items():
                if config.pop(key, expected) != expected:
                    raise ValueError(f"{pretrained_model_name_or_path}: a Geneformer has {key}={expected!r}.")
            for key in ("use_cache", "gradient_checkpointing", "architectures"):
                config.pop(key, None)
            config["model_type"] = cls.model_type
        elif config.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {config['model_type']!r} model; expected 'geneformer', or "
                "'bert' as in the original's checkpoints."
            )
        return config, kwargs


__all__ = ["AUTO_MAP", "PRESETS", "GeneformerConfig"]
