"""Principal components of sparse cells in a few passes over them.

Block Krylov iteration in gene space: with C = A^T A, where A are the centred cells, a pass turns a block Q of
orthonormal vectors into C Q, a block of cells at a time; what of it is new is the next pass's block. The components are
those of the Nystrom approximation (C K) (K^T C K)^-1 (C K)^T of C, K being all blocks: no further pass, and nearer to C
than its restriction to K. Nothing of the size cells x components is held, and centring is a term of rank one, so that
cells stay sparse until their block is multiplied.

The variance of cells falls off slowly from one component to the next. With as many products, subspace iteration, which
keeps only the last block, comes much less near: `benchmarks/pca_projection.py` measures both.

Sources: Musco & Musco 2015, NeurIPS, "Randomized block Krylov methods for stronger and faster approximate singular
value decomposition"; Tropp, Yurtsever, Udell & Cevher 2017, NeurIPS, "Fixed-rank approximation of a positive-
semidefinite matrix from streaming data" (Nystrom).

Axis letters: n cells, g genes, k components, l vectors of a block, m of all blocks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from .split_products import GENES_PER_PRODUCT, GeneSplit

# Passes, and vectors of a block beside the components asked for. On three real sets of cells these passes capture more
# than 99% of the variance that the exact components do (`benchmarks/pca_projection.py`).
PASSES, OVERSAMPLING = 3, 100
# Directions with less than this share of the largest variance cannot be told from rounding in float32.
LEAST_RELATIVE_VARIANCE = 1e-6


class ExpressionMoments:
    """What one pass tells of the expression of each gene: cells it is detected in, sum, sum of squares, maximum."""

    def __init__(self, n_genes: int):
        self.n_cells = 0
        self.n_detected_g = np.zeros(n_genes, dtype=np.int64)
        self.sum_g, self.sum_of_squares_g = np.zeros(n_genes), np.zeros(n_genes)
        self.max_g = np.zeros(n_genes)

    def update(self, expression_ng: sp.csr_matrix) -> None:
        """Adds cells, whose expression must not be negative."""
        genes, values = expression_ng.indices, expression_ng.data.astype(np.float64)
        n_genes = len(self.sum_g)
        self.n_cells += expression_ng.shape[0]
        self.n_detected_g += np.bincount(genes[values > 0], minlength=n_genes)
        self.sum_g += np.bincount(genes, values, minlength=n_genes)
        self.sum_of_squares_g += np.bincount(genes, values * values, minlength=n_genes)
        np.maximum.at(self.max_g, genes, values)

    @property
    def mean_g(self) -> np.ndarray:
        """(genes,) float64"""
        return self.sum_g / max(self.n_cells, 1)

    @property
    def variance_g(self) -> np.ndarray:
        """(genes,) float64, unbiased"""
        squares = self.sum_of_squares_g - self.n_cells * self.mean_g**2
        return np.maximum(squares, 0) / max(self.n_cells - 1, 1)


@dataclass(frozen=True)
class PrincipalComponents:
    """Components and the variance along each, largest first.

    components_kg         (components, genes) float32, orthonormal rows; the largest entry of each is positive
    explained_variance_k  (components,) float64, the unbiased variance of the cells along each: never above the true
                          one, and nearly equal for all but the last
    """

    components_kg: np.ndarray
    explained_variance_k: np.ndarray


def principal_components(
    blocks: Callable[[], Iterable[sp.csr_matrix]],
    mean_g: np.ndarray,
    n_components: int,
    *,
    passes: int = PASSES,
    oversampling: int = OVERSAMPLING,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> PrincipalComponents:
    """Principal components of the cells that `blocks()` yields anew for each pass.

    blocks        () -> blocks of cells (cells, genes), CSR, float32
    mean_g        (genes,) their mean
    n_components  may come out smaller, where the cells vary in fewer directions
    passes        over the cells, each with n_components + oversampling vectors. One is exact where there are no more
                  genes, and all but exact where there are no more cells
    Raises        ValueError for fewer than two cells, less than one pass or component
    """
    if passes < 1 or n_components < 1:
        raise ValueError(f"Expected at least one pass and component, found passes={passes}, {n_components} components.")
    mean = torch.as_tensor(mean_g, dtype=torch.float32, device=device)
    n_genes = len(mean)
    n_vectors = min(n_components + oversampling, n_genes)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n_vectors, n_genes, generator=generator).to(mean.device)
    k_mg = torch.empty(0, n_genes, device=mean.device)
    ck_mg, new_lg, n_cells = k_mg, start, 0
    for _ in range(passes):
        if len(k_mg) == n_genes or 0 < n_cells <= len(k_mg):
            # K C spans all that there is.
            break
        q_lg = _orthonormal(new_lg[: n_genes - len(k_mg)], k_mg)
        new_lg, n_cells = _covariance_product(blocks(), mean, q_lg)
        k_mg, ck_mg = torch.cat([k_mg, q_lg]), torch.cat([ck_mg, new_lg])
    if n_cells < 2:
        raise ValueError(f"Expected at least two cells to find components of, found {n_cells}.")
    components, squares = _nystrom(k_mg, ck_mg, n_components)
    return PrincipalComponents(components.cpu().numpy(), squares.cpu().numpy() / (n_cells - 1))


def _orthonormal(vectors_lg: torch.Tensor, basis_mg: torch.Tensor) -> torch.Tensor:
    """(vectors, genes) orthonormal rows that span the vectors' part outside the basis."""
    # Twice: what the first time leaves inside is rounding, magnified where little of a vector was outside.
    for _ in range(2):
        vectors_lg = vectors_lg - (vectors_lg @ basis_mg.T) @ basis_mg
        vectors_lg = torch.linalg.qr(vectors_lg.T)[0].T
    return vectors_lg.contiguous()


@torch.no_grad()
def _covariance_product(
    blocks: Iterable[sp.csr_matrix], mean_g: torch.Tensor, q_lg: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """(Q C as (basis, genes), number of cells), C the sum of squares and products of the centred cells."""
    offset_l, sums_l, n_cells = q_lg @ mean_g, torch.zeros(len(q_lg), device=q_lg.device), 0
    split = weight = sums = None
    for block in blocks:
        if split is None or weight is None or sums is None:
            split = GeneSplit(block, q_lg.device)
            weight, sums = split.weight(q_lg), split.weight(torch.zeros_like(q_lg))
        for cells in split.blocks(block):
            # Centred before it is multiplied again: afterwards, the mean would drown small components in rounding.
            y_nl = split.product(cells, weight) - offset_l
            split.add_transposed_product(y_nl, cells, sums)
            sums_l += y_nl.sum(0)
        n_cells += block.shape[0]
    if split is None or sums is None:
        return torch.zeros_like(q_lg), 0
    return split.joined(sums).addr_(sums_l, mean_g, alpha=-1), n_cells


def _nystrom(k_mg: torch.Tensor, ck_mg: torch.Tensor, n_components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading eigenvectors (components, genes) and eigenvalues of C's Nystrom approximation, given K and K C."""
    h_mm, squares_mm = (torch.zeros(len(k_mg), len(k_mg), dtype=torch.float64, device=k_mg.device) for _ in range(2))
    # Products in float64, of a few genes at a time: their eigenvalues span the square of the range of variances.
    for k, ck in zip(k_mg.split(GENES_PER_PRODUCT, 1), ck_mg.split(GENES_PER_PRODUCT, 1), strict=True):
        h_mm += k.double() @ ck.double().T
        squares_mm += ck.double() @ ck.double().T
    values, vectors = torch.linalg.eigh((h_mm + h_mm.T) / 2)
    kept = values > LEAST_RELATIVE_VARIANCE * values[-1]
    # C is about F^T F with F = root_m (K C).
    root = (vectors[:, kept] / values[kept].sqrt()).T
    squares, vectors = torch.linalg.eigh(root @ squares_mm @ root.T)
    squares, vectors = squares.flip(0)[:n_components], vectors.flip(1)[:, :n_components]
    components = ((vectors / squares.sqrt()).T @ root).float() @ ck_mg
    # Orthonormal already, but for what rounding did to the last ones.
    components = torch.linalg.qr(components.T.double())[0].T.float()
    # The sign of a component is arbitrary: fixed, so that two fits agree.
    return components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign(), squares
