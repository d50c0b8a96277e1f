"""train/pretrain.py --method gene_graph on small cells: what it leaves, resumes, and refuses."""

import json
import shutil

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining

from cellglot.gene_graph import read_expression
from cellglot.train.expression_rows import ExpressionCollator
from cellglot.train.gene_graph_data import common_genes, load_expression
from cellglot.train.gene_graph_network import make_network
from cellglot.train.metrics_log import read_metrics
from cellglot.train.optimization import make_optimizer
from cellglot.train.pretrain import main
from cellglot.train.pretrain_gene_graph import GeneGraphPretrainConfig, split_cells

from ..conftest import ensembl, synthetic_cells

N_CELLS, N_GENES = 97, 31
SMALL = {"hidden_sizes": [11, 7], "epochs": 4, "batch_size": 16, "learning_rate": 1e-2, "cpu_threads": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """cells.h5ad, edges.tsv (a ring of all genes but the last three)"""
    folder = tmp_path_factory.mktemp("files")
    synthetic_cells(N_CELLS, N_GENES).write_h5ad(folder / "cells.h5ad")
    genes = ensembl(N_GENES)
    ring = [f"{genes[i]}\t{genes[(i + 1) % 28]}\t{100 + i}" for i in range(28)]
    (folder / "edges.tsv").write_text("\n".join(["gene_a\tgene_b\tscore", *ring]) + "\n")
    return folder


def words(files, **options):
    given = {"method": "gene_graph", "data": files / "cells.h5ad", **SMALL, **options}
    out = []
    for name, value in given.items():
        if value is not None:
            out += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return out


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    main(words(files, output=output, smoothing="both", edges=files / "edges.tsv", split_by="donor", leave_out=["2"]))
    return output


def loaded_cells(files, folder, **options):
    config = GeneGraphPretrainConfig(data=str(files / "cells.h5ad"), **options)
    model_config, _ = make_network(config, common_genes(config.data))
    columns = [config.split_by] if config.split_by else []
    return load_expression(config.data, folder, model_config, columns=columns), config


def test_leaves_a_complete_model_whose_error_is_that_of_the_report(finished, files):
    model = AutoModelForPreTraining.from_pretrained(finished / "model").eval()
    assert type(model).__name__ == "GeneGraphForReconstruction"
    assert (model.config.n_edges, model.config.smoothing) == (28, "both")
    assert AutoModel.from_pretrained(finished / "model").network.pairs.shape == (28, 2)
    cells, config = loaded_cells(files, finished / "again", split_by="donor", leave_out=["2"])
    train, validation = split_cells(cells, config)
    x = read_expression(files / "cells.h5ad", model)[0].toarray()
    with torch.no_grad():
        found = model(torch.from_numpy(x[validation])).reconstructions.numpy()
    report = json.loads((finished / "report.json").read_text())
    assert report["validation_loss"] == pytest.approx(((found - x[validation]) ** 2).mean(), rel=1e-5)
    assert (report["n_train_cells"], report["n_validation_cells"]) == (train.sum(), validation.sum())
    mean, components = report["references"].items()
    assert mean[1] == pytest.approx(((x[train].mean(axis=0) - x[validation]) ** 2).mean(), rel=1e-5)
    centred = x[train] - x[train].mean(axis=0)
    basis = np.linalg.svd(centred, full_matrices=False)[2][:7]
    rest = x[validation] - x[train].mean(axis=0)
    assert components[0] == "7 principal components"
    assert components[1] == pytest.approx(((rest - rest @ basis.T @ basis) ** 2).mean(), rel=1e-4)
    card = (finished / "model" / "README.md").read_text()
    assert "smoothed along individual and global graphs without diagonal" in card
    assert "Network: edges.tsv: 28 of 28 genes (100.0%) and 28 of 28 edges (100.0%) matched" in card
    assert "it has 28 of the 31 genes given (90.3%)" in card
    assert ", donor 2 left out, " in card
    assert "reconstructed no worse by: " in card
    assert (finished / "model" / "loss_curve.png").exists()


def test_groups_that_are_left_out_take_no_part(files, tmp_path):
    cells, config = loaded_cells(files, tmp_path / "data", split_by="donor", leave_out=["2"])
    train, validation = split_cells(cells, config)
    donors = cells.obs["donor"].to_numpy()
    assert set(donors[train]) | set(donors[validation]) == {"0", "1", "3"}
    assert not set(donors[train]) & set(donors[validation])


def test_cells_that_are_left_out_do_not_reach_the_weights(files, tmp_path):
    cells = ad.read_h5ad(files / "cells.h5ad")
    left_out = (cells.obs["donor"] == "2").to_numpy()
    counts = cells.to_df().to_numpy()
    counts[left_out] += 7
    cells.X = sp.csr_matrix(counts)
    cells.write_h5ad(tmp_path / "other.h5ad")
    weights = []
    for name, data in (("a", files / "cells.h5ad"), ("b", tmp_path / "other.h5ad")):
        given = {"split_by": "donor", "leave_out": ["2"], "report": "false", "max_steps": 3}
        main(words(files, output=tmp_path / name, data=data, **given))
        weights.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


def test_the_optimizer_is_the_paper_s_adam():
    """Betas 0.9 and 0.999, epsilon 1e-8, no decay, nothing clipped."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    config = GeneGraphPretrainConfig()
    optimizers = [
        make_optimizer(ours, config),
        torch.optim.Adam(theirs.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8),
    ]
    for _ in range(3):
        x = torch.randn(4, 5)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (1e-3 * model(x).square().sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-8)
    assert (config.batch_size, config.schedule, config.warmup_steps) == (64, "constant", 0)


def test_a_resumed_run_has_the_same_losses(files, tmp_path):
    output = tmp_path / "run"
    options = {"output": output, "report": "false", "save_every": 7, "smoothing": "individual", "diagonal": 1}
    main(words(files, edges=files / "edges.tsv", **options))
    expected = read_metrics(output / "metrics.jsonl")
    last = sorted((output / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    main([*words(files, edges=files / "edges.tsv", **options), "--resume"])
    assert read_metrics(output / "metrics.jsonl") == expected
    with pytest.raises(SystemExit, match="diagonal was 1 and is 0"):
        main([*words(files, edges=files / "edges.tsv", **{**options, "diagonal": 0}), "--resume"])


def test_memory_decides_nothing_but_memory(files, tmp_path):
    curves = []
    for max_tokens in (256, 3):
        output = tmp_path / str(max_tokens)
        main(words(files, output=output, max_tokens=max_tokens, report="false", epochs=1))
        curves.append([line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line])
    assert len(curves[0]) == 6
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def test_only_connected_genes_are_read_where_asked(files, tmp_path):
    main(words(files, output=tmp_path / "run", edges=files / "edges.tsv", connected_genes="true", max_steps=1))
    config = AutoModel.from_pretrained(tmp_path / "run" / "model").config
    assert (config.n_genes, config.smoothing, config.gene_ids) == (28, "none", ensembl(28))


def test_files_share_their_common_genes_and_a_cell_in_two_of_them_counts_once(files, tmp_path):
    folder = tmp_path / "cells"
    folder.mkdir()
    cells = ad.read_h5ad(files / "cells.h5ad")
    cells[:60, 3:].copy().write_h5ad(folder / "a.h5ad")
    cells[50:, :-2].copy().write_h5ad(folder / "b.h5ad")
    config = GeneGraphPretrainConfig(data=str(folder))
    genes = common_genes(config.data)
    assert genes.ids == tuple(ensembl(N_GENES)[3:-2])
    # The same ten cells again, with the same genes: as totals make expression, other genes would change it.
    cells[50:60, 3:].copy().write_h5ad(folder / "b.h5ad")
    model_config, _ = make_network(config, common_genes(config.data))
    loaded = load_expression(config.data, tmp_path / "data", model_config, columns=["donor"])
    assert loaded.obs.index.tolist() == cells.obs_names[:60].tolist()
    x = ExpressionCollator()(loaded.examples(np.ones(60, dtype=bool)).__getitems__([59, 0]), [(), ()])["expression"]
    expected, _, _ = read_expression(cells[:60, 3:].copy(), model_config)
    np.testing.assert_allclose(x, expected[[59, 0]].toarray(), rtol=1e-6)
    # In whatever order a file has the genes
    cells[50:60, :2:-1].copy().write_h5ad(folder / "b.h5ad")
    again = load_expression(config.data, tmp_path / "again", model_config, columns=["donor"])
    assert again.obs.index.tolist() == cells.obs_names[:60].tolist()


def test_the_genes_are_those_of_the_layer_with_the_counts(files, tmp_path):
    cells = ad.read_h5ad(files / "cells.h5ad")
    few = cells[:, :5].copy()
    few.raw = cells
    few.write_h5ad(tmp_path / "few.h5ad")
    main(words(files, data=tmp_path / "few.h5ad", output=tmp_path / "run", layer="raw", max_steps=1, report="false"))
    assert AutoModel.from_pretrained(tmp_path / "run" / "model").config.gene_ids == ensembl(N_GENES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "absent.h5ad"}, "does not exist"),
        ({"smoothing": "global"}, "smoothing='global' needs a gene network: pass --edges FILE"),
        ({"edges": "EDGES"}, "smoothing='none' uses no network: pass --smoothing"),
        ({"connected_genes": "true"}, "connected_genes needs edges"),
        ({"min_score": 700}, "min_score needs edges"),
        ({"edges": "nowhere.tsv", "smoothing": "both"}, "nowhere.tsv does not exist"),
        ({"diagonal": 2}, "Expected diagonal 0 or 1"),
        ({"diagonal": 1}, "diagonal does nothing with smoothing='none': pass --smoothing individual or global or both"),
        ({"smoothing": "individual", "edges": "EDGES", "score_scaling": "degree"}, "score_scaling does nothing"),
        ({"smoothing": "global", "edges": "EDGES", "attention_size": 3}, "attention_size does nothing"),
        ({"gradient_checkpointing": "true"}, "smoothing='none' has none"),
        ({"smoothing": "global", "edges": "EDGES", "compile": "true"}, "compile knows no sparse products"),
        ({"smoothing": "global", "edges": "EDGES", "edges_info": "EDGES"}, "a table of edges, .* no use for info"),
        ({"leave_out": ["2"]}, "leave_out needs split_by"),
        ({"split_by": "donor", "leave_out": ["9"]}, "No cell of the data has donor '9'; there are 0, 1, 2, 3"),
        ({"split_by": "patient"}, "obs has no column 'patient'; it has cell_type, donor"),
        ({"hidden_sizes": [0]}, r"Expected hidden_sizes\[0\] above 0"),
    ],
)
def test_what_cannot_be_trained_is_said(files, tmp_path, capsys, options, message):
    import re

    given = {name: files / "edges.tsv" if value == "EDGES" else value for name, value in options.items()}
    with pytest.raises(SystemExit) as error:
        main(words(files, output=tmp_path / "run", **given))
    found = f"{error.value} {capsys.readouterr().err}"
    assert re.search(message, found), found
    assert not (tmp_path / "run" / "model").exists()
