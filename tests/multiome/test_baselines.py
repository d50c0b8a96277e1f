"""Baselines of modality prediction: what each must find on cells whose answer is known, and its own arithmetic."""

import sys
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.gaussian_process.kernels import RBF
from sklearn.kernel_ridge import KernelRidge
from sklearn.neighbors import KNeighborsRegressor

from cellglot.multiome import Cajal, Dance, Dengkw, Frequency, NearestCells, SourceCells, SVDLinear, Zeros
from cellglot.multiome.cajal import REPEATS, marker_features, welch_t
from cellglot.multiome.dance import STATISTICS, batch_statistics
from cellglot.multiome.dengkw import ALPHA, LENGTH_SCALE
from cellglot.multiome.predictor import Standardizer

N, SOURCES, TARGETS = 211, 31, 53


def cells(n: int = N, seed: int = 0) -> tuple[SourceCells, sp.csr_matrix, np.ndarray]:
    """Cells of three types; each has source features of its own, and opens a third of the targets."""
    rng = np.random.default_rng(seed)
    type_n = rng.integers(3, size=n)
    mean = np.where(np.arange(SOURCES)[None] % 3 == type_n[:, None], 2.0, 0.2)
    values = sp.csr_matrix(rng.poisson(mean).astype(np.float32))
    likely = np.where(np.arange(TARGETS)[None] % 3 == type_n[:, None], 0.9, 0.05)
    target = sp.csr_matrix((rng.random((n, TARGETS)) < likely).astype(np.float32))
    totals = np.asarray(values.sum(axis=1)).ravel()
    return SourceCells(values, totals, np.array(["a", "b", "c"])[rng.integers(3, size=n)]), target, type_n


def predictors() -> dict[str, Any]:
    return {
        "zeros": Zeros(),
        "frequency": Frequency(),
        "nearest cells": NearestCells(5),
        "svd": SVDLinear(5),
        "dengkw": Dengkw("gex2atac"),
        "cajal": Cajal("gex2atac", n_clusters=3, n_markers=5),
        "dance": Dance(n_steps=60, n_components=5),
    }


@pytest.mark.parametrize("name", predictors())
def test_a_rule_is_found_by_all_that_read_the_source(name):
    if name == "dance":
        pytest.importorskip("torch_geometric")
    source, target, _ = cells()
    new, truth, type_n = cells(97, seed=1)
    before = source.values_ns.copy()
    predicted = predictors()[name].fit(source, target).predict(new)
    assert predicted.shape == truth.shape
    assert predicted.dtype == np.float32
    np.testing.assert_array_equal(source.values_ns.toarray(), before.toarray())
    own = np.arange(TARGETS)[None] % 3 == type_n[:, None]
    gap = predicted[own].mean() - predicted[~own].mean()
    # 0.9 against 0.05, which who reads nothing cannot tell apart
    assert abs(gap) < 0.02 if name in ("zeros", "frequency") else gap > 0.4


def test_frequency_is_the_mean_of_the_training_cells():
    source, target, _ = cells()
    predicted = Frequency().fit(source, target).predict(cells(3, seed=1)[0])
    np.testing.assert_allclose(predicted, np.tile(target.toarray().mean(axis=0), (3, 1)), rtol=1e-5)


def test_nearest_cells_are_scikit_learns():
    source, target, _ = cells()
    new, *_ = cells(23, seed=1)
    found = NearestCells(5, 7).fit(source, target)
    oracle = KNeighborsRegressor(7).fit(found.svd.transform(source.values_ns), target.toarray())
    expected = oracle.predict(found.svd.transform(new.values_ns))
    np.testing.assert_allclose(found.predict(new), expected, atol=1e-6)


def test_dengkw_is_the_mean_of_kernel_ridges_on_either_half_of_the_batches():
    source, target, _ = cells()
    new, *_ = cells(23, seed=1)
    found = Dengkw("gex2atac").fit(source, target)
    assert found.source.n_components == SOURCES - 1  # of 1,000 asked for

    def standardized(cells: SourceCells) -> np.ndarray:
        x = found.source.transform(cells.values_ns)
        return (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)

    x, y, halves = standardized(source), found.target.transform(target), (["a"], ["b", "c"])
    told = []
    for half in halves:
        inside = np.isin(source.batch_n, half)
        kernel: Any = RBF(LENGTH_SCALE)
        ridge = KernelRidge(alpha=ALPHA, kernel=kernel).fit(x[inside], y[inside])
        told.append(ridge.predict(standardized(new)))
    expected = np.clip(np.mean(told, axis=0) @ found.target.components_, 0, None)
    np.testing.assert_allclose(found.predict(new), expected, atol=1e-5)


def test_cajal_chooses_markers_by_welchs_t():
    from scipy.stats import ttest_ind

    source, _, type_n = cells()
    dense = source.values_ns.toarray()
    found = welch_t(source.values_ns, type_n)
    for c in range(3):
        expected = ttest_ind(dense[type_n == c], dense[type_n != c], equal_var=False).statistic
        np.testing.assert_allclose(found[c], expected, rtol=1e-5)
    # Every cluster adds four of the features that its type has.
    markers = marker_features(source.values_ns, 3, 4, seed=0)
    assert sorted(np.bincount(markers % 3)) == [4, 4, 4]


def test_cajal_reads_totals_of_cell_and_batch_so_often():
    source, *_ = cells()
    found = Cajal("gex2atac")
    found.markers = np.arange(5)
    statistics = found._inputs(source)[:, -3 * REPEATS :: REPEATS]
    for batch in "abc":
        inside = source.batch_n == batch
        totals = source.totals_n[inside]
        np.testing.assert_allclose(statistics[inside, 0], totals)
        np.testing.assert_allclose(statistics[inside, 1:], np.tile([np.median(totals), totals.std()], (len(totals), 1)))


def test_cajal_predicts_within_the_range_of_the_target():
    source, target, _ = cells(23)
    far = SourceCells(source.values_ns * 100, source.totals_n * 100, source.batch_n)
    predicted = Cajal("atac2gex", n_clusters=3, n_markers=5).fit(source, target * 3).predict(far)
    assert predicted.min() >= 0
    assert predicted.max() <= 3


def test_dance_describes_batches_by_their_cells():
    source, *_ = cells()
    found = batch_statistics(source)
    inside = source.batch_n == "b"
    rows = [row[row > 0] for row in source.values_ns.toarray()[inside]]
    expected = {
        "mean": source.values_ns.toarray()[inside].mean(axis=1).mean(),
        "std": source.values_ns.toarray()[inside].std(axis=1).mean(),
        "q50": np.mean([np.median(row) for row in rows]),
        "n_features": np.mean([len(row) for row in rows]),
        "std of those there": np.mean([row.std() for row in rows]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[inside, STATISTICS.index(name)], value, rtol=1e-5, err_msg=name)


def test_dance_of_a_cell_does_not_depend_on_cells_asked_for_without_shared_features():
    """A cell's own edges reach the others only through features."""
    pytest.importorskip("torch_geometric")
    source, target, _ = cells()
    dance = Dance(n_steps=5, n_components=5, n_layers=2).fit(source, target)
    new, *_ = cells(2, seed=1)
    nothing = SourceCells(sp.csr_matrix(np.zeros((1, SOURCES), dtype=np.float32)), np.zeros(1), np.array(["d"]))
    both = SourceCells(
        sp.csr_matrix(sp.vstack([new.values_ns, nothing.values_ns])),
        np.append(new.totals_n, 0),
        np.append(new.batch_n, "d"),
    )
    np.testing.assert_allclose(dance.predict(both)[:2], dance.predict(new), atol=1e-6)


def test_without_torch_geometric_dance_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(ImportError, match=r"cellglot\[benchmark-multiome\]"):
        Dance()


def test_what_does_not_vary_in_training_says_nothing():
    """In single precision the mean of 162.3 is not 162.3, and another batch's value would be many deviations off."""
    x = np.column_stack([np.full(159, 162.3), np.arange(159)]).astype(np.float32)
    standardizer = Standardizer.of(x)
    np.testing.assert_allclose(standardizer(x).std(axis=0), [0, 1], atol=1e-5)
    assert standardizer(np.array([[99.0, 79.0]]))[0] == pytest.approx([0, 0])


def test_totals_and_batches_must_be_of_the_same_cells():
    with pytest.raises(ValueError, match="of 211 cells, found 3 and 211"):
        SourceCells(cells()[0].values_ns, np.zeros(3), np.zeros(211))
