"""The dry run: its parameters, activations and FLOPs are those of the model."""

import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cellglot import GeneformerConfig, GeneformerForMaskedLM
from cellglot.tokenization.packing import packed_cells
from cellglot.train.capacity import (
    CapacityConfig,
    activation_bytes,
    capacity,
    count_parameters,
    flops_of_cell,
    layer_activation_bytes,
    main,
    state_bytes,
)

LENGTHS = (97, 53, 71)


def tiny(n_layers, **options):
    sizes = {
        "vocab_size": 101,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return GeneformerConfig(num_hidden_layers=n_layers, **{**sizes, **options})


@pytest.mark.parametrize(("size", "millions"), [("v1-6l", 10.3), ("v2-104m", 104.4), ("v2-316m", 316.4)])
def test_parameters_are_the_published_ones(size, millions):
    config = GeneformerConfig.from_preset(size)
    parameters = count_parameters(config)
    assert round(parameters.total / 1e6, 1) == millions
    assert parameters.embeddings == config.vocab_size * config.hidden_size
    assert parameters.total > parameters.embeddings + config.num_hidden_layers * parameters.layer


def saved_bytes(config, *, bf16, recomputed):
    """Bytes of the tensors that a forward pass keeps for the backward pass, weights left out."""
    torch.manual_seed(0)
    model = GeneformerForMaskedLM(config).train()
    if recomputed:
        model.activation_checkpointing_enable()
    batch = packed_cells([np.arange(2, 2 + n) for n in LENGTHS])
    labels = torch.where(torch.arange(sum(LENGTHS)) % 7 == 0, batch["input_ids"], -100)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, sizes = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept.append(tensor)  # so that no two share an address
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(**batch, labels=labels)
    return sum(sizes.values())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_layer_keeps_the_bytes_of_the_formula(bf16):
    two, three = (saved_bytes(tiny(n), bf16=bf16, recomputed=False) for n in (2, 3))
    copies_of_weights = 2 * (4 * 64**2 + 2 * 64 * 192) if bf16 else 0
    assert three - two - copies_of_weights == sum(LENGTHS) * layer_activation_bytes(tiny(3), bf16=bf16)


def test_a_recomputed_layer_keeps_its_input():
    two, three = (saved_bytes(tiny(n), bf16=True, recomputed=True) for n in (2, 3))
    assert three - two == sum(LENGTHS) * 4 * 64
    config = tiny(5)
    whole, recomputed = (activation_bytes(config, 1000, recomputed=r) for r in (False, True))
    layer = layer_activation_bytes(config)
    assert whole - recomputed == 1000 * (4 * layer - 5 * 4 * 64)


def test_flops_are_those_torch_counts():
    """One more layer of a padded batch, attention in plain matrix products; and twice the labels for the head."""
    n = 89

    def count(config, labelled=13):
        torch.manual_seed(0)
        config._attn_implementation = "eager"
        model = GeneformerForMaskedLM(config).eval()
        ids = torch.randint(2, 101, (1, n))
        labels = torch.where(torch.arange(n) < labelled, ids, -100)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=labels).loss.backward()
        return counter.get_total_flops()

    layer = flops_of_cell(tiny(3), n) - flops_of_cell(tiny(2), n)
    assert count(tiny(3)) - count(tiny(2)) == pytest.approx(layer, rel=1e-12)
    head = 3 * (2 * 64**2 + 2 * 64 * 101)
    assert count(tiny(2), 26) - count(tiny(2), 13) == 13 * head
    assert flops_of_cell(tiny(1), n) - layer == pytest.approx(0.15 * n * head)
    assert flops_of_cell(tiny(3), n, recomputed=True) - flops_of_cell(tiny(3), n) == pytest.approx(layer)


def test_sharding_divides_what_it_shards():
    parameters = count_parameters(tiny(4))
    for strategy in ("FSDP2", "ZeRO-2"):
        few, many = (state_bytes(parameters, strategy, n)[0] for n in (4, 8))
        assert few > many > state_bytes(parameters, strategy, 10**9)[0] > 0
    assert state_bytes(parameters, "DDP", 8) == state_bytes(parameters, "DDP", 64)
    assert state_bytes(parameters, "ZeRO-3 offload", 4)[1] == 4 * parameters.total


def test_days_are_flops_over_what_the_gpus_do():
    figures = capacity("v1-6l", CapacityConfig(gpus=[12], gpu="a100", utilization=0.5, epochs=2, mean_length=1000))
    flops = flops_of_cell(GeneformerConfig(), 1000)
    assert figures["days"][12] == pytest.approx(2 * 27.4e6 * flops / (12 * 0.5 * 312e12) / 86_400)


def test_the_dry_run_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--sizes", "v1-6l", "v2-316m", "--gpus", "1", "12", "--gpu", "v100"])
    out = capsys.readouterr().out
    assert "v1-6l: 10.3M parameters" in out
    assert "40% of the v100's peak" in out
    # 316M parameters and 65,536 tokens do not fit into 32 GB unless activations are recomputed.
    assert "56.7* (15.8)" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "t4"], "Expected gpu among h200, h100, a100, v100, found 't4'"),
        (["--sizes", "v3"], "Expected sizes among .*v1-6l.*, found 'v3'"),
        (["--utilization", "40"], "share of the peak, between 0 and 1; found 40"),
        (["--gpus", "0"], "must be positive"),
    ],
)
def test_bad_options(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert re.search(message, capsys.readouterr().err)
