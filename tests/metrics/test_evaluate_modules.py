"""`evaluate.load(path)` without a network gives what the plain functions give."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

import cellglot.metrics
from cellglot.metrics.cluster_accuracy import hierarchical_cluster_accuracy
from cellglot.metrics.label_transfer import label_transfer
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
