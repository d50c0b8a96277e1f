"""Guesses of masked entries against plain arithmetic: least squares, a loop over neighbours, hand-worked errors."""

import numpy as np
import pandas as pd
import pytest

from cellglot.train import cross_species_reconstruction
from cellglot.train.cross_species_reconstruction import (
    gene_space_errors,
    linear_map,
    masked_entry_errors,
    nearest_mean,
)


def correlated(n, k, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, k)) @ rng.normal(size=(k, k))).astype(np.float32)


def test_the_linear_map_guesses_masked_entries_as_least_squares_does():
    x = correlated(40_000, 7)
    masked = np.random.default_rng(1).random(x.shape) < 0.3
    shown = np.where(masked, 0, x)
    guess = shown @ linear_map(x, 0.3)
    for k in range(7):
        rows = masked[:, k]
        design = np.delete(shown[rows], k, axis=1)
        fitted = design @ np.linalg.lstsq(design, x[rows, k], rcond=None)[0]
        ours, best, mean = (((x[rows, k] - y) ** 2).mean() for y in (guess[rows, k], fitted, 0))
        # 1e-3: least squares is fitted to this draw of masks, the map to all of them.
        assert best * (1 - 1e-6) <= ours < best + 1e-3 * mean
        assert best < 0.9 * mean


def test_the_linear_map_guesses_the_mean_of_uncorrelated_components():
    u = np.linalg.svd(np.random.default_rng(0).normal(size=(50, 5)), full_matrices=False)[0]
    assert np.abs(linear_map((u * [9, 5, 3, 2, 1]).astype(np.float32), 0.1)).max() < 1e-5
    # A component without variance is guessed as 0 too, and breaks nothing.
    assert np.abs(linear_map((u * [9, 5, 0, 2, 1]).astype(np.float32), 0.1)).max() < 1e-5


def test_nearest_cells_are_those_nearest_in_what_is_shown(monkeypatch):
    monkeypatch.setattr(cross_species_reconstruction, "CELLS_PER_BLOCK", 4)
    cells, reference = correlated(11, 5, 1), correlated(37, 5, 2)
    masked = np.random.default_rng(3).random(cells.shape) < 0.3
    found = nearest_mean(cells, masked, reference)
    for row, (cell, hidden) in enumerate(zip(cells, masked, strict=True)):
        distances = ((reference[:, ~hidden] - cell[~hidden]) ** 2).sum(axis=1)
        np.testing.assert_allclose(found[row], reference[np.argsort(distances)[:10]].mean(axis=0), rtol=1e-5)
    # Fewer cells than neighbours: all of them.
    of_three = nearest_mean(cells, masked, reference[:3])
    np.testing.assert_allclose(of_three, np.tile(reference[:3].mean(axis=0), (11, 1)), rtol=1e-5)


def test_errors_of_masked_entries_by_hand():
    cells = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    masked = np.array([[True, False, True], [False, False, True]])
    guess = np.array([[1.0, 99.0, 1.0], [99.0, 99.0, 8.0]])
    mean, ours = masked_entry_errors(cells, masked, {"mean": np.zeros((2, 3)), "ours": guess}).to_dict("records")
    assert mean == {"guess": "mean", "mse": 46 / 3, "explained": 0, "low": 0, "high": 0, "components": 0}
    assert ours["mse"] == pytest.approx((4 + 4) / 3)
    assert ours["explained"] == pytest.approx(1 - 8 / 46)
    # Each cell drawn twice: 1 - 4/10 and 1 - 4/36.
    assert (ours["low"], ours["high"]) == pytest.approx((0.6, 1 - 4 / 36))
    # Of the two components that are masked anywhere both are guessed better than by 0.
    assert ours["components"] == 1


def test_expression_explained_by_hand_in_blocks():
    expression = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    mean = np.array([3.0, 5.0])
    guess = np.array([[1.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    table = gene_space_errors(
        iter([expression[:2], expression[2:]]),
        {"exact": expression, "half": guess},
        lambda k: np.stack([k[:, 0], np.where(k[:, 1] == 0, 5, k[:, 1])], axis=1),
        mean_g=mean,
    )
    # Squares from the mean: 4 + 9 + 0 + 1 + 4 + 16; from `half`: 0 + 9 + 0 + 1 + 1 + 16
    expected = pd.DataFrame({"guess": ["exact", "half"], "mse": [0, 27 / 6], "explained": [1, 1 - 27 / 34]})
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
