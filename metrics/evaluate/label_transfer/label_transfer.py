"""`evaluate` module of `cellglot.metrics.label_transfer`: `evaluate.load("metrics/evaluate/label_transfer")`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cellglot.metrics.label_transfer import label_transfer


class LabelTransfer(evaluate.Metric):
    """An item is a cell: its embedding, its label, and the source (as a rule, the species) it is from."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Macro F1 of labels given to the cells of one source by their nearest neighbours of another.",
            citation="Pang & Tegnér, ICML 2020 Workshop on Computational Biology",
            inputs_description="predictions: embedding of each cell; references: its label; sources: its source; "
            "reference, query: the sources to carry labels from and to; k, seed: see "
            "cellglot.metrics.label_transfer.label_transfer",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("string"),
                    "sources": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self, predictions: Any, references: Any, sources: Any, *, reference: str, query: str, **options: Any
    ) -> dict[str, Any]:
        embeddings, labels, sources = np.asarray(predictions), np.asarray(references), np.asarray(sources)
        for name in (reference, query):
            if name not in sources:
                raise ValueError(f"No cell is of source {name!r}; there are {', '.join(np.unique(sources))}.")
        sides = [of for name in (reference, query) for of in (embeddings[sources == name], labels[sources == name])]
        return label_transfer(*sides, **options)
