"""`evaluate.load(path)` without a network gives what the plain functions give."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

import cellglot.metrics
from cellglot.metrics.cell_correlation import best_match_correlation, sampled_best_match_correlation
from cellglot.metrics.cluster_accuracy import hierarchical_cluster_accuracy
from cellglot.metrics.energy_distance import energy_distance
from cellglot.metrics.feature_prediction import precision_at_true_size, ranking_metrics, set_metrics
from cellglot.metrics.label_transfer import label_transfer
from cellglot.metrics.response import Response, centroid_accuracy, mean_figures, response_table
from cellglot.metrics.wasserstein import resampled_wasserstein

MODULES = Path(cellglot.metrics.__file__).parent / "evaluate"


def load(name):
    return evaluate.load(str(MODULES / name))


def cells(n, seed):
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


def test_wasserstein_of_sets_of_different_sizes():
    pairs = [(cells(20, 0), cells(33, 1)), (cells(15, 2), cells(11, 3))]
    found = load("wasserstein").compute(
        predictions=[x.tolist() for x, _ in pairs], references=[y.tolist() for _, y in pairs], n_resamples=3
    )
    draws = np.mean([resampled_wasserstein(x, y, n_resamples=3) for x, y in pairs], axis=0)
    assert found == {"wasserstein": pytest.approx(draws.mean()), "sd": pytest.approx(draws.std(ddof=1))}


def test_cluster_accuracy():
    embeddings, labels = cells(7, 0), list("aabbcca")
    found = load("cluster_accuracy").compute(
        predictions=embeddings, references=labels, method="ward", metric="euclidean"
    )
    assert found == hierarchical_cluster_accuracy(embeddings, labels, method="ward", metric="euclidean")


def test_label_transfer():
    embeddings, labels, sources = cells(40, 0), np.array(list("abcd") * 10), np.repeat(["human", "mouse"], 20)
    module = load("label_transfer")
    inputs = {"predictions": embeddings, "references": labels, "sources": sources}
    found = module.compute(**inputs, reference="mouse", query="human", k=3)
    assert found == label_transfer(embeddings[20:], labels[20:], embeddings[:20], labels[:20], k=3)
    with pytest.raises(ValueError, match="No cell is of source 'rat'"):
        module.compute(**inputs, reference="rat", query="human")


def test_feature_prediction():
    rng = np.random.default_rng(0)
    scores, present = rng.random((7, 11), dtype=np.float32), rng.random((7, 11)) < 0.3
    module, inputs = load("feature_prediction"), {"predictions": scores, "references": present}
    ranks = {**ranking_metrics(present, scores), "precision_at_k": precision_at_true_size(present, scores)}
    assert module.compute(**inputs) == ranks
    assert module.compute(**inputs, threshold=0.5) == {**ranks, **set_metrics(present, scores >= 0.5)}


def test_responses_and_their_single_figures():
    sets = [[cells(n, 10 * i + n) for n in (20, 13, 17)] for i in range(3)]
    true, predicted, controls = ([side.tolist() for side in sides] for sides in zip(*sets, strict=True))
    inputs = {"references": true, "predictions": predicted}
    found = load("response").compute(**inputs, controls=controls, seed=3)
    expected = mean_figures(response_table({i: Response(*sides) for i, sides in enumerate(sets)}, seed=3))
    assert found == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in expected.items()
    }
    pairs = [(x, y) for x, y, _ in sets]
    dis = load("best_match_correlation")
    whole = np.mean([best_match_correlation(x, y) for x, y in pairs])
    sampled = np.mean([sampled_best_match_correlation(x, y, n_cells=5, seed=1) for x, y in pairs])
    assert dis.compute(**inputs) == {"best_match_correlation": pytest.approx(whole)}
    assert dis.compute(**inputs, n_cells=5, seed=1) == {"best_match_correlation": pytest.approx(sampled)}
    energy = np.mean([energy_distance(x, y) for x, y in pairs])
    assert load("energy_distance").compute(**inputs) == {"energy_distance": pytest.approx(energy)}
    means = [np.stack([side.mean(axis=0) for side in sides]) for sides in (list(zip(*pairs, strict=True)))]
    accuracy = load("centroid_accuracy").compute(references=means[0], predictions=means[1])
    assert accuracy == {"centroid_accuracy": pytest.approx(centroid_accuracy(*means).mean())}
