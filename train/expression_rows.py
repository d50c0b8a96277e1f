"""Sparse expression of cells on disk, read a batch at a time: what no process holds, and several may share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp


class ExpressionRows:
    """(cells, genes) float32 that `write_expression` left in a folder, as CSR of the rows asked for."""

    def __init__(self, folder: Path, n_genes: int):
        self.folder, self.n_genes = folder, n_genes
        self.starts = np.load(folder / "starts.npy", allow_pickle=False)
        self._opened: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, rows: np.ndarray) -> sp.csr_matrix:
        """(rows, genes) in the order asked for."""
        values, columns = self._open()
        spans = [slice(self.starts[i], self.starts[i + 1]) for i in rows]
        starts = np.cumsum([0, *(span.stop - span.start for span in spans)])
        data, indices = ([part[span] for span in spans] for part in (values, columns))
        empty = [np.empty(0, np.float32)], [np.empty(0, np.int32)]
        found = np.concatenate(data or empty[0]), np.concatenate(indices or empty[1]), starts
        return sp.csr_matrix(found, shape=(len(rows), self.n_genes))

    def _open(self) -> tuple[Any, Any]:
        if self._opened is None:
            shape = (int(self.starts[-1]),)
            # A file without a byte cannot be mapped.
            self._opened = tuple(
                np.memmap(self.folder / name, dtype, "r", shape=shape) if shape[0] else np.empty(0, dtype)
                for name, dtype in _FILES
            )  # type: ignore[assignment]
        assert self._opened is not None
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which would travel to a data loader's process as what they hold."""
        return self.__dict__ | {"_opened": None}


_FILES = (("values.f32", np.float32), ("columns.i32", np.int32))


def write_expression(blocks: Iterable[sp.csr_matrix], folder: Path) -> None:
    """Writes blocks of cells one after the other; `starts.npy`, written last, says that they are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [np.zeros(1, np.int64)]
    values, columns = (folder / name for name, _ in _FILES)
    with values.open("wb") as value_file, columns.open("wb") as column_file:
        for block in blocks:
            block.data.astype(np.float32).tofile(value_file)
            block.indices.astype(np.int32).tofile(column_file)
            sizes.append(np.diff(block.indptr).astype(np.int64))
    partial = folder / "partial-starts.npy"
    np.save(partial, np.cumsum(np.concatenate(sizes)), allow_pickle=False)
    partial.replace(folder / "starts.npy")


class ExpressionExamples:
    """Cells as the training loop takes them.

    rows    cells on disk
    index   (examples,) row of each
    labels  (examples,) class numbers, -100 where unknown; or None
    """

    def __init__(self, rows: ExpressionRows, index: np.ndarray, labels: np.ndarray | None = None):
        self.rows, self.index, self.labels = rows, np.asarray(index), labels

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.__getitems__(indices)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        chosen = np.asarray(indices)
        block = self.rows.read(self.index[chosen])
        examples: list[dict[str, Any]] = [{"expression": block[i]} for i in range(block.shape[0])]
        if self.labels is not None:
            for example, label in zip(examples, self.labels[chosen], strict=True):
                example["labels"] = int(label)
        return examples


class ExpressionCollator:
    """Makes a dense batch of some cells: expression (cells, genes) first, labels (cells,), weights of the classes."""

    def __init__(self, class_weights: np.ndarray | None = None):
        self.class_weights = class_weights

    def __call__(self, rows: Sequence[dict[str, Any]], keys: Sequence[Sequence[int]]) -> dict[str, Any]:
        """keys are not used: nothing here is random."""
        import torch

        stacked = sp.vstack([row["expression"] for row in rows], format="csr")
        batch = {"expression": torch.from_numpy(stacked.toarray())}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        if self.class_weights is not None:
            batch["class_weights"] = torch.as_tensor(self.class_weights, dtype=torch.float32)
        return batch
