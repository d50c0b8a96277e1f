"""train/pretrain.py --method multiome on small data: a planted rule learned, what it leaves, resumes and refuses."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml
from scipy.special import logit
from sklearn.metrics import average_precision_score, precision_recall_curve, precision_recall_fscore_support
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoProcessor

from cellglot.multiome import principal_embeddings
from cellglot.tokenization.binarized_string import TASKS
from cellglot.train.metrics_log import read_metrics
from cellglot.train.multiome_data import (
    cells_of,
    feature_means,
    prepare_data,
    present_features,
    split_cells,
    task_token_ids,
)
from cellglot.train.multiome_report import ScoreHistogram, probability_of_step
from cellglot.train.pretrain import main
from cellglot.train.pretrain_multiome import MultiomePretrainConfig, new_model, pair_lengths

from ..conftest import ROOT
from ..tokenization.test_binarized_string import write_parquet

N_CELLS, GENES, PEAKS_PER_GENE = 300, 11, 2
SMALL: dict[str, Any] = {
    "method": "multiome",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "max_steps": 6,
    "batch_size": 32,
    "validation_fraction": 0.2,
    "eval_every": 3,
    "cpu_threads": 1,
}


def planted(seed: int = 0, n_cells: int = N_CELLS) -> Any:
    """(expression, accessibility): each gene opens two peaks, and nothing else does. Genes are on in a quarter."""
    rng = np.random.default_rng(seed)
    on = rng.random((n_cells, GENES)) < 0.25
    obs = pd.DataFrame({"batch": [f"b{i % 4}" for i in range(n_cells)]}, index=[f"cell{i}" for i in range(n_cells)])
    # A gene that is always on keeps every other one's share of the counts below the threshold while it is off.
    counts = np.hstack([on * rng.poisson(50, on.shape) + (rng.random(on.shape) < 0.1), np.full((n_cells, 1), 9_000)])
    peaks = np.repeat(on, PEAKS_PER_GENE, axis=1) * rng.integers(1, 4, (n_cells, GENES * PEAKS_PER_GENE))
    names = [f"G{i}" for i in range(GENES + 1)], [f"chr1-{100 * i}-{100 * i + 9}" for i in range(peaks.shape[1])]
    return tuple(
        ad.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=obs.copy(), var=pd.DataFrame(index=pd.Index(of)))
        for x, of in zip((counts, peaks), names, strict=True)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    for name, adata in zip(("rna", "atac"), planted(), strict=True):
        adata.write_h5ad(folder / f"{name}.h5ad")
    return [str(folder / "rna.h5ad"), str(folder / "atac.h5ad")]


def words(files, **options):
    given = {"cells": files, **SMALL, **options}
    return [word for name, value in given.items() if value != [] for word in (f"--{name}", *map(str, _many(value)))]


def _many(value):
    return value if isinstance(value, list) else [value]


def config(files, **options):
    return replace(MultiomePretrainConfig(), **{"cells": files, **SMALL, **options})


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    main(words(files, output=output, max_steps=150, learning_rate=1e-2, eval_every=50, split_by="batch"))
    return output


def test_a_planted_rule_is_learned_in_both_directions(finished):
    report = json.loads((finished / "report.json").read_text())
    for task in ("gex2atac", "atac2gex"):
        baseline, ours = [row for row in report["predictions"] if row["task"] == task]
        assert (baseline["guess"], ours["guess"]) == ("frequency", "this model")
        assert ours["f1"] >= 0.95
        assert ours["average_precision"] >= 0.95
        assert ours["rmse"] < 0.6 * baseline["rmse"]
        # The gene that is always on is all that frequencies know.
        assert baseline["f1"] < 0.7


def test_leaves_a_complete_model_directory_that_predicts(finished):
    names = {p.name for p in (finished / "model").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "modeling_multiome.py",
        "set_head_multiome.py",
        "binarized_string.py",
        "README.md",
        "metrics.json",
        "loss_curve.png",
    } <= names
    assert not [p for p in finished.rglob("*") if p.suffix in {".bin", ".pkl", ".pt", ".tmp"}]
    model = AutoModelForSequenceClassification.from_pretrained(finished / "model")
    processor = AutoProcessor.from_pretrained(finished / "model")
    expression, accessibility = planted(seed=1, n_cells=40)
    batch = processor(expression, task="gex2atac")
    found = model.predict(batch["input_ids"], batch["attention_mask"])
    opened = sp.csr_matrix((np.ones(len(found.features)), found.features, found.offsets), (40, accessibility.n_vars))
    assert (opened.toarray() > 0)[accessibility.X.toarray() > 0].mean() > 0.95
    # The threshold is what validation cells say.
    assert 0 < model.config.gex2atac_threshold != 0.5


def test_report_and_card_hold_the_run_s_own_figures(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["validation_loss"] == read_metrics(finished / "metrics.jsonl")[-1]["validation_loss"]
    assert report["n_train_rows"] + report["n_validation_rows"] == 2 * N_CELLS
    card = (finished / "model" / "README.md").read_text()
    metrics = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    ours = [row for row in report["predictions"] if row["guess"] == "this model"]
    assert [m["value"] for m in metrics if m["type"] == "f1"] == [round(row["f1"], 4) for row in ours]
    assert "does not beat" not in card
    assert "demonstration" in card


def test_groups_are_held_out_whole(files, finished):
    options = config(files, split_by="batch")
    parts: Any = split_cells(options, cells_of(files))
    batches = planted()[0].obs["batch"].to_numpy()
    assert not set(batches[parts["train"].mask]) & set(batches[parts["validation"].mask])
    data = prepare_data(options, finished / "data")
    assert len(data.train) == 2 * parts["train"].mask.sum()
    assert len(data.validation) == 2 * parts["validation"].mask.sum() > 0


def test_a_t5_learns_to_write_the_planted_rule(files, tmp_path):
    # One gene in four and no more than a dozen tokens: what a CPU learns in seconds
    options = {"head": "t5", "max_steps": 160, "learning_rate": 1e-2, "d_model": 48}
    main(words(files, output=tmp_path / "run", eval_every=0, generated_cells=20, **options))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for row in report["predictions"]:
        assert row["n_cells"] == 20
        if row["guess"] == "this model":
            assert row["f1"] >= 0.95, row
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.max_target_length >= 2 * PEAKS_PER_GENE
    assert model.config.encoder_position_bias


@pytest.mark.parametrize(
    "options",
    [
        {"head": "t5", "vocabulary": "subword", "subword_size": 60, "max_target_length": 30},
        {"head": "t5", "encoding": "binned", "max_source_length": 9},
        {"head": "set", "encoding": "rank", "tasks": ["atac2gex"]},
    ],
)
def test_other_vocabularies_and_encodings_train(files, tmp_path, options):
    main(words(files, output=tmp_path / "run", generated_cells=2, **options))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["predictions"]) == 2 * len(options.get("tasks", "12"))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    figure = "f1" if options["head"] == "t5" else "average_precision"
    beaten = [ours[figure] > theirs[figure] for theirs, ours in zip(*[iter(report["predictions"])] * 2, strict=True)]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert card.count("does not beat the frequency") == beaten.count(False)


def test_a_resumed_run_has_the_same_losses(files, tmp_path):
    output = tmp_path / "run"
    options = {"output": output, "dropout": 0.1, "save_every": 4, "report": "false", "max_source_length": 9}
    main(words(files, **options))
    expected = read_metrics(output / "metrics.jsonl")
    shutil.rmtree(output / "checkpoints" / "step-00000006")
    main([*words(files, **options), "--resume"])
    assert read_metrics(output / "metrics.jsonl") == expected


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(files, tmp_path):
    options = {"report": "false", "dropout": 0.0, "max_steps": 3, "eval_every": 0}
    main(words(files, output=tmp_path / "one", **options))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            str(ROOT / "train" / "pretrain.py"),
            *words(files, output=tmp_path / "two", **options),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("one", "two")
    )
    # float32 sums in another order
    assert two == pytest.approx(one, rel=1e-4)


def test_a_corpus_keeps_its_own_splits(tmp_path):
    expression, accessibility = planted(n_cells=30)
    folder = tmp_path / "bmmc"
    folder.mkdir()
    for split, part in (("train", slice(0, 19)), ("validation", slice(19, 25)), ("test", slice(25, 30))):
        write_parquet(folder, expression[part].copy(), accessibility[part].copy(), split=split)
    data = prepare_data(config([str(folder)]), tmp_path / "data")
    assert (len(data.train), len(data.validation)) == (2 * 19, 2 * 6)
    expected = data.processor.encode((expression[:19].copy(), accessibility[:19].copy()), "gex2atac")
    of_task = data.train.select(np.flatnonzero(task_token_ids(data.train) == 3))
    assert [list(ids) for ids in of_task["input_ids"]] == list(expected["input_ids"])
    with pytest.raises(ValueError, match="has its own validation split"):
        prepare_data(config([str(folder)], split_by="batch"), tmp_path / "other")
    # Without a validation split training cells are held out, and test cells take no part.
    for file in folder.glob("*-validation*"):
        file.unlink()
    data = prepare_data(config([str(folder)]), tmp_path / "held-out")
    assert (len(data.train), len(data.validation)) == (2 * 15, 2 * 4)


def test_biases_begin_at_the_frequencies_and_means_of_training_cells(files, finished):
    options = config(files, split_by="batch")
    data = prepare_data(options, finished / "data")
    model = new_model(options, data.processor, data.train)
    train = split_cells(options, cells_of(files))["train"].mask
    binary = data.processor.feature_extractor(tuple(part[train].copy() for part in planted()))
    expected = np.concatenate([np.asarray(binary[m].mean(axis=0)).ravel() for m in ("expression", "accessibility")])
    found = [feature_means(data.train, data.processor, task) for task in ("atac2gex", "gex2atac")]
    frequencies, means = (np.concatenate(part) for part in zip(*found, strict=True))
    # 1e-5: means of float32
    np.testing.assert_allclose(frequencies, expected, atol=1e-5)
    np.testing.assert_allclose(means[GENES + 1 :], expected[GENES + 1 :], atol=1e-5)
    assert means[GENES] > 8  # log(1 + 9,000 of 10,000) of the gene that is always on
    np.testing.assert_allclose(model.head.value_bias.detach(), means, rtol=1e-5)


def test_embeddings_begin_as_principal_components_of_training_cells(files, finished):
    options = config(files, split_by="batch")
    data = prepare_data(options, finished / "data")
    train = split_cells(options, cells_of(files))["train"].mask
    binary = data.processor.feature_extractor(tuple(part[train].copy() for part in planted()))
    both = sp.csr_matrix(sp.hstack([binary["expression"], binary["accessibility"]]))
    first = data.processor.model_fields()["first_gene_token_id"]
    models = [new_model(replace(options, principal_embeddings=on), data.processor, data.train) for on in (True, False)]
    ours, random = (model.get_input_embeddings().weight.detach()[first:].numpy() for model in models)
    # 1e-4: float32, and components beyond the planted ones, which are nearly nothing
    np.testing.assert_allclose(ours, principal_embeddings(both, SMALL["d_model"]), atol=1e-4)
    assert np.abs(ours - random).max() > 0.1
    for task in TASKS:
        found = present_features(data.train, data.processor, task, max_cells=len(data.train), seed=0)
        np.testing.assert_array_equal(found.toarray(), both.toarray())
        few = present_features(data.train, data.processor, task, max_cells=7, seed=0)
        assert few.shape == (7, both.shape[1])
        assert {tuple(row) for row in few.toarray()} <= {tuple(row) for row in both.toarray()}


def test_lengths_are_what_a_forward_pass_takes(files, finished):
    data = prepare_data(config(files, split_by="batch"), finished / "data")
    rows = data.train.select(range(9))
    read, written = ([len(x) for x in rows[name]] for name in ("input_ids", "labels"))
    assert pair_lengths(rows, config(files)).tolist() == read
    assert pair_lengths(rows, config(files, head="t5")).tolist() == [a + b for a, b in zip(read, written, strict=True)]
    both = config(files, head="t5", max_source_length=8, max_target_length=9)
    assert pair_lengths(rows, both).tolist() == [min(a, 8) + min(b, 9) for a, b in zip(read, written, strict=True)]


def test_histogram_figures_are_scikit_learn_s():
    rng = np.random.default_rng(0)
    present = rng.random((40, 30)) < 0.1
    logits = rng.normal(-3, 2, present.shape) + 2 * present
    histogram = ScoreHistogram()
    histogram.add(logits[:11], present[:11])
    histogram.add(logits[11:], present[11:])
    # 1e-3: scores of one bin are one step of the curve
    expected = average_precision_score(present.ravel(), logits.ravel())
    assert histogram.average_precision() == pytest.approx(expected, abs=1e-3)
    step = histogram.best_step()
    probability = 1 / (1 + np.exp(-logits))
    predicted = probability >= probability_of_step(step)
    curve = histogram.curve()
    found = [curve[name][step] for name in ("precision", "recall", "f1")]
    expected = precision_recall_fscore_support(present.ravel(), predicted.ravel(), average="binary")[:3]
    np.testing.assert_allclose(found, expected)
    precision, recall, _ = precision_recall_curve(present.ravel(), logits.ravel())
    assert curve["f1"][step] == pytest.approx((2 * precision * recall / (precision + recall)).max(), abs=1e-3)


def test_the_threshold_lies_midway_between_what_is_there_and_what_is_not():
    histogram = ScoreHistogram()
    histogram.add(np.array([3.0, 2.0, -1.0, -4.0]), np.array([True, True, False, False]))
    # Half a bin of 0.002 on either side
    assert logit(probability_of_step(histogram.best_step())) == pytest.approx(0.5, abs=0.004)
    assert histogram.curve()["f1"][histogram.best_step()] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": []}, "no cells were given"),
        ({"cells": ["nowhere.h5ad"]}, "nowhere.h5ad does not exist"),
        ({"split_by": "donor"}, "obs has no column 'donor'; it has batch"),
        ({"gene_names": "symbol"}, "rna.h5ad: var has no column 'symbol'; it has none"),
        ({"threshold": 9.5}, "threshold of 9.5 leaves no expressed gene"),
        ({"min_cells": 200}, "min_cells=200 leaves no peaks; the commonest is of"),
    ],
)
def test_bad_data_end_the_run_with_a_message(files, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        main(words(options.pop("cells", files), output=tmp_path / "run", **options))
    # The corrected command may use the same folder.
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["gex2gex"]}, "Expected tasks among gex2atac, atac2gex"),
        ({"vocabulary": "subword"}, "each of which must be a token"),
        ({"max_target_length": 50}, "max_target_length is for head t5"),
        ({"model": "large"}, "a preset among t5-small, small"),
        ({"gamma_negative": -1.0}, "gamma_negative"),
        ({"max_source_length": 3}, "must be 8 or more"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
    ],
)
def test_bad_options_are_refused(files, options, message):
    with pytest.raises(ValueError, match=message):
        config(files, **options)


def test_other_cells_than_the_run_began_with_are_noticed(files, tmp_path):
    main(words(files, output=tmp_path / "run", report="false", max_steps=1))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(SystemExit, match="made from other data or options"):
        main([*words(files[::-1], output=tmp_path / "run", report="false", max_steps=1), "--resume"])
