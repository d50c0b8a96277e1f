"""`evaluate` module of `cellglot.metrics.wasserstein`: `evaluate.load("metrics/evaluate/wasserstein")`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cellglot.metrics.wasserstein import resampled_wasserstein

_CLOUD = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))


class Wasserstein(evaluate.Metric):
    """An item is a whole set of cells, since two sets need not be equally large."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Wasserstein distance between sets of cells, mean and sd over resamples and pairs of sets.",
            citation="Flamary et al., POT: Python Optimal Transport, Journal of Machine Learning Research 22 (2021)",
            inputs_description="predictions, references: lists of sets of cells, each (cells, dimensions); "
            "n_cells, n_resamples, order, sliced, seed: see cellglot.metrics.wasserstein.resampled_wasserstein",
            features=datasets.Features({"predictions": _CLOUD, "references": _CLOUD}),
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        draws = [resampled_wasserstein(np.asarray(x), np.asarray(y), **options) for x, y in pairs]
        averaged = np.mean(draws, axis=0)
        sd = averaged.std(ddof=1) if len(averaged) > 1 else np.nan
        return {"wasserstein": float(averaged.mean()), "sd": float(sd)}
