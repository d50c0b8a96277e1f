"""Examples of drug response models for the training loop: treated profiles with a control each, and masked profiles."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from cellglot.drug_response.data import CONDITION, ResponseData


class ResponsePairs:
    """Treated profiles with their conditions, and a control that is drawn anew for each in every epoch.

    data            the training profiles, controls included. Nothing else is ever drawn from
    extractor       ExpressionFeatureExtractor of the model
    training_input  "control": what enters is a control of the profile's cell line; "self": the profile itself (the
                    authors' code)
    Raises          ValueError for no treated profiles, a line without controls, and conditions the extractor refuses

    `collate` makes batches of a DrugResponseForConditionalGeneration. Which control is drawn depends on the example's
    key alone (seed, epoch, number), so it is the same for any batch, process and after a resume.
    """

    def __init__(self, data: ResponseData, extractor: Any, training_input: Literal["control", "self"] = "control"):
        self.rows = np.flatnonzero(~data.is_control)
        if not len(self.rows):
            raise ValueError(f"{data.name}: expected treated profiles to learn from, found controls only.")
        self.expression = extractor(data)["expression"]
        # Each condition once: a fingerprint a cell would weigh as much as its expression.
        asked = data.conditions(self.rows).reset_index(drop=True)
        self.condition = asked.groupby(CONDITION, sort=False, observed=True).ngroup().to_numpy()
        asked = asked.drop_duplicates(CONDITION)
        self.conditions = extractor.conditions(asked["drug"], asked["cell_line"], asked["dose"], "uM")
        self.training_input = training_input
        self.controls = [data.pairs.candidates(int(row)) for row in self.rows] if training_input == "control" else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"example": i}

    def collate(self, rows: Sequence[dict[str, Any]], keys: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """expression, labels (n, g) float32; cell_line, dose, and drug or fingerprint."""
        examples = np.array([row["example"] for row in rows])
        entering = self.rows[examples]
        asked = self.condition[examples]
        batch = {name: torch.from_numpy(values[asked]) for name, values in self.conditions.items()}
        batch["labels"] = torch.from_numpy(self.expression[entering])
        if self.controls is not None:
            drawn = (np.random.default_rng(key).choice(self.controls[i]) for key, i in zip(keys, examples, strict=True))
            entering = np.fromiter(drawn, dtype=np.int64, count=len(examples))
        batch["expression"] = torch.from_numpy(self.expression[entering])
        return batch


class MaskedProfiles:
    """Profiles with genes to hide, and what the condition tasks are to tell: batches of a DrugResponseForPreTraining.

    expression  (all, g) an array, or StoredProfiles, of which rows are read
    labels      cell_line, drug (n,) int64 with -100 for unknown, dose (n,) float32 with NaN; those of the model's tasks
    mask_ratio  share of the genes that is hidden, the same number in every profile
    rows        (n,) positions of the examples; None: all
    extractor   scales what is read; None: it is scaled already
    """

    def __init__(
        self,
        expression: Any,
        labels: dict[str, np.ndarray],
        mask_ratio: float,
        *,
        rows: np.ndarray | None = None,
        extractor: Any = None,
    ):
        self.rows = np.arange(len(expression)) if rows is None else rows
        self.expression, self.labels, self.mask_ratio, self.extractor = expression, labels, mask_ratio, extractor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        values = self.read(np.asarray(indices))
        return [
            {"expression": x} | {name: column[i] for name, column in self.labels.items()}
            for i, x in zip(indices, values, strict=True)
        ]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """(indices, g) float32 scaled expression of examples."""
        values = self.expression[self.rows[indices]]
        return values if self.extractor is None else self.extractor.scale(values)

    def collate(self, rows: Sequence[dict[str, Any]], keys: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """expression, labels (n, g) float32; masked (n, g) bool, a pure function of each key; the tasks' labels."""
        expression = torch.from_numpy(np.stack([row["expression"] for row in rows]))
        n_genes = expression.shape[1]
        n_masked = max(round(self.mask_ratio * n_genes), 1)
        masked = np.zeros(expression.shape, dtype=bool)
        for row, key in zip(masked, keys, strict=True):
            row[np.random.default_rng(key).choice(n_genes, n_masked, replace=False)] = True
        batch = {"expression": expression, "labels": expression, "masked": torch.from_numpy(masked)}
        return batch | {name: torch.from_numpy(np.array([row[name] for row in rows])) for name in self.labels}
