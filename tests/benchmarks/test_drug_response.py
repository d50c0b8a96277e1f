"""benchmarks/drug_response.py: what it measures and writes, on profiles whose answer is known."""

import sys
from typing import Any

import anndata as ad
import numpy as np
import pytest

from ..conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from drug_response import COMPARED, averaged, differences, interval, summarized, text
from drug_response_cell_eval import check_cell_eval, write_pair
from drug_response_data import Task
from drug_response_models import TransformerResponse, chosen, condition_labels
from drug_response_pretraining import guesses, masks
from drug_response_streaming import write_gctx
from response_correlation import blockwise, one_matrix

from cellglot.drug_response.baselines import TreatedMean
from cellglot.drug_response.reading import read_responses
from cellglot.drug_response.splits import hold_out_drugs
from cellglot.metrics.response import Response
from cellglot.tokenization.expression_features import ExpressionFeatureExtractor

from ..drug_response.test_baselines import wells


def task(**options):
    data, _ = wells(**options)
    split = hold_out_drugs(data, 2)
    inner = hold_out_drugs(data.select(split.train), 2)
    return Task(data, split, inner, ("drug",), ("cell_line",), {})


def test_intervals_are_student_s():
    found = interval([0.1, 0.2, 0.6])
    assert found["mean"] == pytest.approx(0.3)
    assert found["ci"] == pytest.approx(4.30265 * np.std([0.1, 0.2, 0.6], ddof=1) / np.sqrt(3), rel=1e-5)
    assert text(found) == "0.300 ± 0.657"
    assert text(interval([12.0])) == "12.0"
    assert text(None) == ""
    tables = [{"row": {"mean": 1.0}}, {"row": {"mean": 3.0}}]
    assert averaged(tables) == {"row": {"mean": 2.0}}
    assert summarized(tables)["row"]["mean"]["values"] == [1.0, 3.0]


def test_differences_are_seed_by_seed():
    """A step that is the same in every seed is sure, however much the seeds differ."""
    values = {figure: np.array([1.0, 5.0, 9.0]) for figure in COMPARED}
    rows = {
        row: {figure: interval(list(v + step)) for figure, v in values.items()} for row, step in (("a", 0), ("b", 0.5))
    }
    found = differences(rows, "a")
    assert list(found) == ["b"]
    assert found["b"]["delta"]["mean"] == pytest.approx(0.5)
    assert found["b"]["delta"]["ci"] == pytest.approx(0, abs=1e-12)
    assert differences(rows, "c") == {}


def test_times_are_chosen_without_the_test_part():
    seen = []

    class Recorder(TreatedMean):
        name = "recorder"

        def __init__(self, epochs):
            self.epochs = epochs

        def fit(self, train):
            seen.append((self.epochs, frozenset(train.drugs)))
            return super().fit(train)

        def predict(self, controls_ng, conditions):
            # As far off as the epochs are from 4
            return super().predict(controls_ng, conditions) + abs(self.epochs - 4)

    one = task()
    _, epochs = chosen(Recorder, one, (2, 4, 8))
    assert epochs == 4
    held_out, inner = set(one.split.held_out), set(one.inner.held_out)
    assert [epochs for epochs, _ in seen] == [2, 4, 8, 4]
    assert all(not drugs & held_out for _, drugs in seen)
    assert all(not drugs & inner for _, drugs in seen[:3])
    assert inner <= seen[3][1]
    seen.clear()
    chosen(Recorder, one, (3,))
    assert [epochs for epochs, _ in seen] == [3]


def test_an_additive_start_is_the_additive_baseline():
    one = task()
    settings = {"token_axis": "profile", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    settings |= {"decoder": "mlp", "decoder_size": 4, "predicts": "change", "num_hidden_layers": 1}
    loop = {"learning_rate": 1e-9}
    model = TransformerResponse("additive", 1, settings=settings, additive=True, loop=loop).fit(one.train)
    controls = one.train.expression[one.train.is_control][:3]
    rows = np.flatnonzero(~one.train.is_control)[:3]
    found = model.predict(controls, one.train.conditions(rows)) - controls
    pairs = one.train.pairs
    treated = np.flatnonzero(~one.train.is_control)
    changes = [one.train.expression[r] - one.train.expression[pairs.candidates(int(r))].mean(axis=0) for r in treated]
    np.testing.assert_allclose(found, np.repeat(np.mean(changes, axis=0)[None], 3, axis=0), atol=1e-3)


def test_labels_are_unknown_where_there_is_no_drug():
    data, _ = wells()
    extractor = ExpressionFeatureExtractor.fit(data.select(data.drug != "toluene"))
    labels = condition_labels(data, extractor)
    assert (labels["drug"][data.is_control | (data.drug == "toluene")] == -100).all()
    assert (labels["drug"][data.drug == "xylene"] == extractor.drugs.index("xylene")).all()
    assert np.isnan(labels["dose"]).tolist() == data.is_control.tolist()
    assert (labels["dose"][~data.is_control] == 1).all()


def test_guesses_use_what_genes_have_in_common():
    """Genes that are copies of each other are told from the visible ones; their mean tells nothing."""
    data, _ = wells(replicates=20)
    rng = np.random.default_rng(0)
    copies = rng.normal(size=(len(data), 1)) + 0.01 * rng.normal(size=data.expression.shape)
    object.__setattr__(data, "expression", copies.astype(np.float32))
    extractor = ExpressionFeatureExtractor.fit(data)
    known, tested = data.select(np.arange(200)), data.select(np.arange(200, len(data)))
    rows = guesses([known], [tested], extractor, 0.15, 0)
    assert rows["mean, most frequent, 15%"]["mask_rmse"] == pytest.approx(1, abs=0.25)
    assert rows["Gaussian, 15%"]["mask_rmse"] < 0.1
    assert rows["mean, most frequent, 15%"]["dose_rmse"] == 0
    assert masks(5, 20, 0.15, 0).sum(axis=1).tolist() == [3] * 5


def test_cell_eval_gets_the_same_controls_beside_true_and_predicted_cells(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    control = rng.random((5, 3)).astype(np.float32)
    responses = {
        ("ifn", "B"): Response(rng.random((4, 3)), rng.random((6, 3)) - 0.5, control),
        ("ifn", "T"): Response(rng.random((2, 3)), rng.random((2, 3)), control),
    }
    real, predicted = (ad.read_h5ad(path) for path in write_pair(responses, ["a", "b", "c"], tmp_path))
    names = [str(name) for name in responses]
    assert real.obs["condition"].value_counts().to_dict() == {names[0]: 4, names[1]: 2, "control": 5}
    assert predicted.obs["condition"].value_counts().to_dict() == {names[0]: 6, names[1]: 2, "control": 5}
    controls: Any = [x[x.obs["condition"] == "control"].X for x in (real, predicted)]
    np.testing.assert_array_equal(*controls)
    assert np.asarray(predicted.X).min() == 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install cell-eval"):
        check_cell_eval()


def test_made_up_profiles_are_read_as_those_of_lincs(tmp_path):
    write_gctx(tmp_path / "profiles.gctx", 401, 0)
    data = read_responses(tmp_path / "profiles.gctx")
    assert data.expression.shape == (401, 978)
    assert np.flatnonzero(data.is_control).tolist() == [*range(20), *range(380, 400)]
    assert set(data.dose[~data.is_control]) == {0.1, 1.0, 10.0}
    assert (data.pair_by, set(data.cell_line)) == (("cell_line", "rna_plate"), {"line0", "line1"})


def test_contenders_of_the_correlation_benchmark_agree():
    assert blockwise(40, 30, 0)["value"] == pytest.approx(one_matrix(40, 30, 0)["value"], abs=1e-6)
