"""Fine-tuning, end to end on small synthetic cells: what it leaves, what it refuses, and that nothing leaks."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from cellglot import GeneformerForMaskedLM
from cellglot.train import finetune
from cellglot.train.classifier import load_classifier

from ..conftest import ROOT, ensembl, make_tokenizer, synthetic_cells
from ..modeling.test_geneformer import tiny_config

N_GENES = 43
QUICK = {
    "learning_rate": 1e-2,
    "warmup_steps": 0.1,
    "epochs": 3,
    "batch_size": 16,
    "cpu_threads": 1,
    "pooling": "mean",
    "baselines": "false",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """model/ (a tiny masked LM with its tokenizer), cells.h5ad, genes.tsv"""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(N_GENES, max_length=N_GENES)
    GeneformerForMaskedLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=N_GENES)).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    cells = synthetic_cells(150, N_GENES)
    cells.obs["state"] = [None if i % 5 == 0 else "odd" if i % 2 else "even" for i in range(150)]
    cells.obs["alone"] = "same"
    cells.obs["rare"] = np.where(np.arange(150) < 2, "few", "many")
    cells.write_h5ad(folder / "cells.h5ad")
    rows = [f"{gene}.4\t{'sensitive' if i % 3 else 'insensitive'}" for i, gene in enumerate(ensembl(30))]
    (folder / "genes.tsv").write_text("\n".join(["gene_id\tlabel", *rows, "ENSG09999999999\tsensitive"]) + "\n")
    return folder


def arguments(files, output, **options):
    given = {"model": files / "model", "data": files / "cells.h5ad", "output": output, **QUICK, **options}
    words = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return words


def run(files, output, **options):
    finetune.main(arguments(files, output, **options))
    # Strict: NaN is no JSON.
    return json.loads((output / "metrics.json").read_text(), parse_constant=pytest.fail)


def refused(files, output, capsys, **options):
    """The message that the script ends with."""
    with pytest.raises(SystemExit) as error:
        finetune.main(arguments(files, output, **options))
    return f"{error.value} {capsys.readouterr().err}"


def test_cell_types_are_learned_and_everything_is_left_behind(files, tmp_path, capsys):
    report = run(files, tmp_path / "run", baselines="true", class_weights="balanced")
    models = report["summary"]["cell_type"]
    assert models["this model"]["accuracy"] > 0.9
    assert set(models) == {"this model", "majority", "logistic regression", "linear SVM", "random forest"}
    assert models["majority"]["accuracy"] < 0.6
    assert "logistic regression" in capsys.readouterr().out
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"confusion_matrix.png", "roc.png", "loss_curve.png", "predictions.csv", "model", "run.json"} <= left
    predictions = pd.read_csv(tmp_path / "run" / "predictions.csv")
    assert len(predictions) == report["splits"][0]["n_test"] == 30
    probabilities = predictions[[f"cell_type:{name}" for name in ("B", "NK", "T")]]
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (predictions["cell_type_score"] == probabilities.max(axis=1)).all()
    accuracy = (predictions["cell_type"] == predictions["cell_type_predicted"]).mean()
    assert accuracy == pytest.approx(models["this model"]["accuracy"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "B", 1: "NK", 2: "T"}
    assert model.config.label_name == "cell_type"
    # The saved model says of the tested cells what the table says.
    cells = synthetic_cells(150, N_GENES)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = tokenizer.encode_anndata(cells)["input_ids"]
    index = [cells.obs_names.get_loc(name) for name in predictions["name"]]
    with torch.no_grad():
        found = torch.stack([model(torch.tensor([ids[i]])).logits[0].softmax(-1) for i in index])
    assert np.allclose(found, probabilities, atol=1e-5)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| this model |" in card
    assert 'pipeline("cell-classification"' in card
    assert json.loads((tmp_path / "run" / "model" / "metrics.json").read_text())["n_test"] == 30


def test_folds_by_donor_never_test_a_donor_that_was_trained_on(files, tmp_path):
    report = run(files, tmp_path / "run", split_by="donor", folds=4, epochs=1)
    predictions = pd.read_csv(tmp_path / "run" / "predictions.csv")
    cells = synthetic_cells(150, N_GENES)
    assert sorted(predictions["name"]) == sorted(cells.obs_names)
    donors = cells.obs["donor"].loc[predictions["name"]].to_numpy()
    assert pd.crosstab(donors, predictions["fold"]).gt(0).sum(axis=1).eq(1).all()
    accuracies = [split["metrics"]["cell_type"]["this model"]["accuracy"] for split in report["splits"]]
    assert len(accuracies) == 4
    row = report["summary"]["cell_type"]["this model"]
    assert row["accuracy"] == pytest.approx(np.mean(accuracies))
    assert row["accuracy_sd"] == pytest.approx(np.std(accuracies, ddof=1))
    pooled = (predictions["cell_type"] == predictions["cell_type_predicted"]).mean()
    assert report["pooled"]["cell_type"]["this model"]["accuracy"] == pytest.approx(pooled)
    for i in range(4):
        assert (tmp_path / "run" / f"fold-{i}" / "model" / "config.json").exists()


def test_labels_of_tested_cells_do_not_reach_the_weights(files, tmp_path):
    """With the tested donors' labels shuffled, training ends with the same weights to the last bit."""
    import anndata as ad

    cells = ad.read_h5ad(files / "cells.h5ad")
    tested = (cells.obs["donor"] == "2").to_numpy()
    types = cells.obs["cell_type"].astype(str).to_numpy()
    types[tested] = np.roll(types[tested], 1)
    cells.obs["cell_type"] = types
    cells.write_h5ad(tmp_path / "shuffled.h5ad")
    weights = []
    for name, data in (("a", files / "cells.h5ad"), ("b", tmp_path / "shuffled.h5ad")):
        run(files, tmp_path / name, data=data, split_by="donor", test_groups=["2"], epochs=1)
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_several_labels_make_a_multi_task_model_and_unknown_ones_do_not_count(files, tmp_path):
    report = run(files, tmp_path / "run", labels=["state", "cell_type"], test_fraction=0.3)
    assert report["labels"] == {"cell_type": ["B", "NK", "T"], "state": ["even", "odd"]}
    predictions = pd.read_csv(tmp_path / "run" / "predictions.csv", keep_default_na=False)
    assert (predictions["state"] == "").any()
    known = report["splits"][0]["metrics"]["state"]["this model"]["n"]
    assert known == (predictions["state"] != "").sum() < len(predictions)
    assert report["summary"]["cell_type"]["this model"]["accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert type(model).__name__ == "GeneformerForMultiTaskSequenceClassification"
    assert model.config.tasks == report["labels"]
    assert (tmp_path / "run" / "confusion_matrix_state.png").exists()


def test_genes_are_split_whole_and_their_predictions_averaged_over_cells(files, tmp_path, capsys):
    report = run(
        files, tmp_path / "run", gene_labels=files / "genes.tsv", folds=3, pooling=None, epochs=1, baselines="true"
    )
    assert "30 labelled genes; left out: 1 not in the vocabulary" in capsys.readouterr().out
    predictions = pd.read_csv(tmp_path / "run" / "predictions.csv")
    # Every expressed gene in exactly one fold, under the name that the table gave it
    assert predictions["name"].is_unique
    assert set(predictions["name"]) <= {f"{gene}.4" for gene in ensembl(30)}
    assert predictions["n_cells"].between(1, 150).all()
    for i, split in enumerate(report["splits"]):
        assert split["n_train"] + split["n_test"] == len(predictions)
        assert split["n_test"] == (predictions["fold"] == i).sum()
    assert set(report["summary"]["genes"]) >= {"this model", "random forest"}
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "fold-0" / "model")
    assert model.config.id2label == {0: "insensitive", 1: "sensitive"}
    # The table's probability of a gene of fold 0 is the mean over the cells that hold it.
    row = predictions[predictions["fold"] == 0].iloc[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "fold-0" / "model")
    token = tokenizer.convert_tokens_to_ids(row["name"].removesuffix(".4"))
    scores = []
    with torch.no_grad():
        for ids in tokenizer.encode_anndata(synthetic_cells(150, N_GENES))["input_ids"]:
            if token in ids:
                scores.append(model(torch.tensor([ids])).logits[0, ids.index(token)].softmax(-1)[1])
    assert row["n_cells"] == len(scores)
    assert row["genes:sensitive"] == pytest.approx(float(torch.stack(scores).mean()), abs=1e-5)


def test_early_stopping_and_freezing(files, tmp_path):
    report = run(files, tmp_path / "run", patience=2, eval_every=2, epochs=30, learning_rate=3e-2, freeze=1)
    facts = report["splits"][0]
    assert facts["n_validation"] > 0
    assert facts["best_step"] < facts["steps"] < 30 * facts["n_train"] / 16
    before = load_file(files / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    frozen = [k for k in after if k.startswith(("bert.embeddings", "bert.encoder.layer.0"))]
    assert frozen
    assert all(torch.equal(before[k], after[k]) for k in frozen)
    assert any(not torch.equal(before[k], after[k]) for k in after if k.startswith("bert.encoder.layer.1"))


def test_adapters_are_merged_into_a_plain_model(files, tmp_path):
    report = run(files, tmp_path / "run", lora_rank=4, epochs=6)
    assert report["summary"]["cell_type"]["this model"]["accuracy"] > 0.8
    before = load_file(files / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not any("lora" in key for key in after)
    changed = {key for key in before if key in after and not torch.equal(before[key], after[key])}
    assert changed == {k for k in before if k.endswith(("query.weight", "value.weight"))}


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_adapters_train_over_quantized_weights(files, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    report = run(files, tmp_path / "run", lora_rank=4, quantize=bits, epochs=4)
    assert report["summary"]["cell_type"]["this model"]["accuracy"] > 0.6
    before = load_file(files / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    # What is saved is full precision: the weights that have no adapters are the original ones.
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    assert after[name].dtype == torch.float32
    assert torch.equal(before[name], after[name])


def test_a_search_tries_and_then_trains_with_the_best_and_goes_on(files, tmp_path, capsys):
    def losses():
        out = capsys.readouterr().out
        return [float(line.split()[-1]) for line in out.splitlines() if line.startswith("trial ")]

    run(files, tmp_path / "run", search_trials=2, epochs=1)
    first = losses()
    best = json.loads((tmp_path / "run" / "trials" / "best.json").read_text())
    record = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert {key: record[key] for key in best["params"]} == best["params"]
    assert len(first) == 2
    assert best["validation_loss"] == pytest.approx(min(first), abs=1e-3)
    assert not (tmp_path / "run" / "trials" / "0" / "checkpoints").exists()
    # As if stopped before the training itself: a third trial, not one of the first again
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(files, tmp_path / "run", search_trials=3, epochs=1, resume="true")
    third = losses()
    assert len(third) == 1
    assert third[0] not in first


def test_a_search_survives_trials_that_diverge(files, tmp_path, capsys):
    message = refused(files, tmp_path / "run", capsys, search_trials=2, epochs=1, learning_rate=1e30)
    assert "all 2 trials diverged" in message


def test_an_untrained_network_of_other_depth(files):
    config = finetune.FinetuneConfig(model=str(files / "model"), untrained=True, num_hidden_layers=1, seed=3)

    class Task:
        def model_options(self):
            return {"num_labels": 3}

        def model_class(self):
            return AutoModelForSequenceClassification._model_mapping[type(tiny_config())][0]

    network = load_classifier(config, Task())
    assert len(network.bert.encoder.layer) == 1  # type: ignore[union-attr, arg-type]
    trained = load_file(files / "model" / "model.safetensors")
    key = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(network.state_dict()[key], trained[key])


@pytest.mark.slow
def test_a_run_of_folds_goes_on_after_the_finished_ones(files, tmp_path):
    options = {"folds": 3, "epochs": 1, "split_by": "donor"}
    whole = run(files, tmp_path / "whole", **options)
    run(files, tmp_path / "cut", **options)
    # As if killed in the last fold
    (tmp_path / "cut" / "fold-2" / "result.json").unlink()
    (tmp_path / "cut" / "metrics.json").unlink()
    done = (tmp_path / "cut" / "fold-0" / "result.json").stat().st_mtime_ns
    again = run(files, tmp_path / "cut", resume="true", **options)
    assert (tmp_path / "cut" / "fold-0" / "result.json").stat().st_mtime_ns == done
    assert [s["metrics"] for s in again["splits"]] == [s["metrics"] for s in whole["splits"]]


@pytest.mark.slow
def test_two_processes_predict_what_one_does(files, tmp_path):
    one = run(files, tmp_path / "one", epochs=1, learning_rate=3e-4)
    words = arguments(files, tmp_path / "two", epochs=1, learning_rate=3e-4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train/finetune.py")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    tables = [pd.read_csv(tmp_path / name / "predictions.csv") for name in ("one", "two")]
    assert (tables[0]["name"] == tables[1]["name"]).all()
    columns = [str(c) for c in tables[0] if str(c).startswith("cell_type:")]
    # Gradients are summed in another order, and Adam's first steps enlarge that.
    assert np.allclose(tables[0][columns], tables[1][columns], atol=2e-2)
    assert one["splits"][0]["n_test"] == len(tables[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["type"]}, r"obs has no column 'type'; it has cell_type, donor"),
        ({"labels": ["alone"]}, r"two labels or more in obs\['alone'\], found \['same'\]"),
        ({"labels": ["rare"], "folds": 3}, "label 'few' has fewer than 3 items"),
        ({"split_by": "donor", "test_groups": ["9"]}, "No cell of the data has donor '9'; there are 0, 1, 2, 3"),
        ({"split_by": "donor", "folds": 9}, "4 groups cannot make 9 folds: pass --folds 4"),
        ({"split_by": "cell_type", "folds": 3}, "of which no item is left to train on"),
        ({"test_groups": ["1"]}, "test_groups needs split_by"),
        ({"quantize": "4bit"}, "add --lora_rank"),
        ({"freeze": 3}, "Cannot freeze 3 layers of 2"),
        ({"model": "nowhere/to-be-found"}, "nowhere/to-be-found is no folder here"),
        ({"data": "absent.h5ad"}, "does not exist"),
        ({"patience": 3}, "set eval_every"),
        ({"min_per_class": 500}, "found none at all"),
    ],
)
def test_what_cannot_be_fine_tuned_is_said(files, tmp_path, capsys, options, message):
    import re

    found = refused(files, tmp_path / "run", capsys, **options)
    assert re.search(message, found), found
    assert not (tmp_path / "run" / "model").exists()


def test_gene_tables_that_do_not_fit_are_refused(files, tmp_path, capsys):
    for name, text, message in (
        ("mouse", "gene_id\tlabel\nENSMUSG00000000001\ta\nENSMUSG00000000003\tb\n", "ENSMUSG"),
        ("one", f"gene_id\tlabel\n{ensembl(1)[0]}\ta\n", "expected two labels or more"),
        ("thin", "gene_id\nENSG00000000001\n", "expected columns gene_id and label"),
    ):
        (tmp_path / f"{name}.tsv").write_text(text)
        options = {"gene_labels": tmp_path / f"{name}.tsv", "pooling": None}
        assert message in refused(files, tmp_path / name, capsys, **options)


def test_another_run_s_folder_is_left_alone(files, tmp_path, capsys):
    run(files, tmp_path / "run", epochs=1)
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    assert "holds an earlier run" in refused(files, tmp_path / "run", capsys)
    message = refused(files, tmp_path / "run", capsys, resume="true", epochs=1, learning_rate=1e-4)
    assert "learning_rate was 0.01 and is 0.0001" in message
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_a_tokenizer_of_another_vocabulary_is_refused(files, tmp_path, capsys):
    make_tokenizer(5).save_pretrained(tmp_path / "tokenizer")
    message = refused(files, tmp_path / "run", capsys, tokenizer=tmp_path / "tokenizer")
    assert "knows 45 tokens, its tokenizer 7" in message


def test_without_a_test_part_all_cells_train_and_nothing_is_claimed(files, tmp_path):
    report = run(files, tmp_path / "run", test_fraction=0, epochs=1)
    assert report["summary"] == {}
    assert report["splits"][0]["n_train"] == 150
    assert run(files, tmp_path / "run", test_fraction=0, epochs=1, resume="true") == report
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "nothing is measured" in card
    assert "model-index" not in card
    assert not (tmp_path / "run" / "predictions.csv").exists()


def test_a_failed_overwrite_brings_the_earlier_run_back(files, tmp_path, capsys):
    run(files, tmp_path / "run", epochs=1)
    before = {p.name for p in (tmp_path / "run").iterdir()}
    assert "no column 'typo'" in refused(files, tmp_path / "run", capsys, overwrite="true", labels=["typo"])
    assert {p.name for p in (tmp_path / "run").iterdir()} == before
    inside = tmp_path / "run" / "model"
    message = refused(files, tmp_path / "run", capsys, overwrite="true", model=inside)
    assert "lies in the output folder" in message
    assert (inside / "config.json").exists()
    run(files, tmp_path / "run", epochs=1, overwrite="true", class_weights="balanced")
    assert not (tmp_path / ".replaced-run").exists()


def test_a_folder_of_something_else_is_never_touched(files, tmp_path, capsys):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "precious.txt").write_text("mine")
    for options in ({}, {"resume": "true"}, {"overwrite": "true"}):
        assert "files that are no run" in refused(files, tmp_path / "out", capsys, **options)
    assert (tmp_path / "out" / "data" / "precious.txt").read_text() == "mine"


def test_after_an_error_in_the_options_the_corrected_command_runs(files, tmp_path, capsys):
    assert "cannot make 9 folds" in refused(files, tmp_path / "run", capsys, split_by="donor", folds=9)
    run(files, tmp_path / "run", split_by="donor", epochs=1)


@pytest.mark.slow
def test_a_changed_table_of_genes_is_not_resumed(files, tmp_path, capsys):
    table = tmp_path / "genes.tsv"
    lines = (files / "genes.tsv").read_text().splitlines()
    table.write_text("\n".join(lines) + "\n")
    options = {"gene_labels": table, "folds": 3, "pooling": None, "epochs": 1}
    run(files, tmp_path / "run", **options)
    (tmp_path / "run" / "fold-2" / "result.json").unlink()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    message = refused(files, tmp_path / "run", capsys, resume="true", **options)
    assert "data or the table of genes have changed" in message


def test_a_classifier_of_other_labels_can_be_started_from(files, tmp_path):
    """Of several labels, then of one, then of genes: configuration and heads are the new ones."""
    run(files, tmp_path / "several", labels=["cell_type", "state"], epochs=1)
    run(files, tmp_path / "one", model=tmp_path / "several" / "model", epochs=0.2)
    config = json.loads((tmp_path / "one" / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSequenceClassification"].endswith("GeneformerForSequenceClassification")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one" / "model")
    assert model.config.tasks is None
    assert type(model).__name__ == "GeneformerForSequenceClassification"
    options = {"gene_labels": files / "genes.tsv", "pooling": None, "epochs": 0.2}
    run(files, tmp_path / "genes", model=tmp_path / "one" / "model", **options)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "genes" / "model")
    assert model.config.label_name == "genes"
    assert model.classifier.out_features == 2


def test_a_half_precision_checkpoint_is_trained_in_float32(files, tmp_path):
    from cellglot import GeneformerModel

    GeneformerModel.from_pretrained(files / "model", dtype=torch.float16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(tmp_path / "half")
    run(files, tmp_path / "run", model=tmp_path / "half", epochs=1)
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_copies_of_cells_in_other_files_are_left_out(files, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        shutil.copyfile(files / "cells.h5ad", tmp_path / "data" / f"{name}.h5ad")
    other = synthetic_cells(50, N_GENES, seed=9)  # the same names, other cells
    other.write_h5ad(tmp_path / "data" / "c.h5ad")
    report = run(files, tmp_path / "run", data=tmp_path / "data", epochs=0.1)
    facts = report["splits"][0]
    assert facts["n_train"] + facts["n_test"] == 200
    assert "150 cells are in another file already" in capsys.readouterr().out


def test_rare_labels_of_genes_and_blank_ones_are_left_out(files, tmp_path, capsys):
    text = (files / "genes.tsv").read_text().splitlines()
    text += [f"{gene}\trare" for gene in ensembl(2, start=31)] + [f"{ensembl(1, start=33)[0]}\t "]
    (tmp_path / "genes.tsv").write_text("\n".join(text) + "\n")
    options = {"gene_labels": tmp_path / "genes.tsv", "pooling": None, "epochs": 0.1, "folds": 3}
    report = run(files, tmp_path / "run", min_per_class=3, **options)
    assert report["labels"] == {"genes": ["insensitive", "sensitive"]}
    assert "1 without a label" in capsys.readouterr().out
    assert "pass --min_per_class 3" in refused(files, tmp_path / "strict", capsys, **options)


def test_cells_that_lack_one_of_several_labels_are_split_all_the_same(files, tmp_path, capsys):
    run(files, tmp_path / "run", labels=["state", "cell_type"], folds=3, epochs=0.1)
    # Donor 2 without any state: nothing to test there
    import anndata as ad

    cells = ad.read_h5ad(files / "cells.h5ad")
    cells.obs["state"] = cells.obs["state"].astype(object).where(cells.obs["donor"].astype(str) != "2", None)
    cells.write_h5ad(tmp_path / "partial.h5ad")
    options = {"labels": ["state", "cell_type"], "split_by": "donor", "test_groups": ["2"]}
    message = refused(files, tmp_path / "partial", capsys, data=tmp_path / "partial.h5ad", **options)
    assert "'state': no item of the test part has a label" in message


def test_a_finished_run_is_read_back_as_it_was(files, tmp_path):
    import anndata as ad

    cells = ad.read_h5ad(files / "cells.h5ad")
    cells.obs_names = ["NA", *(f"{i:05d}" for i in range(1, 150))]
    cells.write_h5ad(tmp_path / "numbers.h5ad")
    run(files, tmp_path / "run", data=tmp_path / "numbers.h5ad", epochs=0.1)
    before = (tmp_path / "run" / "predictions.csv").read_bytes()
    run(files, tmp_path / "run", data=tmp_path / "numbers.h5ad", epochs=0.1, resume="true")
    assert (tmp_path / "run" / "predictions.csv").read_bytes() == before
    # Baselines can be had afterwards, without training again.
    report = run(files, tmp_path / "run", data=tmp_path / "numbers.h5ad", epochs=0.1, resume="true", baselines="true")
    assert "random forest" in report["summary"]["cell_type"]
    assert "| random forest |" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_balanced_weights_raise_the_recall_of_a_rare_class(files, tmp_path):
    """Few steps: without weights a class of a tenth of the cells is not predicted at all."""
    import anndata as ad

    cells = ad.read_h5ad(files / "cells.h5ad")
    rare = np.flatnonzero(cells.obs["cell_type"] == "NK")
    cells = cells[np.setdiff1d(np.arange(150), rare[15:])].copy()
    cells.obs["is_nk"] = np.where(cells.obs["cell_type"] == "NK", "yes", "no")
    cells.write_h5ad(tmp_path / "rare.h5ad")
    recall = {}
    for weights in ("none", "balanced"):
        options = {"labels": ["is_nk"], "class_weights": weights, "max_steps": 12, "learning_rate": 2e-3}
        report = run(files, tmp_path / weights, data=tmp_path / "rare.h5ad", **options)
        recall[weights] = report["splits"][0]["metrics"]["is_nk"]["this model"]["per_class"]["yes"]["recall"]
    assert recall["balanced"] > recall["none"]
