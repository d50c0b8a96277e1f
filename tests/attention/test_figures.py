"""Figures draw what the tables say, into the ax that is given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from cellglot.attention import compare_gene_sets, rank_diversity
from cellglot.attention.figures import (
    plot_attention_by_rank,
    plot_head_effects,
    plot_rank_diversity,
    plot_sets_by_layer,
)

from ..conftest import ensembl
from .test_comparison import N_GENES, SET, ranks_table, table_of


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def comparison():
    more, less = np.r_[np.arange(20) + 100.0, np.arange(40)], np.r_[np.zeros(20), np.ones(40)]
    table = table_of([more, np.ones(N_GENES), less, np.ones(N_GENES), more, more], layers=3)
    return table, compare_gene_sets(table, SET)


@pytest.mark.parametrize("matched", [False, True])
def test_head_effects(matched):
    _, result = comparison()
    given = plt.subplots()[1]
    ax = plot_head_effects(result, given, matched=matched, title="factors")
    assert ax is given
    np.testing.assert_allclose(ax.images[0].get_array(), [[1, 0.5], [0, 0.5], [1, 1]])
    # Dots where it is significant, (head, layer)
    assert ax.collections[0].get_offsets().tolist() == [[0, 0], [0, 1], [0, 2], [1, 2]]
    assert "3 of 6 heads more (50%), 1 less" in ax.get_title()
    assert ax.get_title().startswith("factors")
    assert plot_head_effects(result) is not given


def test_attention_by_rank():
    table = ranks_table([[[2.0, 0.5, 0.5], [1, 1, 1]], [[0.0, 1, 2], [4, 1, 1]]])
    ax = plot_attention_by_rank(table)
    values = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(values[:2], [[1, -1, -1], [0, 0, 0]])
    assert values.shape == (4, 3)
    assert np.isfinite(values).all()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]
    assert len(ax.lines) == 1  # between the two layers


def test_rank_diversity_lines():
    diversity = rank_diversity(ranks_table([[[2.0, 0.5, 0.5], [1, 1, 1]], [[0.0, 1, 2], [4, 1, 1]]]))
    ax = plot_rank_diversity(diversity)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), diversity["breadth"])
    right = next(other for other in ax.figure.axes if other is not ax)
    np.testing.assert_allclose(right.lines[0].get_ydata(), diversity["divergence"])


def test_sets_by_layer():
    table, _ = comparison()
    ax = plot_sets_by_layer(table, {"factors": SET, "others": ensembl(40, start=21)})
    medians = [line.get_ydata()[0] for line in ax.lines if line.get_color() == "black" and len(line.get_ydata()) == 2]
    # Layer 0 is the mean of `more` (medians 109.5 and 19.5) and ones.
    assert (109.5 + 1) / 2 in medians
    assert (19.5 + 1) / 2 in medians
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["factors (20 genes)", "others (40 genes)"]
