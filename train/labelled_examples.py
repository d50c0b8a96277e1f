"""Labelled cells and genes as the training loop takes them: examples, and a collator that pads them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cellglot.tokenization.gene_masking import IGNORED_LABEL


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
    """Pads cells into a batch of input_ids, attention_mask, labels, and the weights of the classes if there are any.

    per_gene       labels are one a token and padded with them; else one (or one a task) a cell
    class_weights  (classes,) or (tasks, classes) float32, or None
    """

    def __init__(self, pad_token_id: int, *, per_gene: bool, class_weights: np.ndarray | None = None):
        self.pad_token_id, self.per_gene = pad_token_id, per_gene
        self.class_weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)

    def __call__(self, rows: Sequence[dict[str, Any]], keys: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """keys are not used: nothing here is random."""
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        labels = np.stack([row["labels"] for row in rows]) if not self.per_gene else np.full(shape, IGNORED_LABEL)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            input_ids[i, :n], attention_mask[i, :n] = row["input_ids"], 1
            if self.per_gene:
                labels[i, :n] = row["labels"]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in batch.items()}
        if self.class_weights is not None:
            tensors["class_weights"] = self.class_weights
        return tensors


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """(classes,) float32 weights inverse to frequency, of mean 1 over the labelled items; 1 for a class without any.

    counts  (classes,) labelled items of each class
    """
    n_present = max((counts > 0).sum(), 1)
    weights = counts.sum() / (n_present * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 1.0).astype(np.float32)
