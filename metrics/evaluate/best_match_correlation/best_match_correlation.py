"""`evaluate` module of `cellglot.metrics.cell_correlation`, loaded from "metrics/evaluate/best_match_correlation"."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cellglot.metrics.cell_correlation import best_match_correlation, sampled_best_match_correlation

_CELLS = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))


class BestMatchCorrelation(evaluate.Metric):
    """An item is a whole set of cells, since two sets need not be equally large."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="`dis`: mean over true cells of the highest correlation with a predicted cell, mean over sets.",
            citation="Tan, Wang, Zhang, A pre-trained model for cellular responses to drug perturbations, section 3.3",
            inputs_description="predictions, references: lists of sets of cells, each (cells, genes); n_cells: cells "
            "drawn of each set, all if absent; n_draws, seed: see "
            "cellglot.metrics.cell_correlation.sampled_best_match_correlation",
            features=datasets.Features({"predictions": _CELLS, "references": _CELLS}),
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        function: Any = sampled_best_match_correlation if "n_cells" in options else best_match_correlation
        pairs = zip(references, predictions, strict=True)
        figures = [function(np.asarray(true), np.asarray(predicted), **options) for true, predicted in pairs]
        return {"best_match_correlation": float(np.mean(figures))}
