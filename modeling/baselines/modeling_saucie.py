"""SAUCIE: an autoencoder whose layers are penalized into an embedding, clusters and a correction of batches.

Source: Amodio et al., "Exploring single-cell data with deep multitasking neural networks", Nature Methods 2019, and the
code released with it (KrishnaswamyLab/SAUCIE, model.py), whose formulas these are where it and the paper differ:
- clusters are soft while training: two cells share one to the degree that a kernel gives their codes, not only when
  their codes are equal once binarized;
- distances within clusters are not squared.
Deviations: any number of batches is corrected towards the first at once (released: two); the layer of the codes is
rectified in such a run too if it also clusters (released: NaN).

Axes: n cells, c components, k neurons of the code.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_saucie import SaucieConfig

# Widths of the multi-scale kernel, and what a neuron must exceed to count as on, as a share of the largest activation
KERNEL_WIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)
ON = 1e-6
# Weight of the shape of the batches that are corrected, beside the exact values of the reference batch
CORRECTED_WEIGHT = 0.01


def squared_distances(x: torch.Tensor) -> torch.Tensor:
    """(n, n) between the rows of x (n, features)."""
    squares = x.square().sum(dim=1)
    return (squares[:, None] - 2 * x @ x.T + squares).clamp(min=0)


def multiscale_kernel(distances: torch.Tensor) -> torch.Tensor:
    """Mean of Gaussian kernels of all widths, of squared distances of any shape."""
    return torch.stack([(-distances / (2 * width)).exp() for width in KERNEL_WIDTHS]).mean(dim=0)


def information_dimension(codes: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of how much each neuron is used by all cells: low where few neurons are.

    codes  (n, k) not negative
    """
    use = codes.sum(dim=0) / codes.sum().clamp(min=torch.finfo(codes.dtype).tiny)
    return -(use * (use + 1e-9).log()).sum()


def within_cluster_distance(codes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean over all pairs of cells of their distance in x, weighed by how much they share a code (0 to 1).

    codes  (n, k) of at most 1
    x      (n, c)
    """
    shared = multiscale_kernel(squared_distances(codes))
    shared = shared - shared.min()
    shared = shared / shared.max().clamp(min=torch.finfo(shared.dtype).tiny)
    return ((squared_distances(x) + 1e-3).sqrt() * shared).mean()


def batch_discrepancy(embeddings: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Sum over batches of the squared maximal mean discrepancy of their embeddings from those of batch 0.

    embeddings  (n, d)
    batch       (n,) int64; 0 is the reference
    """
    distances = squared_distances(embeddings)
    kernel = multiscale_kernel(distances / distances.max().clamp(min=torch.finfo(distances.dtype).tiny))
    reference, total = batch == 0, kernel.new_zeros(())
    for other in batches_beside_reference(batch):
        within = kernel[reference][:, reference].mean() + kernel[other][:, other].mean()
        total = total + (within - 2 * kernel[reference][:, other].mean()).abs()
    return total


def corrected_reconstruction_loss(reconstructions: torch.Tensor, x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Squared error where cells are of the reference batch 0; of the others, of values standardized in their batch.

    Only their shape is kept: where their batch lies is what is corrected.
    """
    reference = batch == 0
    loss = (reconstructions[reference] - x[reference]).square().mean() if reference.any() else x.new_zeros(())
    for other in batches_beside_reference(batch):
        standardized = standardize(reconstructions[other]) - standardize(x[other])
        loss = loss + CORRECTED_WEIGHT * standardized.square().mean()
    return loss


def batches_beside_reference(batch: torch.Tensor) -> list[torch.Tensor]:
    """Masks (n,) of the batches there are beside 0; none unless 0 is there too, to correct them to."""
    present = batch.unique().tolist()
    return [batch == b for b in present if b != 0] if 0 in present else []


def standardize(x: torch.Tensor) -> torch.Tensor:
    """x (n, c) with mean 0 and variance 1 in each column."""
    return (x - x.mean(dim=0)) / ((x.var(dim=0, correction=0) + 1e-6).sqrt() + 1e-6)


def assign_clusters(codes: torch.Tensor, *, min_cells: int = 100) -> torch.Tensor:
    """(n,) int64 cluster of each cell, cells with the same neurons on; -1 where `min_cells` or fewer cells have it.

    codes  (n, k) of the whole data set, since its largest value says what is on
    """
    if not len(codes):
        return torch.empty(0, dtype=torch.int64, device=codes.device)
    _, cluster, counts = (codes > ON * codes.max()).unique(dim=0, return_inverse=True, return_counts=True)
    large = counts > min_cells
    return torch.where(large, large.cumsum(dim=0) - 1, -1)[cluster]


@dataclass
class SaucieOutput(ModelOutput):
    """What SAUCIE makes of cells.

    loss                   reconstruction_loss + lambda_b batch_discrepancy + lambda_c information_dimension
                           + lambda_d within_cluster_distance; the terms that have no weight are None
    reconstructions        (n, c)
    embeddings             (n, d) of the layer in the middle
    codes                  (n, k) of the last hidden layer, for `assign_clusters`
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    batch_discrepancy: torch.Tensor | None = None
    information_dimension: torch.Tensor | None = None
    within_cluster_distance: torch.Tensor | None = None
    reconstructions: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    codes: torch.Tensor | None = None


class SauciePreTrainedModel(PreTrainedModel):
    """Initialization of a SAUCIE, which is that of the original's framework."""

    config: SaucieConfig  # type: ignore[assignment]
    config_class = SaucieConfig
    base_model_prefix = "saucie"
    main_input_name = "projections"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)


class SaucieModel(SauciePreTrainedModel):
    """Embeds, clusters, denoises and corrects cells."""

    _auto_class = "AutoModel"

    def __init__(self, config: SaucieConfig):
        super().__init__(config)
        *hidden, embedding = config.layer_sizes
        encoder: list[nn.Module] = []
        for before, after in zip([config.n_components, *hidden], hidden, strict=False):
            encoder += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
        if not (config.lambda_b or config.lambda_c) and len(hidden) > 1:
            encoder[3] = nn.Sigmoid()  # as released, in the second layer of a plain autoencoder
        self.encoder = nn.Sequential(*encoder, nn.Linear(hidden[-1], embedding))
        decoder: list[nn.Module] = []
        for before, after in zip([embedding, *hidden[::-1]], hidden[::-1], strict=False):
            decoder += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
        if config.lambda_c:
            decoder[-1] = nn.ReLU()  # codes are how much a neuron is used
        self.decoder = nn.Sequential(*decoder)
        self.output = nn.Linear(hidden[0], config.n_components)
        self.post_init()

    @can_return_tuple
    def forward(self, projections: torch.Tensor, source: torch.Tensor | None = None) -> SaucieOutput:
        """Loss, and what the layers make of cells.

        projections  (n, c) principal components, or expression, of the order of 1
        source       (n,) int64 batch of each cell, 0 the reference; needed if `lambda_b` is not 0
        Raises       ValueError for shapes that do not fit, or batches that are missing
        """
        if projections.ndim != 2 or projections.shape[1] != self.config.n_components:
            raise ValueError(
                f"Expected projections (cells, {self.config.n_components:,}), found {tuple(projections.shape)}."
            )
        x = projections.to(self.output.weight.dtype)
        embeddings = self.encoder(x)
        codes = self.decoder(embeddings)
        reconstructions = self.output(codes)
        terms = self._terms(projections.float(), reconstructions.float(), embeddings.float(), codes.float(), source)
        weights = {
            "batch_discrepancy": self.config.lambda_b,
            "information_dimension": self.config.lambda_c,
            "within_cluster_distance": self.config.lambda_d,
        }
        loss = torch.stack([term * weights.get(name, 1.0) for name, term in terms.items()]).sum()
        return SaucieOutput(loss=loss, reconstructions=reconstructions, embeddings=embeddings, codes=codes, **terms)

    def _terms(
        self,
        x: torch.Tensor,
        reconstructions: torch.Tensor,
        embeddings: torch.Tensor,
        codes: torch.Tensor,
        source: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The terms of the loss that have a weight."""
        if not len(x):
            return {"reconstruction_loss": reconstructions.sum()}
        terms = {}
        if self.config.lambda_b:
            if source is None or source.shape != x.shape[:1]:
                found = "none" if source is None else tuple(source.shape)
                raise ValueError(f"To correct batches (lambda_b), pass source ({len(x):,},); found {found}.")
            terms["reconstruction_loss"] = corrected_reconstruction_loss(reconstructions, x, source)
            terms["batch_discrepancy"] = batch_discrepancy(embeddings, source)
        else:
            terms["reconstruction_loss"] = (reconstructions - x).square().mean()
        relative = codes / codes.max().clamp(min=torch.finfo(codes.dtype).tiny)
        if self.config.lambda_c:
            terms["information_dimension"] = information_dimension(relative)
        if self.config.lambda_d:
            terms["within_cluster_distance"] = within_cluster_distance(relative, x)
        return terms


__all__ = ["SaucieModel", "SauciePreTrainedModel", "assign_clusters"]
