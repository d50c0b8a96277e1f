"""train/finetune.py --method gene_graph on small cells: start, figures, what it leaves and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig

from cellglot.gene_graph import classify_expression
from cellglot.train import finetune, pretrain
from cellglot.train.finetune_gene_graph import GeneGraphFinetuneConfig, make_task
from cellglot.train.metrics_log import read_metrics

from ..conftest import ROOT, ensembl, synthetic_cells

N_GENES = 31
QUICK = {"epochs": 6, "batch_size": 16, "learning_rate": 3e-3, "cpu_threads": 1, "baselines": "false"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """cells.h5ad, edges.tsv, autoencoder/model, bert/"""
    folder = tmp_path_factory.mktemp("files")
    cells = synthetic_cells(150, N_GENES)
    cells.obs["alone"] = "same"
    cells.obs["half"] = [None if i % 2 else str(i % 3) for i in range(150)]
    cells.write_h5ad(folder / "cells.h5ad")
    genes = ensembl(N_GENES)
    ring = [f"{genes[i]}\t{genes[(i + 1) % 28]}" for i in range(28)]
    (folder / "edges.tsv").write_text("\n".join(["gene_a\tgene_b", *ring]) + "\n")
    words = ["--hidden_sizes", "11", "7", "--max_steps", "5", "--report", "false", "--cpu_threads", "1"]
    words += ["--data", str(folder / "cells.h5ad"), "--output", str(folder / "autoencoder")]
    pretrain.main(["--method", "gene_graph", *words])
    BertConfig().save_pretrained(folder / "bert")
    return folder


def words(files, output, **options):
    given = {"method": "gene_graph", "data": files / "cells.h5ad", "output": output, **QUICK, **options}
    out = []
    for name, value in given.items():
        value = str(value).replace("FILES", str(files)) if isinstance(value, str) else value
        out += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return out


def run(files, output, **options):
    finetune.main(words(files, output, **options))
    return json.loads((output / "metrics.json").read_text(), parse_constant=pytest.fail)


def network(files, tmp_path, **options):
    config = GeneGraphFinetuneConfig(data=str(files / "cells.h5ad"), seed=3, **options)
    task, _ = make_task(config, tmp_path / "data", is_main_process=True)
    return task.load_model(config)


@pytest.mark.parametrize("smoothing", ["none", "both"])
def test_a_classifier_starts_from_the_encoder_of_the_autoencoder(files, tmp_path, smoothing):
    """With a graph that the autoencoder had not as well: what smooths is new, the layers are not."""
    graph = {} if smoothing == "none" else {"smoothing": smoothing, "edges": str(files / "edges.tsv")}
    start = str(files / "autoencoder" / "model")
    model = network(files, tmp_path, model=start, **graph)
    trained = load_file(files / "autoencoder" / "model" / "model.safetensors")
    layers = {name: w for name, w in model.state_dict().items() if name.startswith("gene_graph.layers.")}
    assert len(layers) == 4
    assert all((trained[name] == weight).all() for name, weight in layers.items())
    assert model.config.id2label == {0: "B", 1: "NK", 2: "T"}
    bound = 7**-0.5
    assert 0.5 * bound < model.classifier.weight.abs().max() <= bound
    assert (smoothing == "none") == (model.gene_graph.network is None)
    if smoothing != "none":
        assert (model.config.n_edges, len(model.gene_graph.network.edges())) == (28, 56)


def test_a_classifier_without_smoothing_keeps_nothing_of_the_graph_it_started_from(files, tmp_path):
    graph = {"smoothing": "both", "edges": "FILES/edges.tsv", "max_steps": 1}
    run(files, tmp_path / "smoothed", **graph)
    run(files, tmp_path / "plain", model=str(tmp_path / "smoothed" / "model"), smoothing="none", max_steps=1)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain" / "model")
    assert (plain.config.smoothing, plain.config.n_edges) == ("none", 0)
    with pytest.raises(SystemExit, match="needs a gene network: pass --edges FILE"):
        run(files, tmp_path / "again", model=str(tmp_path / "plain" / "model"), smoothing="global", max_steps=1)


def test_a_classifier_of_other_labels_has_a_new_head_even_if_there_are_as_many(files, tmp_path):
    run(files, tmp_path / "first", max_steps=2)
    start = str(tmp_path / "first" / "model")
    kept = network(files, tmp_path / "a", model=start)
    renewed = network(files, tmp_path / "b", model=start, label="half")
    trained = load_file(tmp_path / "first" / "model" / "model.safetensors")
    assert (kept.classifier.weight == trained["classifier.weight"]).all()
    assert (renewed.classifier.weight != trained["classifier.weight"]).any()
    assert renewed.config.label_name == "half"


def test_cell_types_are_learned_and_everything_is_left_behind(files, tmp_path):
    given = {"smoothing": "both", "edges": "FILES/edges.tsv", "class_weights": "balanced", "diagonal": 1, "epochs": 12}
    report = run(files, tmp_path / "run", baselines="true", split_by="donor", test_groups=["2"], **given)
    models = report["summary"]["cell_type"]
    assert models["this model"]["accuracy"] > 0.9
    assert set(models) == {"this model", "majority", "logistic regression", "linear SVM", "random forest"}
    predictions = pd.read_csv(tmp_path / "run" / "predictions.csv").set_index("name")
    cells = ad.read_h5ad(files / "cells.h5ad")
    assert set(cells.obs["donor"][predictions.index]) == {"2"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.n_edges, model.config.smoothing, model.config.diagonal) == (28, "both", 1)
    # The saved model says of the tested cells what the table says.
    table = classify_expression(cells, model, progress=False).loc[predictions.index]
    assert (table["cell_type_predicted"].astype(str) == predictions["cell_type_predicted"]).all()
    np.testing.assert_allclose(table["cell_type_score"], predictions["cell_type_score"], atol=1e-5)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    for said in ("| this model |", "classify_expression", "Started from random weights", "donor 2 held out", "Adam,"):
        assert said in card
    assert {"confusion_matrix.png", "roc.png", "loss_curve.png"} <= {p.name for p in (tmp_path / "run").iterdir()}


def test_a_resumed_run_has_the_same_losses_and_predictions(files, tmp_path):
    options = {"save_every": 7, "epochs": 2, "model": "FILES/autoencoder/model"}
    whole = run(files, tmp_path / "run", **options)
    log = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # As if killed after its first checkpoint
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    again = run(files, tmp_path / "run", **options, resume="true")
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == log
    assert [s["metrics"] for s in again["splits"]] == [s["metrics"] for s in whole["splits"]]


def test_labels_of_tested_cells_do_not_reach_the_weights(files, tmp_path):
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
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "alone"}, r"Expected two labels or more in obs\['alone'\], found \['same'\]"),
        ({"label": "kind"}, "obs has no column 'kind'; it has cell_type"),
        ({"smoothing": "global"}, "needs a gene network: pass --edges FILE"),
        ({"model": "FILES/bert"}, "is of type 'bert', expected 'gene_graph'"),
        ({"model": "FILES/autoencoder/model", "hidden_sizes": [5]}, r"\[5\] cannot start from .*\[11, 7\]"),
        ({"model": "FILES/autoencoder/model", "smoothing": "both"}, "needs a gene network: pass --edges FILE"),
        ({"model": "FILES/autoencoder/model", "connected_genes": "true", "edges": "FILES/edges.tsv"}, "those of --mod"),
        ({"edges": "FILES/mouse.tsv", "smoothing": "both"}, r"None of the 2 genes of mouse.tsv .*orthologs"),
        ({"edges": "FILES/nan.tsv", "smoothing": "both"}, "score that is NaN, infinite or negative"),
        ({"test_groups": ["1"]}, "test_groups needs split_by"),
        ({"folds": 1}, "folds must be 0"),
    ],
)
def test_what_cannot_be_trained_is_said(files, tmp_path, capsys, options, message):
    (files / "mouse.tsv").write_text("Trp53\tMdm2\n")
    (files / "nan.tsv").write_text(f"{ensembl(2)[0]}\t{ensembl(2)[1]}\tnan\n")
    with pytest.raises(SystemExit) as error:
        finetune.main(words(files, tmp_path / "run", **options))
    found = f"{error.value} {capsys.readouterr().err}"
    assert re.search(message, found), found
    assert not (tmp_path / "run" / "model").exists()


def test_an_unknown_method_is_named(capsys):
    with pytest.raises(SystemExit, match="unknown method 'genegraph'; expected one of geneformer"):
        finetune.main(["--method", "genegraph"])


@pytest.mark.slow
def test_accelerate_launches_it_and_two_processes_learn_what_one_does(files, tmp_path):
    options = {"smoothing": "global", "edges": "FILES/edges.tsv", "epochs": 1}
    run(files, tmp_path / "one", **options)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += [str(ROOT / "train" / "finetune.py"), *words(files, tmp_path / "two", **options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    curves = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("one", "two")
    ]
    # Gradients are summed in another order, which Adam's first steps enlarge.
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)
