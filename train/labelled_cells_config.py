"""Options that say which cells a classifier learns from and is tested on, whatever the method."""

from dataclasses import dataclass
from typing import Literal

from .config import option
from .loop_config import LoopConfig


@dataclass
class LabelledCellsConfig(LoopConfig):
    """Cells, their split, and what their classifier is compared with."""

    data: str | None = option(None, "count file or folder of them; absent: the embedded PBMCs")
    layer: str | None = option(None, "layer with the raw counts, or raw; absent: X")
    gene_ids: str | None = option(None, "column of var with gene ids; absent: found")
    max_cells: int | None = option(None, "cells to use at the most, drawn at random")
    min_per_class: int = option(0, "labels with fewer cells (or genes) are left out")
    split_by: str | None = option(None, "column of obs whose groups are never split, e.g. donor or batch")
    test_groups: list[str] = option([], "groups of split_by to test on; absent: drawn")
    test_fraction: float = option(
        0.2,
        "share to test on, where neither folds nor test_groups are given (nor PBMCs, whose test part is set); 0: none",
    )
    validation_fraction: float = option(0.1, "share of the rest for early stopping, search or eval_every, if any is on")
    folds: int = option(0, "k-fold cross-validation over cells, groups of split_by, or genes; 0: one split")
    class_weights: Literal["none", "balanced"] = option("none", "balanced: rare classes weigh more in the loss")
    baselines: bool = option(True, "fits logistic regression, linear SVM and random forest on the same split")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.test_fraction < 1 or not 0 < self.validation_fraction < 1:
            raise ValueError("test_fraction and validation_fraction must lie between 0 and 1.")
        if self.folds == 1 or self.folds < 0:
            raise ValueError("folds must be 0 (one split) or 2 and more.")
        if self.min_per_class < 0:
            raise ValueError("min_per_class cannot be negative.")
        if self.max_cells is not None and self.max_cells <= 0:
            raise ValueError(f"max_cells must be positive, found {self.max_cells}.")
        if self.test_groups and not self.split_by:
            raise ValueError("test_groups needs split_by, the column they are values of.")
        if self.test_groups and self.folds:
            raise ValueError("test_groups and folds exclude each other.")
        if self.push_to_hub and self.folds:
            raise ValueError("push_to_hub publishes one model: leave out folds, or push one with train/push_to_hub.py.")
        if self.trackers and self.folds:
            raise ValueError("trackers follow one training: leave out folds, or read metrics.jsonl.")

    @property
    def validates(self) -> bool:
        """Whether a part of the training items is put aside to validate on."""
        return bool(self.patience or self.eval_every)
