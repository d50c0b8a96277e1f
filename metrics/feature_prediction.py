"""How well features of cells are predicted: as sets, as rankings, as values. For genes expressed or peaks open.

With few positives one figure misleads: where 3% of the features are there, predicting none is 97% accurate. So sets are
judged by precision, recall, F1 and Jaccard beside accuracy, scores by areas under curves, values by the NeurIPS 2021
competition's RMSE and correlations.

Axes: n cells, f features.
"""

from typing import Any

import numpy as np

# Columns that are ranked at once: about 100 MB for 1,000 cells
COLUMNS_AT_ONCE = 1_024


def set_metrics(present_nf: np.ndarray, predicted_nf: np.ndarray) -> dict[str, float]:
    """Agreement of predicted sets of features with the true ones.

    present_nf, predicted_nf  (n, f) boolean
    Returns  accuracy over all entries; precision, recall, f1, jaccard of all (cell, feature) pairs pooled; cell_f1 and
             cell_jaccard, means over cells; n_predicted, features a cell. 0 where nothing is predicted, as
             scikit-learn's zero_division=0
    Raises   ValueError for other shapes
    """
    _check_shapes(present_nf, predicted_nf)
    hits_n = (present_nf & predicted_nf).sum(axis=1)
    true_n, told_n = present_nf.sum(axis=1), predicted_nf.sum(axis=1)
    hits, true, told = hits_n.sum(), true_n.sum(), told_n.sum()
    return {
        "accuracy": float(1 - (true + told - 2 * hits) / present_nf.size),
        "precision": _share(hits, told),
        "recall": _share(hits, true),
        "f1": _share(2 * hits, true + told),
        "jaccard": _share(hits, true + told - hits),
        "cell_f1": float(np.mean([_share(2 * h, t + p) for h, t, p in zip(hits_n, true_n, told_n, strict=True)])),
        "cell_jaccard": float(np.mean([_share(h, t + p - h) for h, t, p in zip(hits_n, true_n, told_n, strict=True)])),
        "n_predicted": float(told_n.mean()),
    }


def precision_at_true_size(present_nf: np.ndarray, scores_nf: np.ndarray) -> float:
    """Share of the k features that score highest in a cell that are there, k being how many are; mean over cells with
    any. Features that tie at the k-th place count with the chance that one of them is drawn.

    present_nf  (n, f) boolean
    scores_nf   (n, f) the higher, the likelier
    """
    _check_shapes(present_nf, scores_nf)
    found = []
    for present, scores in zip(present_nf, scores_nf, strict=True):
        if k := int(present.sum()):
            cut = np.partition(scores, -k)[-k]
            above, at = scores > cut, scores == cut
            drawn = (k - above.sum()) * present[at].mean()
            found.append((present[above].sum() + drawn) / k)
    return float(np.mean(found)) if found else float("nan")


def ranking_metrics(present_nf: np.ndarray, scores_nf: np.ndarray) -> dict[str, float]:
    """Areas under the ROC curve and average precisions: of all entries pooled, and of each feature over the cells.

    present_nf  (n, f) boolean
    scores_nf   (n, f) the higher, the likelier
    Returns     pooled_auroc, pooled_average_precision; feature_auroc, feature_average_precision: means over the
                n_features that some cells have and others have not. Ties count as in scikit-learn
    """
    _check_shapes(present_nf, scores_nf)
    pooled_auroc, pooled_precision = _areas(present_nf.reshape(-1, 1), scores_nf.reshape(-1, 1))
    n_present = present_nf.sum(axis=0)
    columns = np.flatnonzero((n_present > 0) & (n_present < len(present_nf)))
    parts = [columns[i : i + COLUMNS_AT_ONCE] for i in range(0, len(columns), COLUMNS_AT_ONCE)]
    found = [_areas(present_nf[:, part], scores_nf[:, part]) for part in parts]
    auroc, precision = (
        np.concatenate([areas[k] for areas in found]) if found else np.array([np.nan]) for k in range(2)
    )
    return {
        "pooled_auroc": float(pooled_auroc[0]),
        "pooled_average_precision": float(pooled_precision[0]),
        "feature_auroc": float(auroc.mean()),
        "feature_average_precision": float(precision.mean()),
        "n_features": len(columns),
    }


def value_metrics(values_nf: np.ndarray, predicted_nf: np.ndarray) -> dict[str, float]:
    """Errors of predicted values, as the NeurIPS 2021 competition has them.

    values_nf, predicted_nf  (n, f) log-normalized expression, or binary accessibility
    Returns  rmse, the root of the mean squared error over all entries; pearson_per_cell and pearson_per_feature, means
             of Pearson's correlations, which count as 0 where one side is constant; pearson of all entries, likewise
    """
    _check_shapes(values_nf, predicted_nf)
    error = predicted_nf.astype(np.float32) - values_nf
    return {
        "rmse": float(np.sqrt(np.mean(np.square(error), dtype=np.float64))),
        "pearson_per_cell": float(_correlations(values_nf, predicted_nf).mean()),
        "pearson_per_feature": float(_correlations(values_nf.T, predicted_nf.T).mean()),
        "pearson": float(_correlations(values_nf.reshape(1, -1), predicted_nf.reshape(1, -1))[0]),
    }


def best_f1_threshold(present_nf: np.ndarray, scores_nf: np.ndarray) -> float:
    """The score at and above which to predict features so that the F1 of all (cell, feature) pairs is highest.

    present_nf  (n, f) boolean, of cells set aside for this
    scores_nf   (n, f) the higher, the likelier
    Returns     one of the scores; infinity, which predicts nothing, where no feature is there
    """
    _check_shapes(present_nf, scores_nf)
    scores = scores_nf.ravel()
    order = np.argsort(-scores)
    hits, scores = np.cumsum(present_nf.ravel()[order]), scores[order]
    if not hits[-1]:
        return float("inf")
    # Only between different scores can a threshold lie.
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    f1 = 2 * hits[ends] / (hits[-1] + ends + 1)
    return float(scores[ends[int(f1.argmax())]])


def _areas(present: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve and average precision of each column; every column has both kinds of entries."""
    n = len(scores)
    order = np.argsort(-scores, axis=0)
    sorted_scores = np.take_along_axis(scores, order, axis=0)
    hit = np.take_along_axis(present, order, axis=0)
    # Where the run of equal scores that an entry is in ends and where it begins: ties share a threshold.
    changes = sorted_scores[1:] != sorted_scores[:-1]
    place = np.arange(n)[:, None]
    edge = np.ones((1, scores.shape[1]), dtype=bool)
    ends = np.where(np.concatenate([changes, edge]), place, n)
    ends = np.minimum.accumulate(ends[::-1], axis=0)[::-1]
    starts = np.maximum.accumulate(np.where(np.concatenate([edge, changes]), place, 0), axis=0)
    hits_up_to = np.take_along_axis(np.cumsum(hit, axis=0), ends, axis=0)
    n_hits = hits_up_to[-1]
    precision = (np.where(hit, hits_up_to / (ends + 1), 0)).sum(axis=0) / n_hits
    # Mann-Whitney: of a positive the mean place of its run, counted from the end.
    ranks = np.where(hit, n - (starts + ends) / 2, 0).sum(axis=0)
    return (ranks - n_hits * (n_hits + 1) / 2) / (n_hits * (n - n_hits)), precision


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of x with that of y; 0 where one is constant."""
    x, y = (a - a.mean(axis=1, keepdims=True, dtype=np.float64) for a in (x, y))
    products = np.einsum("nf,nf->n", x, y)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    # Rounding leaves a constant row a norm of the order of its own precision.
    constant = norms <= 1e-12 * np.sqrt(x.shape[1])
    return np.divide(products, norms, out=np.zeros(len(x)), where=~constant)


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def _check_shapes(truth: np.ndarray, predicted: np.ndarray) -> None:
    if truth.shape != predicted.shape or truth.ndim != 2:
        raise ValueError(
            f"Expected two matrices of cells x features of one shape, found {truth.shape} and {predicted.shape}."
        )
