"""What CPA and cVAE share: multilayer perceptrons, and drugs by number or fingerprint.

Doses are log10 of micromolar, as of `ExpressionFeatureExtractor.conditions`; minus infinity is no dose, a control.

Axes: n cells, g genes, d width, b fingerprint bits.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init


def perceptron(n_in: int, hidden_size: int, n_hidden: int, n_out: int, dropout: float = 0.0) -> nn.Sequential:
    """Hidden layers of linear map, layer norm, ReLU and dropout, and a linear layer behind them."""
    layers: list[nn.Module] = []
    for width in [n_in, *[hidden_size] * (n_hidden - 1)]:
        layers += [nn.Linear(width, hidden_size), nn.LayerNorm(hidden_size), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden_size, n_out))


@torch.no_grad()
def initialize_layer(module: nn.Module) -> None:
    """Sets a linear layer to Glorot's uniform, an embedding to a standard Gaussian with its padding at 0."""
    if isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight)
        if module.padding_idx is not None:
            init.zeros_(module.weight[module.padding_idx])


def micromolar_dose(dose: torch.Tensor) -> torch.Tensor:
    """(n, 1) float32 dose in micromolar of log10 doses (n,); 0 where they are minus infinity."""
    return torch.pow(10.0, dose.float())[:, None]


class DrugEncoder(nn.Module):
    """(n, d) of each drug: an embedding of its number, or a linear map of its fingerprint."""

    def __init__(self, config: Any, size: int):
        super().__init__()
        self.by_id = config.drug_encoder == "id"
        self.bits = config.fingerprint_size
        self.encode: nn.Module = nn.Embedding(config.n_drugs, size) if self.by_id else nn.Linear(self.bits, size)

    def forward(self, drug: torch.Tensor | None, fingerprint: torch.Tensor | None) -> torch.Tensor:
        """Raises ValueError without the drug in the form that the model knows."""
        if self.by_id:
            if drug is None:
                raise ValueError('The model has drug_encoder="id" and needs drug=, (n,) numbers of drugs.')
            return self.encode(drug)
        if fingerprint is None or fingerprint.shape[-1] != self.bits:
            found = "none" if fingerprint is None else f"{tuple(fingerprint.shape)}"
            raise ValueError(
                f'The model has drug_encoder="fingerprint" and needs fingerprint=, (n, {self.bits:,}); found {found}.'
            )
        assert isinstance(self.encode, nn.Linear)
        return self.encode(fingerprint.to(self.encode.weight.dtype))


def check_expression(n_genes: int, expression: torch.Tensor, labels: torch.Tensor | None = None) -> None:
    """Raises ValueError unless expression is (n, g), and labels are shaped as it."""
    if expression.ndim != 2 or expression.shape[1] != n_genes:
        raise ValueError(f"Expected expression (cells, {n_genes:,} genes), found {tuple(expression.shape)}.")
    if labels is not None and labels.shape != expression.shape:
        raise ValueError(
            f"Expected labels shaped as expression, {tuple(expression.shape)}; found {tuple(labels.shape)}."
        )


__all__ = ["DrugEncoder", "check_expression", "initialize_layer", "micromolar_dose", "perceptron"]
