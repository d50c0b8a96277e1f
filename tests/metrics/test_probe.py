import numpy as np
import pytest

from cellglot.metrics.probe import accuracy_with_interval, linear_probe, majority_prediction


def blobs(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    return np.eye(3)[labels] @ np.array([[9.0, 0, 0, 1e3], [0, 9, 0, 1e3], [0, 0, 9, 1e3]]) + rng.normal(
        size=(n, 4)
    ), np.array(["a", "b", "c"])[labels]


def test_probe_finds_separable_types_and_no_others():
    (x, y), (x_test, y_test) = blobs(90, 0), blobs(60, 1)
    assert (linear_probe(x, y, x_test) == y_test).all()
    noise = np.random.default_rng(0).normal(size=(90, 4))
    assert (linear_probe(noise, y, noise[:60]) == y_test).mean() < 0.6


def test_accuracy_interval_covers_and_narrows():
    rng = np.random.default_rng(0)
    truth = np.array(["a"] * 400)
    predicted = np.where(rng.random(400) < 0.8, "a", "b")
    wide, narrow = (accuracy_with_interval(truth[:n], predicted[:n]) for n in (40, 400))
    for found in (wide, narrow):
        assert found["low"] < found["accuracy"] < found["high"]
    assert narrow["high"] - narrow["low"] < wide["high"] - wide["low"]
    assert narrow["accuracy"] == (predicted == "a").mean()
    assert accuracy_with_interval(truth, truth) == {"accuracy": 1, "low": 1, "high": 1, "macro_f1": 1}


def test_macro_f1_counts_missed_types():
    found = accuracy_with_interval(["a", "a", "b"], ["a", "a", "a"])
    assert found["macro_f1"] == pytest.approx((0.8 + 0) / 2)


def test_majority():
    assert majority_prediction(["x", "y", "y"], 2).tolist() == ["y", "y"]
