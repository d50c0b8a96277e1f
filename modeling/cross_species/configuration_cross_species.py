"""`CrossSpeciesConfig`: sources, sizes and rates of a mouse <-> human translation model, with presets."""

import dataclasses
import difflib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Written into every saved configuration, so that each Auto class finds its model with trust_remote_code=True and
# without cellglot. transformers itself would name only the class that was saved, and `AutoModel` could not load a
# model with a decoder.
AUTO_MAP = {
    "AutoConfig": "configuration_cross_species.CrossSpeciesConfig",
    "AutoModel": "modeling_cross_species.CrossSpeciesModel",
    "AutoModelForPreTraining": "modeling_cross_species.CrossSpeciesForMaskedReconstruction",
}
TRANSLATION_CLASS = "modeling_cross_species.CrossSpeciesForTranslation"

PRESETS: dict[str, dict[str, Any]] = {
    # Pang & Tegnér 2020: embedding size 1,024, about 300M parameters. The paper gives no depth or heads; these make
    # 299M with 1,200 components and two sources.
    "paper": {},
    # 47M parameters: an epoch over an atlas is minutes on one GPU.
    "base": {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    # Small enough to train on a laptop's CPU. No dropout: thousands of cells, a few epochs.
    "small": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}


@strict
class CrossSpeciesConfig(PreTrainedConfig):
    """Configuration of a cross-species model. The defaults are the paper's size (299M parameters).

    Raises  on construction: a value of the wrong type, a width that the heads do not divide, sources or aligners that
            do not fit, or a misspelt key
    """

    model_type = "cross_species"
    _auto_class = "AutoConfig"

    # Principal components of a cell: the "intense representation" (paper, section 2.3)
    n_components: int = 1200
    # Data sets with a PCA of their own, in the order of `PCAProjectionFeatureExtractor.sources`
    sources: list[str] = dataclasses.field(default_factory=lambda: ["human", "mouse"])
    # Root mean square of the training cells' projections, one a source: what enters equation 1 is divided by it and
    # what leaves equation 5 multiplied, so that weights of one size suit any data. None: 1 for all
    projection_rms: list[float | int] | None = None
    hidden_size: int = 1024
    # Of the encoder, and again of the decoder
    num_hidden_layers: int = 10
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    # "cells": a cell is one token, and attention runs across the cells of a batch (the paper, literally).
    # "components": a cell is `num_patches` tokens and one of its source, and attention stays within the cell.
    token_axis: Literal["cells", "components"] = "cells"
    # Tokens that a cell's components are cut into, with token_axis="components"
    num_patches: int = 16
    # Share of the entries of the intense representation that training hides (paper, section 2.1: 10%)
    mask_probability: float | int = 0.1
    # Ordered pairs (source, target) that the model has a linear aligner for (equation 7)
    aligners: list[list[str]] = dataclasses.field(default_factory=list)
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        names = [field.name for field in dataclasses.fields(self)]
        for key in kwargs:
            close = [] if key.startswith("_") else difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"CrossSpeciesConfig has no {key!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        if "CrossSpeciesForTranslation" in (self.architectures or []):
            # There is one Auto class for both models with a decoder.
            self.auto_map["AutoModelForPreTraining"] = TRANSLATION_CLASS

    def validate_architecture(self) -> None:
        """Heads divide the width, patches fit the components, and rates are shares."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})."
            )
        if self.n_components < 1:
            raise ValueError(f"Expected one component at least, found n_components={self.n_components}.")
        if self.token_axis == "components" and not 1 <= self.num_patches <= self.n_components:
            raise ValueError(
                f"Expected 1 to {self.n_components} patches (the components of a cell), found "
                f"num_patches={self.num_patches}."
            )
        if not 0 <= self.mask_probability < 1:
            raise ValueError(f"Expected mask_probability from 0 to below 1, found {self.mask_probability}.")

    def validate_sources(self) -> None:
        """Sources are named once, scales are one a source, and aligners are of two different sources."""
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise ValueError(f"Expected the names of different sources, e.g. ['human', 'mouse']; found {self.sources}.")
        rms = self.projection_rms
        if rms is not None and (len(rms) != len(self.sources) or not all(value > 0 for value in rms)):
            raise ValueError(
                f"Expected projection_rms as one positive number for each of the {len(self.sources)} sources, "
                f"found {rms}."
            )
        for pair in self.aligners:
            if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(self.sources):
                raise ValueError(
                    f"Expected aligners as pairs of different sources among {', '.join(self.sources)}, found {pair}."
                )
        if len({tuple(pair) for pair in self.aligners}) != len(self.aligners):
            raise ValueError(f"Expected one aligner a pair of sources, found {self.aligners}.")

    def source_index(self, name: str) -> int:
        """Number of a source, as `source` of the models' forward.

        Raises  ValueError for a name that is not among `sources`
        """
        if name not in self.sources:
            raise ValueError(f"The model knows the sources {', '.join(self.sources)}; found {name!r}.")
        return self.sources.index(name)

    @property
    def patches(self) -> tuple[int, int]:
        """(tokens of a cell, components of each): all components in one token with token_axis="cells"."""
        if self.token_axis == "cells":
            return 1, self.n_components
        return self.num_patches, -(-self.n_components // self.num_patches)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "CrossSpeciesConfig":
        """Configuration of "paper" (299M parameters), "base" (47M) or "small" (1.5M), fields overridden."""
        if name not in PRESETS:
            raise ValueError(f"Expected a preset among {', '.join(PRESETS)}, found {name!r}.")
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["AUTO_MAP", "PRESETS", "CrossSpeciesConfig"]
