"""cVAE: a variational autoencoder whose encoder and decoder are told drug, dose and cell line.

loss = 1/2 |x - x'|^2 + kl_weight KL(q(z | x, condition) || N(0, 1)), divided by the number of genes. A control is
predicted under a drug by encoding it as a control and decoding its state under the drug.
Source: Sohn, Lee & Yan, "Learning structured output representation using deep conditional generative models", NeurIPS
2015; as a model of perturbations, Lotfollahi et al. 2019 and 2020 (scGen, trVAE).

Axes: n cells, g genes, d latent width, b fingerprint bits.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_cvae import CvaeConfig
from .response_layers import DrugEncoder, check_expression, initialize_layer, micromolar_dose, perceptron


def divergence(means: torch.Tensor, log_variances: torch.Tensor) -> torch.Tensor:
    """(n,) KL divergence of diagonal Gaussians (n, d) from the standard one."""
    return 0.5 * (means.square() + log_variances.exp() - 1 - log_variances).sum(dim=1)


@dataclass
class CvaeOutput(ModelOutput):
    """What a cVAE makes of cells.

    loss                 (reconstruction_loss x g / 2 + kl_weight x kl_loss) / g
    reconstruction_loss  mean squared error over cells and genes
    kl_loss              mean divergence of a cell's latent state from the prior
    predictions          (n, g)
    latent               (n, d) states: drawn while training, else their means
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kl_loss: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    latent: torch.Tensor | None = None


class CvaePreTrainedModel(PreTrainedModel):
    """Initialization and loading of a cVAE."""

    config: CvaeConfig  # type: ignore[assignment]
    config_class = CvaeConfig
    base_model_prefix = "cvae"
    main_input_name = "expression"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_layer(module)


class CvaeModel(CvaePreTrainedModel):
    """Predicts cells under a drug and dose."""

    _auto_class = "AutoModel"

    def __init__(self, config: CvaeConfig):
        super().__init__(config)
        self.drug = DrugEncoder(config, config.condition_size)
        # The last is a line that is not known, which says nothing.
        self.cell_line = nn.Embedding(config.n_cell_lines + 1, config.condition_size, padding_idx=config.n_cell_lines)
        n_condition = 2 * config.condition_size + 1
        sizes = config.hidden_size, config.num_hidden_layers
        self.encoder = perceptron(config.n_genes + n_condition, *sizes, 2 * config.latent_size, config.dropout)
        self.decoder = perceptron(config.latent_size + n_condition, *sizes, config.n_genes, config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        expression: torch.Tensor,
        cell_line: torch.Tensor,
        dose: torch.Tensor,
        drug: torch.Tensor | None = None,
        fingerprint: torch.Tensor | None = None,
        is_control: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> CvaeOutput:
        """Cells under a condition, and the loss where labels are given.

        expression   (n, g) scaled expression
        cell_line    (n,) int64 number of the line, `config.n_cell_lines` for a line that is not known
        dose         (n,) log10 of micromolar, minus infinity for controls, whose drug counts for nothing
        drug         (n,) int64, with drug_encoder="id"
        fingerprint  (n, b) 0 or 1, with drug_encoder="fingerprint"
        is_control   (n,) bool, whether `expression` is of a control, to be predicted under the condition. By default
                     the condition is that of the cell itself, as in training
        labels       (n, g) what to reconstruct: `expression`
        Raises       ValueError for shapes that do not fit, or the drug in the other form
        """
        check_expression(self.config.n_genes, expression, labels)
        x = expression.to(self.dtype)
        condition = self._condition(cell_line, dose, drug, fingerprint)
        own = condition
        if is_control is not None:
            without = torch.full_like(dose, -torch.inf)
            untreated = self._condition(cell_line, without, drug, fingerprint)
            own = torch.where(is_control[:, None], untreated, condition)
        means, log_variances = self.encoder(torch.cat([x, own], dim=1)).float().chunk(2, dim=1)
        latent = means
        if self.training:
            latent = means + torch.randn_like(means) * (0.5 * log_variances).exp()
        predictions = self.decoder(torch.cat([latent.to(x.dtype), condition], dim=1)).float()
        output = CvaeOutput(predictions=predictions, latent=latent)
        if labels is not None:
            squared = (predictions - labels.float()).square().mean()
            kl = divergence(means, log_variances).mean()
            output.reconstruction_loss, output.kl_loss = squared, kl
            output.loss = 0.5 * squared + self.config.kl_weight / self.config.n_genes * kl
        return output

    def _condition(
        self,
        cell_line: torch.Tensor,
        dose: torch.Tensor,
        drug: torch.Tensor | None,
        fingerprint: torch.Tensor | None,
    ) -> torch.Tensor:
        """(n, 2 condition_size + 1): drug, 0 without a dose; log(1 + dose); cell line."""
        encoded = self.drug(drug, fingerprint)
        amount = micromolar_dose(dose).log1p().to(encoded.dtype)
        return torch.cat([encoded * (amount > 0), amount, self.cell_line(cell_line)], dim=1)


__all__ = ["CvaeModel", "CvaePreTrainedModel", "divergence"]
