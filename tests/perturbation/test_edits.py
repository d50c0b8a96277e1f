"""Edits against the same edits written with plain lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellglot.perturbation.edits import KINDS, edit, edited_length, leaves_cell_as_it_is, shifted_positions


def plain_edit(kind, cell, perturbed, max_genes, rank_shift=1):
    """The edited cell, as a list of genes."""
    cell = list(cell)
    if kind == "delete":
        return [gene for gene in cell if gene not in perturbed]
    if kind == "overexpress":
        return (list(perturbed) + [gene for gene in cell if gene not in perturbed])[:max_genes]
    assert len(perturbed) == 1
    (gene,) = perturbed
    n, rank = len(cell), cell.index(gene)
    quartile = sum(rank >= q * n / 4 for q in (1, 2, 3)) + (-rank_shift if kind == "activate" else rank_shift)
    target = 0 if quartile < 0 else n - 1 if quartile > 3 else int((quartile + 0.5) * n / 4)
    cell.remove(gene)
    cell.insert(target, gene)
    return cell


@st.composite
def cells_and_genes(draw, kind):
    n = draw(st.integers(1, 23))
    cell = draw(st.permutations(range(100, 100 + n)))
    pool = list(cell) + ([*range(7)] if kind == "overexpress" else [])
    most = 1 if kind in ("activate", "inhibit") else min(4, len(pool))
    perturbed = draw(st.lists(st.sampled_from(pool), unique=True, min_size=1, max_size=most))
    return list(cell), perturbed, n + draw(st.integers(0, 5))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_edited_cells_equal_those_made_with_lists(kind, data):
    cell, perturbed, max_genes = data.draw(cells_and_genes(kind))
    rank_shift = data.draw(st.integers(1, 3))
    positions = [cell.index(gene) if gene in cell else -1 for gene in perturbed]
    expected = plain_edit(kind, cell, perturbed, max_genes, rank_shift)
    made = edit(kind, len(cell), positions, max_genes=max_genes, rank_shift=rank_shift)
    found = made.tokens(np.array(cell), perturbed)
    if len(perturbed) <= max_genes:
        assert found.tolist() == expected
        assert edited_length(kind, len(cell), positions, max_genes=max_genes) == len(expected)
        assert leaves_cell_as_it_is(kind, len(cell), positions, rank_shift=rank_shift) == (expected == cell)
    # What is compared are the genes that were not perturbed, paired with themselves.
    reference = np.array(cell) if made.reference is None else np.array(cell)[made.reference]
    assert found[made.compared].tolist() == [gene for gene in found.tolist() if gene not in perturbed]
    assert reference[made.reference_rows()].tolist() == found[made.compared].tolist()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_insertion_pushes_out_is_left_out_of_the_reference_too(data):
    cell, perturbed, _ = data.draw(cells_and_genes("overexpress"))
    max_genes = max(len(cell), len(perturbed))
    positions = [cell.index(gene) if gene in cell else -1 for gene in perturbed]
    made = edit("overexpress", len(cell), positions, max_genes=max_genes)
    found = set(made.tokens(np.array(cell), perturbed).tolist())
    reference = cell if made.reference is None else [cell[p] for p in made.reference]
    assert reference == [gene for gene in cell if gene in found]


def test_a_cell_of_eight_genes_by_hand():
    cell = np.arange(10, 18)

    def moved(kind, position, rank_shift):
        made = edit(kind, 8, [position], max_genes=8, rank_shift=rank_shift)
        return made.tokens(cell, [10 + position]).tolist()

    # Quartiles 10 11 | 12 13 | 14 15 | 16 17, their middles at positions 1, 3, 5 and 7
    assert moved("activate", 6, 1) == [10, 11, 12, 13, 14, 16, 15, 17]
    assert moved("activate", 4, 2) == [10, 14, 11, 12, 13, 15, 16, 17]
    assert moved("activate", 1, 1) == [11, 10, 12, 13, 14, 15, 16, 17]
    assert moved("inhibit", 0, 1) == [11, 12, 13, 10, 14, 15, 16, 17]
    assert moved("inhibit", 0, 3) == [11, 12, 13, 14, 15, 16, 17, 10]
    assert moved("inhibit", 6, 1) == [10, 11, 12, 13, 14, 15, 17, 16]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_genes_that_move_together_keep_their_order_and_stay_in_the_cell(data):
    n = data.draw(st.integers(1, 23))
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1, max_size=n)))
    slots = shifted_positions(n, positions, data.draw(st.sampled_from([-3, -2, -1, 1, 2, 3])))
    assert len(set(slots.tolist())) == len(slots)
    assert slots.min() >= 0
    assert slots.max() < n
    assert np.argsort(slots).tolist() == np.argsort(positions).tolist()
