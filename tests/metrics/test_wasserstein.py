"""Against closed forms: translations, Gaussians, and a plain assignment."""

from typing import Any

import numpy as np
import ot
import pytest
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from cellglot.metrics.wasserstein import (
    exact_wasserstein,
    resampled_wasserstein,
    sliced_wasserstein,
    wasserstein_by_class,
    wasserstein_matrix,
)


def gaussian(n, d, seed, mean: Any = 0.0, scale: Any = 1.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * scale + np.asarray(mean)


@pytest.mark.parametrize("order", [1, 2])
def test_translation_has_the_length_of_its_step(order):
    x, step = gaussian(67, 13, 0), gaussian(1, 13, 1)[0]
    assert exact_wasserstein(x, x[::-1] + step, order=order) == pytest.approx(np.linalg.norm(step))
    assert exact_wasserstein(x, x, order=order) == pytest.approx(0, abs=1e-6)
    # Far from the origin as well, in single precision
    far = (x + 1e4).astype(np.float32)
    assert exact_wasserstein(far, far + 3, order=order) == pytest.approx(3 * np.sqrt(13), rel=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_equals_the_best_assignment_of_equally_many_cells(order):
    x, y = gaussian(31, 5, 0), gaussian(31, 5, 1, mean=0.7)
    costs = cdist(x, y) ** order
    rows, columns = linear_sum_assignment(costs)
    assert exact_wasserstein(x, y, order=order) == pytest.approx(costs[rows, columns].mean() ** (1 / order))


def test_gaussians_have_the_closed_form_of_their_moments():
    """Bures: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)), of order 2."""
    scales = (np.array([1.0, 2.0]), np.array([1.5, 0.5]))
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    x, y = gaussian(1500, 2, 0, scale=scales[0]), gaussian(1500, 2, 1, scale=scales[1]) @ turn.T + [2.0, -1.0]
    c1, c2 = np.diag(scales[0] ** 2), turn @ np.diag(scales[1] ** 2) @ turn.T
    root = np.real(sqrtm(sqrtm(c1) @ c2 @ sqrtm(c1)))
    expected = np.sqrt(5 + np.trace(c1 + c2 - 2 * root))
    assert exact_wasserstein(x, y) == pytest.approx(expected, rel=0.03)  # 1,500 cells
    assert exact_wasserstein(x, gaussian(1500, 2, 2, scale=scales[0])) < 0.25


def test_sliced_distance_of_equal_gaussians_is_their_step_over_the_root_of_dimensions():
    step = np.full(9, 2.0)
    x, y = gaussian(5000, 9, 0), gaussian(5000, 9, 1) + step
    found = sliced_wasserstein(x, y, n_projections=500)
    assert found == pytest.approx(np.linalg.norm(step) / 3, rel=0.1)  # 500 directions
    assert sliced_wasserstein(x, x[::-1]) == pytest.approx(0, abs=1e-6)
    # Exact where there is one direction only
    one = x[:, :1], y[:700, :1]
    exact = exact_wasserstein(one[0][:700], one[1])
    assert sliced_wasserstein(one[0][:700], one[1], n_projections=3) == pytest.approx(exact)


def test_sliced_distance_is_pot_s_whatever_directions_are_sorted_at_once(monkeypatch):
    x, y = gaussian(50, 4, 0), gaussian(70, 4, 1, mean=1)
    expected = ot.sliced_wasserstein_distance(x, y, n_projections=23, p=1, seed=5)
    assert sliced_wasserstein(x, y, n_projections=23, order=1, seed=5) == pytest.approx(expected)
    monkeypatch.setattr("cellglot.metrics.wasserstein.DIRECTIONS_AT_ONCE", 100)
    assert sliced_wasserstein(x, y, n_projections=23, order=1, seed=5) == pytest.approx(expected)


def test_resamples_differ_and_have_the_asked_size(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "cellglot.metrics.wasserstein.exact_wasserstein",
        lambda x, y, order: sizes.append((len(x), len(y))) or float(x.sum()),
    )
    draws = resampled_wasserstein(gaussian(100, 3, 0), gaussian(1, 3, 1), n_cells=500, n_resamples=7, seed=3)
    assert set(sizes) == {(80, 1)}
    assert len(set(draws)) == 7
    resampled_wasserstein(gaussian(100, 3, 0), gaussian(90, 3, 1), n_cells=50, n_resamples=1)
    assert sizes[-1] == (50, 50)


def classes():
    x = np.concatenate([gaussian(40, 4, 0), gaussian(30, 4, 1, mean=5), gaussian(20, 4, 2, mean=-5)])
    y = np.concatenate([gaussian(50, 4, 3, mean=[3, 0, 0, 0]), gaussian(25, 4, 4, mean=[5, 9, 5, 5])])
    return x, ["glia"] * 40 + ["neuron"] * 30 + ["blood"] * 20, y, ["glia"] * 50 + ["neuron"] * 25


def test_by_class_then_average():
    table: Any = wasserstein_by_class(*classes(), n_resamples=4).set_index("class")
    assert list(table.index) == ["glia", "neuron", "average"]
    assert table.loc["glia", "mean"] == pytest.approx(3.3, abs=0.4)  # the step, and what finite samples add
    assert table.loc["neuron", "mean"] == pytest.approx(4.3, abs=0.4)
    assert table.loc["average", "mean"] == pytest.approx(table["mean"].iloc[:2].mean())
    assert (table["sd"] > 0).all()
    assert table.loc["neuron", ["n_x", "n_y"]].tolist() == [30, 25]
    assert table.loc["average", "n_x"] == 70


def test_matrix_holds_every_pair_of_types_and_agrees_with_single_ones():
    x, x_types, y, y_types = classes()
    tables: Any = wasserstein_matrix(x, x_types, y, y_types, n_resamples=3, progress=False)
    mean, sd = tables
    assert mean.shape == sd.shape == (3, 2)
    assert (mean.loc["blood"] > mean.loc["glia"]).all()
    alone = resampled_wasserstein(x[70:], y[:50], n_resamples=3)
    assert mean.loc["blood", "glia"] == pytest.approx(alone.mean())
    assert sd.loc["blood", "glia"] == pytest.approx(alone.std(ddof=1))


def test_what_cannot_be_compared_is_refused():
    x = gaussian(5, 3, 0)
    with pytest.raises(ValueError, match="in one space"):
        exact_wasserstein(x, x[:, :2])
    with pytest.raises(ValueError, match="in one space"):
        exact_wasserstein(x, x[:0])
    with pytest.raises(ValueError, match="NaN"):
        sliced_wasserstein(x, np.where(x == x[0, 0], np.nan, x))
    with pytest.raises(ValueError, match="order 1 or 2"):
        exact_wasserstein(x, x, order=3)
    with pytest.raises(ValueError, match="n_cells and n_resamples of 1 or more, found 0 and 10"):
        resampled_wasserstein(np.ones((3, 2)), np.ones((3, 2)), n_cells=0)
    with pytest.raises(ValueError, match="share no class"):
        wasserstein_by_class(x, ["a"] * 5, x, ["b"] * 5)
