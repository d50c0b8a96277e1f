"""Cajal: a multilayer perceptron on marker features (Laddach, Laddach & Shapiro; NeurIPS 2021 competition).

Differs from the release: its lists of markers are of bone marrow, so markers are found anew, by Welch's t of k-means
clusters of the training cells against the rest; a step takes the same share of the cells, not the same number (1,000 of
22,463), so that 39 epochs are as many steps; outputs are clipped to the range of the target in predictions only, for a
clipped output has no gradient, which leaves most features of a binary target stuck at 1.
Axes: n cells, s source features, t target features, c clusters.
"""

import itertools
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from .predictor import SourceCells, Standardizer, Task, fitted_svd

LAYERS: dict[Task, tuple[int, ...]] = {"gex2atac": (500, 20, 110, 430, 310), "atac2gex": (320, 360, 620, 440)}
EPOCHS: dict[Task, int] = {"gex2atac": 39, "atac2gex": 38}
# Steps of an epoch: 22,463 cells, 1,000 at a time
STEPS_PER_EPOCH = 23
# The release repeats the total counts of a cell, and their median and deviation in its batch, so often.
REPEATS = 50


class Cajal:
    """Dropout of 0.8 on markers and statistics of the batch, ReLU layers, predictions clipped to the target's range.

    n_clusters, n_markers  of k-means, and markers that each cluster adds
    """

    def __init__(self, task: Task, seed: int = 0, n_clusters: int = 10, n_markers: int = 100):
        self.task: Task = task
        self.seed, self.n_clusters, self.n_markers = seed, n_clusters, n_markers

    def fit(self, cells: SourceCells, target_nt: sp.csr_matrix) -> Self:
        import torch
        from tqdm.auto import tqdm

        torch.manual_seed(self.seed)
        self.markers = marker_features(cells.values_ns, self.n_clusters, self.n_markers, self.seed)
        x_nf = self._inputs(cells)
        self.standardizer = Standardizer.of(x_nf)
        x = torch.from_numpy(self.standardizer(x_nf))
        sizes = (x.shape[1], *LAYERS[self.task])
        layers: list[Any] = [torch.nn.Dropout(0.8)]
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(n_in, n_out), torch.nn.ReLU()]
        self.network = torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], target_nt.shape[1])).train()
        self.range = float(target_nt.min()), float(target_nt.max())
        optimizer = torch.optim.Adam(self.network.parameters(), fused=True)
        rows = int(np.ceil(cells.n_cells / STEPS_PER_EPOCH))
        for _ in tqdm(range(EPOCHS[self.task]), desc="Cajal", unit="epoch", leave=False):
            for part in torch.randperm(cells.n_cells).split(rows):
                target = torch.from_numpy(target_nt[part.numpy()].toarray())
                loss = torch.nn.functional.mse_loss(self.network(x[part]), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self

    def predict(self, cells: SourceCells) -> np.ndarray:
        import torch

        with torch.no_grad():
            x = torch.from_numpy(self.standardizer(self._inputs(cells)))
            return self.network.eval()(x).clamp(*self.range).numpy()

    def _inputs(self, cells: SourceCells) -> np.ndarray:
        """(n, markers + 3 * REPEATS) markers; total counts, and their median and deviation in the cell's batch."""
        batches, batch_n = np.unique(cells.batch_n, return_inverse=True)
        totals = [cells.totals_n[batch_n == b] for b in range(len(batches))]
        of_batch = np.array([[np.median(t), np.std(t)] for t in totals])
        statistics = np.column_stack([cells.totals_n, of_batch[batch_n]])
        return np.column_stack([cells.values_ns[:, self.markers].toarray(), np.repeat(statistics, REPEATS, axis=1)])


def marker_features(values_ns: sp.csr_matrix, n_clusters: int, n_markers: int, seed: int) -> np.ndarray:
    """Positions, ascending, of the features with the highest Welch's t of each k-means cluster against all others.

    values_ns  CSR (cells, features)
    n_markers  features that each cluster adds; clusters may add the same
    """
    from sklearn.cluster import KMeans

    components = fitted_svd(values_ns, 50, seed).transform(values_ns)
    # Its own annotations say that n_init is a word.
    starts: Any = 3
    cluster_n = KMeans(min(n_clusters, len(components)), n_init=starts, random_state=seed).fit_predict(components)
    t_cs = welch_t(values_ns, cluster_n)
    best = np.argsort(-t_cs, axis=1)[:, :n_markers]
    return np.unique(best)


def welch_t(values_ns: sp.csr_matrix, cluster_n: np.ndarray) -> np.ndarray:
    """(c, s) Welch's t of every feature in each cluster against the other cells; 0 where neither varies."""
    n_c = np.bincount(cluster_n)
    member_cn = sp.csr_matrix((np.ones(len(cluster_n)), (cluster_n, np.arange(len(cluster_n)))))
    sums, squares = (np.asarray((member_cn @ m).todense()) for m in (values_ns, values_ns.power(2)))
    n = np.stack([n_c, len(cluster_n) - n_c])[:, :, None]
    # Inside each cluster, and outside it.
    sums, squares = (np.stack([x, x.sum(axis=0) - x]) for x in (sums, squares))
    mean = sums / np.maximum(n, 1)
    variance_of_mean = (squares - n * mean**2) / np.maximum(n - 1, 1) / np.maximum(n, 1)
    error = np.sqrt(np.maximum(variance_of_mean.sum(axis=0), 0))
    return np.divide(mean[0] - mean[1], error, out=np.zeros_like(error), where=error > 1e-9)
