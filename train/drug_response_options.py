"""Options that say which drug response model is made, whether it is pre-trained or fine-tuned."""

from dataclasses import dataclass
from typing import Any, Literal

from cellglot.modeling.drug_response import PRESETS, DrugResponseConfig

from .config import option


@dataclass
class DrugResponseOptions:
    """Size and variant of a model that is not loaded from a checkpoint."""

    preset: str = option("small", f"size: {', '.join(PRESETS)} (literal: as in the authors' code)")
    token_axis: Literal["genes", "profile"] | None = option(
        None, "a token a gene, or one a profile; absent: the preset's"
    )
    attends_across_profiles: bool = option(False, "profiles of a batch attend to each other, with token_axis profile")
    hidden_size: int | None = option(None, "width, in place of the preset's")
    num_hidden_layers: int | None = option(None, "layers, in place of the preset's")
    num_attention_heads: int | None = option(None, "heads, in place of the preset's")
    intermediate_size: int | None = option(None, "feed-forward width, in place of the preset's")
    dropout: float | None = option(None, "dropout of hidden states, attention and conditions, in place of the preset's")
    scaling: Literal["none", "center", "standardize"] = option(
        "center", "expression as it is, minus each gene's mean over one spread for all, or over each gene's own"
    )

    def model_options(self) -> dict[str, Any]:
        """Fields of a DrugResponseConfig: the preset, and what was chosen in its place.

        Raises  ValueError for an unknown preset
        """
        if self.preset not in PRESETS:
            raise ValueError(f"Expected a preset among {', '.join(PRESETS)}, found {self.preset!r}.")
        names = ("token_axis", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.attends_across_profiles:
            chosen["attends_across_profiles"] = True
        if self.dropout is not None:
            rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "condition_dropout")
            chosen |= dict.fromkeys(rates, self.dropout)
        return {**PRESETS[self.preset], **chosen}


def tokens_of_profile(config: DrugResponseConfig) -> int:
    """What a profile counts for in `max_tokens`."""
    return 1 + config.n_genes if config.token_axis == "genes" else 1
