"""The command writes complete tables and figures, or one line that says what is wrong."""

import json

import numpy as np
import pandas as pd
import pytest

from cellglot import GeneformerModel
from cellglot.attention import attention_to_genes, compare_gene_sets
from cellglot.attention.__main__ import OUTPUTS, main

from ..conftest import ensembl, make_tokenizer, synthetic_cells
from ..modeling.test_geneformer import tiny_model

N_GENES = 31


def cells():
    """Nine cells that together hold every gene, and whose order of genes differs."""
    adata = synthetic_cells(9, N_GENES)
    adata.X = adata.X.toarray() + np.random.default_rng(0).integers(0, 3, size=adata.shape)
    return adata


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model and its tokenizer, cells as counts and as tokens, and gene sets."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer(N_GENES, aliases={f"SYM{i + 1}": gene for i, gene in enumerate(ensembl(N_GENES))})
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=37)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    adata = cells()
    adata.write_h5ad(folder / "cells.h5ad")
    tokens = tokenizer.encode_anndata(adata)["input_ids"][:]
    pd.DataFrame({"input_ids": tokens}).to_parquet(folder / "cells.parquet")
    (folder / "set.txt").write_text("\n".join(f"sym{i}" for i in range(1, 11)))
    rows = [f"{gene}\t{'central' if i < 10 else 'peripheral'}" for i, gene in enumerate(ensembl(N_GENES))]
    (folder / "network.tsv").write_text("\n".join(["gene_id\tlabel", *rows[:25]]))
    return folder


def command(inputs, output, *options, cells="cells.h5ad", gene_set="set.txt"):
    files = [f"{inputs}/{cells}", "--model", f"{inputs}/model", "--gene-set", f"{inputs}/{gene_set}"]
    return main([*files, "--output", str(output), "--quiet", "--device", "cpu", *options])


def test_everything_is_written_and_equals_the_functions(inputs, tmp_path, capsys):
    assert command(inputs, tmp_path / "out", "--random-control", "--seed", "1") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(OUTPUTS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model, tokenizer = GeneformerModel.from_pretrained(inputs / "model"), make_tokenizer(N_GENES)
    table = attention_to_genes(inputs / "cells.h5ad", model, tokenizer, progress=False)
    written = pd.read_csv(tmp_path / "out" / "attention_by_gene.csv.gz")
    pd.testing.assert_frame_equal(written, table, rtol=1e-5, check_dtype=False)
    expected = compare_gene_sets(table, ensembl(10))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "heads.csv"), expected, check_dtype=False)
    random = pd.read_csv(tmp_path / "out" / "heads_random_weights.csv")
    assert (random["auc"] != expected["auc"]).any()
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert summary["weights"].tolist() == ["model", "random weights"]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["n_cells"] == 9
    said = capsys.readouterr().out
    assert "10 genes of set against 21 other genes" in said
    assert "random weights: " in said
    for name in ("heads.png", "ranks.png", "sets.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_tokens_give_the_same_as_counts(inputs, tmp_path):
    assert command(inputs, tmp_path / "a") == 0
    assert command(inputs, tmp_path / "b", cells="cells.parquet") == 0
    a, b = (pd.read_csv(tmp_path / name / "heads.csv") for name in "ab")
    pd.testing.assert_frame_equal(a, b)


def test_labels_backgrounds_and_overlaps(inputs, tmp_path, capsys):
    assert command(inputs, tmp_path / "a", gene_set="network.tsv") == 0
    assert "10 genes of central against 15 peripheral" in capsys.readouterr().out
    assert command(inputs, tmp_path / "b", "--label", "peripheral", gene_set="network.tsv") == 0
    assert "15 genes of peripheral against 10 central" in capsys.readouterr().out
    a, b = (pd.read_csv(tmp_path / name / "heads.csv") for name in "ab")
    np.testing.assert_allclose(a["auc"], 1 - b["auc"])
    (tmp_path / "background.txt").write_text("\n".join([*ensembl(14, start=8), "NOPE"]))
    assert command(inputs, tmp_path / "c", "--background", str(tmp_path / "background.txt")) == 0
    said = capsys.readouterr().out
    assert "background: 1 of 15 genes are not in the vocabulary, e.g. 'NOPE'" in said
    assert f"3 genes stand on both sides and are left out, e.g. '{ensembl(8)[7]}'" in said
    assert "7 genes of set against 11 background" in said


def test_cells_are_selected_and_drawn(inputs, tmp_path, capsys):
    n = int((cells().obs["cell_type"] == "T").sum())
    assert command(inputs, tmp_path / "a", "--where", "cell_type=T") == 0
    assert f"{n} cells" in capsys.readouterr().out
    assert command(inputs, tmp_path / "b", "--max-cells", "2", "--seed", "7") == 0
    assert "2 cells" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "cell_type"], "Expected --where COLUMN=VALUE, found 'cell_type'"),
        (["--where", "sex=f"], "obs has no column 'sex'; it has cell_type, donor"),
        (["--where", "cell_type=HeLa"], "No cell has cell_type 'HeLa'"),
        (["--label", "x"], "has no label 'x'; it has set"),
        (["--max-cells", "0"], "max_cells of at least 1"),
        (["--counts-layer", "counts"], "no layer 'counts'"),
        (["--tokenizer", "nowhere"], "No rank-value tokenizer"),
    ],
)
def test_bad_options(inputs, tmp_path, options, message, capsys):
    assert command(inputs, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_bad_files(inputs, tmp_path, capsys):
    def fails(message, *options, **files):
        assert command(inputs, tmp_path / "out", *options, **files) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    fails("No such file", gene_set="absent.txt")
    fails("absent.h5ad", cells="absent.h5ad")
    fails("absent.parquet", cells="absent.parquet")
    (inputs / "other.txt").write_text("GATA1\n")
    fails("None of 1 genes (e.g. 'GATA1') is in the vocabulary", gene_set="other.txt")
    (inputs / "few.txt").write_text("\n".join(ensembl(3)))
    fails("too few for a rank-sum test", gene_set="few.txt")
    (inputs / "bad.parquet").write_bytes(b"PAR1 not really")
    fails("cannot be read as Parquet", cells="bad.parquet")
    pd.DataFrame({"tokens": [[2, 3]]}).to_parquet(inputs / "column.parquet")
    fails("expected a column input_ids, found tokens", cells="column.parquet")
    pd.DataFrame({"input_ids": [list(range(2, 33)) * 2]}).to_parquet(inputs / "long.parquet")
    fails("A cell has 62 tokens, but this model reads 37", cells="long.parquet")
    fails("apply to counts", "--where", "a=b", cells="cells.parquet")


def test_an_output_folder_in_use_is_kept(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for options in ([], ["--overwrite"]):
        assert command(inputs, out, *options) == 1
        assert "holds other files, e.g. 'thesis.txt'" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert command(inputs, out / "thesis.txt") == 1
    assert "is a file" in capsys.readouterr().err
    (out / "thesis.txt").unlink()
    assert command(inputs, out) == 0  # an empty folder will do
    assert command(inputs, out) == 1
    assert "holds an analysis already. Pass --overwrite" in capsys.readouterr().err
    assert command(inputs, out, "--overwrite", "--random-control") == 0
    assert (out / "heads_random_weights.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_nothing(inputs, tmp_path, monkeypatch, capsys):
    from cellglot.attention import __main__ as module

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module, "_figures", full)
    assert command(inputs, tmp_path / "out") == 1
    assert "error: disk full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_that_came_meanwhile_are_kept(inputs, tmp_path, monkeypatch, capsys):
    from cellglot.attention import __main__ as module

    output = tmp_path / "out"
    figures = module._figures

    def slow(*arguments):
        output.mkdir()
        (output / "notes.txt").write_text("mine")
        figures(*arguments)

    monkeypatch.setattr(module, "_figures", slow)
    assert command(inputs, output) == 1
    assert "holds other files, e.g. 'notes.txt'" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_analysis_replaces_all_of_an_earlier_one(inputs, tmp_path):
    assert command(inputs, tmp_path / "out", "--random-control") == 0
    assert command(inputs, tmp_path / "out", "--overwrite") == 0
    assert not (tmp_path / "out" / "heads_random_weights.csv").exists()
    assert (tmp_path / "out" / "heads.csv").exists()


def test_a_saved_dataset_is_read_and_a_device_that_is_none_is_named(inputs, tmp_path, capsys):
    import datasets

    dataset = datasets.Dataset.from_parquet(str(inputs / "cells.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert (
        command(
            tmp_path,
            tmp_path / "out",
            "--model",
            str(inputs / "model"),
            "--gene-set",
            str(inputs / "set.txt"),
            cells="saved",
        )
        == 0
    )
    assert command(inputs, tmp_path / "expected", cells="cells.parquet") == 0
    assert (tmp_path / "out" / "heads.csv").read_text() == (tmp_path / "expected" / "heads.csv").read_text()
    assert command(inputs, tmp_path / "none", "--device", "gpu") == 1
    assert "--device gpu cannot be used" in capsys.readouterr().err


def test_a_table_may_have_empty_fields_at_the_end(inputs, tmp_path):
    lines = (inputs / "network.tsv").read_text().splitlines()
    (tmp_path / "notes.tsv").write_text("\n".join([f"{lines[0]}\tnote", *(f"{line}\t" for line in lines[1:])]))
    assert command(inputs, tmp_path / "out", "--gene-set", str(tmp_path / "notes.tsv")) == 0
