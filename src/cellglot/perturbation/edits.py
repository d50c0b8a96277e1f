"""Edits of a cell's ranking, as positions: nothing here knows of genes, tokens or models.

Position 0 is the most distinctive gene; special tokens are not counted. An edited cell is an array `source`: for each
of its places the position its gene had in the unedited cell, or -1 - j for the j-th perturbed gene where the cell did
not hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Kind = Literal["delete", "overexpress", "inhibit", "activate"]
KINDS: tuple[str, ...] = get_args(Kind)
# Kinds that move a gene by quartiles, and which way ranks go
DIRECTION = {"activate": -1, "inhibit": 1}


@dataclass(frozen=True)
class Edit:
    """An edited cell and what it is compared with.

    source     (t,) where each place's gene comes from, see above
    compared   (t,) True for genes that were not perturbed: their embeddings are compared before and after
    reference  (r,) ascending positions of the unedited cell it is compared with; None for all of them. Genes that
               insertion pushed out of the context are left out of both, or their loss would be taken for the effect.
    """

    source: np.ndarray
    compared: np.ndarray
    reference: np.ndarray | None = None

    def tokens(self, genes: np.ndarray, perturbed: Sequence[int]) -> np.ndarray:
        """(t,) tokens of the edited cell, from those of the cell and of the perturbed genes."""
        return np.concatenate([genes, np.asarray(perturbed)[::-1]])[self.source]

    def reference_rows(self) -> np.ndarray:
        """(compared genes,) row of each compared gene among the reference's."""
        source = self.source[self.compared]
        return source if self.reference is None else np.searchsorted(self.reference, source)


def edit(kind: Kind, n_genes: int, positions: Sequence[int], *, max_genes: int, rank_shift: int = 1) -> Edit:
    """The edit of a cell in which the genes at `positions` are perturbed together.

    positions   position of each perturbed gene, or -1 where the cell does not hold it (overexpress only)
    max_genes   genes an edited cell may have at the most: the context less special tokens
    rank_shift  quartiles by which inhibit and activate move a gene

    delete       the genes are dropped
    overexpress  they go to the front in the order given; absent ones are inserted, and the tail is cut at max_genes
    activate     each moves `rank_shift` quartiles up, to the middle of that quartile; beyond the first: to the front
    inhibit      each moves down likewise; beyond the last: to the bottom
    """
    present = np.array([p for p in positions if p >= 0], dtype=np.int64)
    others = np.delete(np.arange(n_genes), present)
    if kind == "delete":
        return Edit(others, np.ones(len(others), dtype=bool))
    if kind == "overexpress":
        front = np.array([p if p >= 0 else -1 - j for j, p in enumerate(positions)], dtype=np.int64)
        kept = others[: max(max_genes - len(front), 0)]
        source = np.concatenate([front, kept])
        reference = None if len(kept) == len(others) else np.sort(np.concatenate([present, kept]))
        return Edit(source, np.arange(len(source)) >= len(front), reference)
    slots = shifted_positions(n_genes, present, DIRECTION[kind] * rank_shift)
    source = np.empty(n_genes, dtype=np.int64)
    moved = np.zeros(n_genes, dtype=bool)
    moved[slots] = True
    source[slots], source[~moved] = present, others
    return Edit(source, ~moved)


def edited_length(kind: Kind, n_genes: int, positions: Sequence[int], *, max_genes: int) -> int:
    """Genes of the edited cell, without making it."""
    if kind == "delete":
        return n_genes - len(positions)
    return min(n_genes + sum(p < 0 for p in positions), max_genes) if kind == "overexpress" else n_genes


def leaves_cell_as_it_is(kind: Kind, n_genes: int, positions: Sequence[int], *, rank_shift: int = 1) -> bool:
    """Whether every gene already stands where the edit would put it."""
    if kind == "delete":
        return False
    if kind == "overexpress":
        return list(positions) == list(range(len(positions)))
    present = np.asarray(positions)
    return bool((shifted_positions(n_genes, present, DIRECTION[kind] * rank_shift) == present).all())


def shifted_positions(n_genes: int, positions: np.ndarray, quartiles: int) -> np.ndarray:
    """Where genes at `positions` stand after a shift by quartiles of the ranking; negative is up.

    A gene of quartile q (of 0 to 3) goes to the middle of quartile q + quartiles, or to the front or bottom of the cell
    where there is no such quartile. Genes that meet keep their order, side by side.
    Source  the original's documentation of `perturb_rank_shift`, which it never implemented
    """
    target_quartile = positions * 4 // n_genes + quartiles
    middle = (2 * target_quartile + 1) * n_genes // 8
    target = np.where(target_quartile < 0, 0, np.where(target_quartile > 3, n_genes - 1, middle))
    order = np.lexsort([positions, target])
    slots, k = target[order], len(positions)
    # Each at least one below the one before it, and with room for those that follow.
    for i in range(1, k):
        slots[i] = max(slots[i], slots[i - 1] + 1)
    slots = np.minimum(slots, n_genes - k + np.arange(k))
    out = np.empty_like(slots)
    out[order] = slots
    return out
