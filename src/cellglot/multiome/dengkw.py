"""Dengkw: kernel ridge regression between truncated SVDs (Kaiwen Deng; NeurIPS 2021 competition, Lance et al. 2022).

Differs from the release: the SVD of the source is fitted on training cells only, not on the test cells with them, and
halves of batches are averaged in both directions (a later port of the release leaves out one batch at a time instead).
Axes: n cells, s source features, t target features, d components.
"""

from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from .predictor import SourceCells, Task, fitted_svd

# Components of source and of target
N_COMPONENTS: dict[Task, tuple[int, int]] = {"gex2atac": (1_000, 50), "atac2gex": (100, 70)}
LENGTH_SCALE = 10.0
# Any: scikit-learn annotates it as an integer
ALPHA: Any = 0.1


class Dengkw:
    """Components of each cell standardized, ridge regression with an RBF kernel; mean of two halves of the batches."""

    def __init__(self, task: Task, seed: int = 0):
        (self.n_source, self.n_target), self.seed = N_COMPONENTS[task], seed

    def fit(self, cells: SourceCells, target_nt: sp.csr_matrix) -> Self:
        from sklearn.kernel_ridge import KernelRidge

        self.source = fitted_svd(cells.values_ns, self.n_source, self.seed)
        self.target = fitted_svd(target_nt, self.n_target, self.seed)
        x_nd, y_nd = self._components(cells), self.target.transform(target_nt)
        batches = np.unique(cells.batch_n)
        middle = len(batches) // 2
        halves = [batches[:middle], batches[middle:]] if middle else [batches]
        self.regressions = [
            KernelRidge(alpha=ALPHA, kernel="rbf", gamma=1 / (2 * LENGTH_SCALE**2)).fit(x_nd[inside], y_nd[inside])
            for inside in (np.isin(cells.batch_n, half) for half in halves)
        ]
        return self

    def predict(self, cells: SourceCells) -> np.ndarray:
        x_nd = self._components(cells)
        y_nd = np.mean([regression.predict(x_nd) for regression in self.regressions], axis=0)
        return np.clip(y_nd @ self.target.components_, 0, None).astype(np.float32)

    def _components(self, cells: SourceCells) -> np.ndarray:
        """(n, d) components of the source, standardized within each cell."""
        x_nd = self.source.transform(cells.values_ns)
        deviation_n = x_nd.std(axis=1, keepdims=True)
        return (x_nd - x_nd.mean(axis=1, keepdims=True)) / np.where(deviation_n > 0, deviation_n, 1)
