"""CPA, the compositional perturbation autoencoder: basal state + drug x dose + cell line, added in latent space.

An encoder gives each cell a basal state, from which adversaries try to tell its drug and its cell line; the encoder is
trained against them. The drug's embedding, scaled by a dose-response curve of its own, and the line's are added, and a
decoder gives mean and variance of each gene. To predict a control under a drug, that drug is added to its basal state.
Source: Lotfollahi et al., "Predicting cellular responses to complex perturbations in high-throughput screens",
Molecular Systems Biology 2023, Methods, and the code released with it (facebookresearch/CPA, cpa/model.py).
Deviations:
- The adversaries' gradient reaches the encoder reversed, in the same step (Ganin & Lempitsky 2015); the released code
  takes two steps of the adversaries for one of the autoencoder, which has the same saddle point.
- Each cell has one drug, so that the drug adversary is a classifier among drugs and "none", with cross-entropy; the
  released code has a logistic loss for each drug, since it has combinations.
- Layer norm in place of batch norm: a cell's prediction does not depend on the others of its batch.
- One learning rate; the released code has one each for autoencoder, adversaries and dose-response curves.
- drug_encoder="fingerprint" is chemCPA's idea (Hetzel et al. 2022), with the fingerprint alone.

Axes: n cells, g genes, d latent width, b fingerprint bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_cpa import CpaConfig
from .response_layers import DrugEncoder, check_expression, initialize_layer, micromolar_dose, perceptron

# Variances below this would let single genes rule the loss (released code)
LEAST_VARIANCE = 1e-3


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is `weight` times the negative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: float) -> torch.Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.weight * gradients[0], None


def gaussian_loss(means: torch.Tensor, variances: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of labels, mean over cells and genes, without its constant. All (n, g)."""
    return 0.5 * (variances.log() + (labels - means).square() / variances).mean()


class DoseResponse(nn.Module):
    """How much of a drug's embedding a dose has: sigmoid(b log(1 + dose) + a) - sigmoid(a), 0 at dose 0 (Methods)."""

    def __init__(self, config: CpaConfig):
        super().__init__()
        self.curve = DrugEncoder(config, 2)

    def forward(self, dose: torch.Tensor, drug: torch.Tensor | None, fingerprint: torch.Tensor | None) -> torch.Tensor:
        """(n, 1)"""
        # Slope 1 and offset 0 to begin with, as released
        slope, offset = (self.curve(drug, fingerprint).float() + torch.tensor([1.0, 0.0], device=dose.device)).split(
            1, dim=1
        )
        return (slope * micromolar_dose(dose).log1p() + offset).sigmoid() - offset.sigmoid()


@dataclass
class CpaOutput(ModelOutput):
    """What CPA makes of cells.

    loss                 reconstruction_loss + adversary_loss + gradient_penalty x the penalty
    reconstruction_loss  Gaussian negative log-likelihood, mean over genes
    adversary_loss       cross-entropy of drug and of cell line told from the basal states, together
    predictions          (n, g) means; variances (n, g)
    basal                (n, d) states without drug and cell line
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    adversary_loss: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    variances: torch.Tensor | None = None
    basal: torch.Tensor | None = None


class CpaPreTrainedModel(PreTrainedModel):
    """Initialization and loading of a CPA."""

    config: CpaConfig  # type: ignore[assignment]
    config_class = CpaConfig
    base_model_prefix = "cpa"
    main_input_name = "expression"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_layer(module)
        if isinstance(module, DoseResponse):
            # The same curve for all drugs to begin with
            init.zeros_(module.curve.encode.weight)  # type: ignore[arg-type]


class CpaModel(CpaPreTrainedModel):
    """Predicts cells under a drug and dose."""

    _auto_class = "AutoModel"

    def __init__(self, config: CpaConfig):
        super().__init__(config)
        width, layers, latent = config.hidden_size, config.num_hidden_layers, config.latent_size
        self.encoder = perceptron(config.n_genes, width, layers, latent, config.dropout)
        self.decoder = perceptron(latent, width, layers, 2 * config.n_genes, config.dropout)
        self.drug = DrugEncoder(config, latent)
        self.dose_response = DoseResponse(config)
        # The last is a line that is not known, which adds nothing.
        self.cell_line = nn.Embedding(config.n_cell_lines + 1, latent, padding_idx=config.n_cell_lines)
        classes = {"drug": config.n_drugs + 1 if config.n_drugs else 0, "cell_line": config.n_cell_lines}
        self.adversaries = nn.ModuleDict(
            {
                name: perceptron(latent, config.adversary_size, config.adversary_layers, n)
                for name, n in classes.items()
                if n > 1
            }
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        expression: torch.Tensor,
        cell_line: torch.Tensor,
        dose: torch.Tensor,
        drug: torch.Tensor | None = None,
        fingerprint: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> CpaOutput:
        """Cells under a condition, and the loss where labels are given.

        expression   (n, g) scaled expression. Of controls, to predict them under the condition; while training of the
                     cell itself, whose own condition it then is
        cell_line    (n,) int64 number of the line, `config.n_cell_lines` for a line that is not known
        dose         (n,) log10 of micromolar, minus infinity for controls, whose drug counts for nothing
        drug         (n,) int64, with drug_encoder="id"; with fingerprints only for the adversary, -100 where unknown
        fingerprint  (n, b) 0 or 1, with drug_encoder="fingerprint"
        labels       (n, g) what to reconstruct: `expression`
        Raises       ValueError for shapes that do not fit, or the drug in the other form
        """
        check_expression(self.config.n_genes, expression, labels)
        basal = self.encoder(expression.to(self.dtype))
        treatment = self.drug(drug, fingerprint) * self.dose_response(dose, drug, fingerprint).to(basal.dtype)
        means, spreads = self.decoder(basal + treatment + self.cell_line(cell_line)).float().chunk(2, dim=1)
        variances = nn.functional.softplus(spreads) + LEAST_VARIANCE
        output = CpaOutput(predictions=means, variances=variances, basal=basal)
        if labels is not None:
            output.reconstruction_loss = gaussian_loss(means, variances, labels.float())
            output.adversary_loss, penalty = self._adversary_loss(basal, self._classes(drug, dose), cell_line)
            output.loss = output.reconstruction_loss + output.adversary_loss + self.config.gradient_penalty * penalty
        return output

    def _classes(self, drug: torch.Tensor | None, dose: torch.Tensor) -> torch.Tensor:
        """(n,) what the drug adversary has to tell: the drug, or that there is none; -100 where it is not known."""
        numbers = torch.full_like(dose, -100, dtype=torch.int64) if drug is None else drug
        return torch.where(dose.isneginf(), self.config.n_drugs, numbers)

    def _adversary_loss(
        self, basal: torch.Tensor, drug: torch.Tensor, cell_line: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross-entropies of drug and line, mean squared gradient of the scores)."""
        known_line = cell_line.masked_fill(cell_line >= self.config.n_cell_lines, -100)
        reversed_basal = ReverseGradient.apply(basal, float(self.config.adversary_weight))
        loss, penalty = basal.new_zeros((), dtype=torch.float32), basal.new_zeros((), dtype=torch.float32)
        # The penalty is the adversaries' own: states are inputs of theirs, not what the encoder could change.
        states = basal.detach().requires_grad_()
        for name, adversary in self.adversaries.items():
            numbers = drug if name == "drug" else known_line
            scores = adversary(reversed_basal).float()
            total = nn.functional.cross_entropy(scores, numbers, ignore_index=-100, reduction="sum")
            loss = loss + total / (numbers != -100).sum().clamp(min=1)
            if self.training and self.config.gradient_penalty and torch.is_grad_enabled():
                gradient = torch.autograd.grad(adversary(states).sum(), states, create_graph=True)[0]
                penalty = penalty + gradient.float().square().mean()
        return loss, penalty


__all__ = ["CpaModel", "CpaPreTrainedModel", "gaussian_loss"]
