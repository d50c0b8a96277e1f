"""Hierarchical cluster accuracy: how many categories of cells a clustering tree puts where a taxonomy has them.

Pang & Tegnér 2020, Table 2: 15 categories (tissue or cell type, species) and two levels of a taxonomy; their figures,
66.7% for example, are fifteenths.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np


def mean_embeddings(
    embeddings_nd: np.ndarray, categories: Sequence[Hashable] | np.ndarray
) -> tuple[list[Any], np.ndarray]:
    """The categories, sorted, and the mean embedding of each: (categories, d)."""
    names, code_n = np.unique(np.asarray(categories), return_inverse=True)
    sums = np.zeros((len(names), embeddings_nd.shape[1]))
    np.add.at(sums, code_n, embeddings_nd)
    return list(names), sums / np.bincount(code_n)[:, None]


def hierarchical_cluster_accuracy(
    embeddings_cd: np.ndarray,
    taxonomy: Sequence[Hashable] | np.ndarray,
    *,
    method: Any = "average",
    metric: Any = "cosine",
) -> dict[str, Any]:
    """Agreement of the tree of some categories, cut into as many groups as a taxonomy's level has, with that level.

    embeddings_cd   (categories, d) mean embedding of each
    taxonomy        (categories,) label of each on the level
    method, metric  of `scipy.cluster.hierarchy.linkage`
    Returns         n_right, n, accuracy = n_right / n, groups: (categories,) label that each one's group stands for.
                    Groups and labels are matched one to one so that most categories are right (Kuhn 1955).
    Raises          ValueError for other lengths, fewer than two categories, or embeddings without a distance
    """
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.optimize import linear_sum_assignment

    labels, label_c = np.unique(np.asarray(taxonomy), return_inverse=True)
    if len(label_c) != len(embeddings_cd) or len(label_c) < 2:
        raise ValueError(
            f"Expected two categories or more with a label each, found {len(embeddings_cd):,} embeddings and "
            f"{len(label_c):,} labels."
        )
    lengths = np.linalg.norm(embeddings_cd, axis=1)
    if not np.isfinite(lengths).all() or (metric == "cosine" and not lengths.all()):
        raise ValueError(
            "Some embeddings hold NaN or infinite values, or are zero, which has no cosine: leave these categories out."
        )
    tree = linkage(embeddings_cd, method=method, metric=metric)
    group_c = cut_tree(tree, n_clusters=[len(labels)])[:, 0]
    n_in_both = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(n_in_both, (group_c, label_c), 1)
    groups, matched = linear_sum_assignment(n_in_both, maximize=True)
    n_right = int(n_in_both[groups, matched].sum())
    return {
        "n_right": n_right,
        "n": len(label_c),
        "accuracy": n_right / len(label_c),
        "groups": [labels[matched[g]] for g in group_c],
    }
