"""Figures show the genes and numbers of the tables they are given."""

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex

from cellglot.perturbation.figures import DOWN, UP, gene_label, plot_shift_ranking, plot_volcano
from cellglot.perturbation.statistics import impact_mixture, mean_effects, shifts_to_states, versus_null

from .test_statistics import GENES, effects_of


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def side_of_points(ax):
    return np.asarray(ax.collections[0].get_offsets())[:, 0]


def ticks(ax):
    return [text.get_text() for text in ax.get_yticklabels()]


def test_ranking_shows_both_ends_and_counts_the_rest():
    table = shifts_to_states(effects_of(GENES))
    ax = plot_shift_ranking(table, n_genes=2, labels={"up": "GATA4"})
    by_shift = table[table["n_cells"] >= 3].sort_values("shift", ascending=False)
    expected = by_shift.iloc[[0, 1, -2, -1]]
    assert ticks(ax) == [
        f"{'GATA4' if gene == 'up' else gene}  ({n})"
        for gene, n in zip(expected["gene"], expected["n_cells"], strict=True)
    ]
    np.testing.assert_allclose(ax.collections[-1].get_offsets()[:, 0], expected["shift"])
    assert [text.get_text() for text in ax.texts] == ["7 genes between"]
    assert "rare" not in str(ticks(plot_shift_ranking(table)))
    assert "rare  (1)" in ticks(plot_shift_ranking(table, min_cells=1))


def test_ranking_of_impact_and_of_means_is_by_how_far_the_similarity_fell():
    effects = effects_of({f"g{i}": (5, 0.9 - i / 50) for i in range(8)}, column="cosine_similarity")
    for table, name in ((impact_mixture(effects), "cosine_similarity"), (mean_effects(effects), "mean")):
        ax = plot_shift_ranking(table, n_genes=3)
        assert ticks(ax) == ["g7  (5)", "g6  (5)", "g5  (5)"]
        lowest = table.set_index("gene").loc[["g7", "g6", "g5"], name]
        np.testing.assert_allclose(ax.collections[-1].get_offsets()[:, 0], 1 - lowest)
        assert "95% interval" in ax.get_xlabel()
    # Both tables know the same standard error.
    widths = [
        plot_shift_ranking(t, n_genes=3).collections[0].get_segments()
        for t in (impact_mixture(effects), mean_effects(effects))
    ]
    np.testing.assert_allclose(widths[0], widths[1], rtol=1e-6)


def test_volcano_names_the_significant_genes_on_their_side():
    table = shifts_to_states(effects_of(GENES))
    ax = plot_volcano(table, labels={"down": "TBX5"})
    side = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert side.keys() == {"up", "TBX5"}
    assert side["TBX5"] < 0 < side["up"]
    assert "2 of 12 genes significant" in ax.get_title()
    points = ax.collections[0].get_offsets()
    assert sorted(points[:, 0]) == pytest.approx(sorted(table["shift"]))


def test_figures_go_on_given_axes_and_take_p_values_of_zero():
    table = shifts_to_states(effects_of(GENES))
    table.loc[0, "p_value"] = 0.0
    figure, axes = plt.subplots(1, 2)
    assert plot_volcano(table, ax=axes[0]) is axes[0]
    assert plot_shift_ranking(table, "goal", ax=axes[1]) is axes[1]
    assert np.isfinite(axes[0].get_ylim()).all()
    assert len(figure.axes) == 2


def test_volcano_of_a_comparison_with_null_cells():
    effects = effects_of({"a": (30, 0.9), "b": (30, 0.9)}, column="cosine_similarity")
    null = effects_of({"a": (30, 0.9), "b": (30, 0.8)}, seed=1, column="cosine_similarity")
    assert [text.get_text() for text in plot_volcano(versus_null(effects, null)).texts] == ["b"]


@pytest.mark.parametrize(("value", "more", "less"), [("cosine_similarity", 0.8, 1.0), ("shift_to_T_cell", 1.0, 0.8)])
def test_what_acts_more_strongly_than_in_null_cells_lies_right(value, more, less):
    effects = effects_of({"equal": (30, 0.9), "more": (30, more), "less": (30, less), "only": (3, 0.9)}, column=value)
    null = effects_of(dict.fromkeys(("equal", "more", "less"), (30, 0.9)), seed=1, column=value)
    ax = plot_volcano(versus_null(effects, null, value))
    side = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert side.keys() == {"more", "less"}
    assert side["less"] < 0 < side["more"]
    by_colour = {to_hex(c): x for c, x in zip(ax.collections[0].get_facecolors(), side_of_points(ax), strict=True)}
    assert by_colour[UP] > 0 > by_colour[DOWN]
    what = "mean of 1 - cosine similarity" if value == "cosine_similarity" else "mean shift to T_cell"
    assert ax.get_xlabel().startswith(f"{what}, minus that of null cells\nright: acts more strongly")


def test_a_gene_that_no_null_cell_has_is_not_named():
    effects = effects_of({"a": (30, 0.9), "only": (30, 0.9)}, column="cosine_similarity")
    null = effects_of({"a": (30, 0.9)}, seed=1, column="cosine_similarity")
    assert [text.get_text() for text in plot_volcano(versus_null(effects, null)).texts] == ["a"]


def test_tables_that_cannot_be_drawn():
    table = shifts_to_states(effects_of(GENES))
    with pytest.raises(ValueError, match="No statistics of state 'x'; there are 'goal'"):
        plot_volcano(table, "x")
    with pytest.raises(ValueError, match="which have p-values"):
        plot_volcano(table[["gene"]])
    with pytest.raises(ValueError, match="Expected a table of statistics"):
        plot_shift_ranking(table[["gene"]])


def test_labels_of_genes_perturbed_together():
    assert gene_label("a+b", {"a": "GATA4"}) == "GATA4+b"
    assert gene_label("a", None) == "a"
