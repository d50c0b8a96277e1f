"""Label transfer: cell types of one species given to the cells of another by their nearest neighbours."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .probe import accuracy_with_interval


def transferred_labels(
    reference_nd: np.ndarray, labels_n: Sequence[str] | np.ndarray, query_md: np.ndarray, *, k: int = 15
) -> np.ndarray:
    """(m,) for each query cell the most frequent label of its k nearest reference cells by cosine.

    Where labels are equally frequent the first by name is taken (scikit-learn's rule).
    """
    from sklearn.neighbors import KNeighborsClassifier

    neighbours = KNeighborsClassifier(min(k, len(reference_nd)), metric="cosine", algorithm="brute")
    return neighbours.fit(reference_nd, np.asarray(labels_n)).predict(query_md)


def label_transfer(
    reference_nd: np.ndarray,
    reference_labels: Sequence[str] | np.ndarray,
    query_md: np.ndarray,
    query_labels: Sequence[str] | np.ndarray,
    *,
    k: int = 15,
    seed: int = 0,
) -> dict[str, Any]:
    """How well labels of the reference cells carry over to query cells of the classes that both have.

    reference_nd, query_md  (cells, d) embeddings in one space
    k                       neighbours that vote
    Returns  macro_f1 over the shared classes, accuracy with its 95% bootstrap interval over cells (low, high), n query
             cells of shared classes, classes. A cell that is given a class of the reference alone counts as wrong.
    Raises   ValueError without a shared class
    """
    reference_labels, query_labels = np.asarray(reference_labels), np.asarray(query_labels)
    shared = np.intersect1d(reference_labels, query_labels)
    if not len(shared):
        raise ValueError(
            f"The sets share no class: {', '.join(np.unique(reference_labels)[:3])}, ... and "
            f"{', '.join(np.unique(query_labels)[:3])}, ... Name the classes of both alike."
        )
    asked = np.isin(query_labels, shared)
    given = transferred_labels(reference_nd, reference_labels, query_md[asked], k=k)
    figures = accuracy_with_interval(query_labels[asked], given, seed=seed)
    return {**figures, "n": int(asked.sum()), "classes": [str(name) for name in shared]}
