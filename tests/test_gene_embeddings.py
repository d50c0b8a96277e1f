"""Gene embeddings in context: the mean over cells, and the original's numbers."""

import numpy as np
import pytest
import torch

from cellglot import embed_genes

from .conftest import ensembl, make_tokenizer
from .test_embedding import golden_cells, setup


def means_one_cell_at_a_time(adata, model, tokenizer, layer):
    """{token: (mean embedding, number of cells)} by the plainest code."""
    rows = {}
    for ids in tokenizer.encode_anndata(adata)["input_ids"]:
        with torch.no_grad():
            states = model.bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer - 1][0]
        for token, state in zip(ids, states, strict=True):
            rows.setdefault(token, []).append(state.double().numpy())
    return {token: (np.mean(states, axis=0), len(states)) for token, states in rows.items()}


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("layer", [0, -1])
def test_mean_over_the_cells_that_hold_a_gene(layout, layer):
    model, tokenizer, adata = setup(layout)
    frame = embed_genes(adata, model, tokenizer, layer=layer, max_tokens=50, cells_per_block=4, progress=False)
    expected = means_one_cell_at_a_time(adata, model, tokenizer, layer)
    genes = [token for token in sorted(expected) if token in tokenizer.gene_token_ids]
    assert min(expected[token][1] for token in genes) < 13
    assert list(frame.index) == tokenizer.convert_ids_to_tokens(genes)
    assert list(frame["n_cells"]) == [expected[token][1] for token in genes]
    assert frame.columns[1] == "embedding_0"
    np.testing.assert_allclose(frame.iloc[:, 1:], [expected[token][0] for token in genes], atol=1e-5)


@pytest.mark.realdata
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_gene_embeddings_equal_the_original_s(real_data, layout):
    model, tokenizer, adata, golden = golden_cells(real_data, layout)
    expected = golden[f"{layout}_emb_gene"]
    # Named, so that the original's rows for <cls> and <eos> are compared too
    frame = embed_genes(adata, model, tokenizer, genes=list(expected), cells_per_block=5, progress=False)
    assert len(frame) == {"v1": 60, "v2": 62}[layout]
    np.testing.assert_allclose(frame.iloc[:, 1:], list(expected.values()), atol=1e-5)
    by_default = embed_genes(adata, model, tokenizer, progress=False)
    assert set(by_default.index) == {gene for gene in expected if not gene.startswith("<")}


def test_chosen_genes_in_the_order_and_by_the_names_given():
    model, _, adata = setup()
    tokenizer = make_tokenizer(31, aliases={"TP53": ensembl(31)[8]})
    every = embed_genes(adata, model, tokenizer, progress=False)
    present = list(every.index)
    chosen = [present[3] + ".7", "TP53", present[0], present[3]]
    frame = embed_genes(adata, model, tokenizer, genes=chosen, progress=False)
    assert list(frame.index) == chosen
    np.testing.assert_allclose(frame, every.loc[[present[3], ensembl(31)[8], present[0], present[3]]], atol=1e-5)


def test_only_cells_that_hold_a_chosen_gene_are_run():
    model, tokenizer, adata = setup()
    every = embed_genes(adata, model, tokenizer, progress=False)
    rare = every["n_cells"].idxmin()
    n_run = []
    model.bert.register_forward_pre_hook(lambda module, args: n_run.append(len(args[0])))
    embed_genes(adata, model, tokenizer, genes=[rare], progress=False)
    assert sum(n_run) == every.loc[rare, "n_cells"] < 13


def test_a_gene_in_no_cell_is_nan_and_an_unknown_one_an_error():
    model, tokenizer, adata = setup()
    adata = adata[:, 1:].copy()
    absent = ensembl(1)[0]
    frame = embed_genes(adata, model, tokenizer, genes=[absent], progress=False)
    assert frame["n_cells"].tolist() == [0]
    assert frame.iloc[0, 1:].isna().all()
    assert absent not in embed_genes(adata, model, tokenizer, progress=False).index
    with pytest.raises(ValueError, match=r"2 of 3 genes are not in the vocabulary, e.g. 'A', 'B'; it holds e.g. 'ENSG"):
        embed_genes(adata, model, tokenizer, genes=["A", absent, "B"], progress=False)
    with pytest.raises(ValueError, match="Expected genes as a list of names, found 'TP53'"):
        embed_genes(adata, model, tokenizer, genes="TP53", progress=False)
    with pytest.raises(ValueError, match=r"Expected layer 0 \(last\)"):
        embed_genes(adata, model, tokenizer, layer=1, progress=False)


def test_a_selection_of_cells_counts_those_only():
    model, tokenizer, adata = setup()
    cells = np.arange(13) % 3 == 0
    found = embed_genes(adata, model, tokenizer, cells=cells, progress=False)
    expected = embed_genes(adata[cells].copy(), model, tokenizer, progress=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    adata.obs["filter_pass"] = cells.astype(int)
    np.testing.assert_array_equal(embed_genes(adata, model, tokenizer, progress=False), found)
