"""DANCE: graph convolution over cells and features (Wen et al. 2022, "Graph Neural Networks for Multimodal Single-Cell
Data Integration"; NeurIPS 2021 competition).

Cells and source features are nodes; a cell and each feature that it has are joined by edges both ways, weighted by the
value. Differs from the release: no edges between genes of a pathway, which need gene sets; cells begin with components
of an SVD beside the statistics of their batch; the graph of training holds training cells only, and new cells join it
to be predicted; one network in place of the mean of four; in both directions (the release answers ATAC -> GEX with the
mean of the training cells); a loss of some cells a step, 150 steps in place of thousands. Needs torch-geometric.
Axes: n cells, s source features, t target features, d width.
"""

import warnings
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from .predictor import SourceCells, Standardizer, fitted_svd

HIDDEN = 48
DROPOUT, EDGE_DROPOUT = 0.3, 0.4
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 1e-5
# The whole graph is convolved in each step, the loss is of some of its cells
CELLS_OF_A_STEP = 256
KINDS = ("cell", "feature")
EDGES = (("feature", "entail", "cell"), ("cell", "occur", "feature"))
# What is known of a batch: means over its cells of these
STATISTICS = ("mean", "std", "q25", "q50", "q75", "max", "n_features", "mean of those there", "std of those there")


class Dance:
    """A heterogeneous graph network, trained on the squared error.

    n_layers  convolutions, 2 to 4 in the release
    n_steps   on the whole graph
    Raises    ImportError without torch-geometric
    """

    def __init__(self, seed: int = 0, n_layers: int = 2, n_steps: int = 150, n_components: int = 50):
        self.geometric = torch_geometric()
        self.seed, self.n_layers, self.n_steps, self.n_components = seed, n_layers, n_steps, n_components

    def fit(self, cells: SourceCells, target_nt: sp.csr_matrix) -> Self:
        import torch
        from tqdm.auto import tqdm

        torch.manual_seed(self.seed)
        self.svd = fitted_svd(cells.values_ns, self.n_components, self.seed)
        self.training_cells = cells
        features = self._cell_features(cells)
        self.standardizer = Standardizer.of(features)
        x = torch.from_numpy(self.standardizer(features))
        target = torch.from_numpy(target_nt.toarray())
        sizes = (cells.values_ns.shape[1], x.shape[1], target.shape[1])
        self.network = _network(self.geometric, *sizes, n_layers=self.n_layers).train()
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        graph = adjacencies(cells.values_ns)
        for _ in tqdm(range(self.n_steps), desc="DANCE", unit="step", leave=False):
            rows = torch.randperm(cells.n_cells)[:CELLS_OF_A_STEP]
            loss = torch.nn.functional.mse_loss(self.network(x, graph, rows), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self

    def predict(self, cells: SourceCells) -> np.ndarray:
        import torch

        known = self.training_cells
        graph = adjacencies(sp.csr_matrix(sp.vstack([known.values_ns, cells.values_ns], format="csr")))
        features = np.concatenate([self._cell_features(known), self._cell_features(cells)])
        with torch.no_grad():
            x = torch.from_numpy(self.standardizer(features))
            return self.network.eval()(x, graph, slice(known.n_cells, None)).numpy()

    def _cell_features(self, cells: SourceCells) -> np.ndarray:
        """(n, components + statistics) components of each cell and the mean statistics of its batch."""
        return np.concatenate([self.svd.transform(cells.values_ns), batch_statistics(cells)], axis=1)


def batch_statistics(cells: SourceCells) -> np.ndarray:
    """(n, statistics) mean of each of `STATISTICS` over the cells of the cell's batch."""
    rows = np.split(cells.values_ns.data, cells.values_ns.indptr[1:-1])
    n_features = cells.values_ns.shape[1]
    statistics = np.zeros((cells.n_cells, len(STATISTICS)))
    for n, row in enumerate(rows):
        if len(row):
            mean = row.sum() / n_features
            deviation = np.sqrt(max(np.square(row).sum() / n_features - mean**2, 0))
            quartiles = np.percentile(row, (25, 50, 75))
            statistics[n] = (mean, deviation, *quartiles, row.max(), len(row), row.mean(), row.std())
    _, batch_n = np.unique(cells.batch_n, return_inverse=True)
    means = np.zeros((batch_n.max() + 1, len(STATISTICS)))
    np.add.at(means, batch_n, statistics)
    return (means / np.bincount(batch_n)[:, None])[batch_n]


def torch_geometric() -> Any:
    """The module torch_geometric.nn.

    Raises  ImportError that says how to install it
    """
    try:
        import torch_geometric.nn
    except ImportError as error:
        raise ImportError(
            "The graph network DANCE needs torch-geometric, which is not installed: "
            'pip install "cellglot[benchmark-multiome]". The other baselines do without.'
        ) from error
    return torch_geometric.nn


def adjacencies(values_ns: sp.csr_matrix) -> tuple[Any, Any]:
    """Sparse tensors of the edges into cells, (n, s), and into features, (s, n), as PyTorch Geometric takes them."""
    return tuple(_sparse_tensor(sp.csr_matrix(matrix)) for matrix in (values_ns, values_ns.T))  # type: ignore[return-value]


def _sparse_tensor(matrix: sp.csr_matrix) -> Any:
    import torch

    arrays = (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data.astype(np.float32))
    with warnings.catch_warnings():
        # torch calls CSR tensors a beta feature.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(*map(torch.from_numpy, arrays), size=matrix.shape)


def dropped(adjacency: Any, training: bool) -> Any:
    """The same edges; while training the weights of a share of them are 0."""
    import torch

    if not training:
        return adjacency
    weights = torch.nn.functional.dropout(adjacency.values(), EDGE_DROPOUT)
    return torch.sparse_csr_tensor(adjacency.crow_indices(), adjacency.col_indices(), weights, size=adjacency.shape)


def _network(geometric: Any, n_source: int, n_cell_features: int, n_target: int, *, n_layers: int) -> Any:
    """The graph network as a torch module: forward(cell features (n, c), `adjacencies`, rows of cells)
    -> (rows, t)."""
    import torch
    from torch import nn

    def activated() -> nn.Module:
        return nn.Sequential(nn.LeakyReLU(), nn.GroupNorm(4, HIDDEN), nn.Dropout(DROPOUT))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(n_source, HIDDEN)
            self.embed_cells = nn.Linear(n_cell_features, HIDDEN)
            self.begin = nn.ModuleDict(
                {kind: nn.Sequential(nn.LeakyReLU(), nn.Linear(HIDDEN, HIDDEN), activated()) for kind in KINDS}
            )
            self.convolutions = nn.ModuleList(
                geometric.HeteroConv({edge: geometric.GraphConv(width, HIDDEN, aggr="mean") for edge in EDGES})
                for width in ((HIDDEN, HIDDEN), *[(2 * HIDDEN, 2 * HIDDEN)] * (n_layers - 1))
            )
            self.after = nn.ModuleList(nn.ModuleDict({kind: activated() for kind in KINDS}) for _ in range(n_layers))
            self.readout = nn.Linear(n_layers * HIDDEN, n_target)

        def forward(
            self,
            cell_features: torch.Tensor,
            graph: tuple[torch.Tensor, torch.Tensor],
            rows: torch.Tensor | slice = slice(None),
        ) -> torch.Tensor:
            first = {
                "cell": self.begin["cell"](self.embed_cells(cell_features)),
                "feature": self.begin["feature"](self.embeddings.weight),
            }
            edges = {edge: dropped(matrix, self.training) for edge, matrix in zip(EDGES, graph, strict=True)}
            h, read = first, []
            for convolution, after in zip(self.convolutions, self.after, strict=True):
                # Every convolution but the first sees what nodes began with, too.
                x = first if not read else {kind: torch.cat([h[kind], first[kind]], dim=1) for kind in KINDS}
                h = {kind: after[kind](y) for kind, y in convolution(x, edges).items()}  # type: ignore[index]
                read.append(h["cell"])
            return self.readout(torch.cat(read, dim=1)[rows])

    return Network()
