"""`MultiomeT5Config`: a T5's sizes, the layout of a vocabulary of genes and peaks, the loss of the set head."""

import dataclasses
import difflib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import T5Config

# Written into every saved configuration, so that each Auto class finds its model with trust_remote_code=True and
# without cellglot. transformers itself would name only the class that was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_multiome.MultiomeT5Config",
    "AutoModel": "modeling_multiome.MultiomeT5EncoderModel",
    "AutoModelForSeq2SeqLM": "modeling_multiome.MultiomeT5ForConditionalGeneration",
    # A cell has many labels: its features
    "AutoModelForSequenceClassification": "modeling_multiome.MultiomeT5ForFeaturePrediction",
}

PRESETS: dict[str, dict[str, Any]] = {
    # Raffel et al. 2020, and google-t5/t5-small: what the paper trains
    "t5-small": {},
    # Not published: small enough to train on a laptop. No dropout: on a CPU its random numbers and the slower attention
    # it forces take more time than all the rest.
    "small": {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0},
}


@strict
class MultiomeT5Config(T5Config):
    """Configuration of a multiome T5. The defaults are t5-small's.

    `BinarizedStringProcessor.model_fields()` has the fields that a vocabulary decides.

    Raises  on construction: a value of the wrong type, token ranges outside the vocabulary, or a misspelt key
    """

    model_type = "multiome_t5"
    _auto_class = "AutoConfig"

    decoder_start_token_id: int | None = 0
    # Tokens that a cell's string begins with, one a direction
    gex2atac_token_id: int = 3
    atac2gex_token_id: int = 4
    # Where every feature is one token: genes, and peaks right behind them. No genes: a subword vocabulary
    first_gene_token_id: int | None = None
    num_genes: int = 0
    num_peaks: int = 0
    # Tokens of expression bins, one of which follows each gene (encoding="binned")
    first_bin_token_id: int | None = None
    num_bins: int = 0
    # Whether the encoder knows the order of its tokens (T5's relative position bias). Where the order is that of a
    # matrix it says nothing; without it the encoder reads a set, and attention needs no (heads, tokens, tokens) bias
    encoder_position_bias: bool = True
    # Tokens that `generate` writes at the most where it is not told, the end included
    max_target_length: int = 512
    # Asymmetric loss of the set head (Ridnik et al. 2021, equation 7): focusing of features that are there and that are
    # not, and the probability under which those that are not are easy enough. Equal focusing without margin is the
    # focal loss; zeros are cross-entropy, which keeps probabilities calibrated and did best on real cells
    gamma_positive: float | int = 0
    gamma_negative: float | int = 0
    probability_margin: float | int = 0
    # Weight of the squared error of measured values beside the loss of the set
    value_loss_weight: float | int = 1
    # Probability at and above which a feature is predicted, as found on validation cells
    gex2atac_threshold: float | int = 0.5
    atac2gex_threshold: float | int = 0.5

    def __post_init__(self, **kwargs: Any):
        names = [field.name for field in dataclasses.fields(self)]
        for key in kwargs:
            close = [] if key.startswith("_") else difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"MultiomeT5Config has no {key!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def validate_token_ranges(self) -> None:
        """Genes, peaks and bins lie within the vocabulary."""
        for what, first, n in (
            ("num_genes + num_peaks", self.first_gene_token_id, self.num_genes + self.num_peaks),
            ("num_bins", self.first_bin_token_id, self.num_bins),
        ):
            if n and first is None:
                raise ValueError(f"{what} is {n:,}, but the first of their tokens is not given.")
            if n and first is not None and first + n > self.vocab_size:
                raise ValueError(
                    f"{what}: tokens {first:,} to {first + n - 1:,} do not fit vocab_size={self.vocab_size:,}."
                )

    def validate_set_loss(self) -> None:
        """Focusing is not negative, the margin a probability."""
        if min(self.gamma_positive, self.gamma_negative) < 0 or not 0 <= self.probability_margin < 1:
            raise ValueError(
                f"Expected gamma_positive and gamma_negative from 0 and probability_margin from 0 to below 1; found "
                f"{self.gamma_positive}, {self.gamma_negative}, {self.probability_margin}."
            )

    @property
    def has_feature_tokens(self) -> bool:
        """Whether every feature is one token."""
        return self.num_genes + self.num_peaks > 0

    def target_of(self, task_token_id: int) -> tuple[int, int]:
        """(first token, number of tokens) of the features that a task predicts.

        Raises  ValueError for a token that is no task's, or a subword vocabulary
        """
        if not self.has_feature_tokens or self.first_gene_token_id is None:
            raise ValueError("This vocabulary has subwords, no token for each feature (num_genes and num_peaks are 0).")
        if task_token_id == self.gex2atac_token_id:
            return self.first_gene_token_id + self.num_genes, self.num_peaks
        if task_token_id == self.atac2gex_token_id:
            return self.first_gene_token_id, self.num_genes
        raise ValueError(
            f"Expected cells to begin with a task token, {self.gex2atac_token_id} (gex2atac) or "
            f"{self.atac2gex_token_id} (atac2gex); found {task_token_id}."
        )

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> "MultiomeT5Config":
        """Configuration of a size, "t5-small" or "small", with fields set."""
        if name not in PRESETS:
            raise ValueError(f"Expected a preset among {', '.join(PRESETS)}, found {name!r}.")
        return cls(**{**PRESETS[name], **fields})


__all__ = ["AUTO_MAP", "PRESETS", "MultiomeT5Config"]
