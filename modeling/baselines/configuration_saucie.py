"""`SaucieConfig`: sizes and penalties of a SAUCIE."""

import dataclasses
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_checks import check_keys

# Written into every saved configuration, so that the Auto classes find the model with trust_remote_code=True and
# without cellglot.
AUTO_MAP = {
    "AutoConfig": "configuration_saucie.SaucieConfig",
    "AutoModel": "modeling_saucie.SaucieModel",
}


@strict
class SaucieConfig(PreTrainedConfig):
    """Configuration of a SAUCIE. The defaults are those of the released code, for clustering.

    Raises  on construction: a value of the wrong type, sizes or penalties that make no sense, or a misspelt key
    """

    model_type = "saucie"
    _auto_class = "AutoConfig"

    # Features of a cell: genes, or principal components. The penalties suit values of the order of 1.
    n_components: int = 100
    # Of the encoder; the last is the embedding (2 for pictures), and the decoder mirrors them
    layer_sizes: list[int] = dataclasses.field(default_factory=lambda: [512, 256, 128, 2])
    # Weights in the loss of maximal mean discrepancy between batches, of information dimension, and of distances within
    # clusters; 0 leaves a term out. The paper corrects batches (lambda_b 0.1, others 0) and clusters in separate runs.
    lambda_b: float | int = 0.0
    lambda_c: float | int = 0.1
    lambda_d: float | int = 0.2

    def __post_init__(self, **kwargs: Any):
        check_keys(self, kwargs)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def validate_architecture(self) -> None:
        """There is something to encode, layers have a size, and penalties are not rewards."""
        if self.n_components < 1 or len(self.layer_sizes) < 2 or min(self.layer_sizes) < 1:
            raise ValueError(
                "Expected one component at least and two layers or more, the last of them the embedding; found "
                f"n_components={self.n_components}, layer_sizes={self.layer_sizes}."
            )
        if min(self.lambda_b, self.lambda_c, self.lambda_d) < 0:
            raise ValueError(
                "Expected penalties of 0 or more, found "
                f"lambda_b={self.lambda_b}, lambda_c={self.lambda_c}, lambda_d={self.lambda_d}."
            )
        if self.lambda_d and not self.lambda_c:
            raise ValueError("lambda_d is about the clusters that lambda_c makes: pass lambda_c > 0, or lambda_d=0.")


__all__ = ["AUTO_MAP", "SaucieConfig"]
