"""First-order estimates of deletions: right derivatives, useful ranks, and nobody takes them for exact values."""

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import cosine_similarity

from cellglot.perturb import CellStates, read_perturbations, write_perturbations
from cellglot.perturbation import gradient
from cellglot.perturbation.statistics import mean_effects

from ..conftest import synthetic_cells
from .test_perturb import N_GENES, STATES, names, run, setup

LAYOUTS = pytest.mark.parametrize(("layout", "pooling"), [("v1", "mean"), ("v2", "mean"), ("v2", "cls")])
RNG = np.random.default_rng(3)
STATE_EMBEDDINGS = {name: RNG.normal(size=32).astype(np.float32) for name in ("a", "b")}


def with_states(cells, **options):
    dataset = datasets.Dataset.from_dict({"input_ids": cells, "state": ["a"] * len(cells)})
    return dataset, {"states": CellStates("state", "a", "b", embeddings=STATE_EMBEDDINGS), **options}


class PartialDeletion:
    """Hidden states of a cell from which one token is taken by a share, all genes being up half a rank: in float64,
    with the share in a mask of ordinary attention."""

    def __init__(self, model, tokens, special):
        self.encoder, self.special = model.bert.double(), special
        self.encoder.set_attn_implementation("eager")
        self.tokens = torch.tensor(tokens)
        positions = self.encoder.embeddings.position_embeddings.weight[: len(tokens)]
        self.step = torch.zeros_like(positions)
        first = 2 if special else 1
        self.step[first:] = positions[first - 1 : -1] - positions[first:]

    def __call__(self, token, share):
        """(t, d) hidden states and (t,) weights in the mean over genes."""
        keep = torch.ones(len(self.tokens), dtype=torch.float64)
        keep[token] -= share
        moved = 0.5 + share * (torch.arange(len(keep)) > token).double()
        embeds = self.encoder.embeddings.word_embeddings(self.tokens) + self.step * moved[:, None]
        mask = keep.log().expand(1, 1, len(keep), len(keep))
        x = self.encoder(inputs_embeds=embeds[None], attention_mask=mask, num_layers=2).last_hidden_state[0]
        weight = keep.clone()
        if self.special:
            weight[0] = weight[-1] = 0
        return x, weight


@LAYOUTS
@torch.no_grad()
def test_shifts_are_derivatives_along_a_partial_deletion(layout, pooling):
    cells, model, tokenizer = setup(layout, n_cells=3)
    dataset, options = with_states(cells, pooling=pooling, method="gradient")
    frame = run(dataset, model, tokenizer, **options)
    states = torch.tensor(np.stack([*STATE_EMBEDDINGS.values()])).double()
    special = layout == "v2"
    for i, cell in enumerate(cells):
        partial = PartialDeletion(model, cell, special)
        of_cell = frame[frame["cell"] == i]
        genes = cell[1:-1] if special else cell
        assert of_cell["gene"].tolist() == names(tokenizer, *genes)
        for position, found in enumerate(of_cell[["shift_to_a", "shift_to_b"]].to_numpy()):
            to_states = []
            for share in (-1e-5, 1e-5):
                x, weight = partial(position + special, share)
                pooled = x[0] if pooling == "cls" else weight @ x / weight.sum()
                to_states.append(cosine_similarity(pooled[None], states))
            derivative = (to_states[1] - to_states[0]) / 2e-5
            # Gradients are sums in float32.
            np.testing.assert_allclose(found, derivative, rtol=1e-4, atol=1e-6)


@LAYOUTS
@torch.no_grad()
def test_cosines_are_of_the_mean_square_turn(monkeypatch, layout, pooling):
    monkeypatch.setattr(gradient, "DIRECTIONS", 3000)
    cells, model, tokenizer = setup(layout, n_cells=1)
    found = run(cells, model, tokenizer, pooling=pooling, method="gradient")["cosine_similarity"]
    special = layout == "v2"
    partial = PartialDeletion(model, cells[0], special)
    compared = slice(0, 1) if pooling == "cls" else slice(1, -1) if special else slice(None)
    x = partial(0, 0.0)[0][compared]
    for position in range(len(found)):
        before, after = (partial(position + special, share)[0][compared] for share in (-1e-5, 1e-5))
        change = (after - before) / 2e-5
        across = change - (change * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True) * x
        square = (across.norm(dim=1) / x.norm(dim=1)).square().mean()
        # Random directions: sqrt(2 / 3000) = 2.6% of the square
        assert 1 / found[position] ** 2 - 1 == pytest.approx(square.item(), rel=0.13)


@LAYOUTS
def test_estimates_rank_genes_as_exact_values_do(layout, pooling):
    cells, model, tokenizer = setup(layout, n_cells=7, shortest=13)
    # Of the size that they have in trained models: a rank more or less changes a cell by a little.
    model.bert.embeddings.position_embeddings.weight.data *= 0.3
    dataset, options = with_states(cells, pooling=pooling)
    correlations = {}
    for source, given, value in ((dataset, options, "shift_to_b"), (cells, {"pooling": pooling}, "cosine_similarity")):
        exact = run(source, model, tokenizer, **given)
        estimate = run(source, model, tokenizer, method="gradient", **given)
        pd.testing.assert_frame_equal(estimate[["cell", "gene", "position"]], exact[["cell", "gene", "position"]])
        of_cell = exact.groupby("cell").indices.values()
        of_cell = [spearmanr(exact[value].iloc[rows], estimate[value].iloc[rows]).statistic for rows in of_cell]
        correlations[value] = np.mean(of_cell)
    assert correlations["shift_to_b"] > 0.8
    assert correlations["cosine_similarity"] > 0.6


@LAYOUTS
def test_a_cell_does_not_depend_on_those_beside_it(layout, pooling):
    cells, model, tokenizer = setup(layout, n_cells=7)
    options = {"pooling": pooling, "method": "gradient"}
    together = run(cells, model, tokenizer, **options)
    one_by_one = run(cells, model, tokenizer, max_tokens=1, **options)
    # float32 sums in another order
    pd.testing.assert_frame_equal(together, one_by_one, atol=1e-5)


def test_a_list_of_genes_has_the_values_it_has_among_all():
    cells, model, tokenizer = setup(n_cells=5)
    every = run(cells, model, tokenizer, method="gradient")
    chosen = names(tokenizer, cells[0][3], cells[2][1])
    some = run(cells, model, tokenizer, method="gradient", genes=chosen)
    expected = every[every["gene"].isin(chosen)]
    assert len(some) == len(expected)
    merged = some.merge(expected, on=["cell", "gene", "position"])
    np.testing.assert_allclose(merged["cosine_similarity_x"], merged["cosine_similarity_y"], atol=1e-6)
    assert len(merged) == len(some)


def test_model_is_left_as_it_was():
    cells, model, tokenizer = setup()
    expected = run(cells, model, tokenizer)
    model.set_attn_implementation("eager")
    run(cells, model, tokenizer, method="gradient")
    assert model.config._attn_implementation == "eager"
    assert all(weight.grad is None for weight in model.parameters())
    np.testing.assert_allclose(
        run(cells, model, tokenizer)["cosine_similarity"], expected["cosine_similarity"], atol=1e-5
    )


def test_estimates_say_what_they_are(tmp_path):
    cells, model, tokenizer = setup()
    exact = run(cells, model, tokenizer)
    estimate = run(cells, model, tokenizer, method="gradient")
    assert (exact.attrs["method"], estimate.attrs["method"]) == ("exact", "gradient")
    assert not np.allclose(exact["cosine_similarity"], estimate["cosine_similarity"], atol=1e-4)
    dataset, options = with_states(cells, method="gradient")
    frame = run(dataset, model, tokenizer, **options)
    assert frame["cosine_similarity"].isna().all()
    means = mean_effects(frame)
    assert means["mean"].isna().all()
    assert (means["n_cells"] == frame.groupby("gene").size()[means["gene"]].to_numpy()).all()
    assert means["shift_to_b"].is_monotonic_increasing
    write_perturbations(cells, model, tokenizer, tmp_path, method="gradient", progress=False)
    kept = read_perturbations(tmp_path)
    pd.testing.assert_frame_equal(kept, estimate)
    assert kept.attrs == estimate.attrs
    with pytest.raises(FileExistsError, match='method: "gradient" there, "exact" now'):
        write_perturbations(cells, model, tokenizer, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "taylor"}, "Expected method 'exact' or 'gradient', found 'taylor'"),
        (
            {"kind": "overexpress"},
            "deletions of several genes, one at a time, found kind='overexpress'. Use method='exact'",
        ),
        ({"effect": "gene"}, "found effect='gene'"),
        ({"genes": ["ENSG00000000003", ["ENSG00000000001", "ENSG00000000002"]]}, "found genes perturbed together"),
        ({"genes": "ENSG00000000001"}, "found one gene"),
        ({"anchor": "ENSG00000000001", "kind": "inhibit"}, "found kind='inhibit' and genes perturbed together"),
    ],
)
def test_what_cannot_be_estimated(options, message):
    _, model, tokenizer = setup()
    with pytest.raises(ValueError, match=message):
        run(synthetic_cells(11, N_GENES), model, tokenizer, **{"method": "gradient", "states": STATES, **options})


def test_one_listed_gene_that_the_cells_hold():
    cells, model, tokenizer = setup(n_cells=1)
    absent = np.setdiff1d(tokenizer.gene_token_ids, cells[0])[0]
    genes = names(tokenizer, cells[0][2], absent)
    with pytest.raises(ValueError, match="found one gene that the cells hold"):
        run(cells, model, tokenizer, method="gradient", genes=genes)


def test_callers_own_inference_mode():
    cells, model, tokenizer = setup(n_cells=2)
    expected = run(cells, model, tokenizer, method="gradient")
    with torch.inference_mode():
        found = run(cells, model, tokenizer, method="gradient")
    pd.testing.assert_frame_equal(found, expected)


def test_without_layers_genes_do_not_see_each_other():
    cells, model, tokenizer = setup()
    # Nor do they see their ranks.
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
    frame = run(cells, model, tokenizer, method="gradient", layer=-model.config.num_hidden_layers)
    np.testing.assert_allclose(frame["cosine_similarity"], 1, atol=1e-6)


def test_weights_that_are_not_finite():
    cells, model, tokenizer = setup()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite: its weights hold NaN"):
        run(cells, model, tokenizer, method="gradient")
