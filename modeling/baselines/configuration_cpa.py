"""`CpaConfig`: sizes, adversary and drug encoder of a CPA."""

import dataclasses
import difflib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Written into every saved configuration, so that the Auto classes find the model with trust_remote_code=True and
# without cellglot.
AUTO_MAP = {"AutoConfig": "configuration_cpa.CpaConfig", "AutoModel": "modeling_cpa.CpaModel"}


@strict
class CpaConfig(PreTrainedConfig):
    """Configuration of a CPA. Sizes are those of the released code.

    Raises  on construction: a value of the wrong type, sizes or weights that make no sense, or a misspelt key
    """

    model_type = "cpa"
    _auto_class = "AutoConfig"

    n_genes: int = 978
    # Known by number. Drugs are also what the adversary tells apart, whatever the encoder; 0: no drug adversary
    n_drugs: int = 0
    n_cell_lines: int = 0
    # An embedding learnt for each drug (the paper), or a linear map of its Morgan fingerprint (any drug; chemCPA)
    drug_encoder: Literal["id", "fingerprint"] = "id"
    fingerprint_size: int = 1024
    latent_size: int = 128
    hidden_size: int = 128
    # Hidden layers of encoder and decoder each
    num_hidden_layers: int = 3
    adversary_size: int = 64
    adversary_layers: int = 2
    # Weight of the reversed gradient of the adversaries in the encoder, and of the squared gradient of their scores in
    # their own loss (the paper draws both at random and keeps the best). The reconstruction loss is a mean over genes.
    adversary_weight: float | int = 0.3
    gradient_penalty: float | int = 0.1
    dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any):
        names = [field.name for field in dataclasses.fields(self)]
        for key in kwargs:
            close = [] if key.startswith("_") else difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"CpaConfig has no {key!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def validate_architecture(self) -> None:
        """Sizes are positive, weights are not negative, and a drug known by number has a number."""
        sizes = ("n_genes", "fingerprint_size", "latent_size", "hidden_size", "num_hidden_layers", "adversary_size")
        for name in (*sizes, "adversary_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of 1 or more, found {getattr(self, name)}.")
        if min(self.adversary_weight, self.gradient_penalty, self.n_drugs, self.n_cell_lines) < 0:
            raise ValueError(
                "Expected numbers and weights of 0 or more, found "
                f"n_drugs={self.n_drugs}, n_cell_lines={self.n_cell_lines}, adversary_weight={self.adversary_weight}, "
                f"gradient_penalty={self.gradient_penalty}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Expected dropout from 0 to below 1, found {self.dropout}.")
        if self.drug_encoder == "id" and self.n_drugs < 1:
            raise ValueError('drug_encoder="id" needs n_drugs, the number of drugs known by id; found 0.')


__all__ = ["AUTO_MAP", "CpaConfig"]
