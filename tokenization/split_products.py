"""Products of sparse cells with dense matrices, the genes that many cells express apart from the rest.

In a cell a few thousand genes hold most of the counts. Columns of those are multiplied as dense ones by vector units
(oneDNN), the others as sparse ones by SciPy, a part of them in each thread. `benchmarks/pca_projection.py` holds the
speed against products of all columns as sparse ones. On a GPU all columns are dense ones.

Axis letters: n cells, g genes, k rows of the dense matrix.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

# Genes that more of the cells than this express are dense columns. Up to 0.2 costs a tenth of the speed, 0.05 more.
DENSE_SHARE = 0.1
# Bounds what is dense at a time.
CELLS_PER_PRODUCT, GENES_PER_PRODUCT = 1024, 2048


@dataclass(frozen=True)
class SplitCells:
    """A block of cells: its often expressed genes dense, the others sparse."""

    often_no: torch.Tensor
    rarely_nr: sp.csr_matrix


class GeneSplit:
    """Which genes are dense columns, judged by some of the cells, and products of split cells with dense matrices.

    cells_ng  (cells, genes) CSR: the first block, say. Others may be unlike it: slower then, and as right
    """

    def __init__(self, cells_ng: sp.csr_matrix, device: str | torch.device = "cpu"):
        self.device, n_genes = torch.device(device), cells_ng.shape[1]
        often = np.ones(n_genes, dtype=bool)
        if self.device.type == "cpu":
            often = np.bincount(cells_ng.indices, minlength=n_genes) > DENSE_SHARE * cells_ng.shape[0]
        self.often, self.rarely = np.flatnonzero(often), np.flatnonzero(~often)

    def blocks(self, cells_ng: sp.csr_matrix) -> Iterator[SplitCells]:
        """The cells in split blocks of `CELLS_PER_PRODUCT`."""
        for start in range(0, cells_ng.shape[0], CELLS_PER_PRODUCT):
            rows: Any = cells_ng[start : start + CELLS_PER_PRODUCT]
            if self.device.type == "cpu":
                often = torch.from_numpy(rows[:, self.often].toarray().astype(np.float32, copy=False))
                yield SplitCells(often, rows[:, self.rarely])
            else:
                parts = (rows.indptr.astype(np.int64), rows.indices.astype(np.int64), rows.data.astype(np.float32))
                arrays = [torch.from_numpy(part).to(self.device) for part in parts]
                often = torch.sparse_csr_tensor(*arrays, size=rows.shape, check_invariants=False).to_dense()
                yield SplitCells(often, rows[:, self.rarely])

    def weight(self, weight_kg: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """A dense matrix as `product` takes it: (k, often) columns, and (rarely, k) rows."""
        often, rarely = (torch.from_numpy(genes).to(weight_kg.device) for genes in (self.often, self.rarely))
        return weight_kg[:, often].contiguous(), weight_kg[:, rarely].T.contiguous().cpu().numpy()

    def product(self, cells: SplitCells, weight: tuple[torch.Tensor, np.ndarray]) -> torch.Tensor:
        """cells weight^T, (cells, k)."""
        often_ko, rarely_rk = weight
        product = linear(cells.often_no, often_ko)
        if len(rarely_rk):
            product += torch.from_numpy(_sparse_product(cells.rarely_nr, rarely_rk))
        return product

    def add_transposed_product(
        self, y_nk: torch.Tensor, cells: SplitCells, into: tuple[torch.Tensor, np.ndarray]
    ) -> None:
        """Adds y^T cells to what `weight` made of a (k, genes) matrix of sums."""
        often_ko, rarely_rk = into
        often_ko += linear(y_nk.T.contiguous(), cells.often_no.T.contiguous())
        if len(rarely_rk):
            y, transposed = y_nk.numpy(), cells.rarely_nr.T.tocsr()

            def add(start: int) -> None:
                rarely_rk[start : start + GENES_PER_PRODUCT] += transposed[start : start + GENES_PER_PRODUCT] @ y

            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(add, range(0, len(rarely_rk), GENES_PER_PRODUCT)))

    def joined(self, split: tuple[torch.Tensor, np.ndarray]) -> torch.Tensor:
        """The (k, genes) matrix of which `weight` made this."""
        often_ko, rarely_rk = split
        whole_kg = torch.empty(len(often_ko), len(self.often) + len(self.rarely), device=often_ko.device)
        whole_kg[:, torch.from_numpy(self.often)] = often_ko
        whole_kg[:, torch.from_numpy(self.rarely)] = torch.from_numpy(rarely_rk).T.to(often_ko.device)
        return whole_kg


def _sparse_product(x_ng: sp.csr_matrix, weight_gk: np.ndarray) -> np.ndarray:
    """x weight, cells shared out among torch's number of threads: SciPy lets go of the interpreter meanwhile.

    By gene (CSC), since weight is larger than a cache and the product of some cells is not: four times as fast.
    """
    threads = torch.get_num_threads()
    ends = np.linspace(0, x_ng.shape[0], threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(lambda a, b: x_ng[a:b].tocsc() @ weight_gk, ends[:-1], ends[1:])))


def linear(x_ng: torch.Tensor, weight_kg: torch.Tensor) -> torch.Tensor:
    """x weight^T, (cells, k), for contiguous float32 tensors.

    On CPUs as a 1x1 convolution, which torch gives to oneDNN: MKL leaves the AVX-512 units of AMD processors idle.
    """
    if x_ng.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not x_ng.numel() or not len(weight_kg):
        return x_ng @ weight_kg.T
    # One image of 1 x cells pixels, channels last: nothing is copied.
    image = x_ng[None, None].permute(0, 3, 1, 2)
    return torch.nn.functional.conv2d(image, weight_kg[:, :, None, None]).permute(0, 2, 3, 1)[0, 0]
