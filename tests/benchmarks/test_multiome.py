"""benchmarks/multiome.py: splits without leaks, and what it measures on cells whose answer is known."""

import sys
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from ..conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import multiome_methods
from multiome import _text, as_anndata, interval, measured, summarized
from multiome_cells import MIN_SHARE, TEST_FRACTION, Pair, Split, masks, read_pair
from multiome_methods import BASELINES, SET_HEAD, T5, Prediction, predictions

from cellglot.tokenization.binarized_string import TASKS

N, GENES, PEAKS = 113, 11, 17


def pair(*, with_batches: bool = False) -> Pair:
    """Cells of two kinds with genes and peaks of their own; two genes and three peaks that no cell of "a" has."""
    rng = np.random.default_rng(0)
    kind = rng.integers(2, size=N)[:, None]
    batch = np.where(np.arange(N) % 3 == 0, "b", "a") if with_batches else np.full(N, "all")
    matrices = []
    for n, high in ((GENES, 3.0), (PEAKS, 1.0)):
        there = rng.random((N, n)) < np.where(np.arange(n)[None] % 2 == kind, 0.8, 0.1)
        if with_batches:
            there[batch == "a", : 2 if n == GENES else 3] = False
        matrices.append(sp.csr_matrix(high * there, dtype=np.float32))
    rna, atac = (ad.AnnData(matrix) for matrix in matrices)
    rna.var_names = [f"G{i}" for i in range(GENES)]
    atac.var_names = [f"chr1-{i}00-{i}50" for i in range(1, PEAKS + 1)]
    totals = np.asarray(matrices[0].sum(axis=1)).ravel()
    return Pair("scicar", rna, atac, totals, totals, batch, batch == "a" if with_batches else None)


def split(*, with_batches: bool = False, seed: int = 0) -> Split:
    cells = pair(with_batches=with_batches)
    return Split(cells, seed, masks(cells, seed))


@pytest.mark.parametrize("with_batches", [False, True])
def test_no_cell_is_on_two_sides(with_batches):
    cells = split(with_batches=with_batches).cells
    assert (cells.train.astype(int) + cells.validation + cells.test).max() == 1
    assert min(mask.sum() for mask in (cells.train, cells.validation, cells.test)) > 0
    if not with_batches:
        assert cells.test.sum() == round(TEST_FRACTION * N)


def test_the_batch_of_test_cells_never_trains():
    found = split(with_batches=True)
    assert set(found.pair.batch_n[found.cells.test]) == {"b"}
    assert set(found.pair.batch_n[found.cells.train | found.cells.validation]) == {"a"}


def test_features_are_chosen_on_training_cells_alone():
    found = split(with_batches=True)
    assert found.processor.feature_extractor.genes == [f"G{i}" for i in range(2, GENES)]
    assert found.present["accessibility"].shape == (N, PEAKS - 3)
    expected = found.pair.rna.X[:, 2:].toarray()
    np.testing.assert_array_equal(found.values["expression"].toarray(), expected)
    np.testing.assert_array_equal(found.present["expression"].toarray(), expected >= 2)
    least = found.present["expression"][found.cells.train].mean(axis=0).min()
    assert least >= MIN_SHARE


@pytest.mark.parametrize("task", TASKS)
def test_known_answers_have_known_figures(task):
    found, modality = split(), TASKS[task][1]
    truth = {part: found.present[modality][getattr(found.cells, part)].toarray() for part in ("validation", "test")}
    levels = found.values[modality][found.cells.test].toarray()
    right = measured(Prediction(truth, values=levels), found, task)
    for name in ("accuracy", "f1", "jaccard", "precision_at_k", "pooled_auroc", "feature_average_precision"):
        assert right[name] == 1, name
    assert right["rmse"] == 0
    nothing = measured(predictions("zeros", found, ROOT)[task], found, task)
    assert nothing["f1"] == nothing["n_predicted"] == 0
    assert nothing["accuracy"] == pytest.approx(1 - truth["test"].mean())
    assert nothing["rmse"] == pytest.approx(np.sqrt(np.mean(levels**2)))
    sets = Prediction(present=truth["test"][[3, 1]] > 0, tested=np.array([3, 1]))
    assert measured(sets, found, task)["f1"] == 1
    assert "rmse" not in measured(sets, found, task)


def test_baselines_and_models_predict_both_ways(tmp_path, monkeypatch):
    few = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "max_steps": 2, "batch_size": 8}
    few["cpu_threads"] = 1
    monkeypatch.setitem(multiome_methods.SET_HEAD_TRAINING, "scicar", few)
    monkeypatch.setattr(multiome_methods, "T5_TRAINING", {**few, "head": "t5"})
    found = split()
    for method in ("frequency", "nearest cells", SET_HEAD, T5):
        told = predictions(method, found, tmp_path)
        assert list(told) == list(TASKS)
        for task, prediction in told.items():
            figures = measured(prediction, found, task)
            adata: Any = as_anndata(prediction, figures.get("threshold"), found, task, method)
            assert adata.var_names.tolist() == found.processor.feature_extractor.features(TASKS[task][1])
            cells = found.pair.rna.obs_names[found.cells.test].tolist()
            assert adata.obs_names.tolist() == cells[: adata.n_obs]
            assert adata.n_obs == figures["cells"]
            assert adata.layers["present"].sum() / adata.n_obs == pytest.approx(figures["n_predicted"])
            if method != T5:
                assert figures["rmse"] < 2
                assert adata.layers["scores"].shape == adata.X.shape


def test_differences_are_paired_by_seed():
    def record(frequency: float, other: float) -> dict:
        figures = {"frequency": {"f1": frequency}, "DANCE": {"f1": other}}
        return {"facts": {}, "methods": {name: dict.fromkeys(TASKS, found) for name, found in figures.items()}}

    found = summarized([record(0.1, 0.3), record(0.5, 0.7), record(0.9, 1.1)])["gex2atac"]
    assert found["methods"]["frequency"]["f1"]["ci"] > 0.9
    assert found["differences"]["DANCE"]["f1"]["mean"] == pytest.approx(0.2)
    assert found["differences"]["DANCE"]["f1"]["ci"] == pytest.approx(0, abs=1e-9)


def test_interval_by_hand():
    # t of two degrees of freedom, 4.303, times 0.1 / sqrt(3)
    found = interval([0.4, 0.5, 0.6])
    assert found["ci"] == pytest.approx(0.2484, abs=1e-4)
    assert _text(found) == "0.5000 ± 0.2484"
    assert _text(interval([0.25]), "+") == "+0.2500"
    assert _text(None) == ""


def test_every_baseline_of_the_table_has_a_class():
    names = [type(multiome_methods.new_baseline(name, "gex2atac", 0)).__name__ for name in BASELINES if name != "DANCE"]
    assert len(set(names)) == len(BASELINES) - 1


@pytest.mark.realdata
def test_the_real_cells_are_those_that_the_card_describes(real_data, monkeypatch):
    import multiome_cells

    monkeypatch.setattr(multiome_cells, "DATA", real_data)
    scicar, bmmc = read_pair("scicar"), read_pair("bmmc")
    assert (scicar.rna.n_obs, bmmc.rna.n_obs) == (2_641, 500)
    assert bmmc.is_train is not None
    assert set(bmmc.batch_n[bmmc.is_train]) == {"s1d1"}
    # "about 3% non-zero": the paper's threshold on the competition's values
    assert (bmmc.rna.X >= 2).sum() / np.prod(bmmc.rna.shape) == pytest.approx(0.027, abs=0.001)
