"""The simplest predictions of one modality from the other. Axes: n cells, s source features, t target features."""

from typing import Self

import numpy as np
import scipy.sparse as sp

from .predictor import SourceCells, fitted_svd


class Zeros:
    """Nothing is there."""

    def fit(self, cells: SourceCells, target_nt: sp.csr_matrix) -> Self:
        self.n_targets = target_nt.shape[1]
        return self

    def predict(self, cells: SourceCells) -> np.ndarray:
        return np.zeros((cells.n_cells, self.n_targets), dtype=np.float32)


class Frequency:
    """Every cell is the mean of the training cells."""

    def fit(self, cells: SourceCells, target_nt: sp.csr_matrix) -> Self:
        self.mean_t = np.asarray(target_nt.mean(axis=0), dtype=np.float32).ravel()
        return self

    def predict(self, cells: SourceCells) -> np.ndarray:
        return np.tile(self.mean_t, (cells.n_cells, 1))


class NearestCells:
    """The mean of the training cells that are nearest in the leading components of the source.

    n_components, n_neighbors  50 and 25, as the competition's own nearest neighbours
    """

    def __init__(self, n_components: int = 50, n_neighbors: int = 25, seed: int = 0):
        self.n_components, self.n_neighbors, self.seed = n_components, n_neighbors, seed

    def fit(self, cells: SourceCells, target_nt: sp.csr_matrix) -> Self:
        from sklearn.neighbors import NearestNeighbors

        self.svd = fitted_svd(cells.values_ns, self.n_components, self.seed)
        reference = self.svd.transform(cells.values_ns)
        self.neighbors = NearestNeighbors(n_neighbors=min(self.n_neighbors, cells.n_cells)).fit(reference)
        self.target_nt = target_nt
        return self

    def predict(self, cells: SourceCells) -> np.ndarray:
        near = self.neighbors.kneighbors_graph(self.svd.transform(cells.values_ns))
        shares = near / self.neighbors.n_neighbors
        return np.asarray((shares @ self.target_nt).todense(), dtype=np.float32)


class SVDLinear:
    """Ridge regression from components of the source to components of the target."""

    def __init__(self, n_components: int = 50, alpha: float = 1.0, seed: int = 0):
        self.n_components, self.alpha, self.seed = n_components, alpha, seed

    def fit(self, cells: SourceCells, target_nt: sp.csr_matrix) -> Self:
        from sklearn.linear_model import Ridge

        self.source = fitted_svd(cells.values_ns, self.n_components, self.seed)
        self.target = fitted_svd(target_nt, self.n_components, self.seed)
        self.ridge = Ridge(self.alpha).fit(self.source.transform(cells.values_ns), self.target.transform(target_nt))
        return self

    def predict(self, cells: SourceCells) -> np.ndarray:
        components = self.ridge.predict(self.source.transform(cells.values_ns))
        return (components @ self.target.components_).astype(np.float32)
