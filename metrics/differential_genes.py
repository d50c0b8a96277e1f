"""Which genes a treatment changes most, by Welch's t statistic, and how many of them a prediction finds.

Axis letters: n treated and k control profiles, g genes.
"""

from collections.abc import Iterable

import numpy as np

# Variance below this is no variance: genes that nobody expresses
TINY = 1e-12


def differential_scores(treated_ng: np.ndarray, control_kg: np.ndarray) -> np.ndarray:
    """(g,) Welch's t of each gene; positive where the treatment raises it, 0 where nothing changes.

    A group of a single profile, such as one well of L1000, has no variance: the other group's stands in for it.
    Raises  ValueError for other genes, empty groups, or one profile in both
    """
    if treated_ng.ndim != 2 or control_kg.ndim != 2 or treated_ng.shape[1] != control_kg.shape[1]:
        raise ValueError(
            f"Expected treated and control profiles over the same genes, found {treated_ng.shape} and "
            f"{control_kg.shape}."
        )
    n, k = len(treated_ng), len(control_kg)
    if not n or not k or n + k < 3:
        raise ValueError(f"Expected two profiles or more in one group at least, found {n} treated and {k} control.")
    step = treated_ng.mean(axis=0, dtype=np.float64) - control_kg.mean(axis=0, dtype=np.float64)
    of_treated = (treated_ng if n > 1 else control_kg).var(axis=0, ddof=1, dtype=np.float64)
    of_control = (control_kg if k > 1 else treated_ng).var(axis=0, ddof=1, dtype=np.float64)
    error = of_treated / n + of_control / k
    # A change without any spread is as sure as can be.
    return np.where(np.abs(step) > np.sqrt(TINY), step / np.sqrt(np.maximum(error, TINY)), 0.0)


def top_genes(scores_g: np.ndarray, n_genes: int) -> np.ndarray:
    """Indices of the genes with the largest scores, whatever their sign, best first; of equal ones the first."""
    return np.argsort(-np.abs(scores_g), kind="stable")[:n_genes]


def mean_scores(groups: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(g,) mean of the scores of several (treated, control) pairs: of each cell line, so that lines do not mix.

    Raises  ValueError without a pair
    """
    scores = [differential_scores(treated, control) for treated, control in groups]
    if not scores:
        raise ValueError("Expected treated and control profiles of one cell line or more, found none.")
    return np.mean(scores, axis=0)


def differential_overlap(
    true_ng: np.ndarray, predicted_mg: np.ndarray, control_kg: np.ndarray, *, n_genes: int = 50
) -> float:
    """Share of the genes that change most in truth that are also among those that change most in the prediction.

    The direction has to agree. Of g genes, a random ranking finds n_genes / (2 g).
    """
    true, predicted = (differential_scores(treated, control_kg) for treated in (true_ng, predicted_mg))
    shared = np.intersect1d(top_genes(true, n_genes), top_genes(predicted, n_genes))
    return float((true[shared] * predicted[shared] > 0).sum() / min(n_genes, len(true)))
