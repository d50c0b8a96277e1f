"""`CvaeConfig`: sizes and drug encoder of a conditional variational autoencoder."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_checks import check_keys, check_perturbation_model

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
        check_keys(self, kwargs)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def validate_architecture(self) -> None:
        """Sizes are positive, weights are not negative, and a drug known by number has a number."""
        check_perturbation_model(self, ("condition_size",), ("kl_weight",))


__all__ = ["AUTO_MAP", "CvaeConfig"]
