"""`CvaeConfig`: sizes and drug encoder of a conditional variational autoencoder."""

import dataclasses
import difflib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Written into every saved configuration, so that the Auto classes find the model with trust_remote_code=True and
# without cellglot.
AUTO_MAP = {"AutoConfig": "configuration_cvae.CvaeConfig", "AutoModel": "modeling_cvae.CvaeModel"}


@strict
class CvaeConfig(PreTrainedConfig):
    """Configuration of a conditional variational autoencoder.

    Raises  on construction: a value of the wrong type, sizes or weights that make no sense, or a misspelt key
    """

    model_type = "cvae"
    _auto_class = "AutoConfig"

    n_genes: int = 978
    # Known by number
    n_drugs: int = 0
    n_cell_lines: int = 0
    # An embedding learnt for each drug, or a linear map of its Morgan fingerprint (any drug)
    drug_encoder: Literal["id", "fingerprint"] = "id"
    fingerprint_size: int = 1024
    # Of drug and cell line
    condition_size: int = 32
    latent_size: int = 32
    hidden_size: int = 128
    # Hidden layers of encoder and decoder each
    num_hidden_layers: int = 2
    # Weight of the divergence from the prior; 1 is the evidence lower bound with unit variance
    kl_weight: float | int = 1.0
    dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any):
        names = [field.name for field in dataclasses.fields(self)]
        for key in kwargs:
            close = [] if key.startswith("_") else difflib.get_close_matches(key, names, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"CvaeConfig has no {key!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def validate_architecture(self) -> None:
        """Sizes are positive, the weight is not negative, and a drug known by number has a number."""
        sizes = ("n_genes", "fingerprint_size", "condition_size", "latent_size", "hidden_size", "num_hidden_layers")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of 1 or more, found {getattr(self, name)}.")
        if min(self.kl_weight, self.n_drugs, self.n_cell_lines) < 0:
            raise ValueError(
                f"Expected numbers and weights of 0 or more, found n_drugs={self.n_drugs}, "
                f"n_cell_lines={self.n_cell_lines}, kl_weight={self.kl_weight}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Expected dropout from 0 to below 1, found {self.dropout}.")
        if self.drug_encoder == "id" and self.n_drugs < 1:
            raise ValueError('drug_encoder="id" needs n_drugs, the number of drugs known by id; found 0.')


__all__ = ["AUTO_MAP", "CvaeConfig"]
