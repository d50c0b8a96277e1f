"""`evaluate` module of `cellglot.metrics.energy_distance`: `evaluate.load("metrics/evaluate/energy_distance")`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cellglot.metrics.energy_distance import energy_distance

_CELLS = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))


class EnergyDistance(evaluate.Metric):
    """An item is a whole set of cells, since two sets need not be equally large."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Energy distance between sets of cells, mean over pairs of sets.",
            citation="Székely & Rizzo, Energy statistics, Journal of Statistical Planning and Inference 143 (2013)",
            inputs_description="predictions, references: lists of sets of cells, each (cells, dimensions)",
            features=datasets.Features({"predictions": _CELLS, "references": _CELLS}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"energy_distance": float(np.mean([energy_distance(np.asarray(x), np.asarray(y)) for x, y in pairs]))}
