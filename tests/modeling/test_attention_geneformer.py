"""Attention in blocks on a CPU, against the same written out."""

import pytest
import torch
from torch.testing import assert_close

from cellglot import GeneformerConfig, GeneformerForMaskedLM, GeneformerModel
from cellglot.modeling.geneformer import attention_geneformer
from cellglot.modeling.geneformer.attention_geneformer import BlockedAttention, PackedCells, dropped_places

HEADS, QUERIES, KEYS, WIDTH = 3, 11, 17, 5


def tensors(seed=0):
    torch.manual_seed(seed)
    shapes = ((HEADS, QUERIES, WIDTH), (HEADS, KEYS, WIDTH), (HEADS, KEYS, WIDTH))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("onednn", [attention_geneformer.ONEDNN, False])
@pytest.mark.parametrize("block_size", [1, 4 * KEYS, 2**20])
@pytest.mark.parametrize("dropout", [0.0, 0.02, 0.3])
def test_output_and_gradients_equal_the_definition(monkeypatch, onednn, block_size, dropout):
    monkeypatch.setattr(attention_geneformer, "ONEDNN", onednn)
    monkeypatch.setattr(attention_geneformer, "BLOCK_SIZE", block_size)
    query, key, value = tensors()
    grad = torch.randn(HEADS, QUERIES, WIDTH)

    torch.manual_seed(7)
    out = BlockedAttention.apply(query, key, value, 0.4, dropout)
    found = torch.autograd.grad(out, (query, key, value), grad)

    # The same weights are dropped, whatever the blocks: those that the seed chooses, head by head.
    torch.manual_seed(7)
    kept = torch.ones(HEADS, QUERIES, KEYS)
    if dropout:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        for head in kept:
            head.view(-1)[dropped_places(QUERIES * KEYS, dropout, generator)] = 0
        assert 0 < (kept == 0).float().mean() < 2 * dropout
    expected = (torch.softmax(query @ key.transpose(1, 2) * 0.4, dim=-1) * kept / (1 - dropout)) @ value
    assert_close(out, expected)
    for a, b in zip(found, torch.autograd.grad(expected, (query, key, value), grad), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 401, 797]])
def test_long_cells_go_in_blocks_and_give_what_torch_gives(monkeypatch, cu_seqlens):
    config = GeneformerConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    torch.manual_seed(0)
    model = GeneformerModel(config).eval()
    ids = torch.randint(2, 101, (3, 397) if cu_seqlens is None else (1, 797))
    batch = {"input_ids": ids} | ({} if cu_seqlens is None else {"cu_seqlens": torch.tensor(cu_seqlens)})
    calls = []

    def counted(*args, apply=BlockedAttention.apply):
        calls.append(args[0].shape)
        return apply(*args)

    monkeypatch.setattr(BlockedAttention, "apply", counted)
    found = model(**batch).last_hidden_state
    assert len(calls) == 2 * (1 if cu_seqlens is None else 2)
    monkeypatch.setattr(attention_geneformer, "ENOUGH_KEYS", 1000)
    expected = model(**batch).last_hidden_state
    assert len(calls) == 2 * (1 if cu_seqlens is None else 2)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("probability", [0.003, 0.1, 0.9])
def test_every_place_is_dropped_with_the_probability_and_on_its_own(probability):
    n, repeats = 101, 4000
    generator = torch.Generator().manual_seed(0)
    dropped = torch.zeros(repeats, n)
    for row in dropped:
        places = dropped_places(n, probability, generator)
        assert (places.diff() > 0).all()
        row[places] = 1
    # Five standard errors
    error = 5 * (probability * (1 - probability) / repeats) ** 0.5
    assert (dropped.mean(dim=0) - probability).abs().max() < error
    neighbours = (dropped[:, 1:] * dropped[:, :-1]).mean()
    assert abs(neighbours - probability**2) < 5 * (probability**2 / (repeats * n)) ** 0.5


def test_mask_of_flex_attention_keeps_to_cells():
    keys, queries = torch.tensor([0, 3, 5, 9]).int(), torch.tensor([0, 2, 2, 3]).int()
    mask = PackedCells(keys, queries, longest=4).block_mask
    q, k = torch.arange(3)[:, None], torch.arange(9)[None]
    allowed = mask.mask_mod(torch.tensor(0), torch.tensor(0), q, k)
    cell_of_query, cell_of_key = torch.tensor([0, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    assert torch.equal(allowed, cell_of_query[:, None] == cell_of_key[None])


def test_blocks_of_flex_attention_s_mask_are_those_with_allowed_pairs(monkeypatch):
    monkeypatch.setattr(attention_geneformer, "FLEX_BLOCK", 8)
    keys, queries = torch.tensor([0, 3, 5, 30, 61]), torch.tensor([0, 2, 2, 19, 43])
    mask = PackedCells(keys.int(), queries.int(), longest=31).block_mask
    cell_of_query = torch.arange(4).repeat_interleave(queries.diff())
    cell_of_key = torch.arange(4).repeat_interleave(keys.diff())
    allowed = torch.nn.functional.pad(cell_of_query[:, None] == cell_of_key, (0, 3, 0, 5)).view(6, 8, 8, 8)
    assert torch.equal(mask.to_dense()[0, 0].bool(), allowed.any(dim=3).any(dim=1))


def test_dropout_of_a_run_that_goes_on_is_the_same():
    config = GeneformerConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        attention_probs_dropout_prob=0.3,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = GeneformerForMaskedLM(config).train()
    ids = torch.randint(2, 101, (1, 23))
    batch = {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, 11, 23])}

    def loss(**options):
        return model(**batch, **options).loss

    state = torch.get_rng_state()
    first, second = loss(), loss()
    assert first != second
    torch.set_rng_state(state)
    assert torch.equal(loss(), first)
    # Recomputed for gradient checkpointing, it drops the same.
    torch.set_rng_state(state)
    first.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.activation_checkpointing_enable()
    torch.set_rng_state(state)
    loss().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    model.eval()
    assert torch.equal(loss(), loss())


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_packed_cells_in_half_precision_on_a_gpu(attention, dropout):
    config = GeneformerConfig(
        vocab_size=101,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        attention_probs_dropout_prob=dropout,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = GeneformerForMaskedLM(config).train()
    ids = torch.randint(2, 101, (1, 500))
    labels = torch.where(torch.rand(1, 500) < 0.15, ids, -100)
    offsets = torch.tensor([0, 203, 290, 500])
    expected = model(ids, labels=labels, cu_seqlens=offsets).loss.item()
    model.set_attn_implementation(attention)
    model.to("cuda")  # pyright: ignore[reportArgumentType]
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids.cuda(), labels=labels.cuda(), cu_seqlens=offsets.cuda()).loss
    loss.backward()
    # bfloat16 has 8 bits; dropout is drawn anew
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
