"""Figures of predicted responses against direct formulas, and what they say of predictions that are made up."""

from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr, ttest_ind

from cellglot.metrics import cell_correlation, energy_distance
from cellglot.metrics.cell_correlation import best_match_correlation, sampled_best_match_correlation
from cellglot.metrics.differential_genes import differential_overlap, differential_scores, mean_scores, top_genes
from cellglot.metrics.response import (
    Response,
    centroid_accuracy,
    change_correlation,
    correlation,
    mean_figures,
    response_metrics,
    response_table,
)

GENES = 67


def cells(n, seed, genes=GENES, shift: Any = 0.0):
    drawn = np.random.default_rng(seed).normal(5, 1, size=(n, genes)) + np.asarray(shift)
    return drawn.astype(np.float32)


def plain_dis(true, predicted):
    return np.mean([max(pearsonr(x, y).statistic for y in predicted) for x in true])


def test_dis_is_the_loop_over_all_pairs():
    true, predicted = cells(13, 0), cells(17, 1)
    assert best_match_correlation(true, predicted) == pytest.approx(plain_dis(true, predicted), abs=1e-6)
    genes = np.array([3, 1, 41, 5, 7])
    found = best_match_correlation(true, predicted, genes=genes)
    assert found == pytest.approx(plain_dis(true[:, genes], predicted[:, genes]), abs=1e-6)
    # A permutation of the same cells is a perfect prediction, and dis is no symmetric figure.
    assert best_match_correlation(true, true[::-1] * 3 + 2) == pytest.approx(1, abs=1e-6)
    assert best_match_correlation(true[:1], np.concatenate([true[:1], predicted])) == pytest.approx(1, abs=1e-6)
    assert best_match_correlation(np.concatenate([true[:1], predicted]), true[:1]) < 0.5


def test_dis_does_not_depend_on_the_blocks(monkeypatch):
    true, predicted = cells(29, 0), cells(31, 1)
    whole = best_match_correlation(true, predicted)
    monkeypatch.setattr(cell_correlation, "TRUE_AT_ONCE", 7)
    monkeypatch.setattr(cell_correlation, "PREDICTED_AT_ONCE", 5)
    assert best_match_correlation(true, predicted) == pytest.approx(whole, abs=1e-6)


def test_cells_without_spread_correlate_with_nothing():
    flat = np.full((3, GENES), 0.1, dtype=np.float32)
    assert best_match_correlation(flat, cells(5, 0)) == 0
    # The best of a flat cell (0) and one that is the opposite (-1)
    true = cells(1, 0)
    assert best_match_correlation(true, np.concatenate([-true, flat[:1]])) == 0


def test_sampled_dis_draws_what_it_says(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        cell_correlation,
        "best_match_correlation",
        lambda true, predicted, genes: sizes.append((len(true), len(predicted), len(np.unique(true[:, 0])))) or 0.5,
    )
    assert sampled_best_match_correlation(cells(100, 0), cells(11, 1), n_draws=3) == 0.5
    assert sizes == [(30, 11, 30)] * 3
    monkeypatch.undo()
    many = cells(100, 0), cells(100, 1)
    assert sampled_best_match_correlation(*many, seed=0) != sampled_best_match_correlation(*many, seed=1)
    # Fewer cells to choose from match less well.
    assert sampled_best_match_correlation(*many, n_draws=20) < best_match_correlation(*many)
    assert sampled_best_match_correlation(*many, n_cells=1000) == pytest.approx(best_match_correlation(*many))


def test_energy_distance_is_the_mean_over_all_pairs(monkeypatch):
    x, y = cells(23, 0), cells(31, 1, shift=0.5)
    expected = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    assert energy_distance.energy_distance(x, y) == pytest.approx(expected)
    monkeypatch.setattr(energy_distance, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(energy_distance, "COLUMNS_AT_ONCE", 5)
    assert energy_distance.energy_distance(x, y) == pytest.approx(expected)
    assert energy_distance.energy_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)


def test_differential_scores_are_welch_s_t():
    treated, control = cells(11, 0, shift=np.linspace(-1, 1, GENES)), cells(19, 1)
    expected = ttest_ind(treated.astype(float), control.astype(float), equal_var=False).statistic
    np.testing.assert_allclose(differential_scores(treated, control), expected, rtol=1e-5)
    # One well has the controls' variance.
    one = differential_scores(treated[:1], control)
    error = np.sqrt(control.astype(float).var(axis=0, ddof=1) * (1 + 1 / 19))
    np.testing.assert_allclose(one, (treated[0] - control.astype(float).mean(axis=0)) / error, rtol=1e-5)
    np.testing.assert_allclose(differential_scores(control, treated[:1]), -one, rtol=1e-5)
    # A gene that nobody expresses changes nothing.
    treated[:, 3] = control[:, 3] = 0
    assert differential_scores(treated, control)[3] == 0
    with pytest.raises(ValueError, match="two profiles or more"):
        differential_scores(treated[:1], control[:1])
    with pytest.raises(ValueError, match="same genes"):
        differential_scores(treated, control[:, 1:])


def test_top_genes_are_the_largest_changes_of_either_sign():
    scores = np.array([0.1, -5, 3, 5, 0])
    assert top_genes(scores, 3).tolist() == [1, 3, 2]
    pairs = [(cells(5, 0, shift=2), cells(7, 1)), (cells(5, 2), cells(7, 3))]
    np.testing.assert_allclose(mean_scores(pairs), np.mean([differential_scores(*pair) for pair in pairs], axis=0))
    with pytest.raises(ValueError, match="found none"):
        mean_scores([])


def test_overlap_asks_for_the_direction():
    step = np.zeros(GENES)
    step[:10] = 9
    control, true = cells(19, 0), cells(11, 1, shift=step)
    assert differential_overlap(true, cells(13, 2, shift=step), control, n_genes=10) == 1
    assert differential_overlap(true, cells(13, 2, shift=-step), control, n_genes=10) == 0
    assert differential_overlap(true, cells(13, 2, shift=step[::-1]), control, n_genes=10) == 0


def test_centroid_accuracy_counts_the_conditions_that_lie_farther():
    true = np.array([[0.0], [1.0], [10.0]])
    assert centroid_accuracy(true, true).tolist() == [1, 1, 1]
    # 0.9 is nearer to the second than to the first; 5.5 lies as far from the second as from the third.
    assert centroid_accuracy(true, np.array([[0.9], [1.0], [5.5]])).tolist() == [0.5, 1, 0.75]
    # The same prediction for all
    assert centroid_accuracy(cells(31, 0), np.repeat(cells(1, 1), 31, axis=0)).mean() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two conditions or more"):
        centroid_accuracy(true[:1], true[:1])


def responses(n=5):
    control = cells(19, 100)
    shifts = np.random.default_rng(7).normal(size=(n, GENES))
    true = [cells(11, i, shift=shift) for i, shift in enumerate(shifts)]
    predicted = [cells(13, 50 + i, shift=shift) for i, shift in enumerate(shifts)]
    return {f"drug {i}": Response(true[i], predicted[i], control) for i in range(n)}


def test_metrics_of_a_condition_are_the_formulas():
    response = responses()["drug 0"]
    centroid, training = cells(1, 200)[0], np.arange(GENES)[::-1].astype(float)
    found = response_metrics(response, centroid_g=centroid, training_scores_g=training, n_dis_cells=5)
    true, predicted, control = (
        x.astype(float).mean(axis=0) for x in (response.true, response.predicted, response.control)
    )
    assert found["mean"] == pytest.approx(pearsonr(true, predicted).statistic)
    assert found["mean_de10"] == pytest.approx(pearsonr(true[:10], predicted[:10]).statistic)
    assert found["mean_de50"] == pytest.approx(pearsonr(true[:50], predicted[:50]).statistic)
    assert found["dis_de10"] == pytest.approx(plain_dis(response.true[:, :10], response.predicted[:, :10]), abs=1e-6)
    assert found["dis_sampled"] < found["dis"]
    assert found["delta"] == pytest.approx(pearsonr(true - control, predicted - control).statistic)
    assert found["delta_centroid"] == pytest.approx(pearsonr(true - centroid, predicted - centroid).statistic)
    assert found["mse"] == pytest.approx(np.mean((true - predicted) ** 2))
    assert found["de_genes_from"] == "training"
    assert (found["n_true"], found["n_predicted"], found["n_control"]) == (11, 13, 19)
    # Without training scores the true profiles choose, and nothing is centred on treated ones.
    by_test = response_metrics(response)
    genes = top_genes(differential_scores(response.true, response.control), 10)
    assert by_test["mean_de10"] == pytest.approx(pearsonr(true[genes], predicted[genes]).statistic)
    assert by_test["de_genes_from"] == "test"
    assert "delta_centroid" not in by_test


def test_a_prediction_that_is_the_same_for_all_is_exposed():
    good = responses()
    centroid = np.concatenate([r.true for r in good.values()]).mean(axis=0, dtype=np.float64)
    same = {name: Response(r.true, centroid[None].astype(np.float32), r.control) for name, r in good.items()}
    tuples = response_table({(name, "line"): response for name, response in good.items()}, centroid_g=centroid)
    assert ("drug 0", "line") in tuples.index
    table, of_same = (mean_figures(response_table(x, centroid_g=centroid)) for x in (good, same))
    assert table["centroid_accuracy"] == 1
    assert table["delta_centroid"] > 0.8
    assert of_same["centroid_accuracy"] == pytest.approx(0.5)
    assert of_same["delta_centroid"] == 0
    assert table["n_conditions"] == 5
    # The control predicts no change, yet has a mean that correlates.
    stay = {name: Response(r.true, r.control, r.control) for name, r in good.items()}
    assert mean_figures(response_table(stay))["delta"] == 0


def test_undefined_correlations_are_0():
    assert correlation(np.ones(5), np.arange(5.0)) == 0
    assert change_correlation(np.arange(5.0), np.full(5, 3.0), np.full(5, 3.0)) == 0


def test_what_cannot_be_compared_is_refused():
    x = cells(5, 0)
    with pytest.raises(ValueError, match="same genes"):
        best_match_correlation(x, x[:, :3])
    with pytest.raises(ValueError, match="0 predicted"):
        best_match_correlation(x, x[:0])
    with pytest.raises(ValueError, match="NaN"):
        response_metrics(Response(x, np.where(x == x[0, 0], np.nan, x), x))
    with pytest.raises(ValueError, match="one condition or more"):
        response_table({})
