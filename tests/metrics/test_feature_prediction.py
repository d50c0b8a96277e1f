"""Predicted features of cells: every figure is scikit-learn's, ties and features that never vary included."""

import numpy as np
import pytest
from sklearn import metrics

from cellglot.metrics import feature_prediction
from cellglot.metrics.feature_prediction import (
    best_f1_threshold,
    precision_at_true_size,
    ranking_metrics,
    set_metrics,
    value_metrics,
)


@pytest.fixture
def cells() -> tuple[np.ndarray, np.ndarray]:
    """What is there in 41 cells of 13 features, few and many, one never and one always; scores of few levels: ties."""
    rng = np.random.default_rng(0)
    present = rng.random((41, 13)) < np.linspace(0, 0.6, 13)
    present[:, 12] = True
    return present, np.round(rng.random((41, 13)) + 0.3 * present, 1)


def test_sets_are_judged_as_by_scikit_learn(cells):
    present, scores = cells
    predicted = scores >= 0.8
    predicted[3], present[4] = False, False
    found = set_metrics(present, predicted)
    truth, told = present.ravel(), predicted.ravel()
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, told))
    for name in ("precision", "recall", "f1", "jaccard"):
        assert found[name] == pytest.approx(getattr(metrics, f"{name}_score")(truth, told)), name
    options = {"average": "samples", "zero_division": 0}
    assert found["cell_f1"] == pytest.approx(metrics.f1_score(present, predicted, **options))
    assert found["cell_jaccard"] == pytest.approx(metrics.jaccard_score(present, predicted, **options))
    assert found["n_predicted"] == pytest.approx(predicted.sum() / 41)


def test_predicting_nothing_is_accurate_and_worthless():
    present = np.zeros((7, 100), dtype=bool)
    present[:, :3] = True
    found = set_metrics(present, np.zeros_like(present))
    assert found["accuracy"] == pytest.approx(0.97)
    assert found["precision"] == found["recall"] == found["f1"] == found["jaccard"] == found["cell_f1"] == 0


def test_rankings_are_judged_as_by_scikit_learn(cells):
    present, scores = cells
    found = ranking_metrics(present, scores)
    assert found["pooled_auroc"] == pytest.approx(metrics.roc_auc_score(present.ravel(), scores.ravel()))
    pooled = metrics.average_precision_score(present.ravel(), scores.ravel())
    assert found["pooled_average_precision"] == pytest.approx(pooled)
    vary = [f for f in range(13) if 0 < present[:, f].sum() < 41]
    assert found["n_features"] == len(vary) == 11
    for name, score in (("auroc", metrics.roc_auc_score), ("average_precision", metrics.average_precision_score)):
        by_feature = [score(present[:, f], scores[:, f]) for f in vary]
        assert found[f"feature_{name}"] == pytest.approx(np.mean(by_feature)), name


def test_features_are_ranked_in_parts_without_change(cells, monkeypatch):
    whole = ranking_metrics(*cells)
    monkeypatch.setattr(feature_prediction, "COLUMNS_AT_ONCE", 3)
    assert ranking_metrics(*cells) == pytest.approx(whole)


def test_no_feature_that_varies_has_no_area():
    present = np.tile([True, False], (3, 1))
    assert np.isnan(ranking_metrics(present, present.astype(float))["feature_auroc"])


def test_precision_at_true_size_is_recall_of_the_top_k(cells):
    present, _ = cells
    present[5] = False
    scores = np.random.default_rng(2).random(present.shape)
    expected = []
    for truth, row in zip(present, scores, strict=True):
        if truth.any():
            top = np.argsort(-row)[: truth.sum()]
            expected.append(truth[top].mean())
    assert precision_at_true_size(present, scores) == pytest.approx(np.mean(expected))


def test_ties_at_the_last_place_count_by_chance():
    present = np.array([[True, True, False, False]])
    # One is certain, the second place is drawn from three, of which one is there.
    assert precision_at_true_size(present, np.array([[3.0, 1.0, 1.0, 1.0]])) == pytest.approx((1 + 1 / 3) / 2)
    assert precision_at_true_size(present, np.zeros((1, 4))) == pytest.approx(0.5)


def test_values_are_judged_as_in_the_competition(cells):
    truth, predicted = np.random.default_rng(3).gamma(1, size=(2, 17, 11))
    truth[4], predicted[:, 5] = 1.5, 0.25
    found = value_metrics(truth, predicted)
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(truth.ravel(), predicted.ravel()))
    with np.errstate(invalid="ignore"):
        by_cell = np.nan_to_num([np.corrcoef(a, b)[0, 1] for a, b in zip(truth, predicted, strict=True)])
        by_feature = np.nan_to_num([np.corrcoef(a, b)[0, 1] for a, b in zip(truth.T, predicted.T, strict=True)])
    assert by_cell[4] == 0
    assert by_feature[5] == 0
    assert found["pearson_per_cell"] == pytest.approx(by_cell.mean())
    assert found["pearson_per_feature"] == pytest.approx(by_feature.mean())
    assert found["pearson"] == pytest.approx(np.corrcoef(truth.ravel(), predicted.ravel())[0, 1])


def test_no_other_threshold_has_a_better_f1(cells):
    present, scores = cells
    threshold = best_f1_threshold(present, scores)
    best = set_metrics(present, scores >= threshold)["f1"]
    assert threshold in scores
    assert best == max(set_metrics(present, scores >= other)["f1"] for other in np.unique(scores))


def test_nothing_to_find_needs_no_threshold():
    assert best_f1_threshold(np.zeros((2, 3), dtype=bool), np.ones((2, 3))) == np.inf


@pytest.mark.parametrize("judge", [set_metrics, ranking_metrics, value_metrics, precision_at_true_size])
def test_other_shapes_are_refused(judge):
    with pytest.raises(ValueError, match=r"one shape, found \(3, 2\) and \(2, 3\)"):
        judge(np.ones((3, 2), dtype=bool), np.ones((2, 3), dtype=bool))
