"""`evaluate` module of `cellglot.metrics.response`: `evaluate.load("metrics/evaluate/centroid_accuracy")`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cellglot.metrics.response import centroid_accuracy

_MEAN = datasets.Sequence(datasets.Value("float32"))


class CentroidAccuracy(evaluate.Metric):
    """An item is the mean profile of a condition."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the other conditions that lie farther from a prediction than its own does, mean.",
            citation="Viñas Torné et al., Systema, Nature Biotechnology (2025)",
            inputs_description="predictions, references: (conditions, genes) mean profiles in the same order",
            features=datasets.Features({"predictions": _MEAN, "references": _MEAN}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"centroid_accuracy": float(centroid_accuracy(np.asarray(references), np.asarray(predictions)).mean())}
