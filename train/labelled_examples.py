"""Labelled cells and genes as the training loop takes them: examples, and a collator that packs them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cellglot.tokenization.packing import packed_cells


class LabelledCells:
    """Cells with class numbers.

    tokens  datasets.Dataset with input_ids in NumPy format
    labels  (cells,) or (cells, tasks) int64, -100 where unknown
    """

    def __init__(self, tokens: Any, labels: np.ndarray):
        self.tokens, self.labels = tokens, labels

    def __getitem__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.__getitems__(indices)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.tokens[indices]["input_ids"]
        return [{"input_ids": ids, "labels": self.labels[i]} for ids, i in zip(rows, indices, strict=True)]


class LabelledGenes:
    """Cells of which some genes have class numbers.

    label_of_token  (vocabulary,) int64 class of each token, -100 where it is not to be learned
    """

    def __init__(self, tokens: Any, label_of_token: np.ndarray):
        self.tokens, self.label_of_token = tokens, label_of_token

    def __getitem__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.__getitems__(indices)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.tokens[indices]["input_ids"]
        return [{"input_ids": ids, "labels": self.label_of_token[ids]} for ids in rows]


class LabelCollator:
    """Packs cells into a batch (see `packed_cells`) with labels, and the weights of the classes if there are any.

    per_gene       labels are one a token, (1, tokens of all cells); else (cells,) or (cells, tasks)
    class_weights  (classes,) or (tasks, classes) float32, or None
    """

    def __init__(self, *, per_gene: bool, class_weights: np.ndarray | None = None):
        self.per_gene = per_gene
        self.class_weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)

    def __call__(self, rows: Sequence[dict[str, Any]], keys: Sequence[Sequence[int]]) -> dict[str, Any]:
        """keys are not used: nothing here is random."""
        labels = [row["labels"] for row in rows]
        stacked = np.concatenate(labels)[None] if self.per_gene else np.stack(labels)
        batch = packed_cells([row["input_ids"] for row in rows]) | {"labels": torch.from_numpy(stacked)}
        return batch if self.class_weights is None else batch | {"class_weights": self.class_weights}


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """(classes,) float32 weights inverse to frequency, of mean 1 over the labelled items; 1 for a class without any.

    counts  (classes,) labelled items of each class
    """
    n_present = max((counts > 0).sum(), 1)
    weights = counts.sum() / (n_present * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 1.0).astype(np.float32)
