"""`evaluate` module of `cellglot.metrics.cluster_accuracy`: `evaluate.load("metrics/evaluate/cluster_accuracy")`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cellglot.metrics.cluster_accuracy import hierarchical_cluster_accuracy


class ClusterAccuracy(evaluate.Metric):
    """An item is a category of cells: its mean embedding, and its label in the taxonomy."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Categories that a clustering tree puts where a taxonomy has them.",
            citation="Pang & Tegnér, ICML 2020 Workshop on Computational Biology, Table 2",
            inputs_description="predictions: mean embedding of each category; references: its label; method, metric: "
            "see cellglot.metrics.cluster_accuracy.hierarchical_cluster_accuracy",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        return hierarchical_cluster_accuracy(np.asarray(predictions), references, **options)
