from typing import Literal

import numpy as np
import pytest
import torch

from cellglot import embed_cells
from cellglot.embedding import embed_tokens

from .conftest import make_tokenizer, synthetic_cells
from .modeling.test_geneformer import tiny_model


def setup(layout: Literal["v1", "v2"] = "v1", n_genes=31):
    tokenizer = make_tokenizer(n_genes, layout)
    return tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64), tokenizer, synthetic_cells(13, n_genes)


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("layer", [0, -1, -2])
def test_mean_over_gene_tokens_of_the_layer(layout, layer):
    model, tokenizer, adata = setup(layout)
    embeddings = embed_cells(adata, model, tokenizer, layer=layer, max_tokens=50, progress=False).obsm["X_geneformer"]
    assert embeddings.shape == (13, 32)
    assert embeddings.dtype == np.float32
    for row, ids in zip(embeddings, tokenizer.encode_anndata(adata)["input_ids"], strict=True):
        with torch.no_grad():
            states = model.bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer - 1][0]
        genes = states[1:-1] if layout == "v2" else states
        np.testing.assert_allclose(row, genes.mean(0), atol=1e-5)


def test_cls_pooling():
    model, tokenizer, adata = setup("v2")
    rows = embed_cells(adata, model.bert, tokenizer, pooling="cls", progress=False).obsm["X_geneformer"]
    ids = torch.tensor([tokenizer.encode_anndata(adata)["input_ids"][4]])
    np.testing.assert_allclose(rows[4], model.bert(ids, num_layers=1).last_hidden_state[0, 0].detach(), atol=1e-5)
    with pytest.raises(ValueError, match="no <cls>; use pooling='mean'"):
        embed_cells(adata, *setup("v1")[:2], pooling="cls", progress=False)


def test_a_path_gives_an_array_and_an_anndata_stays_unchanged(tmp_path):
    model, tokenizer, adata = setup()
    adata.write_h5ad(tmp_path / "c.h5ad")
    from_path = embed_cells(tmp_path / "c.h5ad", model, tokenizer, progress=False)
    assert "X_geneformer" not in adata.obsm
    annotated = embed_cells(adata, model, tokenizer, progress=False)
    np.testing.assert_array_equal(from_path, annotated.obsm["X_geneformer"])
    assert list(annotated.obs_names) == list(adata.obs_names)


def test_counts_may_lie_in_a_layer():
    model, tokenizer, adata = setup()
    expected = embed_cells(adata, model, tokenizer, progress=False).obsm["X_geneformer"]
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.toarray() / 7
    found = embed_cells(adata, model, tokenizer, counts_layer="counts", progress=False).obsm["X_geneformer"]
    np.testing.assert_array_equal(found, expected)


def test_an_empty_cell_is_nan_and_changes_no_other():
    model, tokenizer, _ = setup()
    cells = [np.array([2, 3, 4]), np.array([], dtype=int), np.array([5])]
    embeddings = embed_tokens(cells, model, tokenizer)
    assert np.isnan(embeddings[1]).all()
    np.testing.assert_allclose(embeddings[[0, 2]], embed_tokens([cells[0], cells[2]], model, tokenizer), atol=1e-6)


def test_training_mode_is_left_as_it_was():
    model, tokenizer, _ = setup()
    model.train()
    first = embed_tokens([np.array([2, 3])], model, tokenizer)
    assert model.bert.training
    np.testing.assert_array_equal(first, embed_tokens([np.array([2, 3])], model.eval(), tokenizer))


def test_bad_layers_and_selections(tmp_path):
    model, tokenizer, adata = setup()
    for layer in (1, -3):
        with pytest.raises(ValueError, match=r"Expected layer 0 \(last\) to -2 \(input\)"):
            embed_cells(adata, model, tokenizer, layer=layer, progress=False)
    with pytest.raises(ValueError, match="one row a cell"):
        embed_cells(adata, model, tokenizer, empty_cells="drop", progress=False)
    adata.obs["filter_pass"] = [1] * 12 + [0]
    adata.write_h5ad(tmp_path / "c.h5ad")
    for source in (adata, tmp_path / "c.h5ad"):
        with pytest.raises(ValueError, match="selects 12 of 13 cells: subset them first"):
            embed_cells(source, model, tokenizer, progress=False)
