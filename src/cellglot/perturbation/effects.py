"""What edits do to embeddings: forward passes in unpadded batches, and cosine similarities.

Axes: n edits of a batch, t places of an edited cell, g gene tokens of all unedited cells of a block, d width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from .cells import Cells
from .edits import Edit, edit
from .targets import Perturbation, PlannedEdit

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class Measure:
    """What is measured, in which hidden layer of which model.

    n_layers    layers of the encoder to run
    pooling     "mean" over gene tokens or "cls": the cell's embedding
    states_sd   (states, d) embeddings of cell states, or None
    genes       whether each gene's own similarity is kept
    max_tokens  padded tokens of one forward pass
    """

    encoder: Any
    n_layers: int
    pooling: Pooling
    states_sd: np.ndarray | None
    genes: bool
    max_tokens: int


@dataclass
class Effects:
    """Effects of the edits of some cells, in order.

    cosine_n   (edits,) float32 cosine similarity of the cell before and after
    shift_ns   (edits, states) float32 cos(edited, state) - cos(unedited, state)
    by_gene    where genes are measured: for each edit, the similarity of each gene that was not perturbed, by rank
    """

    cosine_n: np.ndarray
    shift_ns: np.ndarray
    by_gene: list[np.ndarray]


@dataclass(frozen=True)
class _Job:
    """One edit of one cell of a block."""

    cell: int
    planned: PlannedEdit


@dataclass(frozen=True)
class _References:
    """Embeddings of the unedited cells of a block.

    x_gd     embeddings of their genes, end to end
    start    (cell, kept genes) -> row in x_gd where it begins, and its number
    pooled   (cells, d) cell embeddings
    """

    x_gd: torch.Tensor
    start: dict[tuple[int, bytes], tuple[int, int]]
    pooled: torch.Tensor


@torch.inference_mode()
def block_effects(
    cells: Cells,
    genes_of_cell: Sequence[np.ndarray],
    planned: Sequence[Sequence[PlannedEdit]],
    perturbation: Perturbation,
    measure: Measure,
    done: Callable[[int], Any] = lambda n: None,
) -> Effects:
    """Effects of the planned edits of a block of cells, cell by cell in order.

    genes_of_cell  (genes,) tokens of each cell of the block
    planned        the edits of each cell
    done           told how many edits a forward pass finished
    """
    jobs = [_Job(i, p) for i, edits in enumerate(planned) for p in edits]

    def edit_of(job: _Job) -> Edit:
        return edit(
            perturbation.kind,
            len(genes_of_cell[job.cell]),
            job.planned.positions,
            max_genes=perturbation.max_genes,
            rank_shift=perturbation.rank_shift,
        )

    references = _references(cells, genes_of_cell, jobs, edit_of, measure)
    n_states = 0 if measure.states_sd is None else len(measure.states_sd)
    out = Effects(np.empty(len(jobs), np.float32), np.empty((len(jobs), n_states), np.float32), [])
    by_gene: dict[int, np.ndarray] = {}
    lengths = np.array([job.planned.length for job in jobs])
    for chosen in batches_by_length(lengths, measure.max_tokens):
        edits = [edit_of(jobs[i]) for i in chosen]
        rankings = [
            e.tokens(genes_of_cell[jobs[i].cell], jobs[i].planned.tokens) for i, e in zip(chosen, edits, strict=True)
        ]
        x, real, pooled = _embed(cells, rankings, measure)
        keys = [_key(jobs[i].cell, e) for i, e in zip(chosen, edits, strict=True)]
        number = torch.tensor([references.start[key][1] for key in keys], device=x.device)
        before = references.pooled[number]
        if n_states:
            out.shift_ns[chosen] = _shifts(before, pooled, measure.states_sd).cpu().numpy()
        if measure.pooling == "cls":
            out.cosine_n[chosen] = cosine_similarity(pooled, before, dim=-1).cpu().numpy()
        if measure.genes or measure.pooling == "mean":
            rows = np.zeros(real.shape, dtype=np.int64)
            compared = np.zeros(real.shape, dtype=bool)
            for row, mask, key, e in zip(rows, compared, keys, edits, strict=True):
                mask[: len(e.source)] = e.compared
                row[mask] = e.reference_rows() + references.start[key][0]
            similarity = cosine_similarity(x, references.x_gd[torch.from_numpy(rows).to(x.device)], dim=-1)
            similarity_nt = similarity.cpu().numpy()
            if measure.pooling == "mean":
                out.cosine_n[chosen] = (similarity_nt * compared).sum(axis=1) / compared.sum(axis=1)
            if measure.genes:
                by_gene |= {int(i): row[mask] for i, row, mask in zip(chosen, similarity_nt, compared, strict=True)}
        done(len(chosen))
    out.by_gene = [by_gene[i] for i in range(len(by_gene))]
    if not (np.isfinite(out.cosine_n).all() and np.isfinite(out.shift_ns).all()):
        raise ValueError("The model's embeddings are not finite: its weights hold NaN, or overflow in this precision.")
    return out


def _references(
    cells: Cells,
    genes_of_cell: Sequence[np.ndarray],
    jobs: Sequence[_Job],
    edit_of: Callable[[_Job], Edit],
    measure: Measure,
) -> _References:
    """One pass over the unedited cells; a cell whose tail insertion pushes out needs another, without that tail."""
    kept: dict[tuple[int, bytes], np.ndarray] = {}
    for job in jobs:
        key = (job.cell, b"")
        # Only insertion changes what a cell is compared with; for the rest the edit need not be made to know.
        if min(job.planned.positions) < 0:
            e = edit_of(job)
            key = _key(job.cell, e)
            if e.reference is not None:
                kept[key] = genes_of_cell[job.cell][e.reference]
                continue
        kept.setdefault(key, genes_of_cell[job.cell])
    keys, rankings = list(kept), list(kept.values())
    lengths = np.array([len(ranking) for ranking in rankings])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    device, width = next(measure.encoder.parameters()).device, measure.encoder.config.hidden_size
    x_gd = torch.empty((int(starts[-1]), width), device=device)
    pooled = torch.empty((len(keys), width), device=device)
    for chosen in batches_by_length(lengths, measure.max_tokens):
        x, real, cell = _embed(cells, [rankings[i] for i in chosen], measure)
        pooled[torch.from_numpy(chosen).to(device)] = cell
        for row, i, n in zip(x, chosen, real.sum(axis=1), strict=True):
            x_gd[starts[i] : starts[i] + n] = row[:n]
    return _References(x_gd, {key: (int(starts[i]), i) for i, key in enumerate(keys)}, pooled)


def _key(cell: int, e: Edit) -> tuple[int, bytes]:
    return cell, b"" if e.reference is None else e.reference.tobytes()


def _embed(
    cells: Cells, rankings: Sequence[np.ndarray], measure: Measure
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Embeddings (n, t, d) of the genes of rankings, where they are real (n, t), and of the cells (n, d)."""
    rows = [cells.wrapped(ranking) for ranking in rankings]
    longest = max(map(len, rows))
    real = np.arange(longest) < np.array([len(row) for row in rows])[:, None]
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = np.concatenate(rows)
    device = next(measure.encoder.parameters()).device
    # Without a mask where nothing is padded: attention then takes its fastest path.
    mask = None if real.all() else torch.from_numpy(real).long().to(device)
    x = measure.encoder(
        torch.from_numpy(ids).to(device), attention_mask=mask, num_layers=measure.n_layers
    ).last_hidden_state.float()
    cls = x[:, 0]
    if cells.wrapping:
        # <eos> stands at the end of each cell's own tokens, where the narrower mask leaves it out.
        x, real = x[:, 1:-1], real[:, 2:]
    if measure.pooling == "cls":
        return x, real, cls
    weight = torch.from_numpy(real).to(device).unsqueeze(-1)
    return x, real, (x * weight).sum(dim=1) / weight.sum(dim=1)


def _shifts(before: torch.Tensor, after: torch.Tensor, states_sd: Any) -> torch.Tensor:
    """(n, states) change of the cosine similarity to each state."""
    states = torch.as_tensor(states_sd, device=after.device, dtype=after.dtype)
    to_state = [cosine_similarity(x.unsqueeze(1), states.unsqueeze(0), dim=-1) for x in (after, before)]
    return to_state[0] - to_state[1]


def batches_by_length(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Batches of at most max_tokens padded tokens (or of one), without padding where enough are equally long.

    What is left over of each length is batched together, longest first, and padded.
    """
    order = np.argsort(-lengths, kind="stable")
    left_over = []
    for equal in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        if len(equal) == 0:
            continue
        size = max(max_tokens // int(lengths[equal[0]]), 1)
        n_full = len(equal) // size * size
        yield from equal[:n_full].reshape(-1, size)
        left_over.append(equal[n_full:])
    rest = np.concatenate([*left_over, np.empty(0, dtype=np.int64)]).astype(np.int64)
    start = 0
    while start < len(rest):
        stop = start + max(max_tokens // int(lengths[rest[start]]), 1)
        yield rest[start:stop]
        start = stop
