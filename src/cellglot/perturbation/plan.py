"""What a run will do, decided before anything is computed: which cells, which edits, in which parts."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..cell_stream import check_model
from ..embedding import layers_to_run
from .cells import Cells, check_cells, open_cells
from .effects import Measure, Pooling, default_max_tokens
from .run import FORMAT, Effect, Part, Run
from .states import CellStates, embed_states
from .targets import Perturbation, PerturbationReport, parse_perturbation

logger = logging.getLogger(__name__)

# Tokens of edited cells in a part, about: what a killed run loses at the most, unless one cell has more
PART_TOKENS = 2_000_000


def plan_run(
    source: Any,
    model: Any,
    tokenizer: Any,
    *,
    kind: str = "delete",
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
    """Checks everything there is to check and computes nothing but the states. Arguments as of `perturb_cells`."""
    encoder = check_model(model, tokenizer)
    n_layers = layers_to_run(encoder, layer)
    pooling = ("cls" if tokenizer.layout == "v2" else "mean") if pooling is None else pooling
    _check_measure(tokenizer, effect, pooling)
    max_length = min(int(encoder.config.max_position_embeddings), int(tokenizer.model_max_length))
    for name, value in (("max_cells", max_cells), ("max_tokens", max_tokens), ("part_tokens", part_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} of at least 1, found {value}.")
    max_tokens = default_max_tokens(encoder) if max_tokens is None else max_tokens
    n_special = 2 if tokenizer.layout == "v2" else 0
    perturbation = parse_perturbation(kind, genes, anchor, rank_shift, tokenizer, max_length - n_special)
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
    parts = _parts(cells, chosen, perturbation, part_tokens, report)
    if not parts:
        raise ValueError(f"Nothing to perturb: {report}.")
    logger.info("%s", report)
    record = {
        "format": FORMAT,
        "vocabulary": _hash(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))),
        "cells": data_hash if cells.labels is None else _hash([data_hash, *map(str, cells.labels)]),
        "kind": kind,
        "genes": "all" if perturbation.groups is None else [list(group) for group in perturbation.groups],
        "anchor": perturbation.anchor,
        "rank_shift": perturbation.rank_shift,
        "layer": layer,
        "effect": effect,
        "pooling": pooling,
        "states": None if states is None else [states.column, *states.names, states.summary],
        "max_cells": max_cells,
        "seed": seed,
        "max_length": max_length,
        "part_tokens": part_tokens,
    }
    states_sd = None
    if states is not None and states.embeddings is not None:
        states_sd = states.given_embeddings(encoder.config.hidden_size)
        record["state_embeddings"] = hashlib.blake2b(states_sd.tobytes(), digest_size=16).hexdigest()
    elif states is not None:
        states_sd = embed_states(
            cells,
            states.names,
            model,
            tokenizer,
            layer=layer,
            pooling=pooling,
            summary=states.summary,
            max_tokens=max_tokens,
        )
    return Run(
        cells=cells,
        vocabulary=pa.array(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), pa.string()),
        perturbation=perturbation,
        measure=Measure(encoder, n_layers, pooling, states_sd, effect == "gene", max_tokens),
        state_names=() if states is None else tuple(states.names),
        parts=parts,
        report=report,
        record=record,
    )


def _check_measure(tokenizer: Any, effect: str, pooling: str) -> None:
    if effect not in ("cell", "gene"):
        raise ValueError(f"Expected effect 'cell' or 'gene', found {effect!r}.")
    if pooling not in ("mean", "cls"):
        raise ValueError(f"Expected pooling 'mean' or 'cls', found {pooling!r}.")
    if pooling == "cls" and tokenizer.cls_token_id is None:
        raise ValueError("This tokenizer's layout has no <cls>; use pooling='mean'.")


def _eligible(
    cells: Cells, perturbation: Perturbation, states: CellStates | None, report: PerturbationReport
) -> np.ndarray:
    """Cells of the start state that hold what the kind needs. Raises ValueError if there is none."""
    if states is not None:
        assert cells.labels is not None
        states.check_labels(cells.labels)
    chosen = []
    missing = set(perturbation.groups or ())
    for i, tokens in enumerate(cells.iter_tokens()):
        genes = cells.unwrapped(tokens)
        if len(genes) == 0:
            report.n_empty_cells += 1
        elif states is not None and cells.labels is not None and cells.labels[i] != states.start:
            report.n_cells_of_other_states += 1
        elif not perturbation.applies_to(genes):
            report.n_cells_without_genes += 1
        else:
            chosen.append(i)
            if missing and perturbation.kind != "overexpress":
                held = set(genes.tolist())
                missing = {group for group in missing if not held.issuperset(group)}
    n_candidates = len(chosen) + report.n_cells_without_genes
    if not chosen and n_candidates:
        who = "cell" if states is None else f"cell of state {states.start!r}"
        raise ValueError(
            f"No {who} (of {n_candidates:,}) holds the genes to {perturbation.kind}"
            f"{' together' if perturbation.anchor is not None or any(len(g) > 1 for g in missing) else ''}. "
            "Only kind='overexpress' can do without: it inserts them."
        )
    if missing and perturbation.kind != "overexpress":
        logger.warning(
            "%d of the %d genes or groups are in none of the cells", len(missing), len(perturbation.groups or ())
        )
    return np.array(chosen, dtype=np.int64)


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


def _hash(names: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
