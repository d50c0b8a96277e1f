"""Cell embeddings: what they are, that they come block by block, and that they equal the original's."""

import json
import weakref
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellglot import GeneformerModel, RankValueTokenizer, embed_cells, embedding
from cellglot.embedding import embed_tokens
from cellglot.tokenization import count_matrix

from .conftest import make_tokenizer, synthetic_cells
from .modeling.test_geneformer import tiny_model


def setup(layout: Literal["v1", "v2"] = "v1", n_genes=31):
    tokenizer = make_tokenizer(n_genes, layout)
    return tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64), tokenizer, synthetic_cells(13, n_genes)


def golden_cells(real_data, layout):
    """(model, tokenizer, cells that encode to the golden tokens, the original's results for them in their order)"""
    folder = real_data / "golden" / "original_full"
    golden = json.loads((folder / "golden_isp.json").read_text())
    model = GeneformerModel.from_pretrained(folder / f"tiny_{layout}")
    table = pd.read_csv(real_data / "geneformer" / f"vocabulary_{layout}.tsv.gz", sep="\t").head(
        model.config.vocab_size
    )
    tokenizer = RankValueTokenizer.from_vocabulary(table.assign(nonzero_median=table["nonzero_median"] * 0 + 1), layout)
    genes = list(tokenizer.gene_medians)
    counts = np.zeros((len(golden["cells"][layout]), len(genes)))
    for row, cell in zip(counts, golden["cells"][layout], strict=True):
        held = [i - tokenizer.gene_token_ids[0] for i in cell["input_ids"] if i in tokenizer.gene_token_ids]
        row[held] = np.arange(len(held), 0, -1)
    adata = ad.AnnData(counts, var=pd.DataFrame(index=pd.Index(genes)))
    encoded = tokenizer.encode_anndata(adata)["input_ids"]
    assert [list(ids) for ids in encoded] == [cell["input_ids"] for cell in golden["cells"][layout]]
    # The original lists cells by length, the longest first, equal ones as they came.
    order = np.argsort([-len(ids) for ids in encoded], kind="stable")
    states = [golden["cells"][layout][i]["state"] for i in order]
    assert states == golden["results"][f"{layout}_emb_order"]
    return model, tokenizer, adata[order].copy(), golden["results"]


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


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("layout", "pooling", "layer", "key"),
    [
        ("v1", "mean", -1, "v1_emb_cell_-1"),
        ("v1", "mean", 0, "v1_emb_cell_0"),
        ("v2", "cls", -1, "v2_emb_cls_-1"),
        ("v2", "cls", 0, "v2_emb_cls_0"),
        ("v2", "mean", -1, "v2_emb_cell_-1"),
    ],
)
def test_embeddings_equal_the_original_s(real_data, layout, pooling, layer, key):
    model, tokenizer, adata, golden = golden_cells(real_data, layout)
    found = embed_cells(adata, model, tokenizer, layer=layer, pooling=pooling, progress=False).obsm["X_geneformer"]
    # 1e-5: float32 sums in another order
    np.testing.assert_allclose(found, golden[key], atol=1e-5)


@pytest.mark.parametrize("options", [{"max_tokens": 1}, {"cells_per_block": 1}, {"cells_per_block": 4}])
def test_cells_one_by_one_in_small_blocks_and_together_agree(options):
    model, tokenizer, adata = setup()
    together = embed_cells(adata, model, tokenizer, progress=False).obsm["X_geneformer"]
    apart = embed_cells(adata, model, tokenizer, progress=False, **options).obsm["X_geneformer"]
    np.testing.assert_allclose(apart, together, atol=1e-5)


@pytest.mark.parametrize("output", [None, "out.parquet", "out.h5ad"])
def test_a_block_is_embedded_and_dropped_before_the_next_but_one_is_read(output, tmp_path, monkeypatch):
    model, tokenizer, adata = setup()
    adata.write_h5ad(tmp_path / "c.h5ad")
    events, blocks, held = [], [], []
    read, embed = count_matrix._CSRRows.read, embedding._embed

    def spied_read(self, start, stop):
        events.append(("read", stop - start))
        held.append(sum(block() is not None for block in blocks))
        return read(self, start, stop)

    def spied_embed(cells, *args):
        events.append(("embed", len(cells)))
        rows = embed(cells, *args)
        blocks.extend([weakref.ref(cells[0]), weakref.ref(rows)])
        return rows

    monkeypatch.setattr(count_matrix._CSRRows, "read", spied_read)
    monkeypatch.setattr(embedding, "_embed", spied_embed)
    output = None if output is None else tmp_path / output
    embed_cells(tmp_path / "c.h5ad", model, tokenizer, output=output, cells_per_block=3, progress=False)
    assert events == [("read", 3), ("embed", 3)] * 4 + [("read", 1), ("embed", 1)]
    # Tokens and embeddings of one block at the most, while the next is read
    assert max(held) <= 2


def test_a_batch_stays_within_its_tokens():
    model, tokenizer, adata = setup()
    sizes = []
    model.bert.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    embed_cells(adata, model, tokenizer, max_tokens=50, progress=False)
    assert sum(n for n, _ in sizes) == 13
    assert all(n * t <= 50 for n, t in sizes)
    assert max(n for n, _ in sizes) > 1


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_backed_anndata_stays_backed(tmp_path, mode):
    model, tokenizer, adata = setup()
    adata.raw = adata
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "c.h5ad")
    backed = ad.read_h5ad(tmp_path / "c.h5ad", backed=mode)
    backed.obs["later"] = range(13)
    annotated = embed_cells(backed, model, tokenizer, progress=False)
    expected = embed_cells(adata, model, tokenizer, progress=False).obsm["X_geneformer"]
    np.testing.assert_array_equal(annotated.obsm["X_geneformer"], expected)
    assert annotated.isbacked
    assert "X_geneformer" not in backed.obsm
    assert list(annotated.obs["later"]) == list(range(13))
    np.testing.assert_array_equal(annotated.to_memory().X.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(annotated.to_memory().raw.X.toarray(), adata.X.toarray())
    view = embed_cells(backed[[7, 2]], model, tokenizer, progress=False)
    np.testing.assert_allclose(view.obsm["X_geneformer"], expected[[7, 2]], atol=1e-5)


def test_cells_are_cut_to_what_the_model_can_read():
    _, tokenizer, adata = setup()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=5)
    found = embed_cells(adata, model, tokenizer, progress=False).obsm["X_geneformer"]
    first = [ids[:5] for ids in tokenizer.encode_anndata(adata).with_format("numpy")["input_ids"][:]]
    np.testing.assert_allclose(found, embed_tokens(first, model, tokenizer), atol=1e-6)


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


def test_models_and_tokenizers_that_do_not_fit_are_refused():
    from transformers import BertConfig, BertModel

    model, tokenizer, adata = setup()
    other = make_tokenizer(7)
    with pytest.raises(ValueError, match=r"The model knows 33 tokens, the tokenizer 9: they do not belong together"):
        embed_cells(adata, model, other, progress=False)
    with pytest.raises(ValueError, match="the tokenizer 9"):
        embed_tokens([np.array([2])], model, other)
    bert = BertModel(BertConfig(vocab_size=33, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"Expected a Geneformer, found BertModel"):
        embed_cells(adata, bert, tokenizer, progress=False)
    with pytest.raises(ValueError, match=r"Expected a RankValueTokenizer, found dict"):
        embed_cells(adata, model, {}, progress=False)
    with pytest.raises(ValueError, match=r"Expected pooling 'mean' or 'cls', found 'max'"):
        embed_cells(adata, model, tokenizer, pooling="max", progress=False)  # type: ignore[arg-type]


def test_empty_cells_keep_their_row_and_bad_counts_are_refused():
    model, tokenizer, adata = setup()
    counts = adata.X.toarray()
    counts[3] = 0
    adata.X = sp.csr_matrix(counts)
    found = embed_cells(adata, model, tokenizer, progress=False, cells_per_block=4).obsm["X_geneformer"]
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [3]
    assert np.isnan(found[3]).all()
    with pytest.raises(ValueError, match="1 cells of this block have no gene"):
        embed_cells(adata, model, tokenizer, empty_cells="error", progress=False)
    adata.X = sp.csr_matrix(counts / 3)
    with pytest.raises(ValueError, match="looks normalized"):
        embed_cells(adata, model, tokenizer, progress=False)


def test_options_that_are_none_and_tokens_of_another_vocabulary_are_refused():
    model, tokenizer, adata = setup()
    with pytest.raises(ValueError, match="There is no option 'outptu'; those of tokenization are layer, max_length"):
        embed_cells(adata, model, tokenizer, outptu="x.parquet")
    with pytest.raises(ValueError, match="the token 99, but the vocabulary has 33"):
        embed_tokens([np.array([5, 99])], model, tokenizer)
