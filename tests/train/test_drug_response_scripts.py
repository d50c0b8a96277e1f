"""train/pretrain.py and train/finetune.py --method drug_response on small data: what they leave, go on from, refuse."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoFeatureExtractor, AutoModel

from cellglot import (
    DrugResponseForConditionalGeneration,
    DrugResponseForPreTraining,
    ExpressionFeatureExtractor,
    predict_response,
)
from cellglot.drug_response.baselines import TreatedMean
from cellglot.drug_response.evaluation import predicted_responses
from cellglot.drug_response.reading import read_responses
from cellglot.drug_response.splits import hold_out_drugs
from cellglot.metrics.response import correlation
from cellglot.train.drug_response_profiles import prepare_profiles
from cellglot.train.drug_response_report import linear_guess
from cellglot.train.finetune import main as finetune
from cellglot.train.finetune_drug_response import DrugResponseFinetuneConfig, make_extractor
from cellglot.train.metrics_log import read_metrics
from cellglot.train.pretrain import main as pretrain
from cellglot.train.pretrain_drug_response import DrugResponsePretrainConfig

from ..conftest import ROOT
from ..drug_response.responses import GENES, responses

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SMALL = {"method": "drug_response", "batch_size": 16, "cpu_threads": 1, **SIZES}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Wells of one file, and of another with the genes in another order and one less."""
    folder = tmp_path_factory.mktemp("wells")
    responses().to_anndata().write_h5ad(folder / "a.h5ad")
    other = responses(seed=1).to_anndata()[:, ::-1]
    other[:, 1:].copy().write_h5ad(folder / "b.h5ad")
    return folder


@pytest.fixture(scope="module")
def first_stage(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "first"
    pretrain(words(data=files / "a.h5ad", output=output, max_steps=6, eval_every=3, mask_ratio=0.8))
    return output


def words(**options: Any) -> list[str]:
    given = {**SMALL, **options}
    return [
        word
        for name, value in given.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def test_the_first_stage_leaves_a_complete_model_and_figures_beside_simple_guesses(files, first_stage):
    report = json.loads((first_stage / "report.json").read_text())
    guesses = {(row["figure"], row["guess"]) for row in report["figures"]}
    assert guesses == {("RMSE of hidden genes", guess) for guess in ("this model", "mean", "linear")}
    assert report["n_train"] == 65
    assert [line["step"] for line in read_metrics(first_stage / "metrics.jsonl") if "validation_loss" in line] == [3, 6]
    model = DrugResponseForPreTraining.from_pretrained(first_stage / "model")
    assert (model.config.mask_ratio, model.config.tasks, model.config.n_genes) == (0.8, ["mask"], GENES)
    extractor = AutoFeatureExtractor.from_pretrained(first_stage / "model")
    inputs = extractor(read_responses(files / "a.h5ad"), return_tensors="pt")
    encoder = AutoModel.from_pretrained(first_stage / "model")
    assert encoder(**inputs).embeddings.shape == (72, 16)
    card = (first_stage / "model" / "README.md").read_text()
    assert "Trained on 65 profiles only" in card
    assert "![loss curve](loss_curve.png)" in card


def test_the_second_stage_goes_on_with_the_model_and_learns_four_tasks(files, first_stage, tmp_path):
    tasks = ["mask", "cell_line", "drug", "dose"]
    options = {"data": files / "a.h5ad", "output": tmp_path / "second", "max_steps": 1, "warmup_steps": 0}
    pretrain(words(**options, model=first_stage / "model", tasks=tasks, learning_rate=1e-9))
    figures = json.loads((tmp_path / "second" / "report.json").read_text())["figures"]
    assert {row["figure"] for row in figures} == {
        *("RMSE of hidden genes", "accuracy of cell lines", "accuracy of drugs", "RMSE of doses, log10(uM)")
    }
    before = DrugResponseForPreTraining.from_pretrained(first_stage / "model")
    after = DrugResponseForPreTraining.from_pretrained(tmp_path / "second" / "model")
    assert after.config.tasks == tasks
    assert (after.config.n_drugs, after.config.n_cell_lines) == (5, 2)
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_files_are_joined_over_the_genes_that_all_have_and_scaled_by_training_profiles(files, tmp_path):
    paths = [str(files / "a.h5ad"), str(files / "b.h5ad")]
    config = DrugResponsePretrainConfig(data=paths, split_by="drug", validation_fraction=0.4, scaling="standardize")
    data = prepare_profiles(config, tmp_path / "data")
    a, b = (read_responses(path) for path in paths)
    genes = [gene for gene in a.gene_ids if gene in b.gene_ids]
    assert data.extractor.gene_ids == genes
    assert len(genes) == GENES - 1
    expected = np.concatenate([x.expression[:, [x.gene_ids.index(gene) for gene in genes]] for x in (a, b)])
    np.testing.assert_array_equal(data.expression[np.arange(len(expected))], expected)
    held_out = set(data.obs["drug"][~data.train])
    assert len(held_out) == 2
    assert not held_out & set(data.obs["drug"][data.train])
    treated = expected[data.train & ~data.obs["is_control"].to_numpy()].astype(np.float64)
    np.testing.assert_allclose(np.array(data.extractor.mean), treated.mean(0), rtol=1e-5)
    examples = data.examples(~data.train, ["drug", "dose"], 0.5)
    assert set(examples[0]) == {"expression", "drug", "dose"}
    # Drugs that were held out have no number, controls neither drug nor dose.
    assert (examples.labels["drug"] == -100).all()
    again = prepare_profiles(config, tmp_path / "data")
    assert again.fingerprint == data.fingerprint
    with pytest.raises(ValueError, match="was made from other data or options"):
        prepare_profiles(DrugResponsePretrainConfig(data=paths[:1]), tmp_path / "data")


def test_fine_tuning_leaves_a_model_that_predicts_and_says_what_it_is_worth(files, first_stage, tmp_path):
    output = tmp_path / "finetuned"
    options = {"data": files / "a.h5ad", "output": output, "max_steps": 4, "hold_out_drugs": 2, "decoder": "mlp"}
    finetune(words(**options, model=first_stage / "model", fingerprint_size=64))
    report = json.loads((output / "report.json").read_text())
    assert [row["predictor"] for row in report["figures"]] == ["control mean", "treated mean", "additive", "this model"]
    assert (report["n_conditions"], report["held_out"], report["n_train"]) == (4, "2 drugs", 36)
    model = DrugResponseForConditionalGeneration.from_pretrained(output / "model")
    extractor = ExpressionFeatureExtractor.from_pretrained(output / "model")
    data = read_responses(files / "a.h5ad")
    found = predict_response(data, model, extractor, drug=data.drugs, dose=1, dose_unit="uM", smiles=data.smiles)
    assert np.isfinite(found.X).all()
    assert "predict_response(" in (output / "model" / "README.md").read_text()


def test_fine_tuning_keeps_the_genes_of_the_model_and_scales_by_its_own_training_profiles(files, first_stage):
    data = read_responses(files / "b.h5ad")
    train = data.select(data.drug != "urea")
    config = DrugResponseFinetuneConfig(data="b", model=str(first_stage / "model"), scaling="standardize")
    extractor = make_extractor(config, train)
    start = ExpressionFeatureExtractor.from_pretrained(first_stage / "model")
    assert (extractor.genes, extractor.scaling) == (start.genes, "center")
    assert extractor.drugs == ["acetone", "aniline", "benzene", "ethanol"]
    scaled = extractor(train)["expression"][~train.is_control]
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)
    # The gene that these data lack
    missing = start.gene_ids.index("GENE12")
    np.testing.assert_allclose(scaled[:, missing], 0, atol=1e-6)


def test_a_model_of_logarithms_goes_on_with_counts_of_fewer_genes(files, first_stage, tmp_path):
    cells = responses().to_anndata()[:, 2:].copy()
    cells.X = np.rint(np.exp2(cells.X / 2))
    cells.obs = cells.obs.rename(columns={"drug": "product_name", "cell_line": "cell_type", "is_control": "vehicle"})
    cells.write_h5ad(tmp_path / "cells.h5ad")
    options = {"data": tmp_path / "cells.h5ad", "output": tmp_path / "run", "max_steps": 2, "hold_out_drugs": 1}
    finetune(words(**options, model=first_stage / "model", fingerprint_size=64))
    extractor = ExpressionFeatureExtractor.from_pretrained(tmp_path / "run" / "model")
    assert (extractor.n_genes, extractor.target_sum) == (GENES, 1e4)
    assert extractor.mean is not None
    assert extractor.mean[:2] == [0, 0]
    figures = json.loads((tmp_path / "run" / "report.json").read_text())["figures"]
    # With the two genes that are not there, this would be near 1.
    data = read_responses(tmp_path / "cells.h5ad")
    split = hold_out_drugs(data, 1)
    predicted = TreatedMean().fit(data.select(split.train))
    expected = [
        correlation(r.true.mean(0), r.predicted.mean(0)) for r in predicted_responses(predicted, data, split).values()
    ]
    np.testing.assert_allclose(figures[1]["mean"], np.mean(expected), rtol=1e-5)


def test_early_stopping_validates_on_drugs_that_are_not_trained_on(files, tmp_path):
    output = tmp_path / "run"
    options = {"data": files / "a.h5ad", "output": output, "max_steps": 4, "eval_every": 2, "patience": 3}
    finetune(words(**options, validation_drugs=2, drug_encoder="fingerprint", fingerprint_size=64))
    assert json.loads((output / "report.json").read_text())["n_train"] == 36
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl") if "validation_loss" in line] == [2, 4]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (pretrain, {}, "no profiles were given"),
        (pretrain, {"data": "absent.h5ad"}, "absent.h5ad does not exist"),
        (finetune, {}, "no responses were given"),
    ],
)
def test_runs_without_data_end_with_a_sentence(script, options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        script(words(**options, output=tmp_path / "run"))


@pytest.fixture
def own_precision():
    """Accelerate keeps the precision of a process's first run; this lets a test have another."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("own_precision")
def test_the_base_recipes_run_both_stages_and_fine_tuning(files, tmp_path):
    """With their own options (bfloat16, a token a gene, trackers), a narrower model and two steps."""
    recipes = ROOT / "train" / "recipes"
    narrow = {**SMALL, "data": files / "a.h5ad", "batch_size": 4, "num_workers": 0, "max_steps": 2}
    first = ["--recipe", str(recipes / "drug_response_base.yaml")]
    pretrain([*first, *words(**narrow, output=tmp_path / "one")])
    stage_2 = {"model": tmp_path / "one" / "model", "tasks": ["mask", "cell_line", "drug", "dose"]}
    pretrain([*first, *words(**narrow, **stage_2, output=tmp_path / "four")])
    last = {"model": tmp_path / "four" / "model", "hold_out_drugs": 1, "output": tmp_path / "tuned"}
    finetune(["--recipe", str(recipes / "finetune_drug_response_base.yaml"), *words(**narrow, **last)])
    tuned = DrugResponseForConditionalGeneration.from_pretrained(tmp_path / "tuned" / "model")
    assert (tuned.config.token_axis, tuned.config.decoder, tuned.config.hidden_size) == ("genes", "lstm", 16)
    assert len(json.loads((tmp_path / "tuned" / "report.json").read_text())["figures"]) == 4
    for run in ("one", "four", "tuned"):
        losses = [line["loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in line]
        assert len(losses) == 2
        assert np.isfinite(losses).all()


def test_what_a_run_would_only_find_out_after_training_is_found_before(files, first_stage, tmp_path):
    cells = responses()
    cells.select(~cells.is_control).to_anndata().write_h5ad(tmp_path / "treated.h5ad")
    options = {"data": tmp_path / "treated.h5ad", "output": tmp_path / "run", "training_input": "self"}
    with pytest.raises(SystemExit, match="'A549' has no controls; no line has any"):
        finetune(words(**options, hold_out_drugs=2))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    other = cells.to_anndata()
    other.var = other.var[[]].set_axis([f"other{i}" for i in range(GENES)])
    other.write_h5ad(tmp_path / "other.h5ad")
    options = {"data": tmp_path / "other.h5ad", "output": tmp_path / "run", "model": first_stage / "model"}
    with pytest.raises(SystemExit, match=r"lacks 13 of the 13 genes .* 'other0'.* and the model e\.g\. 'GENE0'"):
        pretrain(words(**options))
    with pytest.raises(SystemExit, match="none of its 13 genes is among the 13 of the model"):
        finetune(words(**options))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DrugResponsePretrainConfig, {"tasks": ["dosage"]}, "Expected tasks among"),
        (DrugResponsePretrainConfig, {"mask_ratio": 1.5}, "mask_ratio between 0 and 1"),
        (DrugResponsePretrainConfig, {"preset": "tiny"}, "Expected a preset among"),
        (DrugResponsePretrainConfig, {"validation_fraction": 1.0}, "must lie between 0 and 1"),
        (DrugResponseFinetuneConfig, {"drug_encoder": "id", "hold_out_drugs": 3}, "have no id embedding"),
        (DrugResponseFinetuneConfig, {"hold_out_donor": "101"}, "go together"),
        (DrugResponseFinetuneConfig, {"patience": 3, "eval_every": 2}, "give both or neither"),
        (DrugResponseFinetuneConfig, {"hidden_size": 65}, "multiple of"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_the_linear_guess_is_the_conditional_mean_of_a_normal_distribution():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(5, 5))
    reference = rng.normal(size=(20_000, 5)) @ mixing
    covariance = np.cov(reference, rowvar=False)
    covariance += 0.1 * covariance.trace() / 5 * np.eye(5)
    x, masked = rng.normal(size=(1, 5)), np.array([[True, False, False, True, False]])
    precision = np.linalg.inv(covariance)
    hidden, shown = [0, 3], [1, 2, 4]
    # Another form of the same mean: by blocks of the precision matrix
    mean = reference.mean(0)
    solve = np.linalg.solve(precision[np.ix_(hidden, hidden)], precision[np.ix_(hidden, shown)])
    found = linear_guess(reference, x, masked)[0]
    np.testing.assert_allclose(found[hidden], mean[hidden] - solve @ (x[0, shown] - mean[shown]), rtol=1e-6)
    np.testing.assert_array_equal(found[shown], x[0, shown])


@pytest.mark.realdata
def test_on_real_wells_the_small_recipe_beats_the_mean_of_treated_profiles(real_data, tmp_path):
    recipe = ROOT / "train" / "recipes" / "finetune_drug_response_small.yaml"
    wells = real_data / "drug" / "l1000_level3_HT115_681x978.h5ad"
    finetune(["--recipe", str(recipe), "--data", str(wells), "--output", str(tmp_path / "run"), "--cpu_threads", "1"])
    figures = json.loads((tmp_path / "run" / "report.json").read_text())["figures"]
    mean, delta = ({row["predictor"]: row[name] for row in figures} for name in ("mean", "delta"))
    np.testing.assert_allclose((mean["treated mean"], delta["treated mean"]), (0.932, 0.320), atol=5e-4)
    assert mean["this model"] > mean["treated mean"]
    assert delta["this model"] > delta["treated mean"]


@pytest.mark.realdata
def test_on_real_cells_an_unseen_type_of_an_unseen_donor_is_predicted_better_than_by_adding_the_mean_effect(
    real_data, tmp_path
):
    recipe = ROOT / "train" / "recipes" / "finetune_drug_response_interferon.yaml"
    cells = real_data / "cells" / "kang2018_ifnb_1556x1267.h5ad"
    words = ["--recipe", str(recipe), "--data", str(cells), "--output", str(tmp_path / "run"), "--cpu_threads", "1"]
    finetune(words)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["held_out"] == "CD14+ Monocytes, donor 107"
    mean, delta = ({row["predictor"]: row[name] for row in report["figures"]} for name in ("mean", "delta"))
    for figures in (mean, delta):
        ours = figures.pop("this model")
        assert ours > max(figures.values())
