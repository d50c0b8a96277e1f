"""Figures of a classifier: accuracy, macro F1, each class, confusion, ROC. Strings and scores in, plain numbers out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .probe import accuracy_with_interval


def classification_metrics(
    labels: np.ndarray, scores: np.ndarray, classes: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """What a classifier is worth on some items.

    labels   (items,) true class names
    scores   (items, classes) the higher, the likelier
    Returns  accuracy with its 95% bootstrap interval (low, high), macro_f1 over the classes among the labels,
             macro_auroc one against the rest (NaN without two classes), n, and per class: n, precision, recall, f1,
             auroc
    """
    from sklearn.metrics import precision_recall_fscore_support

    names = np.asarray(classes, dtype=str)
    predicted = names[scores.argmax(axis=1)]
    present = [name for name in names if (labels == name).any()]
    table: Any = precision_recall_fscore_support(labels, predicted, labels=present, zero_division=0)  # type: ignore[arg-type]
    precision, recall, f1, count = table
    auroc = {name: area_under_roc(labels == name, scores[:, i]) for i, name in enumerate(names)}
    per_class = {
        name: {
            "n": int(count[i]),
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "auroc": auroc[name],
        }
        for i, name in enumerate(present)
    }
    areas = [auroc[name] for name in present]
    return {
        **accuracy_with_interval(labels, predicted, seed=seed),
        "macro_auroc": float(np.mean(areas)) if areas and not np.isnan(areas).any() else float("nan"),
        "n": len(labels),
        "per_class": per_class,
    }


def area_under_roc(positive: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive item scores above a negative one (ties count half).

    positive  (items,) boolean
    Returns   NaN where all items are of one kind
    """
    from scipy.stats import rankdata

    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    rank_sum = rankdata(scores)[positive].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def confusion_table(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Items of each true class (rows) predicted as each class (columns)."""
    table = pd.crosstab(pd.Series(labels, name="label"), pd.Series(predicted, name="predicted"))
    return table.reindex(index=list(classes), columns=list(classes), fill_value=0)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(items, classes) probabilities of logits."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
