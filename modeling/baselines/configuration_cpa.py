"""`CpaConfig`: sizes, adversary and drug encoder of a CPA."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_checks import check_keys, check_perturbation_model

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
        check_keys(self, kwargs)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def validate_architecture(self) -> None:
        """Sizes are positive, weights are not negative, and a drug known by number has a number."""
        check_perturbation_model(self, ("adversary_size", "adversary_layers"), ("adversary_weight", "gradient_penalty"))


__all__ = ["AUTO_MAP", "CpaConfig"]
