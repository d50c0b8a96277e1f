"""What a run will do, decided before anything is computed: which cells, which edits, in which parts."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from ..cell_stream import check_model, default_max_tokens
from ..embedding import layers_to_run
from ..tokenization.gene_ids import examples
from .cells import Cells, check_cells, open_cells
from .effects import Measure, Pooling
from .run import FORMAT, Effect, Method, Part, Run
from .states import CellStates, embed_states
from .targets import JOINER, Perturbation, PerturbationReport, gene_names, parse_perturbation

logger = logging.getLogger(__name__)

# Tokens of edited cells in a part, about: what a killed run loses at the most, unless one cell has more
PART_TOKENS = 2_000_000

_NOT_BY_GRADIENT = (
    "method='gradient' estimates effects on cells of deletions of several genes, one at a time, found {}. "
    "Use method='exact'."
)


def plan_run(
    source: Any,
    model: Any,
    tokenizer: Any,
    *,
    kind: str = "delete",
    method: Method = "exact",
    genes: Any = "all",
    anchor: str | None = None,
    rank_shift: int | None = None,
    layer: int = -1,
    effect: Effect = "cell",
    pooling: Pooling | None = None,
    states: CellStates | None = None,
    max_cells: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    part_tokens: int = PART_TOKENS,
    counts_layer: str | None = None,
    **encode_options: Any,
) -> Run:
    """Checks everything there is to check, and computes nothing. Arguments as of `perturb_cells`."""
    encoder = check_model(model, tokenizer)
    n_layers = layers_to_run(encoder, layer)
    pooling = ("cls" if tokenizer.layout == "v2" else "mean") if pooling is None else pooling
    _check_measure(tokenizer, effect, pooling)
    max_length = min(int(encoder.config.max_position_embeddings), int(tokenizer.model_max_length))
    for name, value in (("max_cells", max_cells), ("max_tokens", max_tokens), ("part_tokens", part_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} of at least 1, found {value}.")
    max_tokens = default_max_tokens(next(encoder.parameters()).device) if max_tokens is None else max_tokens
    n_special = 2 if tokenizer.layout == "v2" else 0
    perturbation = parse_perturbation(kind, genes, anchor, rank_shift, tokenizer, max_length - n_special)
    _check_method(method, perturbation, effect)
    cells = open_cells(
        source,
        tokenizer,
        label_column=None if states is None else states.column,
        # A caller's own max_length may be shorter than what the model reads.
        max_length=min(max_length, encode_options.pop("max_length", None) or max_length),
        counts_layer=counts_layer,
        **encode_options,
    )
    report = PerturbationReport(n_cells=len(cells))
    data_hash = check_cells(cells, tokenizer, perturbation.max_genes)
    chosen = _eligible(cells, perturbation, states, report)
    if max_cells is not None and max_cells < len(chosen):
        report.n_cells_not_sampled = len(chosen) - max_cells
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, max_cells, replace=False))
    absent = _absent_groups(cells, chosen, perturbation)
    if method == "gradient" and perturbation.groups is not None and len(perturbation.groups) - len(absent) == 1:
        raise ValueError(_NOT_BY_GRADIENT.format("one gene that the cells hold"))
    if absent:
        logger.warning(
            f"{len(absent):,} of the {len(perturbation.groups or ()):,} genes or groups are in none of the "
            f"{len(chosen):,} cells to perturb: "
            f"{examples([JOINER.join(gene_names(group, tokenizer)) for group in absent])}."
        )
    parts = _parts(cells, chosen, perturbation, part_tokens, report)
    if not parts:
        raise ValueError(f"Nothing to perturb: {report}.")
    logger.info("%s", report)
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    run = Run(
        cells=cells,
        vocabulary=pa.array(vocabulary, pa.string()),
        perturbation=perturbation,
        measure=Measure(encoder, n_layers, pooling, None, effect == "gene", max_tokens),
        parts=parts,
        report=report,
        record={
            "format": FORMAT,
            "vocabulary": _hash(vocabulary),
            "cells": data_hash if cells.labels is None else _hash([data_hash, *map(str, cells.labels)]),
            "cell_names": None if cells.names is None else _hash(cells.names),
            "kind": kind,
            "method": method,
            "genes": "all" if perturbation.groups is None else [list(group) for group in perturbation.groups],
            "anchor": perturbation.anchor,
            "rank_shift": perturbation.rank_shift,
            "layer": layer,
            "effect": effect,
            "pooling": pooling,
            "state_column": None if states is None else states.column,
            "states": None if states is None else states.names,
            "start": None if states is None else states.start,
            "state_summary": None if states is None else states.summary,
            "state_embeddings": None,
            "max_cells": max_cells,
            "seed": seed,
            "max_length": max_length,
            "part_tokens": part_tokens,
        },
    )
    if states is None:
        return run
    if states.embeddings is not None:
        return run.with_states(states.names, states.given_embeddings(encoder.config.hidden_size))
    options = {"layer": layer, "pooling": pooling, "summary": states.summary, "max_tokens": max_tokens}
    return dataclasses.replace(
        run, embed_states=functools.partial(embed_states, cells, states.names, model, tokenizer, **options)
    )


def _check_measure(tokenizer: Any, effect: str, pooling: str) -> None:
    if effect not in ("cell", "gene"):
        raise ValueError(f"Expected effect 'cell' or 'gene', found {effect!r}.")
    if pooling not in ("mean", "cls"):
        raise ValueError(f"Expected pooling 'mean' or 'cls', found {pooling!r}.")
    if pooling == "cls" and tokenizer.cls_token_id is None:
        raise ValueError("This tokenizer's layout has no <cls>; use pooling='mean'.")


def _check_method(method: str, perturbation: Perturbation, effect: str) -> None:
    if method not in ("exact", "gradient"):
        raise ValueError(f"Expected method 'exact' or 'gradient', found {method!r}.")
    if method == "exact":
        return
    together = perturbation.anchor is not None or any(len(group) > 1 for group in perturbation.groups or ())
    found = {
        f"kind={perturbation.kind!r}": perturbation.kind != "delete",
        f"effect={effect!r}": effect != "cell",
        "genes perturbed together": together,
        # It costs a forward and a backward pass where the exact value costs a forward pass.
        "one gene": perturbation.groups is not None and len(perturbation.groups) == 1,
    }
    if any(found.values()):
        raise ValueError(_NOT_BY_GRADIENT.format(" and ".join(what for what, is_so in found.items() if is_so)))


def _eligible(
    cells: Cells, perturbation: Perturbation, states: CellStates | None, report: PerturbationReport
) -> np.ndarray:
    """Cells of the start state that hold what the kind needs. Raises ValueError if there is none."""
    if states is not None:
        assert cells.labels is not None
        states.check_labels(cells.labels)
    chosen = []
    n_genes = np.zeros(len(cells), dtype=np.int64)
    for i, tokens in enumerate(cells.iter_tokens()):
        genes = cells.unwrapped(tokens)
        n_genes[i] = len(genes)
        if len(genes) == 0:
            report.n_empty_cells += 1
        elif states is not None and cells.labels is not None and cells.labels[i] != states.start:
            report.n_cells_of_other_states += 1
        elif not perturbation.applies_to(genes):
            report.n_cells_without_genes += 1
        else:
            chosen.append(i)
    if states is not None and cells.labels is not None:
        states.check_filled(cells.labels, n_genes)
    n_candidates = len(chosen) + report.n_cells_without_genes
    if not chosen and n_candidates:
        who = "cell" if states is None else f"cell of state {states.start!r}"
        together = perturbation.anchor is not None or any(len(group) > 1 for group in perturbation.groups or ())
        raise ValueError(
            f"No {who} (of {n_candidates:,}) holds the genes to {perturbation.kind}"
            f"{' together' if together else ''}. "
            "Only kind='overexpress' can do without: it inserts them."
        )
    return np.array(chosen, dtype=np.int64)


def _absent_groups(cells: Cells, chosen: np.ndarray, perturbation: Perturbation) -> list[tuple[int, ...]]:
    """The listed genes and groups that none of the chosen cells holds, and that so have no row."""
    groups = perturbation.groups
    if groups is None or perturbation.kind == "overexpress":
        return []
    absent = set(groups)
    for cell in chosen.tolist():
        held = set(cells.genes(cell).tolist())
        absent = {group for group in absent if not held.issuperset(group)}
        if not absent:
            break
    return [group for group in groups if group in absent]


def _parts(
    cells: Cells, chosen: np.ndarray, perturbation: Perturbation, part_tokens: int, report: PerturbationReport
) -> tuple[Part, ...]:
    """Cells in order, in parts of about part_tokens tokens of edited cells."""
    parts: list[Part] = []
    members: list[int] = []
    n_edits = n_tokens = 0
    for cell in chosen.tolist():
        planned = perturbation.planned(cells.genes(cell), report)
        if not planned:
            continue
        members.append(cell)
        n_edits += len(planned)
        n_tokens += sum(p.length for p in planned)
        report.n_perturbed_cells += 1
        report.n_edits += len(planned)
        if n_tokens >= part_tokens:
            parts.append(Part(tuple(members), n_edits))
            members, n_edits, n_tokens = [], 0, 0
    if members:
        parts.append(Part(tuple(members), n_edits))
    return tuple(parts)


def _hash(names: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        text = name.encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.hexdigest()
