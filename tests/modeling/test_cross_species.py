"""What must hold of the cross-species models: their equations, who attends to whom, sources, masks, aligners."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cellglot import (
    CrossSpeciesConfig,
    CrossSpeciesForMaskedReconstruction,
    CrossSpeciesForTranslation,
    CrossSpeciesModel,
)

# Primes, so that a swapped axis fails; components are no multiple of the patches
CELLS, COMPONENTS, PATCHES = 11, 37, 7
AXES = pytest.mark.parametrize("token_axis", ["cells", "components"])


def tiny_config(token_axis="cells", **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return CrossSpeciesConfig(
        **{
            "n_components": COMPONENTS,
            "num_patches": PATCHES,
            "token_axis": token_axis,
            # Larger initial weights than in practice, so that differences show
            "initializer_range": 0.2,
            "projection_rms": [2.0, 3.0],
            **sizes,
            **no_dropout,
            **options,
        }
    )


def tiny_model(token_axis="cells", cls: Any = CrossSpeciesForMaskedReconstruction, **options) -> Any:
    torch.manual_seed(0)
    return cls(tiny_config(token_axis, **options)).eval()


def tiny_batch(n_cells=CELLS, seed=0):
    """(projections, source, masked)"""
    generator = torch.Generator().manual_seed(seed)
    projections = 2 * torch.randn(n_cells, COMPONENTS, generator=generator)
    masked = torch.rand(n_cells, COMPONENTS, generator=generator) < 0.3
    return projections, torch.arange(n_cells) % 2, masked


def plain_attention(module, x, memory):
    """Multi-head attention of one sequence (t, d), one head and one query at a time."""
    q, k, v = module.query(x), module.key(memory), module.value(memory)
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(4):
            part = slice(8 * h, 8 * (h + 1))
            weights = torch.softmax(k[:, part] @ q[i, part] / math.sqrt(8), dim=0)
            heads.append(weights @ v[:, part])
        rows.append(torch.cat(heads))
    return module.output(torch.stack(rows))


def plain_reconstructions(model, projections, source):
    """The equations, written out for one sequence of tokens after another."""
    config, embeddings, decoder = model.config, model.model.embeddings, model.decoder
    size = config.n_components if config.token_axis == "cells" else math.ceil(COMPONENTS / PATCHES)
    cells = []
    for x, s in zip(projections, source, strict=True):
        x = x / config.projection_rms[s]
        patches = [x[start : start + size] for start in range(0, COMPONENTS, size)]
        tokens = [
            part @ embeddings.projection.weight[s, p, : len(part)] + embeddings.source.weight[s]
            for p, part in enumerate(patches)
        ]
        if config.token_axis == "components":
            tokens = [token + embeddings.patch[p] for p, token in enumerate(tokens)]
            # A patch without any component is left over where rounding up fills the others.
            tokens += [embeddings.patch[p] + embeddings.source.weight[s] for p in range(len(tokens), PATCHES)]
            tokens = [embeddings.source.weight[s], *tokens]
        cells.append(torch.stack(tokens))
    sequences = [torch.cat(cells)] if config.token_axis == "cells" else cells
    outputs = []
    for i in sequences:
        e = i
        for layer in model.model.layers:
            normed = layer.attention_norm(e)
            e = e + plain_attention(layer.attention, normed, normed)
            e = e + layer.feed_forward(layer.feed_forward_norm(e))
        e = model.model.norm(e)
        for layer in decoder.layers:
            i = i + plain_attention(layer.cross_attention, layer.cross_attention_norm(i), e)
            normed = layer.attention_norm(i)
            i = i + plain_attention(layer.attention, normed, normed)
            i = i + layer.feed_forward(layer.feed_forward_norm(i))
        outputs.append(i)
    rows = []
    for n, s in enumerate(source):
        tokens = outputs[0][n : n + 1] if config.token_axis == "cells" else outputs[n][1:]
        patches = [token @ decoder.projection.weight[s, p] for p, token in enumerate(tokens)]
        rows.append(torch.cat(patches)[:COMPONENTS] * config.projection_rms[s])
    return torch.stack(rows)


@AXES
@pytest.mark.parametrize("n_patches", [PATCHES, 10])  # 10: the last patches hold nothing
def test_model_equals_its_equations_written_out(token_axis, n_patches, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PATCHES", n_patches)
    model = tiny_model(token_axis, num_patches=n_patches)
    projections, source, _ = tiny_batch()
    with torch.no_grad():
        # 1e-4 of values of the order of 10: float32 sums in another order
        found = model(projections, source).reconstructions
        assert_close(found, plain_reconstructions(model, projections, source), atol=1e-4, rtol=1e-4)


def test_presets_have_their_sizes():
    """The paper's is about 300M parameters (Pang & Tegnér, section 2.1)."""
    counts = {}
    for name in ("small", "base", "paper"):
        with torch.device("meta"):
            model = CrossSpeciesForMaskedReconstruction(CrossSpeciesConfig.from_preset(name))
        counts[name] = sum(p.numel() for p in model.parameters())
    assert counts == {"small": 1_540_608, "base": 46_598_144, "paper": 298_848_256}
    assert CrossSpeciesConfig.from_preset("paper").hidden_size == 1024


def test_attention_across_cells_is_permutation_equivariant():
    model = tiny_model("cells")
    projections, source, masked = tiny_batch()
    order = torch.randperm(CELLS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, permuted = model(projections, source, masked), model(projections[order], source[order], masked[order])
        # 1e-5: float32 sums in another order
        assert_close(permuted.embeddings, found.embeddings[order], atol=1e-5, rtol=1e-5)
        assert_close(permuted.reconstructions, found.reconstructions[order], atol=1e-4, rtol=1e-5)
        # What the equality would be worth nothing without: cells do see each other.
        alone = model(projections[:1], source[:1], masked[:1]).embeddings
        assert (alone - found.embeddings[:1]).abs().max() > 0.1


def test_with_components_as_tokens_a_cell_does_not_depend_on_its_batch():
    model = tiny_model("components")
    projections, source, masked = tiny_batch()
    with torch.no_grad():
        found = model(projections, source, masked)
        for i in range(CELLS):
            alone = model(projections[i : i + 1], source[i : i + 1], masked[i : i + 1])
            assert_close(alone.embeddings, found.embeddings[i : i + 1], atol=1e-5, rtol=1e-5)
            assert_close(alone.reconstructions, found.reconstructions[i : i + 1], atol=1e-4, rtol=1e-5)


@AXES
def test_loss_is_the_mean_squared_error_over_all_entries_and_what_is_masked_is_not_seen(token_axis):
    model = tiny_model(token_axis)
    projections, source, masked = tiny_batch()
    with torch.no_grad():
        output = model(projections, source, masked, labels=projections)
        squared = [
            (float(output.reconstructions[n, c]) - float(projections[n, c])) ** 2
            for n in range(CELLS)
            for c in range(COMPONENTS)
        ]
        assert float(output.loss) == pytest.approx(sum(squared) / len(squared), rel=1e-5)
        changed = model(torch.where(masked, 1e3, projections), source, masked)
        assert torch.equal(changed.reconstructions, output.reconstructions)
        assert not torch.equal(model(projections, source).reconstructions, output.reconstructions)
        assert model(projections, source).loss is None


@AXES
def test_training_hides_a_share_of_the_entries_and_evaluation_none(token_axis):
    model = tiny_model(token_axis, mask_probability=0.25)
    projections, source, _ = tiny_batch()
    with torch.no_grad():
        shown = model(projections, source).reconstructions
        assert torch.equal(model(projections, source, torch.zeros(CELLS, COMPONENTS).bool()).reconstructions, shown)
        model.train()
        torch.manual_seed(3)
        found = model(projections, source).reconstructions
        torch.manual_seed(3)
        masked = torch.rand(CELLS, COMPONENTS) < 0.25
        assert torch.equal(model(projections, source, masked).reconstructions, found)


@AXES
@pytest.mark.parametrize("told_apart_by", ["projection and embedding", "embedding"])
def test_the_same_projections_of_another_source_have_another_embedding(token_axis, told_apart_by):
    model = tiny_model(token_axis, projection_rms=None)
    projections, source, _ = tiny_batch()
    with torch.no_grad():
        if told_apart_by == "embedding":
            weight = model.model.embeddings.projection.weight
            weight[1] = weight[0]
        found, other = model(projections, source).embeddings, model(projections, 1 - source).embeddings
    assert ((found - other).norm(dim=1) > 0.3 * found.norm(dim=1)).all()


def train(model, projections, source, *, steps, batch_size=128, learning_rate=3e-3):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for _ in range(steps):
        batch = torch.randperm(len(projections))[:batch_size]
        loss = model(projections[batch], source[batch], labels=projections[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def planted_cells(n_cells, rank=3):
    """Cells of two sources whose components are all linear in `rank` numbers, by a map of each source's own."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, rank, COMPONENTS, generator=generator)
    source = torch.arange(n_cells) % 2
    hidden = torch.randn(n_cells, rank, generator=generator)
    return 5 * torch.einsum("nr,nrc->nc", hidden, maps[source]), source


def nearest_centroid_accuracy(embeddings, source):
    """Share of the second half of the cells that is nearest to the centroid of its own source in the first half."""
    half = len(source) // 2
    centroids = torch.stack([embeddings[:half][source[:half] == s].mean(dim=0) for s in (0, 1)])
    nearest = torch.cdist(embeddings[half:], centroids).argmin(dim=1)
    return float((nearest == source[half:]).float().mean())


@AXES
def test_a_planted_structure_fills_in_masked_entries_and_the_source_embedding_separates_sources(token_axis):
    projections, source = planted_cells(600)
    options = {"initializer_range": 0.02, "projection_rms": [8.7, 8.7], "num_hidden_layers": 1}
    model = train(tiny_model(token_axis, **options), projections[:400], source[:400], steps=200)
    held_out, of = projections[400:], source[400:]
    masked = torch.rand(held_out.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    with torch.no_grad():
        output = model(held_out, of, masked)
        error = (output.reconstructions - held_out)[masked].square().mean()
        # The mean of every component is 0, so guessing it errs by the variance.
        assert error < 0.15 * held_out[masked].square().mean()
        assert nearest_centroid_accuracy(output.embeddings, of) > 0.95
        model.model.embeddings.source.weight.zero_()
        assert nearest_centroid_accuracy(model(held_out, of).embeddings, of) < 0.7


@AXES
def test_scales_of_the_sources_cancel(token_axis):
    """Cells in other units, told to the model, are reconstructed in those units."""
    model, scaled = tiny_model(token_axis), tiny_model(token_axis, projection_rms=[20.0, 0.3])
    projections, source, _ = tiny_batch()
    factor = torch.tensor([10.0, 0.1])[source][:, None]
    with torch.no_grad():
        expected = model(projections, source).reconstructions * factor
        assert_close(scaled(projections * factor, source).reconstructions, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("token_axis", "attention"), [("cells", "sdpa"), ("components", "sdpa"), ("components", "flex_attention")]
)
def test_attention_backends_agree_with_eager(token_axis, attention):
    model = tiny_model(token_axis)
    projections, source, masked = tiny_batch()
    results = {}
    # torch's flex attention has no backward pass on CPU.
    with torch.set_grad_enabled(attention != "flex_attention"):
        for name in ("eager", attention):
            model.set_attn_implementation(name)
            model.zero_grad()
            output = model(projections, source, masked, labels=projections, output_hidden_states=True)
            if torch.is_grad_enabled():
                output.loss.backward()
            results[name] = (output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    (ours, gradients), (eager, eager_gradients) = results[attention], results["eager"]
    assert_close(ours.reconstructions, eager.reconstructions, atol=1e-4, rtol=1e-5)
    assert len(ours.hidden_states) == 3
    for a, b in zip(ours.hidden_states, eager.hidden_states, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
    # Every parameter takes part.
    assert len(eager_gradients) == (0 if attention == "flex_attention" else len(list(model.parameters())))
    for name, gradient in eager_gradients.items():
        assert gradient.abs().max() > 0, name
        assert_close(gradients[name], gradient, atol=1e-3, rtol=1e-3)


@AXES
def test_attention_weights_of_the_encoder_are_shown_and_sum_to_one(token_axis):
    model = tiny_model(token_axis)
    model.set_attn_implementation("eager")
    projections, source, _ = tiny_batch()
    attentions = model(projections, source, output_attentions=True).attentions
    shape = (1, 4, CELLS, CELLS) if token_axis == "cells" else (CELLS, 4, 1 + PATCHES, 1 + PATCHES)
    assert [a.shape for a in attentions] == [shape] * 2
    assert_close(attentions[0].sum(dim=-1), torch.ones(shape[:3]))


@AXES
def test_gradient_checkpointing_changes_no_gradient(token_axis):
    projections, source, masked = tiny_batch()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(token_axis).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(projections, source, masked, labels=projections).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@AXES
def test_half_precision_keeps_losses_and_reconstructions_in_float32(token_axis):
    projections, source, masked = tiny_batch()
    model = tiny_model(token_axis)
    with torch.no_grad():
        expected = model(projections, source, masked, labels=projections)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(projections, source, masked, labels=projections)
        half = model.to(torch.bfloat16)(projections, source, masked, labels=projections)
    for found in (mixed, half):
        assert found.loss.dtype == found.reconstructions.dtype == torch.float32
        # bfloat16 has 8 bits: some tenths of a percent a product
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=0.05)


@AXES
def test_no_cells_give_no_embeddings_and_no_loss(token_axis):
    projections, source, masked = tiny_batch(0)
    model = tiny_model(token_axis)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        output = model(projections, source, masked, labels=projections)
        assert output.embeddings.shape == (0, 32)
        assert output.reconstructions.shape == (0, COMPONENTS)
        assert float(output.loss.detach()) == 0
        output.loss.backward()
    translator = translation_model(token_axis)
    assert translator.translate(projections, source="mouse", target="human").shape == (0, COMPONENTS)


def test_wrong_shapes_and_sources_are_refused():
    model = tiny_model()
    projections, source, masked = tiny_batch()
    for batch, message in (
        ((projections[:, :-1], source), r"Expected projections \(cells, 37\), found \(11, 36\)"),
        ((projections, source[:-1]), r"one source a cell, \(11,\), found \(10,\)"),
        ((projections, source + 1), r"Expected sources 0 to 1 \(human, mouse\), found 1 to 2"),
        ((projections, source, masked[:-1]), r"Expected masked shaped as projections, \(11, 37\); found \(10, 37\)"),
        ((projections, source, masked, masked[:, 1:]), r"Expected labels shaped as projections"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 33}, "must be a multiple of num_attention_heads"),
        ({"num_patches": 38, "token_axis": "components"}, "Expected 1 to 37 patches"),
        ({"n_components": 0}, "n_components=0"),
        ({"mask_probability": 1.0}, "Expected mask_probability"),
        ({"sources": ["human", "human"]}, "different sources"),
        ({"projection_rms": [1.0]}, "one positive number for each of the 2 sources"),
        ({"projection_rms": [1.0, 0.0]}, "one positive number for each of the 2 sources"),
        ({"aligners": [["mouse", "rat"]]}, "pairs of different sources among human, mouse"),
        ({"aligners": [["mouse", "mouse"]]}, "pairs of different sources"),
        ({"aligners": [["mouse", "human"]] * 2}, "one aligner a pair"),
        ({"token_axes": "cells"}, "did you mean 'token_axis'"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**options)
    with pytest.raises(ValueError, match="Expected a preset among paper, base, small"):
        CrossSpeciesConfig.from_preset("large")


# Translation


def translation_model(token_axis="cells", **options):
    """An untrained translator from mouse to human, whose aligner is a rotation."""
    model = tiny_model(token_axis, CrossSpeciesForTranslation, **options)
    model.set_aligner("mouse", "human", rotation())
    return model


def rotation(seed=5):
    return torch.linalg.qr(torch.randn(COMPONENTS, COMPONENTS, generator=torch.Generator().manual_seed(seed)))[0]


@AXES
def test_translation_with_the_identity_is_the_reconstruction_as_a_cell_of_the_target(token_axis):
    translator, reconstructor = translation_model(token_axis), tiny_model(token_axis)
    reconstructor.load_state_dict(translator.state_dict(), strict=False)
    translator.set_aligner("mouse", "human", np.eye(COMPONENTS))
    projections, source, _ = tiny_batch()
    human = torch.zeros_like(source)
    with torch.no_grad():
        expected = reconstructor(projections, human)
        translated = translator.translate(projections, source="mouse", target="human")
        assert torch.equal(translated, expected.reconstructions)
        output = translator(projections, source, human)
    assert torch.equal(output.translations, expected.reconstructions)
    assert torch.equal(output.embeddings, expected.embeddings)


@AXES
def test_an_aligner_multiplies_each_cell_s_components_from_the_left(token_axis):
    model, w = translation_model(token_axis), rotation()
    projections, _, _ = tiny_batch()
    aligned = torch.stack([w @ x for x in projections])
    with torch.no_grad():
        expected, _ = model.reconstruct(aligned, torch.zeros(CELLS).long())
        assert_close(model.translate(projections, source="mouse", target="human"), expected, atol=1e-4, rtol=1e-4)


def test_cells_of_several_pairs_are_translated_each_by_its_own_aligner():
    model = translation_model("components", sources=["human", "mouse", "fish"], projection_rms=None)
    model.set_aligner("fish", "mouse", rotation(6))
    projections, _, _ = tiny_batch(5)
    source, target = torch.tensor([1, 2, 0, 1, 2]), torch.tensor([0, 1, 0, 0, 2])
    with torch.no_grad():
        found = model(projections, source, target).translations
        for cells, name, into in (([0, 3], "mouse", "human"), ([1], "fish", "mouse")):
            alone = model.translate(projections[cells], source=name, target=into)
            assert_close(found[cells], alone, atol=1e-4, rtol=1e-4)
        # A cell that stays what it is has no aligner to go through.
        expected, _ = model.reconstruct(projections[[2, 4]], source[[2, 4]])
        assert_close(found[[2, 4]], expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="no aligner from fish to human; it has mouse to human, fish to mouse"):
            model(projections, source, torch.zeros_like(target))


def test_a_second_aligner_of_a_pair_takes_the_place_of_the_first():
    model = translation_model()
    model.set_aligner("mouse", "human", 2 * rotation())
    assert model.config.aligners == [["mouse", "human"]]
    assert_close(model.aligners[0].weight, 2 * rotation())


def test_aligners_and_names_that_do_not_fit_are_refused():
    model = translation_model()
    projections, _, _ = tiny_batch()
    for names, w, message in (
        (("mouse", "human"), torch.eye(COMPONENTS)[1:], r"Expected W as \(37, 37\), .*; found \(36, 37\)"),
        (("mouse", "human"), torch.full((COMPONENTS, COMPONENTS), torch.nan), "not finite"),
        (("mouse", "mouse"), torch.eye(COMPONENTS), "two different sources"),
        (("rat", "human"), torch.eye(COMPONENTS), "knows the sources human, mouse; found 'rat'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_aligner(*names, w)
    for names, message in (
        (("rat", "human"), "knows the sources human, mouse; found 'rat'"),
        (("mouse", "rat"), "knows the sources human, mouse; found 'rat'"),
        (("human", "mouse"), "no aligner from human to mouse; it has mouse to human"),
        (("human", "human"), "two different sources"),
    ):
        with pytest.raises(ValueError, match=message):
            model.translate(projections, source=names[0], target=names[1])
    assert_close(model.aligners[0].weight, rotation())


def load(cls: Any, path, **options) -> Any:
    return cls.from_pretrained(path, **options)


@AXES
def test_aligners_are_saved_and_models_with_a_decoder_load_each_other_s_weights(token_axis, tmp_path):
    projections, source, _ = tiny_batch()
    reconstructor = tiny_model(token_axis)
    reconstructor.save_pretrained(tmp_path / "reconstruction")
    translator = CrossSpeciesForTranslation.from_pretrained(tmp_path / "reconstruction")
    assert translator.config.aligners == []
    translator.set_aligner("mouse", "human", rotation())
    translator.save_pretrained(tmp_path / "translation")

    again, info = load(CrossSpeciesForTranslation, tmp_path / "translation", output_loading_info=True)
    assert not any(info.values())
    expected = translator.translate(projections, source="mouse", target="human")
    assert torch.equal(again.translate(projections, source="mouse", target="human"), expected)
    for cls in (CrossSpeciesForMaskedReconstruction, CrossSpeciesModel):
        model, info = load(cls, tmp_path / "translation", output_loading_info=True)
        assert not info["missing_keys"]
        with torch.no_grad():
            assert torch.equal(model(projections, source).embeddings, reconstructor(projections, source).embeddings)


def test_aligners_asked_for_when_loading_begin_as_the_identity(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = load(CrossSpeciesForTranslation, tmp_path, aligners=[["mouse", "human"]])
    assert torch.equal(model.aligners[0].weight, torch.eye(COMPONENTS))


@pytest.mark.gpu
@AXES
def test_a_gpu_gives_the_same(token_axis):
    model = translation_model(token_axis)
    projections, source, _ = tiny_batch()
    target = torch.zeros_like(source)
    with torch.no_grad():
        expected = model(projections, source, target).translations
        found = model.cuda()(projections.cuda(), source.cuda(), target.cuda()).translations
        # float32 sums in another order, of values of the order of 10
        assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
        with torch.autocast("cuda", torch.bfloat16):
            half = model(projections.cuda(), source.cuda(), target.cuda()).translations
    assert half.dtype == torch.float32
    assert_close(half.cpu(), expected, atol=0.2 * float(expected.std()), rtol=0.1)
