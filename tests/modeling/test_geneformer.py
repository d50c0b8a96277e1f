"""What must hold of the Geneformer itself: padding, packing, backends, gradients, the original's numbers."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM

from cellglot import GeneformerConfig, GeneformerForMaskedLM, GeneformerModel
from cellglot.modeling.geneformer import PRESETS
from cellglot.modeling.geneformer.modeling_geneformer import masked_gene_loss
from cellglot.tokenization.packing import packed_cells

VOCABULARY = 101
LENGTHS = (13, 7, 11)


def tiny_config(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return GeneformerConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 17, **sizes, **options})


def tiny_model(**options):
    torch.manual_seed(0)
    # Larger initial weights than in practice, so that differences show.
    return GeneformerForMaskedLM(tiny_config(initializer_range=0.2, **options)).eval()


def tiny_batch(seed=0):
    """(input_ids, attention_mask, labels) of three cells, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (3, max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    labels = torch.where((torch.rand(ids.shape, generator=generator) < 0.4) & mask.bool(), ids, -100)
    return ids * mask, mask, labels


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def packed(x):
    """The real tokens of a padded (3, t, ...) tensor, end to end, as (1, tokens, ...)."""
    return torch.cat([row[:n] for row, n in zip(x, LENGTHS, strict=True)])[None]


CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_padding_and_other_cells_do_not_change_a_cell(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    ids, mask, _ = tiny_batch()
    with torch.no_grad():
        logits = model(ids, mask).logits
        for i, n in enumerate(LENGTHS):
            # 1e-5: float32 sums in another order
            assert_close(logits[i : i + 1, :n], model(ids[i : i + 1, :n]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_attention_backends_agree_with_eager(attention):
    model = tiny_model()
    ids, mask, labels = tiny_batch()
    results = {}
    # torch's flex attention has no backward pass on CPU.
    with torch.set_grad_enabled(attention != "flex_attention"):
        for name in ("eager", attention):
            model.set_attn_implementation(name)
            model.zero_grad()
            output = model(ids, mask, labels=labels, output_hidden_states=True)
            if torch.is_grad_enabled():
                output.loss.backward()
            results[name] = (output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    (ours, gradients), (eager, eager_gradients) = results[attention], results["eager"]
    assert_close(ours.logits, eager.logits, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours.hidden_states, eager.hidden_states, strict=True):
        assert_close(a[mask.bool()], b[mask.bool()], atol=1e-5, rtol=1e-5)
    assert len(eager_gradients) == (0 if attention == "flex_attention" else len(list(model.parameters())))
    for name, gradient in eager_gradients.items():
        assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_padded_and_one_by_one_give_the_same_loss_and_gradients(attention, training):
    # Training takes other ways to the loss than evaluation does.
    model = tiny_model(**NO_DROPOUT).train(training)
    model.set_attn_implementation(attention)
    ids, mask, labels = tiny_batch()

    def gradients(compute_loss):
        model.zero_grad()
        loss = compute_loss()
        loss.backward()
        found = {}
        for n, p in model.named_parameters():
            assert p.grad is not None, n
            found[n] = p.grad.clone()
        return loss.detach(), found

    def one_by_one():
        total = (labels != -100).sum()
        cells = zip(ids, labels, LENGTHS, strict=True)
        return sum(model(i[None, :n], labels=y[None, :n], num_items_in_batch=total).loss for i, y, n in cells)

    expected, expected_gradients = gradients(lambda: model(ids, mask, labels=labels).loss)
    for compute in (lambda: model(packed(ids), labels=packed(labels), cu_seqlens=CU_SEQLENS).loss, one_by_one):
        loss, found = gradients(compute)
        assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        for name, gradient in expected_gradients.items():
            assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_logits_only_where_labels_ask():
    model = tiny_model()
    ids, mask, labels = tiny_batch()
    with torch.no_grad():
        full = model(ids, mask).logits
        some = model(ids, mask, labels=labels)
    assert full.shape == (3, 13, VOCABULARY)
    wanted = labels != -100
    assert_close(some.logits, full[wanted])
    assert_close(some.loss, torch.nn.functional.cross_entropy(full[wanted], labels[wanted]))


def test_a_batch_without_labels_has_no_loss_but_gradients():
    model = tiny_model()
    ids, mask, labels = tiny_batch()
    loss = model(ids, mask, labels=torch.full_like(labels, -100)).loss
    assert loss.item() == 0
    loss.backward()


def test_every_parameter_gets_a_gradient():
    model = tiny_model()
    ids, mask, labels = tiny_batch()
    model(ids, mask, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    ids, mask, labels = tiny_batch()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(ids, mask, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert_close(gradients[0], gradients[1])


def test_fewer_layers_give_the_hidden_state_between():
    model = tiny_model().bert
    ids, mask, _ = tiny_batch()
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert len(states) == 3
        for n in range(3):
            assert_close(model(ids, attention_mask=mask, num_layers=n).last_hidden_state, states[n])


def test_attention_weights_are_recorded():
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids, mask, _ = tiny_batch()
    weights = model(ids, mask, output_attentions=True).attentions
    assert [w.shape for w in weights] == [(3, 4, 13, 13)] * 2
    assert_close(weights[0].sum(-1), torch.ones(3, 4, 13))
    assert weights[0][1, :, :, LENGTHS[1] :].abs().max() == 0


def test_saves_and_loads_the_same_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = GeneformerForMaskedLM.from_pretrained(tmp_path).eval()
    ids, mask, _ = tiny_batch()
    assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    encoder = GeneformerModel.from_pretrained(tmp_path).eval()
    assert torch.equal(encoder(ids, attention_mask=mask).last_hidden_state, model.bert(ids, mask).last_hidden_state)


def test_initialization_is_bert_s():
    torch.manual_seed(0)
    ours = GeneformerForMaskedLM(tiny_config(hidden_size=64, vocab_size=499))
    for name, p in ours.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (p == 1).all()
        elif p.ndim == 1:
            assert (p == 0).all(), name
        elif p.numel() > 2000:
            assert abs(p.std() - 0.02) < 0.002, name
    assert (ours.bert.embeddings.word_embeddings.weight[0] == 0).all()


@pytest.mark.parametrize(
    ("preset", "millions"), [("v1-6l", 10.3), ("v1-12l", None), ("v2-104m", 104.4), ("v2-316m", 316.4)]
)
def test_presets_have_the_published_sizes(preset, millions):
    config = GeneformerConfig.from_preset(preset)
    with torch.device("meta"):
        model = GeneformerForMaskedLM(config)
        bert = BertForMaskedLM(BertConfig(**{k: v for k, v in config.to_dict().items() if k in BertConfig().to_dict()}))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in bert.named_parameters()}
    if millions:
        assert round(model.num_parameters() / 1e6, 1) == millions
    assert preset in PRESETS


def test_bad_configurations_and_inputs():
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        GeneformerConfig(hiden_size=3)  # type: ignore[call-arg]
    with pytest.raises(Exception, match="must be a multiple of num_attention_heads"):
        GeneformerConfig(hidden_size=30, num_attention_heads=4)
    with pytest.raises(Exception, match="num_hidden_layers"):
        GeneformerConfig(num_hidden_layers="six")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected a preset among v1-6l"):
        GeneformerConfig.from_preset("v3")
    model = tiny_model()
    with pytest.raises(ValueError, match="A cell has 18 tokens, but this model reads 17"):
        model(torch.ones(1, 18, dtype=torch.long))
    with pytest.raises(ValueError, match="A cell has 18 tokens"):
        model(torch.ones(1, 20, dtype=torch.long), cu_seqlens=torch.tensor([0, 2, 20]))
    with pytest.raises(ValueError, match="one row and no attention_mask; found 3 rows and a mask"):
        model(*tiny_batch()[:2], cu_seqlens=CU_SEQLENS)
    with pytest.raises(ValueError, match="are for packed batches"):
        model(*tiny_batch()[:2], output_positions=torch.tensor([0]))
    for offsets in ([0, 13, 20], [1, 13, 31], [0, 13, 13, 31], [0, 20, 13, 31], [0]):
        with pytest.raises(ValueError, match=r"cu_seqlens to rise from 0 to the 31 tokens.*; found \["):
            model(packed(tiny_batch()[0]), cu_seqlens=torch.tensor(offsets))
    ids, _, labels = map(packed, tiny_batch())
    with pytest.raises(ValueError, match="leave output_positions out"):
        model(ids, labels=labels, cu_seqlens=CU_SEQLENS, output_positions=torch.tensor([0]))
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="do not form one tensor"):
        model.bert(packed(tiny_batch()[0]), cu_seqlens=CU_SEQLENS)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_last_layer_computes_only_the_tokens_asked_for(attention, num_layers):
    model = tiny_model().bert
    model.set_attn_implementation(attention)
    ids, _, _ = tiny_batch()
    given = {"input_ids": packed(ids), "cu_seqlens": CU_SEQLENS, "num_layers": num_layers}
    # Of the second cell, from place 13 to 19, nothing is wanted.
    wanted = torch.tensor([2, 12, 20, 21, 30])
    with torch.no_grad():
        every = model(**given).last_hidden_state
        some = model(**given, output_positions=wanted).last_hidden_state
    assert_close(some, every[:, wanted], atol=1e-5, rtol=1e-5)


def test_hidden_states_are_of_every_token_when_they_are_asked_for():
    model = tiny_model()
    ids, _, labels = tiny_batch()
    outputs = model(packed(ids), labels=packed(labels), cu_seqlens=CU_SEQLENS, output_hidden_states=True)
    assert [x.shape[1] for x in outputs.hidden_states] == [sum(LENGTHS)] * 3


def test_packed_batches_with_max_seqlen_and_positions_are_the_same():
    model = tiny_model()
    ids, _, labels = tiny_batch()
    cells = [row[:n].numpy() for row, n in zip(ids, LENGTHS, strict=True)]
    given = packed_cells(cells)
    assert torch.equal(given["input_ids"], packed(ids))
    with torch.no_grad():
        expected = model(packed(ids), labels=packed(labels), cu_seqlens=CU_SEQLENS)
        found = model(**given, labels=packed(labels))
    assert torch.equal(found.logits, expected.logits)


def test_loss_in_bfloat16_is_near_that_in_float32():
    model = tiny_model(**NO_DROPOUT).train()
    ids, _, labels = tiny_batch()
    given = {"input_ids": packed(ids), "labels": packed(labels), "cu_seqlens": CU_SEQLENS}
    expected = model(**given).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**given).loss
    found.backward()
    assert found.dtype == torch.float32
    # bfloat16 has 8 bits
    assert_close(found, expected, atol=0, rtol=2e-2)


@pytest.mark.parametrize("n", [300, 2048])
def test_losses_in_half_precision_are_summed_in_float32(n):
    torch.manual_seed(0)
    x = torch.randn(n, 16, dtype=torch.bfloat16, requires_grad=True)
    decoder = torch.nn.Linear(16, 53, dtype=torch.bfloat16)
    labels = torch.randint(53, (n,))
    loss = masked_gene_loss(x, decoder, labels)
    logits = torch.nn.functional.linear(x, decoder.weight, decoder.bias)
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    assert_close(loss, expected, rtol=1e-6, atol=0)
    inputs = (x, decoder.weight, decoder.bias)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        # Chunks are added up in bfloat16, which has 8 bits.
        assert_close(a, b, rtol=0, atol=2e-2 * float(b.abs().max()))


def test_a_wrapped_decoder_is_asked_for_its_logits():
    class Adapted(torch.nn.Linear):
        adapter: torch.nn.Parameter

        def forward(self, input):
            return super().forward(input) + self.adapter * input.sum(dim=-1, keepdim=True)

    model = tiny_model(**NO_DROPOUT)
    decoder = Adapted(32, VOCABULARY)
    decoder.adapter = torch.nn.Parameter(torch.linspace(0, 1, VOCABULARY))
    model.set_output_embeddings(decoder)
    ids, mask, labels = tiny_batch()
    expected = model(ids, mask, labels).loss
    found = model.train()(ids, mask, labels).loss
    assert_close(found, expected)
    found.backward()
    assert decoder.adapter.grad is not None
    assert decoder.adapter.grad.abs().sum() > 0


def test_packed_cells_restart_their_positions():
    # 31 tokens in all are more than the context of 17, but no cell is.
    model = tiny_model()
    ids, mask, _ = tiny_batch()
    with torch.no_grad():
        logits = model(packed(ids), cu_seqlens=CU_SEQLENS).logits
        assert_close(logits, packed(model(ids, mask).logits), atol=1e-5, rtol=1e-5)


# ---- against the original


@pytest.mark.realdata
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_original_checkpoint_gives_the_original_s_numbers(real_data, attention):
    golden = json.loads((real_data / "golden" / "original_geneformer_tiny.json").read_text())
    path = real_data / "golden" / "tiny_official_bert"
    ours = GeneformerForMaskedLM.from_pretrained(path, attn_implementation=attention).eval()
    theirs = BertForMaskedLM.from_pretrained(path, attn_implementation=attention).eval()
    cells = sorted(golden["cells"], key=lambda cell: cell["length"])
    ids = torch.zeros(len(cells), cells[-1]["length"], dtype=torch.long)
    for row, cell in zip(ids, cells, strict=True):
        row[: cell["length"]] = torch.tensor(cell["input_ids"])
    mask = (ids != 0).long()
    with torch.no_grad():
        a = ours(ids, mask, output_hidden_states=True)
        b = theirs(ids, attention_mask=mask, output_hidden_states=True)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert_close(x[mask.bool()], y[mask.bool()], atol=1e-5, rtol=1e-5)
    assert_close(a.logits[mask.bool()], b.logits[mask.bool()], atol=1e-5, rtol=1e-4)
    expected = torch.tensor(golden["mlm_logits_padded_batch_position0_tokens0_19"])
    assert_close(a.logits[:, 0, :20], expected, atol=1e-5, rtol=1e-5)
    for layer, depth in (("-1", 2), ("0", 3)):
        states = ours.bert(ids, attention_mask=mask, num_layers=depth).last_hidden_state
        means = {c["length"]: s[: c["length"]].mean(0) for c, s in zip(cells, states, strict=True)}
        for cell, embedding in zip(golden["cells"], golden["cell_embedding"][layer], strict=True):
            assert_close(means[cell["length"]], torch.tensor(embedding).reshape(-1), atol=1e-5, rtol=1e-5)
