"""train/pretrain.py end to end on small data: what it leaves, what it prints, what it refuses."""

import json
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml

from cellglot import GeneformerForMaskedLM, RankValueTokenizer
from cellglot.tokenization.medians import vocabulary_from_corpus
from cellglot.tokenization.rank_value import SPECIAL_TOKENS
from cellglot.train.metrics_log import read_metrics
from cellglot.train.pretrain import main
from cellglot.train.pretrain_geneformer import PretrainConfig
from cellglot.train.pretraining_data import find_sources, prepare_data
from cellglot.train.pretraining_report import labelled_cells

from ..conftest import make_tokenizer, synthetic_cells

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_steps": 6,
    "batch_size": 16,
    "eval_every": 3,
}


def words(**options):
    return [word for name, value in {**SMALL, **options}.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(2):
        synthetic_cells(60, 31, seed=i).write_h5ad(folder / f"part{i}.h5ad")
    return folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    main(words(data=corpus, output=output))
    return output


def test_leaves_a_complete_model_directory(finished):
    names = {p.name for p in (finished / "model").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "gene_medians.json",
        "gene_aliases.json",
        "modeling_geneformer.py",
        "configuration_geneformer.py",
        "rank_value.py",
        "README.md",
        "metrics.json",
        "loss_curve.png",
        "umap.png",
    } <= names
    assert not [p for p in finished.rglob("*") if p.suffix in {".bin", ".pkl", ".pt", ".tmp"}]
    model = GeneformerForMaskedLM.from_pretrained(finished / "model")
    tokenizer = RankValueTokenizer.from_pretrained(finished / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 2048


def test_report_and_card_hold_the_run_s_own_figures(finished):
    report = json.loads((finished / "report.json").read_text())
    log = read_metrics(finished / "metrics.jsonl")
    assert report["validation_loss"] == log[-1]["validation_loss"]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 7))
    assert report["uniform_loss"] == pytest.approx(np.log(report["vocabulary"] - 2))
    assert [row["features"] for row in report["probe"]] == [
        "majority type",
        "log counts",
        "embeddings, untrained network",
        "embeddings",
    ]
    card = (finished / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == round(report["validation_loss"], 4)
    assert f"| this model | {report['validation_loss']:.3f} |" in card
    # Six steps teach nothing, and the card says so before anything else.
    assert card.index("does not beat the frequency of genes") < card.index("## Loading")
    assert "trust_remote_code=True" in card


def test_pictures_are_pictures(finished):
    from matplotlib.image import imread

    for name in ("loss_curve.png", "umap.png"):
        image = imread(finished / name)
        assert min(image.shape[:2]) > 300
        assert image[..., :3].std() > 0.01


def config(**options):
    return replace(PretrainConfig(), **options)


def test_medians_come_from_training_cells_only(corpus, tmp_path):
    data = prepare_data(config(data=str(corpus), validation_fraction=0.4), tmp_path / "data")
    sources = data.sources
    assert sum(s.train.sum() for s in sources) + sum(s.validation.sum() for s in sources) == 120
    assert not any((s.train & s.validation).any() for s in sources)
    assert sum(s.validation.sum() for s in sources) == pytest.approx(48, abs=1)
    table = vocabulary_from_corpus(
        [s.source for s in sources],
        special_tokens=SPECIAL_TOKENS["v1"],
        cells=[s.train for s in sources],
        progress=False,
    )
    assert data.tokenizer.gene_medians == dict(zip(table["token"][2:], table["nonzero_median"][2:], strict=True))
    assert len(data.train) == sum(s.train.sum() for s in sources)


def test_symbols_of_the_files_name_genes_of_the_model(tmp_path):
    cells = synthetic_cells(40, 11)
    cells.X = cells.X + sp.csr_matrix(np.ones(cells.shape, dtype=np.float32))  # so that each gene is expressed
    cells.var["ensembl_id"] = cells.var_names
    # A symbol that two genes bear tells neither; one that is another gene's id is none.
    cells.var_names = [f"SYM{i}" for i in range(10)] + [str(cells.var_names[0])]
    cells.var["gene_name"] = [f"name{i}" for i in range(9)] + ["twice", "twice"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    data = prepare_data(config(data=str(tmp_path / "cells.h5ad")), tmp_path / "data")
    genes = list(cells.var["ensembl_id"])
    aliases = data.tokenizer.gene_aliases
    assert aliases == {f"SYM{i}": genes[i] for i in range(10)} | {f"name{i}": genes[i] for i in range(9)}
    match = data.tokenizer.resolver.match(["sym3", "name8", "twice", f"{genes[0]}.7"])
    assert match.index_g.tolist() == [3, 8, -1, 0]


def test_groups_are_held_out_whole(corpus):
    sources, _, _ = find_sources(config(data=str(corpus), split_by="donor", validation_fraction=0.3))
    donors = {"train": set(), "validation": set()}
    for i, source in enumerate(sources):
        obs = synthetic_cells(60, 31, seed=i).obs["donor"].to_numpy()
        for split, found in donors.items():
            found |= set(obs[getattr(source, split)])
    assert donors["train"]
    assert donors["validation"]
    assert not donors["train"] & donors["validation"]


def test_tokens_with_a_vocabulary_train_too(tmp_path, capsys):
    tokenizer = make_tokenizer(31)
    cells = tokenizer.encode_anndata(synthetic_cells(80, 31))
    cells.to_parquet(tmp_path / "tokens.parquet")
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    main(words(data=tmp_path / "tokens.parquet", vocabulary=tmp_path / "vocabulary", output=tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "rank-binned unigram" in printed
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["n_train_cells"], report["n_validation_cells"]) == (68, 12)
    assert report["probe"] == []
    assert (tmp_path / "run" / "model" / "loss_curve.png").exists()


def test_v2_layout_trains_without_masking_special_tokens(corpus, tmp_path):
    main(words(data=corpus, output=tmp_path / "run", layout="v2", report="false"))
    model = GeneformerForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.max_position_embeddings == 4096
    assert RankValueTokenizer.from_pretrained(tmp_path / "run" / "model").cls_token_id == 2


def test_files_with_other_genes_in_another_order_and_cells_that_failed(tmp_path):
    """The report's features are by gene of the vocabulary, whatever a file's columns; failed cells take no part."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, genes in enumerate((slice(0, 20), slice(30, 10, -1), slice(5, 31))):
        adata = synthetic_cells(50, 31, seed=i)[:, genes].copy()
        adata.obs["filter_pass"] = (np.arange(50) % 5 > 0).astype(int)
        adata.write_h5ad(folder / f"part{i}.h5ad")
    main(words(data=folder, output=tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["n_train_cells"] + report["n_validation_cells"] == 120
    assert len(report["probe"]) == 4
    sources, _, _ = find_sources(config(data=str(folder)))
    data = prepare_data(config(data=str(folder)), tmp_path / "data")
    cells = labelled_cells(data, None)
    position = {gene: i for i, gene in enumerate(data.tokenizer.gene_medians)}
    row = 0
    for source in sources:
        adata: Any = ad.read_h5ad(source.source)
        for cell in np.flatnonzero(source.train | source.validation):
            counts = np.asarray(adata.X[cell].todense()).ravel()
            expected = np.zeros(len(position))
            for gene, x in zip(adata.var_names, counts, strict=True):
                if gene in position:
                    expected[position[gene]] = np.log1p(x / counts.sum() * 10_000)
            np.testing.assert_allclose(cells.expression[row].toarray().ravel(), expected)
            row += 1
    assert row == 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "--data nowhere does not exist"),
        ({"data": "EMPTY"}, "holds neither .h5ad, .loom, .h5 with counts nor .parquet"),
        ({"data": "TOKENS"}, "holds token ids: pass the vocabulary"),
        ({"data": "TOKENS", "vocabulary": "SMALLER"}, "token id 32, but the vocabulary has 9 tokens"),
        ({"data": "CORPUS", "split_by": "patient"}, "no column 'patient'; it has cell_type, donor"),
        ({"data": "CORPUS", "split_by": "cell_type", "validation_fraction": 0.9}, "cannot be split"),
        ({"data": "CORPUS", "cell_type": "celltype"}, "no column 'celltype'; it has cell_type, donor"),
        ({"data": "TOKENS", "vocabulary": "SMALLER", "split_by": "donor"}, "split_by cannot be set for token ids"),
        ({"validation_fraction": 0.5}, "validation_fraction cannot be set for the embedded PBMC corpus"),
        ({"data": "CORPUS", "vocabulary": "SMALLER", "max_length": 9}, "its own aliases and length"),
        ({"data": "CORPUS", "layer": "counts"}, "has no layer 'counts'; it has X"),
        ({"data": "CORPUS", "trackers": "tensorbored"}, "Unknown tracker 'tensorbored'"),
    ],
)
def test_bad_data_ends_with_one_clear_line(options, message, corpus, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    ids = [list(range(2, 33))] * 9
    pd.DataFrame({"input_ids": ids}).to_parquet(tmp_path / "TOKENS.parquet")
    make_tokenizer(7).save_pretrained(tmp_path / "SMALLER")
    places = {
        "EMPTY": tmp_path / "EMPTY",
        "TOKENS": tmp_path / "TOKENS.parquet",
        "CORPUS": corpus,
        "SMALLER": tmp_path / "SMALLER",
    }
    options = {name: places.get(value, value) for name, value in options.items()}
    with pytest.raises(SystemExit, match=message):
        main(words(output=tmp_path / "run", **options))
    # Nothing is left that would stand in the way of the corrected command.
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_the_default_corpus_is_found_offline():
    sources, description, _ = find_sources(PretrainConfig())
    assert "PBMC" in description
    assert [int(s.train.sum()) for s in sources] == [595, 0]
    assert [int(s.validation.sum()) for s in sources] == [0, 105]


def test_the_most_variable_genes_of_training_cells_are_kept(monkeypatch):
    from cellglot.train import expression_features

    x = np.random.default_rng(0).normal(size=(30, 5)) * [1, 5, 1, 3, 1]
    x[20:, 0] *= 100  # varies among held-out cells only
    monkeypatch.setattr(expression_features, "MAX_GENES", 2)
    kept = expression_features.variable_genes(sp.csr_matrix(x), np.arange(30) < 20)
    np.testing.assert_allclose(kept, x[:, [1, 3]])
