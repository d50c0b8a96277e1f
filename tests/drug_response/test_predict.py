"""Predictions start from controls, say what they are of, and refuse what a model cannot know."""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from cellglot import (
    DrugResponseConfig,
    DrugResponseForConditionalGeneration,
    DrugResponseForPreTraining,
    ExpressionFeatureExtractor,
    predict_response,
)
from cellglot.drug_response.predict import ResponsePredictor

from .responses import GENES, responses

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def trained(drug_encoder: Any = "id", **options):
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data, drug_encoder=drug_encoder, fingerprint_size=32)
    torch.manual_seed(0)
    config = DrugResponseConfig(
        n_genes=GENES, n_drugs=5, n_cell_lines=2, drug_encoder=drug_encoder, fingerprint_size=32, **TINY, **options
    )
    return data, DrugResponseForConditionalGeneration(config), extractor


def test_every_control_is_predicted_for_each_drug_and_dose():
    data, model, extractor = trained()
    found = predict_response(data, model, extractor, drug=["urea", "ethanol"], dose=[100, 10_000], dose_unit="nM")
    n = int(data.is_control.sum())
    assert found.shape == (4 * n, GENES)
    conditions = found.obs[["drug", "dose_um"]].drop_duplicates()
    assert conditions.to_numpy().tolist() == [["urea", 0.1], ["urea", 10.0], ["ethanol", 0.1], ["ethanol", 10.0]]
    assert found.obs["control"].tolist() == data.obs.index[data.is_control].tolist() * 4
    assert not found.obs["is_control"].any()
    assert found.var_names.tolist() == data.gene_ids
    assert found.obs_names.is_unique


def test_predictions_are_the_models_on_the_scale_of_the_data():
    data, model, extractor = trained(predicts="change")
    torch.nn.init.zeros_(model.decoder.output.weight)
    found = predict_response(data, model, extractor, drug="urea", dose=1, dose_unit="uM")
    np.testing.assert_allclose(found.X, data.expression[data.is_control], rtol=1e-5)


def test_treated_profiles_do_not_enter():
    data, model, extractor = trained()
    before = predict_response(data, model, extractor, drug="urea", dose=1, dose_unit="uM")
    data.expression[~data.is_control] = 0
    after = predict_response(data.to_anndata(), model, extractor, drug="urea", dose=1, dose_unit="uM")
    np.testing.assert_allclose(before.X, after.X, rtol=1e-5)


def test_plain_controls_need_only_genes_and_the_name_of_their_line(tmp_path):
    data, model, extractor = trained()
    controls = data.expression[data.is_control & (data.cell_line == "A549")]
    cells = ad.AnnData(controls[:, ::-1].copy(), var=pd.DataFrame(index=pd.Index(data.gene_ids[::-1])))
    cells.write_h5ad(tmp_path / "controls.h5ad")
    options = {"drug": "urea", "dose": 1, "dose_unit": "uM"}
    found = predict_response(tmp_path / "controls.h5ad", model, extractor, cell_line="A549", **options)
    everything = predict_response(data, model, extractor, **options)
    np.testing.assert_allclose(found.X, everything[everything.obs["cell_line"] == "A549"].X, rtol=1e-5)
    with pytest.raises(ValueError, match="obs has no cell_line, cell_id or cell_type"):
        predict_response(cells, model, extractor, **options)


def test_a_predictor_answers_as_baselines_do_whatever_the_batch():
    data, model, extractor = trained()
    rows = np.flatnonzero(~data.is_control)[:7]
    controls = data.expression[data.is_control][:7]
    whole = ResponsePredictor(model, extractor).predict(controls, data.conditions(rows))
    small = ResponsePredictor(model, extractor, profiles_per_batch=2).predict(controls, data.conditions(rows))
    np.testing.assert_allclose(whole, small, rtol=1e-5)
    assert model.training


def test_drugs_by_structure_may_be_new_and_by_id_may_not():
    data, model, extractor = trained("fingerprint")
    options = {"drug": "aspirin", "dose": 1, "dose_unit": "uM"}
    found = predict_response(data, model, extractor, smiles={"aspirin": "CC(=O)Oc1ccccc1C(=O)O"}, **options)
    assert np.isfinite(found.X).all()
    with pytest.raises(ValueError, match="No structure is known"):
        predict_response(data, model, extractor, **options)
    with pytest.raises(ValueError, match="'C1CC' is no SMILES that RDKit can read"):
        predict_response(data, model, extractor, smiles={"aspirin": "C1CC"}, **options)
    data, model, extractor = trained("id")
    with pytest.raises(ValueError, match='drug_encoder="fingerprint" can do any'):
        predict_response(data, model, extractor, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dose_unit": None}, "found no unit. Pass dose_unit"),
        ({"dose": -1}, "doses of 0 uM or more, found 1 that are negative"),
        ({"dose": [1, 0]}, "doses are 0: these are controls"),
        ({"drug": []}, "Expected a drug and a dose at least, found 0 drugs and 1 doses"),
    ],
)
def test_doses_that_mean_nothing_are_refused(change, message):
    data, model, extractor = trained()
    with pytest.raises(ValueError, match=message):
        predict_response(data, model, extractor, **{"drug": "urea", "dose": 1, "dose_unit": "uM", **change})


def test_what_does_not_belong_together_is_refused():
    data, model, extractor = trained()
    options = {"drug": "urea", "dose": 1, "dose_unit": "uM"}
    other = ExpressionFeatureExtractor.fit(data.select(data.drug != "urea"))
    with pytest.raises(ValueError, match="do not belong together: n_drugs 5 and 4"):
        predict_response(data, model, other, **options)
    with pytest.raises(ValueError, match="Expected a DrugResponseForConditionalGeneration, found DrugResponseForPre"):
        predict_response(data, DrugResponseForPreTraining(model.config), extractor, **options)
    with pytest.raises(ValueError, match="Expected an ExpressionFeatureExtractor, found dict"):
        predict_response(data, model, {}, **options)
    with pytest.raises(ValueError, match="Expected control cells to start from, found none"):
        predict_response(data.select(~data.is_control), model, extractor, **options)
