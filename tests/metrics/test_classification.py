"""Figures of a classifier against scikit-learn's and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from cellglot.metrics.baselines import BASELINES, baseline_scores
from cellglot.metrics.classification import area_under_roc, classification_metrics, confusion_table, softmax

CLASSES = ["B", "NK", "T"]


@given(st.integers(0, 1000))
def test_area_under_roc_equals_scikit_learn_s_with_ties(seed):
    rng = np.random.default_rng(seed)
    positive = rng.random(17) < 0.4
    scores = rng.integers(5, size=17) / 4
    if positive.all() or not positive.any():
        assert np.isnan(area_under_roc(positive, scores))
    else:
        assert area_under_roc(positive, scores) == pytest.approx(roc_auc_score(positive, scores))


def test_metrics_of_known_predictions():
    labels = np.array(["B", "B", "T", "T", "T"])
    scores = np.array([[3, 0, 1], [0, 2, 1], [0, 0, 1], [0, 0, 5], [0, 0, 2]], dtype=float)
    found = classification_metrics(labels, scores, CLASSES)
    assert found["accuracy"] == 0.8
    assert found["n"] == 5
    # NK was predicted once and never occurs: it counts against B's recall, not as a class of its own.
    assert found["macro_f1"] == pytest.approx(
        f1_score(labels, ["B", "NK", "T", "T", "T"], labels=["B", "T"], average="macro")
    )
    assert list(found["per_class"]) == ["B", "T"]
    assert found["per_class"]["B"] == {
        "n": 2,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "auroc": pytest.approx(roc_auc_score(labels == "B", scores[:, 0])),
    }
    assert found["low"] < 0.8 < found["high"]


def test_one_class_has_no_area_but_an_accuracy():
    found = classification_metrics(np.array(["T", "T"]), np.array([[0, 0, 1], [1, 0, 0]]), CLASSES)
    assert found["accuracy"] == 0.5
    assert np.isnan(found["macro_auroc"])


def test_confusion_has_every_class_in_order():
    table = confusion_table(np.array(["T", "B", "B"]), np.array(["B", "B", "B"]), CLASSES)
    assert table.to_numpy().tolist() == [[2, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_softmax_of_large_logits():
    assert softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3)]])).tolist() == [
        [0.5, 0.5],
        pytest.approx([0.25, 0.75]),
    ]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_baselines_tell_separate_clouds_apart_and_score_in_the_order_of_classes(name, n_classes):
    rng = np.random.default_rng(0)
    # Classes in an order that is not alphabetical, and one that no training item has
    classes = [*["z", "a", "m"][:n_classes], "never"]
    labels = np.array(classes)[rng.integers(n_classes, size=120)]
    labels[:40] = "a"
    x = rng.normal(size=(120, 4)) + 6 * np.stack([labels == c for c in ("z", "a", "m", "x")], axis=1)
    scores = baseline_scores(name, x[:90], labels[:90], x[90:], classes)
    assert scores.shape == (30, len(classes))
    predicted = np.array(classes)[scores.argmax(axis=1)]
    assert np.isneginf(scores[:, -1]).all()
    if name == "majority":
        assert set(predicted) == {"a"}
    else:
        assert (predicted == labels[90:]).mean() > 0.95


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="Expected a baseline among"):
        baseline_scores("xgboost", np.zeros((4, 1)), np.array(list("abab")), np.zeros((1, 1)), ["a", "b"])
