import itertools

import numpy as np
import pytest

from cellglot.metrics.cluster_accuracy import hierarchical_cluster_accuracy, mean_embeddings


def tissues():
    """15 categories around five directions, which lie around two: fine and coarse level of a taxonomy."""
    rng = np.random.default_rng(0)
    coarse = np.array([0, 0, 1, 1, 1])
    fine_centres = 10 * np.eye(7)[coarse] + 4 * np.eye(7)[2:]
    fine = np.repeat(np.arange(5), 3)
    return fine_centres[fine] + 0.1 * rng.normal(size=(15, 7)), fine, coarse[fine]


def test_tree_of_two_levels_is_right_on_both():
    embeddings, fine, coarse = tissues()
    for level in (fine, coarse):
        found = hierarchical_cluster_accuracy(embeddings, level)
        assert (found["n_right"], found["n"], found["accuracy"]) == (15, 15, 1.0)
        assert found["groups"] == level.tolist()


def test_misplaced_categories_are_fifteenths():
    embeddings, fine, coarse = tissues()
    wrong = fine.copy()
    wrong[[0, 3]] = wrong[[3, 0]]
    found = hierarchical_cluster_accuracy(embeddings, wrong)
    assert (found["n_right"], found["n"]) == (13, 15)
    assert found["accuracy"] == pytest.approx(0.8667, abs=1e-4)
    assert hierarchical_cluster_accuracy(embeddings, coarse[::-1])["n_right"] == 12  # 6 of 6 and 6 of 9


@pytest.mark.parametrize("method", ["average", "ward"])
def test_matching_is_the_best_one_to_one_of_all(method):
    rng = np.random.default_rng(1)
    embeddings, labels = rng.normal(size=(15, 3)), rng.permutation(15) % 4
    found = hierarchical_cluster_accuracy(embeddings, labels, method=method, metric="euclidean")
    from scipy.cluster.hierarchy import cut_tree, linkage

    group = cut_tree(linkage(embeddings, method), n_clusters=[4])[:, 0]
    best = max(sum(np.array(p)[group] == labels) for p in itertools.permutations(range(4)))
    assert found["n_right"] == best


def test_category_means():
    embeddings = np.arange(12.0).reshape(6, 2)
    names, means = mean_embeddings(embeddings, ["b", "a", "b", "a", "a", "c"])
    assert names == ["a", "b", "c"]
    np.testing.assert_array_equal(means, [embeddings[[1, 3, 4]].mean(0), embeddings[[0, 2]].mean(0), embeddings[5]])


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(ValueError, match="3 embeddings and 2 labels"):
        hierarchical_cluster_accuracy(np.ones((3, 2)), ["a", "b"])
    with pytest.raises(ValueError, match="zero, which has no cosine"):
        hierarchical_cluster_accuracy(np.eye(3) * [1, 1, 0], ["a", "b", "b"])
