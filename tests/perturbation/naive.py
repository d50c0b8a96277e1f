"""Perturbation of one gene of one cell as the method defines it: plain lists, one forward pass at a time."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cosine_similarity


class NaiveEffects(NamedTuple):
    cell: float
    genes: list[float]  # of every gene left to compare, by rank
    affected: list[int]  # their tokens
    shifts: list[float]


@torch.no_grad()
def naive_effects(
    model: Any,
    tokens: Any,
    kind: str,
    perturbed: Any,
    *,
    layout: str,
    pooling: str | None = None,
    layer: int = -1,
    max_tokens: int = 10_000,
    states: Any = (),
) -> NaiveEffects:
    """Effects of "delete" or "overexpress". `tokens` with special tokens where the layout has them."""
    encoder = getattr(model, model.base_model_prefix, model)
    special = layout == "v2"
    genes = list(tokens)[1:-1] if special else list(tokens)
    pooling = pooling or ("cls" if special else "mean")
    others = [gene for gene in genes if gene not in perturbed]
    if kind == "overexpress":
        others = others[: max_tokens - 2 * special - len(perturbed)]
        edited = [*perturbed, *others]
    else:
        edited = others
    unedited = [gene for gene in genes if gene in others or gene in perturbed]

    def hidden(cell):
        ids = [tokens[0], *cell, tokens[-1]] if special else cell
        out = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states
        x = out[encoder.config.num_hidden_layers + layer][0]
        of_genes = x[1:-1] if special else x
        return dict(zip(cell, of_genes, strict=True)), x[0] if pooling == "cls" else of_genes.mean(0)

    (before, cell_before), (after, cell_after) = hidden(unedited), hidden(edited)
    by_gene = [cosine_similarity(before[gene], after[gene], dim=0).item() for gene in others]
    cell = cosine_similarity(cell_before, cell_after, dim=0).item() if pooling == "cls" else float(np.mean(by_gene))
    states = [torch.as_tensor(state) for state in states]
    shifts = [
        (cosine_similarity(cell_after, state, dim=0) - cosine_similarity(cell_before, state, dim=0)).item()
        for state in states
    ]
    return NaiveEffects(cell, by_gene, others, shifts)
