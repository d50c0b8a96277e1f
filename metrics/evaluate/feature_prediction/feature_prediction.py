"""`evaluate` module of the metrics of the same name: `evaluate.load("metrics/evaluate/feature_prediction")`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cellglot.metrics.feature_prediction import precision_at_true_size, ranking_metrics, set_metrics


class FeaturePrediction(evaluate.Metric):
    """An item is a cell: the score of each feature, and whether it is there."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="How well scores rank the features that cells have, and how well sets of the highest agree.",
            citation="Lance et al., Multimodal single cell data integration challenge, NeurIPS 2021 competition",
            inputs_description="predictions: scores of the features of each cell; references: 1 for those that are "
            "there, else 0; threshold: least score of a feature that is predicted, without which sets are not judged",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("bool")),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any, *, threshold: float | None = None) -> dict[str, Any]:
        scores, present = np.asarray(predictions, dtype=np.float32), np.asarray(references, dtype=bool)
        found = {**ranking_metrics(present, scores), "precision_at_k": precision_at_true_size(present, scores)}
        return found if threshold is None else found | set_metrics(present, scores >= threshold)
