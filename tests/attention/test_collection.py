"""Attention received, against the weights that the model itself reports under eager attention."""

from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from cellglot.attention import attention_by_rank, attention_to_genes, collect_attention
from cellglot.attention.collection import AttentionStatistics, _block_of_rank, attention_received

from ..conftest import ensembl, make_tokenizer, synthetic_cells
from ..modeling.test_geneformer import tiny_model

GENES = 31


def setup(layout: Literal["v1", "v2"] = "v1", **options) -> tuple[Any, Any, list[np.ndarray]]:
    tokenizer = make_tokenizer(GENES, layout)
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=37, **options)
    rng = np.random.default_rng(0)
    genes = [rng.permutation(tokenizer.gene_token_ids)[:n] for n in (13, 2, 29, 7)]
    if layout == "v2":
        genes = [np.array([2, *ids, 3]) for ids in genes]
    return model, tokenizer, genes


def oracle(model, tokenizer, cells) -> pd.DataFrame:
    """Attention received, one weight at a time."""
    model.set_attn_implementation("eager")
    first = int(tokenizer.gene_token_ids[0])
    rows = []
    for ids in cells:
        with torch.no_grad():
            attentions = model.bert(torch.tensor(ids)[None], output_attentions=True).attentions
        genes = [i for i, token in enumerate(ids) if token >= first]
        for layer, weights in enumerate(attentions):
            for head in range(weights.shape[1]):
                for rank, k in enumerate(genes):
                    others = [float(weights[0, head, q, k]) for q in genes if q != k]
                    value = len(ids) * np.mean(others)
                    rows.append((layer, head, tokenizer.convert_ids_to_tokens(int(ids[k])), value, rank + 1))
    return pd.DataFrame(rows, columns=["layer", "head", "gene", "attention", "rank"])


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_the_model_s_own_attention_weights(layout, implementation):
    model, tokenizer, cells = setup(layout)
    model.set_attn_implementation(implementation)
    found = attention_to_genes(cells, model, tokenizer, progress=False)
    assert model.config._attn_implementation == implementation
    grouped = oracle(model, tokenizer, cells).groupby(["layer", "head", "gene"])
    expected = grouped.agg(attention=("attention", "mean"), n_cells=("rank", "size"), mean_rank=("rank", "mean"))
    found = found.set_index(["layer", "head", "gene"]).sort_index()
    # 1e-5: float32 sums in another order
    pd.testing.assert_frame_equal(
        found[["attention", "n_cells", "mean_rank"]], expected.sort_index(), rtol=1e-5, check_dtype=False
    )


def test_by_rank_equals_the_weights_too():
    model, tokenizer, cells = setup()
    found = attention_by_rank(cells, model, tokenizer, n_bins=5, progress=False)
    weights = oracle(model, tokenizer, cells)
    edges = list(zip(found["first_rank"][:5], found["last_rank"][:5], strict=True))
    assert edges == [(1, 6), (7, 12), (13, 17), (18, 23), (24, 29)]
    for row in found.itertuples():
        inside = weights[(weights["layer"] == row.layer) & (weights["head"] == row.head)]
        inside = inside[inside["rank"].between(row.first_rank, row.last_rank)]
        assert row.n_tokens == len(inside)
        assert row.attention == pytest.approx(inside["attention"].mean(), rel=1e-5)
    with pytest.raises(ValueError, match="between 1 and the 29 ranks of the longest cell, found 30"):
        attention_by_rank(cells, model, tokenizer, n_bins=30, progress=False)


def test_blocks_of_ranks_widen_downwards():
    blocks = _block_of_rank(4096)
    widths = np.bincount(blocks)
    assert widths.sum() == 4096
    assert (np.diff(blocks) >= 0).all()
    assert (widths[:32] == 1).all()
    assert (np.diff(widths[:-1]) >= 0).all()
    assert widths.max() == 16
    for t in (1, 2, 33, 37, 300):
        np.testing.assert_array_equal(_block_of_rank(t), blocks[:t])


def test_expected_is_what_the_ranks_alone_would_give():
    """By hand: two cells with the genes in opposite order, and attention that depends on the rank only."""
    n = 35  # of the ranks from 0, 32 and 33 count as one
    statistics = AttentionStatistics.zeros(ensembl(n), tiny_model(max_position_embeddings=40).config)
    received = np.arange(n, dtype=float)
    for genes in (np.arange(n), np.arange(n)[::-1]):
        for layer in range(2):
            statistics.add(layer, genes, np.tile(received, (4, 1)))
        statistics.add_cell(genes)
    table = statistics.by_gene().set_index("gene")
    expected = [(0 + 34) / 2, (1 + 32.5) / 2, (2 + 32.5) / 2, (3 + 31) / 2]
    for gene, value in zip(ensembl(n), expected, strict=False):
        rows = table.loc[gene]
        assert len(rows) == 8
        np.testing.assert_allclose(rows["attention"], (n - 1) / 2)
        np.testing.assert_allclose(rows["expected"], value)
        np.testing.assert_allclose(rows["mean_rank"], (1 + n) / 2)


def test_even_attention_is_1_whatever_the_length():
    for t in (2, 7, 13):
        for special in (0, 2):
            reads = torch.ones(t + special, dtype=torch.bool)
            reads[: special // 2] = False
            reads[len(reads) - special // 2 :] = False
            zeros = torch.zeros(3, t + special, 5)
            received = attention_received(zeros, torch.randn(3, t + special, 5), 1.0, reads)
            torch.testing.assert_close(received, torch.ones(3, t))


@pytest.mark.parametrize("max_weights", [1, 50, 3 * 17 * 5, 10**6])
def test_blocks_of_rows_do_not_change_the_result(max_weights):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 17, 5, generator=generator)
    reads = torch.arange(17) % 5 != 0
    whole = attention_received(q, k, 0.7, reads)
    torch.testing.assert_close(attention_received(q, k, 0.7, reads, max_weights=max_weights), whole)


def test_the_model_is_left_as_it_was():
    model, tokenizer, cells = setup(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.5)
    expected = attention_to_genes(cells, model, tokenizer, progress=False)
    model.train()
    model.bert.encoder.layer[0].eval()  # as somebody who froze a layer would
    before = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = attention_to_genes(cells, model, tokenizer, progress=False)
    pd.testing.assert_frame_equal(found, expected)  # no dropout in spite of the mode
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="two genes"):
        attention_to_genes([[2]], model, tokenizer, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_hooks_are_removed_when_the_model_fails(monkeypatch):
    model, tokenizer, cells = setup()

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.bert.encoder.layer[1], "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        collect_attention(cells, model, tokenizer, progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_all_kinds_of_cells_give_the_same(tmp_path):
    model, tokenizer, _ = setup()
    adata = synthetic_cells(5, GENES)
    adata.write_h5ad(tmp_path / "c.h5ad")
    dataset = tokenizer.encode_anndata(adata, max_length=37)
    expected = attention_to_genes(dataset, model, tokenizer, progress=False)
    for cells in (adata, tmp_path / "c.h5ad", str(tmp_path / "c.h5ad"), dataset["input_ids"][:]):
        pd.testing.assert_frame_equal(attention_to_genes(cells, model, tokenizer, progress=False), expected)
    mask = np.arange(5) % 2 == 0
    part = attention_to_genes(adata, model.bert, tokenizer, cells=mask, progress=False)
    pd.testing.assert_frame_equal(part, attention_to_genes(adata[mask].copy(), model, tokenizer, progress=False))


def test_drawn_cells_depend_on_the_seed_only():
    model, tokenizer, _ = setup()
    adata = synthetic_cells(11, GENES)
    tokens = tokenizer.encode_anndata(adata)["input_ids"][:]

    def drawn(cells, **options):
        return collect_attention(cells, model, tokenizer, max_cells=4, progress=False, **options)

    first = drawn(adata)
    assert first.n_cells == 4
    pd.testing.assert_frame_equal(first.by_gene(), drawn(tokens).by_gene())
    assert not first.by_gene().equals(drawn(adata, seed=1).by_gene())
    assert collect_attention(adata, model, tokenizer, max_cells=99, progress=False).n_cells == 11


def test_cells_without_two_genes_are_left_out_and_counted():
    model, tokenizer, cells = setup()
    expected = collect_attention(cells, model, tokenizer, progress=False)
    found = collect_attention([[], *cells, [5], [1, 5]], model, tokenizer, progress=False)
    assert (found.n_cells, found.n_skipped) == (4, 3)
    pd.testing.assert_frame_equal(found.by_gene(), expected.by_gene())


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ([], {}, "None of the 0 cells has two genes"),
        ([[], [4]], {}, "None of the 2 cells has two genes"),
        ([list(range(2, 33)) * 2], {}, "A cell has 62 tokens, but this model reads 37 at the most"),
        ([[2, 3, 33]], {}, "Expected token ids from 0 to 32, found 2 to 33: .*another vocabulary"),
        ([[2, 3, -1]], {}, "found -1 to 3"),
        ([[2, 3, 0, 0]], {}, "holds <pad>: pass cells without padding"),
        ([[2, 3, 2]], {}, "holds a gene twice"),
        ([[2.0, 3.5]], {}, r"list of token ids, found float64 of shape \(2,\)"),
        ([[[2, 3]]], {}, r"found int64 of shape \(1, 2\)"),
        ([[2, 3]], {"max_cells": 0}, "max_cells of at least 1, found 0"),
        ([[2, 3]], {"gene_ids": "symbol", "counts_layer": "raw"}, "gene_ids, counts_layer apply to counts"),
        (datasets.Dataset.from_dict({"tokens": [[2, 3]]}), {}, "Expected a column input_ids, found tokens"),
    ],
)
def test_bad_cells(cells, options, message):
    model, tokenizer, _ = setup()
    with pytest.raises(ValueError, match=message):
        collect_attention(cells, model, tokenizer, progress=False, **options)


def test_model_and_tokenizer_that_do_not_belong_together():
    model, _, cells = setup()
    with pytest.raises(ValueError, match="knows 33 tokens, the tokenizer 32"):
        collect_attention(cells, model, make_tokenizer(GENES - 1), progress=False)


@pytest.mark.gpu
def test_equal_on_a_gpu():
    model, tokenizer, cells = setup()
    expected = attention_to_genes(cells, model, tokenizer, progress=False)
    found = attention_to_genes(cells, model.to("cuda"), tokenizer, progress=False)
    # 1e-3: matrix products may run in TF32
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3)
