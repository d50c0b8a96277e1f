import numpy as np
import pytest
from sklearn.metrics import f1_score

from cellglot.metrics.label_transfer import label_transfer, transferred_labels


def cells(n, seed, centres):
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(centres), size=n)
    return np.asarray(centres, dtype=float)[labels] + rng.normal(size=(n, 3)), np.array(list("abcd"))[labels]


def test_equals_a_plain_loop():
    (x, labels), (query, truth) = cells(60, 0, [[3, 0, 0], [0, 3, 0], [0, 0, 3]]), cells(40, 1, [[2, 0, 1], [0, 2, 0]])
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, query)]
    loop = []
    for cell in unit[1]:
        nearest = labels[np.argsort(-unit[0] @ cell)[:7]]
        names, counts = np.unique(nearest, return_counts=True)
        loop.append(names[counts.argmax()])
    given = transferred_labels(x, labels, query, k=7)
    assert given.tolist() == loop
    found = label_transfer(x, labels, query, truth, k=7)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, loop, average="macro", labels=["a", "b"]))
    assert found["low"] <= found["accuracy"] == (truth == loop).mean() <= found["high"]


def test_only_shared_classes_are_asked_and_others_are_wrong_answers():
    x, query = np.eye(3), np.eye(3)[[0, 1, 2, 1]]
    found = label_transfer(x, ["a", "mouse only", "c"], query, ["a", "c", "human only", "human only"], k=1)
    assert found["classes"] == ["a", "c"]
    assert found["n"] == 2
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == 0.5


def test_fewer_reference_cells_than_neighbours():
    assert transferred_labels(np.eye(2), ["a", "a"], np.eye(2), k=15).tolist() == ["a", "a"]


def test_no_shared_class():
    with pytest.raises(ValueError, match=r"share no class: a, \.\.\. and b"):
        label_transfer(np.eye(2), ["a", "a"], np.eye(2), ["b", "b"])
