"""Which genes are perturbed in which cell."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..tokenization.gene_ids import examples
from .edits import DIRECTION, KINDS, Kind, edited_length, leaves_cell_as_it_is

# What names an effect on the cell itself in the column `affected`
CELL = "cell"
# Joins the names of genes that are perturbed together
JOINER = "+"


@dataclass
class PerturbationReport:
    """What was perturbed and what was left out, and why."""

    n_cells: int = 0
    n_perturbed_cells: int = 0
    n_edits: int = 0
    n_empty_cells: int = 0
    n_cells_of_other_states: int = 0
    # Cells that hold none of the genes, where the kind needs them
    n_cells_without_genes: int = 0
    n_cells_not_sampled: int = 0
    # Edits after which no unperturbed gene is left to compare, e.g. the only gene of a cell deleted
    n_edits_with_nothing_left: int = 0
    # Of "all" genes: those that stand already where the edit would put them
    n_edits_without_change: int = 0

    def __str__(self) -> str:
        text = f"{self.n_edits:,} edits in {self.n_perturbed_cells:,} of {self.n_cells:,} cells"
        left_out = {
            "cells are empty": self.n_empty_cells,
            "are of other states": self.n_cells_of_other_states,
            "hold none of the genes": self.n_cells_without_genes,
            "were not sampled (max_cells)": self.n_cells_not_sampled,
            "edits skipped as they leave no other gene": self.n_edits_with_nothing_left,
            "as they change nothing": self.n_edits_without_change,
        }
        return "; ".join([text, *(f"{n:,} {what}" for what, n in left_out.items() if n)])


class PlannedEdit(NamedTuple):
    """Genes to perturb together in one cell."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    length: int  # genes of the edited cell

    def position(self, anchor: int | None) -> int:
        """Where the gene stands: the first of a group, the partner of the anchor; -1 if the cell does not hold it."""
        return self.positions[0 if anchor is None else 1]


@dataclass(frozen=True)
class Perturbation:
    """What is done to every cell.

    groups      tokens of genes that are perturbed together, one group at a time; None for every gene of a cell
    anchor      token of a gene that is perturbed together with each group
    rank_shift  quartiles, for inhibit and activate
    max_genes   genes a cell may have
    """

    kind: Kind
    groups: tuple[tuple[int, ...], ...] | None
    anchor: int | None
    rank_shift: int
    max_genes: int

    def planned(self, genes: np.ndarray, report: PerturbationReport) -> list[PlannedEdit]:
        """The edits of a cell with these genes (tokens, most distinctive first), in order; adds to the report."""
        position = {int(token): i for i, token in enumerate(genes)}
        edits = []
        for tokens in self._groups_of(position):
            positions = tuple(position.get(token, -1) for token in tokens)
            n_others = len(genes) - sum(p >= 0 for p in positions)
            if self.kind == "overexpress":
                n_others = min(n_others, self.max_genes - len(positions))
            if n_others < 1:
                report.n_edits_with_nothing_left += 1
            elif self.groups is None and leaves_cell_as_it_is(
                self.kind, len(genes), positions, rank_shift=self.rank_shift
            ):
                report.n_edits_without_change += 1
            else:
                length = edited_length(self.kind, len(genes), positions, max_genes=self.max_genes)
                edits.append(PlannedEdit(tokens, positions, length))
        return edits

    def applies_to(self, genes: np.ndarray) -> bool:
        """Whether the cell holds the genes of some group, or need not."""
        if self.kind == "overexpress" or (self.groups is None and self.anchor is None):
            return True
        return next(self._groups_of({int(token): 0 for token in genes}), None) is not None

    def _groups_of(self, position: dict[int, int]) -> Iterator[tuple[int, ...]]:
        groups = self.groups
        if groups is None:
            groups = tuple((token,) for token in position if token != self.anchor)
        for group in groups:
            tokens = group if self.anchor is None else (self.anchor, *group)
            if self.kind == "overexpress" or all(token in position for token in tokens):
                yield tokens


def parse_perturbation(
    kind: Any, genes: Any, anchor: str | None, rank_shift: int | None, tokenizer: Any, max_genes: int
) -> Perturbation:
    """Checks what a user asked for and turns names of genes into tokens.

    genes   "all", a name, or a list of names (one at a time) and of lists of names (each together)
    Raises  ValueError that says what is wrong
    """
    if kind not in KINDS:
        raise ValueError(f"Expected kind {', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}, found {kind!r}.")
    if kind in DIRECTION:
        rank_shift = 1 if rank_shift is None else rank_shift
        if rank_shift not in (1, 2, 3):
            raise ValueError(f"Expected rank_shift 1, 2 or 3 quartiles, found {rank_shift!r}.")
    elif rank_shift is not None:
        raise ValueError(f"rank_shift moves genes of kind 'inhibit' and 'activate'; it means nothing for {kind!r}.")
    groups = None
    anchor_token = None if anchor is None else _tokens([anchor], tokenizer)[0]
    if not isinstance(genes, str) or genes != "all":
        listed = [genes] if isinstance(genes, str) else list(genes)
        groups = tuple(_tokens([g] if isinstance(g, str) else list(g), tokenizer) for g in listed)
        if not groups or not all(groups):
            raise ValueError("Expected genes='all' or names of genes, found none.")
        _check_distinct(groups, anchor_token, tokenizer)
    return Perturbation(kind, groups, anchor_token, rank_shift or 0, max_genes)


def _tokens(names: Sequence[Any], tokenizer: Any) -> tuple[int, ...]:
    match = tokenizer.resolver.match(names)
    unknown = match.gene_ids[match.index_g < 0]
    if len(unknown):
        raise ValueError(
            f"{len(unknown):,} of the genes to perturb are not in the vocabulary: {examples(unknown)}. It holds e.g. "
            f"{examples(tokenizer.resolver.vocabulary)} and {len(tokenizer.gene_aliases):,} other names for its genes."
        )
    return tuple(int(token) for token in tokenizer.gene_token_ids[match.index_g])


def _check_distinct(groups: tuple[tuple[int, ...], ...], anchor: int | None, tokenizer: Any) -> None:
    seen = set()
    for group in groups:
        if len(set(group)) < len(group) or anchor in group:
            what = "the anchor" if anchor in group else "another of its group"
            raise ValueError(f"Of the genes {examples(gene_names(group, tokenizer))} one is also {what}.")
        if group in seen:
            raise ValueError(
                f"Gene {examples(gene_names(group, tokenizer))} is listed twice (other names are resolved)."
            )
        seen.add(group)


def gene_names(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The vocabulary's names of genes."""
    return [str(name) for name in tokenizer.convert_ids_to_tokens([int(token) for token in tokens])]
