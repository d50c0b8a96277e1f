"""Embeddings on disk: what is written, and that no file of a user's is ever harmed."""

import os
import stat
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from cellglot import embed_cells, embedding
from cellglot.embedding_files import count_embeddings, read_embeddings

from .test_embedding import setup

# Its annotations allow X and obs to be almost anything.
read_h5ad: Any = ad.read_h5ad


@pytest.fixture
def cells(tmp_path):
    """(path, model, tokenizer, embeddings) of a file that has another obsm entry."""
    model, tokenizer, adata = setup()
    adata.obsm["X_pca"] = np.arange(26.0).reshape(13, 2)
    adata.write_h5ad(tmp_path / "c.h5ad")
    return tmp_path / "c.h5ad", model, tokenizer, embed_cells(adata, model, tokenizer, progress=False).obsm


def embed(cells, **options):
    path, model, tokenizer, _ = cells
    return embed_cells(path, model, tokenizer, **{"progress": False, "cells_per_block": 5, **options})


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_parquet_has_names_and_rows_in_groups_of_a_block(cells, tmp_path):
    out = embed(cells, output=tmp_path / "new" / "e.parquet")
    assert out == tmp_path / "new" / "e.parquet"
    names, rows = read_embeddings(out)
    assert names == [f"cell{i}" for i in range(13)]
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, cells[3]["X_geneformer"], atol=1e-5)
    assert pq.ParquetFile(out).num_row_groups == 3
    assert str(pq.read_schema(out).field("X_geneformer").type) == "fixed_size_list<element: float>[32]"
    assert left_in(tmp_path / "new") == ["e.parquet"]


def test_an_anndata_can_go_to_parquet_but_not_into_h5ad(cells, tmp_path):
    _, model, tokenizer, _ = cells
    adata = read_h5ad(cells[0])
    embed_cells(adata, model, tokenizer, output=tmp_path / "e.parquet", progress=False)
    np.testing.assert_array_equal(read_embeddings(tmp_path / "e.parquet")[1], cells[3]["X_geneformer"])
    with pytest.raises(ValueError, match=r"the input is an AnnData: leave output out"):
        embed_cells(adata, model, tokenizer, output=tmp_path / "e.h5ad", progress=False)


@pytest.mark.parametrize("name", ["c.h5ad", "copy.h5ad"])
def test_h5ad_gains_the_embeddings_and_keeps_the_rest(cells, tmp_path, name):
    before = read_h5ad(cells[0])
    cells[0].chmod(0o640)
    embed(cells, output=tmp_path / name)
    after = read_h5ad(tmp_path / name)
    np.testing.assert_allclose(after.obsm["X_geneformer"], cells[3]["X_geneformer"], atol=1e-5)
    np.testing.assert_array_equal(after.obsm["X_pca"], before.obsm["X_pca"])
    np.testing.assert_array_equal(after.X.toarray(), before.X.toarray())
    assert after.obs.equals(before.obs)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
    names, rows = read_embeddings(tmp_path / name)
    assert names == list(before.obs_names)
    np.testing.assert_array_equal(rows, after.obsm["X_geneformer"])
    assert left_in(tmp_path) == sorted({"c.h5ad", name})
    # A copy leaves the file it came from alone.
    assert ("X_geneformer" in read_h5ad(cells[0]).obsm) == (name == "c.h5ad")


def test_a_file_without_obsm_gains_one(cells):
    with h5py.File(cells[0], "r+") as file:
        del file["obsm"]
    embed(cells, output=cells[0], key="X_other")
    assert list(read_h5ad(cells[0]).obsm) == ["X_other"]


def test_nothing_is_overwritten_unless_asked_for(cells, tmp_path):
    embed(cells, output=cells[0])
    embed(cells, output=tmp_path / "e.parquet")
    before = cells[0].read_bytes()
    with pytest.raises(FileExistsError, match=r"holds obsm\['X_geneformer'\] already: pass another key, or overwrite"):
        embed(cells, output=cells[0])
    with pytest.raises(FileExistsError, match=r"e.parquet exists: choose another name, or pass overwrite=True"):
        embed(cells, output=tmp_path / "e.parquet")
    (tmp_path / "there.h5ad").write_text("mine")
    with pytest.raises(FileExistsError, match=r"there.h5ad exists"):
        embed(cells, output=tmp_path / "there.h5ad", key="k")
    assert cells[0].read_bytes() == before
    for output in (cells[0], tmp_path / "e.parquet", tmp_path / "there.h5ad"):
        embed(cells, output=output, overwrite=True, layer=0)
        assert abs(read_embeddings(output)[1] - cells[3]["X_geneformer"]).max() > 0.01


@pytest.mark.parametrize("output", ["c.h5ad", "copy.h5ad", "e.parquet"])
def test_a_failure_half_way_leaves_what_was_there(cells, tmp_path, monkeypatch, output):
    before = cells[0].read_bytes()
    embed_block, calls = embedding._embed, []

    def fails_in_the_second_block(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed_block(*args)

    monkeypatch.setattr(embedding, "_embed", fails_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        embed(cells, output=tmp_path / output)
    assert cells[0].read_bytes() == before
    assert left_in(tmp_path) == ["c.h5ad"]


def test_a_file_that_somebody_else_changes_meanwhile_is_left_to_them(cells, monkeypatch):
    embed_block = embedding._embed

    def somebody_saves(*args):
        os.utime(cells[0], (1, 1))
        return embed_block(*args)

    monkeypatch.setattr(embedding, "_embed", somebody_saves)
    with pytest.raises(OSError, match="was changed by another program"):
        embed(cells, output=cells[0])
    assert "X_geneformer" not in read_h5ad(cells[0]).obsm


def test_a_link_stays_a_link(cells, tmp_path):
    (tmp_path / "link.h5ad").symlink_to(cells[0])
    embed((tmp_path / "link.h5ad", *cells[1:]), output=tmp_path / "link.h5ad")
    assert (tmp_path / "link.h5ad").is_symlink()
    assert "X_geneformer" in read_h5ad(cells[0]).obsm


def test_outputs_that_cannot_be(cells, tmp_path):
    with pytest.raises(ValueError, match=r"Expected an output ending in .parquet or .h5ad, found '.*e.csv'"):
        embed(cells, output=tmp_path / "e.csv")
    with pytest.raises(ValueError, match=r"An .h5ad output is a copy of an .h5ad input, found .*c.loom; write .p"):
        embed((tmp_path / "c.loom", *cells[1:]), output=tmp_path / "e.h5ad")
    with pytest.raises(OSError, match=r"nowhere.h5ad"):
        embed((tmp_path / "nowhere.h5ad", *cells[1:]), output=tmp_path / "nowhere.h5ad")
    assert left_in(tmp_path) == ["c.h5ad"]


@pytest.mark.parametrize("name", ["e.parquet", "e.h5ad"])
def test_some_rows_are_those_of_all(cells, tmp_path, name):
    out = embed(cells, output=tmp_path / "some" / name)
    all_names, all_rows = read_embeddings(out)
    assert count_embeddings(out) == 13
    chosen = np.array([0, 4, 5, 11])  # of a block of five each, two blocks and the last
    names, rows = read_embeddings(out, rows=chosen)
    assert names == [all_names[i] for i in chosen]
    np.testing.assert_array_equal(rows, all_rows[chosen])
