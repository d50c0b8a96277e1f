"""What all baselines of modality prediction share: cells in, values or probabilities of the other modality out.

Axes: n cells, s source features, t target features.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import scipy.sparse as sp

Task = Literal["gex2atac", "atac2gex"]


@dataclass(frozen=True)
class SourceCells:
    """The modality that is read, of some cells.

    values_ns  CSR, log-normalized expression or binary accessibility
    totals_n   counts of each cell over all features of the modality
    batch_n    label of each cell's batch

    Raises  ValueError for totals or batches of another number of cells
    """

    values_ns: sp.csr_matrix
    totals_n: np.ndarray
    batch_n: np.ndarray

    def __post_init__(self) -> None:
        n = self.values_ns.shape[0]
        if len(self.totals_n) != n or len(self.batch_n) != n:
            raise ValueError(
                f"Expected totals and batches of {n:,} cells, found {len(self.totals_n):,} and {len(self.batch_n):,}."
            )

    @property
    def n_cells(self) -> int:
        return self.values_ns.shape[0]


class ModalityPredictor(Protocol):
    """One way to predict the other modality."""

    def fit(self, cells: SourceCells, target_nt: sp.csr_matrix) -> Self:
        """Learns from training cells; target_nt is binary where probabilities are asked for, else values."""
        ...

    def predict(self, cells: SourceCells) -> np.ndarray:
        """(n, t) float32; of a binary target the higher, the likelier."""
        ...


def fitted_svd(matrix_nf: sp.csr_matrix, n_components: int, seed: int) -> Any:
    """scikit-learn's TruncatedSVD, with no more components than the matrix has."""
    from sklearn.decomposition import TruncatedSVD

    return TruncatedSVD(min(n_components, min(matrix_nf.shape) - 1), random_state=seed).fit(matrix_nf)


@dataclass(frozen=True)
class Standardizer:
    """Mean 0 and variance 1 of each column over the training cells; columns that do not vary in them become 0."""

    mean_f: np.ndarray
    factor_f: np.ndarray

    @classmethod
    def of(cls, x_nf: np.ndarray) -> "Standardizer":
        # In double precision: rounding in single would make a constant column seem to vary.
        mean, deviation = (np.asarray(f(x_nf, axis=0, dtype=np.float64)) for f in (np.mean, np.std))
        varies = deviation > 1e-6 * (np.abs(mean) + 1e-6)
        return cls(mean, np.divide(1, deviation, out=np.zeros_like(deviation), where=varies))

    def __call__(self, x_nf: np.ndarray) -> np.ndarray:
        return ((x_nf - self.mean_f) * self.factor_f).astype(np.float32)
