"""What must hold of the multiome models: constrained generation, set losses and predictions, a planted rule."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from cellglot.modeling.multiome import (
    PRESETS,
    MultiomeT5Config,
    MultiomeT5EncoderModel,
    MultiomeT5ForConditionalGeneration,
    MultiomeT5ForFeaturePrediction,
    iter_predictions,
    modeling_multiome,
    set_head_multiome,
)
from cellglot.modeling.multiome.modeling_multiome import token_loss
from cellglot.modeling.multiome.set_head_multiome import asymmetric_loss, dense_rows

GENES, PEAKS, FIRST = 11, 17, 5
GEX2ATAC, ATAC2GEX = 3, 4
BINS = 3
T5_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")


def tiny_config(**fields: Any) -> MultiomeT5Config:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    layout = {"vocab_size": FIRST + GENES + PEAKS, "first_gene_token_id": FIRST, "num_genes": GENES, "num_peaks": PEAKS}
    return MultiomeT5Config(**{**sizes, **layout, "dropout_rate": 0.0, "max_target_length": 40, **fields})


def tiny_model(kind: Any = MultiomeT5ForFeaturePrediction, **fields: Any) -> Any:
    torch.manual_seed(0)
    return kind(tiny_config(**fields)).eval()


def tiny_batch(tasks: tuple[int, ...] = (GEX2ATAC, GEX2ATAC, GEX2ATAC)) -> dict[str, Any]:
    """Cells of 5, 3 and 0 features with 4, 0 and 2 to predict."""
    generator = np.random.default_rng(0)
    ids, labels = torch.zeros(3, 7, dtype=torch.long), torch.full((3, 5), -100)
    for n, (task, given, wanted) in enumerate(zip(tasks, (5, 3, 0), (4, 0, 2), strict=True)):
        ranges = (np.arange(FIRST, FIRST + GENES), np.arange(FIRST + GENES, FIRST + GENES + PEAKS))
        source, target = (
            np.sort(generator.choice(tokens, n_tokens, replace=False))
            for tokens, n_tokens in zip(ranges if task == GEX2ATAC else ranges[::-1], (given, wanted), strict=True)
        )
        ids[n, : len(source) + 2] = torch.tensor([task, *source, 1])
        labels[n, : len(target) + 1] = torch.tensor([*target, 1])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


# ---- configuration


def test_presets_are_t5_small_and_a_small_one():
    stock, ours = T5Config(), MultiomeT5Config.from_preset("t5-small")
    for name in ("d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "feed_forward_proj"):
        assert getattr(ours, name) == getattr(stock, name)
    assert (ours.d_model, ours.num_layers, ours.num_heads, ours.d_ff) == (512, 6, 8, 2048)
    assert set(PRESETS) == {"t5-small", "small"}
    with pytest.raises(ValueError, match="a preset among t5-small, small"):
        MultiomeT5Config.from_preset("t5-base")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_peak": 7}, "did you mean 'num_peaks'"),
        ({"num_peaks": PEAKS + 1}, "do not fit vocab_size=33"),
        ({"first_gene_token_id": None}, "first of their tokens is not given"),
        ({"gamma_negative": -1}, "gamma_negative from 0"),
        ({"probability_margin": 1.0}, "probability_margin"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)


# ---- generation


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_generation_stays_in_the_target_modality_and_repeats_nothing(num_beams, seed):
    torch.manual_seed(seed)
    model: Any = MultiomeT5ForConditionalGeneration(tiny_config()).eval()
    # Logits of random weights would all but always end at once, or repeat one token for ever.
    model.lm_head.weight.data[1] = 0
    batch = tiny_batch((GEX2ATAC, ATAC2GEX, GEX2ATAC))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tasks = batch["input_ids"][:, 0].tolist()

    def written(**options):
        """What each cell's row holds up to its end."""
        rows = model.generate(**inputs, num_beams=num_beams, **options).tolist()
        return [row[1 : row.index(1) if 1 in row else None] for row in rows]

    def keeps_the_rule(task, tokens):
        first, n = model.config.target_of(task)
        return all(first <= token < first + n for token in tokens) and len(set(tokens)) == len(tokens)

    constrained, free = written(), written(constrained=False)
    assert all(keeps_the_rule(task, tokens) for task, tokens in zip(tasks, constrained, strict=True))
    assert any(constrained)
    assert not all(keeps_the_rule(task, tokens) for task, tokens in zip(tasks, free, strict=True))


def test_greedy_generation_equals_the_slow_way():
    """Each step by hand: the highest logit among what is left."""
    model = tiny_model(MultiomeT5ForConditionalGeneration)
    batch = tiny_batch()
    found = model.generate(input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1])[0].tolist()
    written = [0]
    first, n = model.config.target_of(GEX2ATAC)
    with torch.no_grad():
        while written[-1] != 1 and len(written) <= 40:
            logits = model(
                **{k: v[:1] for k, v in batch.items() if k != "labels"}, decoder_input_ids=torch.tensor([written])
            )
            left = [1, *(token for token in range(first, first + n) if token not in written)]
            written.append(left[int(logits.logits[0, -1, left].argmax())])
    assert found == written


def test_a_bin_follows_each_gene_and_nothing_else():
    bins = {"vocab_size": FIRST + GENES + PEAKS + BINS, "first_bin_token_id": FIRST + GENES + PEAKS, "num_bins": BINS}
    model = tiny_model(MultiomeT5ForConditionalGeneration, **bins)
    model.lm_head.weight.data[1] = 0
    batch = tiny_batch((ATAC2GEX, GEX2ATAC, ATAC2GEX))
    for num_beams in (1, 2):
        rows = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=num_beams).tolist()
        for task, row in zip((ATAC2GEX, GEX2ATAC, ATAC2GEX), rows, strict=True):
            tokens = row[1 : row.index(1)]
            if task == ATAC2GEX:
                assert len(tokens) > 0
                assert all(FIRST <= token < FIRST + GENES for token in tokens[::2])
                assert all(token >= FIRST + GENES + PEAKS for token in tokens[1::2])
                assert len(set(tokens[::2])) == len(tokens[::2]) == len(tokens[1::2])
            else:
                assert all(token < FIRST + GENES + PEAKS for token in tokens)


def test_subwords_are_generated_as_whole_names_none_twice():
    """With the processor's constraint; without it random weights spell no name."""
    from ..tokenization.test_binarized_string import GENE_NAMES, PEAK_NAMES, pair, processor

    ours = processor(vocabulary="subword")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model: Any = MultiomeT5ForConditionalGeneration(MultiomeT5Config(**sizes, **ours.model_fields())).eval()
    # Otherwise the end comes at once.
    model.lm_head.weight.data[1] = 0
    for task, modality, names in (("gex2atac", "accessibility", PEAK_NAMES), ("atac2gex", "expression", GENE_NAMES)):
        batch = ours(pair(), task=task)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for num_beams in (1, 2):
            written = model.generate(
                **inputs, num_beams=num_beams, max_new_tokens=300, prefix_allowed_tokens_fn=ours.allowed_tokens(task)
            )
            told = ours.tokenizer.batch_decode(written, skip_special_tokens=True)
            assert any(told)
            for text in told:
                words = text.split()
                assert len(set(words)) == len(words)
                assert set(words) <= set(names)
            assert ours.decode_matrix(written, modality).shape == (len(told), len(names))
    with pytest.raises(ValueError, match="no feature of"):
        ours.decode_matrix(model.generate(**inputs, max_new_tokens=30), "expression")


def test_generation_is_as_long_as_the_configuration_says_or_the_caller():
    model = tiny_model(MultiomeT5ForConditionalGeneration, max_target_length=4)
    model.lm_head.weight.data[1] = 0
    ids = tiny_batch()["input_ids"][:1]
    assert model.generate(ids, min_new_tokens=4).shape == (1, 5)
    assert model.generate(ids, min_new_tokens=6, max_new_tokens=6).shape == (1, 7)


def test_without_its_position_option_the_generation_model_is_a_stock_t5():
    ours = tiny_model(MultiomeT5ForConditionalGeneration)
    stock = T5ForConditionalGeneration(ours.config).eval()
    stock.load_state_dict(ours.state_dict())
    batch = tiny_batch()
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, stock(**batch).logits)
        assert torch.equal(ours(**batch).loss, stock(**batch).loss)


def test_training_loss_in_pieces_equals_that_of_all_logits(monkeypatch):
    batch, found = tiny_batch(), []
    for at_once in (2**26, 2 * (FIRST + GENES + PEAKS)):
        monkeypatch.setattr(modeling_multiome, "LOGITS_AT_ONCE", at_once)
        model = tiny_model(MultiomeT5ForConditionalGeneration).train()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), model.shared.weight.grad.clone()))
        output = model.eval()(**batch, return_logits=False)
        assert output.logits is None
        assert_close(output.loss, loss.detach())
    expected = tiny_model(MultiomeT5ForConditionalGeneration)(**batch).loss
    for loss, gradient in found:
        assert_close(loss, expected)
        assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-5)  # float32 sums in another order
    nothing = torch.full((3,), -100)
    assert token_loss(torch.ones(3, 5), torch.ones(7, 5), nothing) == 0


# ---- the set head


@pytest.mark.parametrize("gammas", [(0, 0, 0), (2, 2, 0), (1, 4, 0.05), (0, 2, 0.2)])
def test_asymmetric_loss_equals_the_formula(gammas):
    positive, negative, margin = gammas
    generator = np.random.default_rng(0)
    scores = np.append(generator.normal(0, 3, 40), [-12.0, 12.0, 0.0])
    for present in (True, False):
        found = asymmetric_loss(torch.from_numpy(scores), torch.full(scores.shape, present), *gammas)
        for score, value in zip(scores, found.tolist(), strict=True):
            p = 1 / (1 + np.exp(-score))
            if present:
                expected = -((1 - p) ** positive) * np.log(p)
            else:
                q = max(p - margin, 0)
                expected = -(q**negative) * np.log1p(-q)
            assert value == pytest.approx(expected, rel=2e-5, abs=1e-6)  # float32


def plain_loss(model, batch, gammas, value_weight):
    """One cell and one feature at a time."""
    total, n_labels = 0.0, int((batch["labels"] != -100).sum())
    for n in range(len(batch["input_ids"])):
        cell = {name: batch[name][n : n + 1] for name in ("input_ids", "attention_mask")}
        output = model(**cell)
        first, n_features = model.config.target_of(int(cell["input_ids"][0, 0]))
        values = dict(zip(batch["value_features"][n].tolist(), batch["values"][n].tolist(), strict=True))
        for f in range(n_features):
            present = first + f in batch["labels"][n].tolist()
            score = output.logits[:, f : f + 1].double()
            total += float(asymmetric_loss(score, torch.tensor([[present]]), *gammas))
            total += value_weight * (float(output.values[0, f]) - values.get(f, 0.0)) ** 2
    return total / n_labels


@pytest.mark.parametrize("scores_at_once", [2**24, 20])
@pytest.mark.parametrize("tasks", [(GEX2ATAC,) * 3, (ATAC2GEX,) * 3, (GEX2ATAC, ATAC2GEX, GEX2ATAC)])
def test_set_loss_equals_the_plain_oracle(tasks, scores_at_once, monkeypatch):
    monkeypatch.setattr(set_head_multiome, "SCORES_AT_ONCE", scores_at_once)
    options = {"gamma_positive": 1, "gamma_negative": 3, "probability_margin": 0.05, "value_loss_weight": 0.7}
    model = tiny_model(**options)
    batch = tiny_batch(tasks)
    batch["value_features"] = torch.tensor([[0, 3, 7], [2, -100, -100], [-100, -100, -100]])
    batch["values"] = torch.tensor([[1.5, 2.0, 0.3], [4.0, 0, 0], [0, 0, 0]])
    with torch.no_grad():
        expected = plain_loss(model, batch, (1, 3, 0.05), 0.7)
        assert float(model.train()(**batch).loss) == pytest.approx(expected, rel=1e-5)


def test_chunks_give_the_gradients_of_all_scores_at_once(monkeypatch):
    gradients = []
    for at_once in (2**24, 20):
        monkeypatch.setattr(set_head_multiome, "SCORES_AT_ONCE", at_once)
        model = tiny_model().train()
        batch = tiny_batch((GEX2ATAC, ATAC2GEX, GEX2ATAC))
        batch |= {"value_features": torch.tensor([[1], [2], [-100]]), "values": torch.tensor([[1.0], [2.0], [0.0]])}
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)  # float32 sums in another order


def test_dense_rows_pass_over_what_is_outside():
    features = torch.tensor([[0, 4, -100], [7, -1, 2]])
    assert dense_rows(features, None, 5).int().tolist() == [[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    assert dense_rows(features, torch.arange(6.0).view(2, 3), 5).tolist() == [[0, 0, 0, 0, 1], [0, 0, 5, 0, 0]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("position_bias", [True, False])
def test_padding_and_other_cells_do_not_change_a_cell(attention, position_bias):
    model = tiny_model(encoder_position_bias=position_bias)
    model.set_attn_implementation(attention)
    batch = tiny_batch()
    with torch.no_grad():
        together = model(batch["input_ids"], batch["attention_mask"])
        for n, length in enumerate(batch["attention_mask"].sum(dim=1)):
            alone = model(batch["input_ids"][n : n + 1, :length])
            # float32 sums in another order
            assert_close(together.logits[n : n + 1], alone.logits, atol=1e-5, rtol=1e-4)
            assert_close(together.values[n : n + 1], alone.values, atol=1e-5, rtol=1e-4)


def test_without_position_bias_the_order_of_features_does_not_matter():
    for bias, matters in ((False, False), (True, True)):
        for kind in (MultiomeT5ForFeaturePrediction, MultiomeT5ForConditionalGeneration):
            model = tiny_model(kind, encoder_position_bias=bias)
            ids = torch.tensor([[GEX2ATAC, 5, 6, 7, 8, 9, 1]])
            start = {} if kind is MultiomeT5ForFeaturePrediction else {"decoder_input_ids": torch.tensor([[0]])}
            with torch.no_grad():
                found = [model(input_ids=ids[:, order], **start).logits for order in (range(7), [0, 4, 5, 1, 3, 2, 6])]
            assert torch.allclose(*found, atol=1e-5) != matters


def test_set_attention_equals_t5_attention_with_a_bias_of_zeros():
    sets, stock = tiny_model(encoder_position_bias=False), tiny_model(encoder_position_bias=True)
    stock.load_state_dict(sets.state_dict(), strict=False)
    stock.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.zero_()
    batch = tiny_batch()
    with torch.no_grad():
        assert_close(sets(**batch).logits, stock(**batch).logits, atol=1e-6, rtol=1e-5)


def test_cells_of_both_tasks_train_together_and_are_predicted_apart():
    batch = tiny_batch((GEX2ATAC, ATAC2GEX, GEX2ATAC))
    model = tiny_model()
    loss = model.train()(**batch).loss
    output = model.eval()(**batch, return_logits=False)
    assert output.logits is None
    assert_close(output.loss, loss)
    for predict in (model.eval(), model.predict):
        with pytest.raises(ValueError, match="both tasks"):
            predict(batch["input_ids"], batch["attention_mask"])
    with pytest.raises(ValueError, match="begin with a task token"):
        model(torch.tensor([[7, 8, 1]]))
    with pytest.raises(ValueError, match="subwords"):
        MultiomeT5ForFeaturePrediction(MultiomeT5Config(vocab_size=50))


def test_frequencies_are_where_training_begins():
    model = tiny_model()
    frequencies = torch.linspace(0, 0.5, GENES + PEAKS)
    model.set_frequencies(frequencies, 3 * frequencies)
    model.head.score.weight.data.zero_()
    model.head.value.weight.data.zero_()
    batch = tiny_batch()
    with torch.no_grad():
        output = model(batch["input_ids"], batch["attention_mask"])
    assert_close(output.logits.sigmoid(), frequencies[GENES:].expand(3, -1), atol=1e-4, rtol=1e-4)
    assert_close(output.values, 3 * frequencies[GENES:].expand(3, -1))


@pytest.mark.parametrize("scores_at_once", [2**24, 20])
@pytest.mark.parametrize("values", [False, True])
def test_streamed_predictions_are_those_of_the_dense_scores(values, scores_at_once, monkeypatch):
    monkeypatch.setattr(set_head_multiome, "SCORES_AT_ONCE", scores_at_once)
    model = tiny_model()
    cells = [[GEX2ATAC, *range(FIRST, FIRST + n), 1] for n in (3, 0, 9, 5, 1, 7, 2)]
    examples = {"input_ids": cells}

    class Examples:
        def __len__(self):
            return len(cells)

        def __getitem__(self, part):
            return {name: column[part] for name, column in examples.items()}

    dense, measured = [], []
    with torch.no_grad():
        for cell in cells:
            output = model(torch.tensor([cell]))
            dense.append(output.logits[0].sigmoid().numpy())
            measured.append(output.values[0].numpy())
    dense, measured = np.array(dense), np.array(measured)
    data = measured if values else dense
    threshold = float(np.median(dense))
    options = {"values": values, "max_tokens": 20, "cells_per_block": 3}
    found = sp.vstack(list(iter_predictions(model, Examples(), threshold=threshold, **options)))
    model.config.gex2atac_threshold = threshold
    by_default = sp.vstack(list(iter_predictions(model, Examples(), **options)))
    assert np.array_equal(by_default.toarray(), found.toarray())
    # 1e-5: padded batches add in another order; the median lies between two scores
    np.testing.assert_allclose(found.toarray(), np.where(dense >= threshold, data, 0), atol=1e-5)
    best = sp.vstack(list(iter_predictions(model, Examples(), top_k=4, **options)))
    keep = dense >= np.sort(dense, axis=1)[:, -4:-3]
    np.testing.assert_allclose(best.toarray(), np.where(keep, data, 0), atol=1e-5)
    assert best.has_sorted_indices
    assert np.diff(best.indptr).tolist() == [4] * 7
    with pytest.raises(ValueError, match="threshold or top_k"):
        model.predict(torch.tensor([cells[0]]), threshold=0.5, top_k=3)


@pytest.mark.parametrize("position_bias", [True, False])
def test_weights_begin_at_the_sizes_of_t5(position_bias):
    """transformers leaves modules of derived classes to the default of linear layers, a standard deviation of 1."""
    config = tiny_config(d_model=64, d_ff=96, d_kv=16, encoder_position_bias=position_bias)
    torch.manual_seed(0)
    stock = T5ForConditionalGeneration(T5Config(**{k: getattr(config, k) for k in T5_SIZES}))
    expected = {name: float(p.detach().std()) for name, p in stock.named_parameters()}
    for kind in (MultiomeT5ForFeaturePrediction, MultiomeT5ForConditionalGeneration):
        for name, parameter in kind(config).named_parameters():
            if name in expected and "layer_norm" not in name and "relative" not in name:
                # 0.15: standard deviations of some thousand draws
                size = 1 / 8 if name == "shared.weight" and kind is MultiomeT5ForFeaturePrediction else expected[name]
                assert float(parameter.detach().std()) == pytest.approx(size, rel=0.15), name


def test_an_untrained_set_head_says_about_the_frequencies():
    model: Any = MultiomeT5ForFeaturePrediction(tiny_config()).eval()
    frequencies = torch.linspace(0.01, 0.5, GENES + PEAKS)
    model.set_frequencies(frequencies)
    batch = tiny_batch()
    output = model(batch["input_ids"], batch["attention_mask"])
    assert_close(output.logits, torch.logit(frequencies[GENES:]).expand(3, -1), atol=0.5, rtol=0)
    assert_close(output.values, frequencies[GENES:].expand(3, -1), atol=0.5, rtol=0)


def test_the_encoder_of_one_class_loads_into_the_others(tmp_path):
    generator = tiny_model(MultiomeT5ForConditionalGeneration, encoder_position_bias=False)
    generator.save_pretrained(tmp_path)
    ids = tiny_batch()["input_ids"]
    with torch.no_grad():
        expected = generator.encoder(ids).last_hidden_state
        for kind in (MultiomeT5EncoderModel, MultiomeT5ForFeaturePrediction):
            assert torch.equal(kind.from_pretrained(tmp_path).eval().encoder(ids).last_hidden_state, expected)


def test_config_survives_the_classes_that_are_built_with_it():
    config = tiny_config()
    before = config.to_dict()
    for kind in (MultiomeT5EncoderModel, MultiomeT5ForFeaturePrediction, MultiomeT5ForConditionalGeneration):
        kind(config)
    after = config.to_dict()
    assert {k: v for k, v in after.items() if k != "dtype"} == {k: v for k, v in before.items() if k != "dtype"}


@pytest.mark.parametrize("kind", [MultiomeT5ForFeaturePrediction, MultiomeT5ForConditionalGeneration])
def test_half_precision_and_gradient_checkpointing(kind):
    batch = tiny_batch()
    if kind is MultiomeT5ForFeaturePrediction:
        batch |= {"value_features": torch.tensor([[1], [2], [-100]]), "values": torch.tensor([[1.0], [2.0], [0.0]])}
    reference = tiny_model(kind).train()(**batch).loss
    model = tiny_model(kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.item() == pytest.approx(reference.item(), rel=0.05)  # three digits of bfloat16
    model.activation_checkpointing_enable()
    loss = model(**batch).loss
    loss.backward()
    assert_close(loss, reference)
    assert all(p.grad is not None for p in model.parameters())


# ---- a planted rule


def planted_cells(n_cells, n_genes, peaks_per_gene, genes_per_cell, seed):
    """(cells, genes) and (cells, peaks) bool: peak j is open if and only if gene j modulo n_genes is expressed."""
    expressed = np.random.default_rng(seed).random((n_cells, n_genes)) < genes_per_cell / n_genes
    return expressed, np.tile(expressed, peaks_per_gene)


def planted_batch(expressed, opened):
    n_genes = expressed.shape[1]
    rows = [np.array([GEX2ATAC, *(FIRST + np.flatnonzero(row)), 1]) for row in expressed]
    targets = [np.array([*(FIRST + n_genes + np.flatnonzero(row)), 1]) for row in opened]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    labels = torch.full((len(rows), max(map(len, targets))), -100)
    for n, (row, target) in enumerate(zip(rows, targets, strict=True)):
        ids[n, : len(row)], labels[n, : len(target)] = torch.from_numpy(row), torch.from_numpy(target)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def test_a_planted_peak_gene_rule_is_learned_by_the_set_head():
    n_genes, peaks_per_gene = 29, 4
    n_peaks = n_genes * peaks_per_gene
    expressed, opened = planted_cells(1_000, n_genes, peaks_per_gene, 4, seed=0)
    model = tiny_model(
        vocab_size=FIRST + n_genes + n_peaks,
        num_genes=n_genes,
        num_peaks=n_peaks,
        d_model=64,
        encoder_position_bias=False,
    ).train()
    model.set_frequencies(torch.from_numpy(np.append(expressed.mean(axis=0), opened.mean(axis=0))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        rows = np.random.default_rng(step).integers(len(expressed), size=64)
        model(**planted_batch(expressed[rows], opened[rows])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expressed, opened = planted_cells(200, n_genes, peaks_per_gene, 4, seed=1)
    batch = planted_batch(expressed, opened)
    found = model.eval().predict(batch["input_ids"], batch["attention_mask"])
    predicted = np.zeros_like(opened)
    predicted[np.repeat(np.arange(200), found.offsets.diff().numpy()), found.features.numpy()] = True
    f1 = 2 * (predicted & opened).sum() / (predicted.sum() + opened.sum())
    assert f1 >= 0.95
