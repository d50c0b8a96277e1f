"""`evaluate` module of `cellglot.metrics.response`: `evaluate.load("metrics/evaluate/response")`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cellglot.metrics.response import Response, mean_figures, response_table

_CELLS = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))


class ResponseMetrics(evaluate.Metric):
    """An item is a condition: all its predicted, true and control profiles, as many as there are of each."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Figures of predicted responses to perturbations, means over conditions.",
            citation="Tan, Wang, Zhang, A pre-trained model for cellular responses to drug perturbations, section 3.3",
            inputs_description="predictions, references, controls: lists of conditions, each (profiles, genes); "
            "centroid_g, training_scores_g, n_dis_cells, seed: see cellglot.metrics.response.response_metrics",
            features=datasets.Features({"predictions": _CELLS, "references": _CELLS, "controls": _CELLS}),
        )

    def _compute(self, predictions: Any, references: Any, controls: Any, **options: Any) -> dict[str, Any]:
        sides = zip(references, predictions, controls, strict=True)
        responses = {i: Response(*(np.asarray(cells) for cells in condition)) for i, condition in enumerate(sides)}
        return mean_figures(response_table(responses, **options))
