"""`python -m cellglot.embed`: outputs, and one line for what a user can mend."""

import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellglot import embed_cells
from cellglot.embed import main
from cellglot.embedding_files import read_embeddings

from .test_embedding import setup


@pytest.fixture
def files(tmp_path, monkeypatch):
    model, tokenizer, adata = setup("v2")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    adata.write_h5ad(tmp_path / "c.h5ad")
    monkeypatch.chdir(tmp_path)
    return model, tokenizer, adata


def run(*arguments):
    return main(["c.h5ad", "--model", "model", "--quiet", "--device", "cpu", *arguments])


def test_cells_to_parquet_and_into_the_file(files, capsys):
    model, tokenizer, adata = files
    for options, arguments in (
        ({}, []),
        ({"layer": 0, "pooling": "cls"}, ["--layer", "0", "--pooling", "cls", "--max-tokens", "50", "--overwrite"]),
    ):
        expected = embed_cells(adata, model, tokenizer, progress=False, **options).obsm["X_geneformer"]
        assert run("--output", "e.parquet", *arguments) == 0
        np.testing.assert_allclose(read_embeddings("e.parquet")[1], expected, atol=1e-5)
    assert run("--into-file", "--key", "X_cls", "--pooling", "cls") == 0
    assert list(ad.read_h5ad("c.h5ad").obsm) == ["X_cls"]
    assert capsys.readouterr().out.splitlines() == [
        *["cell embeddings: e.parquet"] * 2,
        "cell embeddings: obsm['X_cls'] of c.h5ad",
    ]


def test_genes(files):
    assert run("--output", "g.parquet", "--genes") == 0
    every = pd.read_parquet("g.parquet")
    assert len(every) > 10
    assert run("--output", "g.parquet", "--overwrite", "--genes", every.index[2], "<cls>") == 0
    assert list(pd.read_parquet("g.parquet").index) == [every.index[2], "<cls>"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_umap_of_the_cells_that_have_an_embedding(files, capsys):
    import matplotlib

    matplotlib.use("Agg")
    adata = files[2]
    counts = adata.X.toarray()
    counts[3] = 0
    adata.X = counts
    adata.write_h5ad("c.h5ad")
    assert run("--into-file", "--umap", "figures/u.png", "--color", "cell_type") == 0
    with open("figures/u.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert "UMAP of 12 cells: figures/u.png" in capsys.readouterr().out


def test_mistakes_end_in_one_line(files, capsys, tmp_path):
    (tmp_path / "e.parquet").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "c.h5ad").read_bytes()[:3000])
    for arguments, message in (
        (["c.h5ad", "--model", "model", "--output", "e.parquet"], "e.parquet exists: choose another name"),
        (["c.h5ad", "--model", "model", "--output", "e.csv"], "ending in .parquet or .h5ad, found 'e.csv'"),
        (["c.h5ad", "--model", "model", "--output", "g.parquet", "--layer", "3"], "Expected layer 0 (last) to -2"),
        (["c.h5ad", "--model", "empty", "--output", "g.parquet"], "No rank-value tokenizer in empty"),
        (["c.h5ad", "--model", "nowhere", "--output", "g.parquet"], "tokenizer at nowhere, which is no directory"),
        (["no.h5ad", "--model", "model", "--output", "g.parquet"], "no.h5ad does not exist"),
        (["cut.h5ad", "--model", "model", "--output", "g.parquet"], "cut.h5ad cannot be read: truncated or corrupt"),
        (["cut.h5ad", "--model", "model", "--into-file"], "cut.h5ad cannot be read: truncated or corrupt"),
        (["no.h5ad", "--model", "model", "--into-file"], "no.h5ad does not exist"),
        (["c.h5ad", "--model", "model", "--output", "g.parquet", "--device", "gpu"], "--device gpu cannot be used"),
        (
            ["c.h5ad", "--model", "model", "--into-file", "--umap", "u.png", "--color", "x"],
            "no column 'x' to colour",
        ),
        (["c.h5ad", "--model", "model", "--output", "g.parquet", "--genes", "XYZ"], "1 of 1 genes are not in the"),
        (["c.h5ad", "--model", "model", "--output", "g.parquet", "--counts-layer", "l"], "has no layer 'l'; it has X"),
    ):
        assert main([*arguments, "--quiet"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    assert not (tmp_path / "g.parquet").exists()
    assert (tmp_path / "e.parquet").read_text() == "mine"


def test_a_missing_library_is_named_before_the_work(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    assert run("--into-file", "--umap", "u.png") == 1
    assert "error: --umap needs umap: pip install 'cellglot[train]'" in capsys.readouterr().err
    assert not ad.read_h5ad("c.h5ad").obsm


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "e.parquet", "--into-file"], "not allowed with"),
        ([], "one of the arguments --output --into-file is required"),
        (["--output", "e.parquet", "--color", "x"], "pass --umap too"),
        (["--into-file", "--genes"], "pass --output FILE.parquet"),
        (["--output", "e.parquet", "--pooling", "cls", "--genes"], "are for cells"),
    ],
)
def test_combinations_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_help_as_a_module():
    result = subprocess.run([sys.executable, "-m", "cellglot.embed", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--into-file" in result.stdout
