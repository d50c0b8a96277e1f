"""First-order estimates of what deleting each gene of a cell does: a screen for the exact values of `effects`.

A deletion does two things to a cell: nobody attends to the gene any more, and the genes behind it move up a rank. Both
are made continuous. Each token gets a keep weight w (1: there, 0: deleted), which multiplies exp(score) wherever it is
attended to, and its share in the mean over genes; each rank's position embedding may move towards that of the rank
above it. The estimate for gene i of a function F of the hidden states is, of a single backward pass for all i,

    F(without i) - F  ~  -dF/dw_i + sum over j > i of dF/dp_j . (p above j - p_j)

Gradients are taken where all genes have moved up by half a rank, the middle of the way where the first gene is deleted.
The second term adds up moves of as many as all genes, too many for a straight line from the unmoved cell: there,
estimates of shifts have half the rank correlation with exact ones.

Axes: n cells, t tokens, d width.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cells import Cells
from .effects import Effects, Measure, batches_by_length
from .targets import PlannedEdit

# Random directions for cosine similarities, a backward pass each: the relative standard error of 1 - cosine is at most
# sqrt(2 / directions). `benchmarks/perturbation_screen.py` measures rank correlations with exact values.
DIRECTIONS = 16
# Of a token that is not there. Finite, as infinity times no gradient is not a number.
LOG_ABSENT = -1e4
ATTENTION = "keep_weighted"


def keep_weighted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    log_keep: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in which exp(score) of a key is multiplied by its keep weight.

    query, key, value  (n, h, t, d/h)
    log_keep           (n, t) logarithm of the weights
    Returns            (n, t, h, d/h)
    """
    # One more dimension of queries (constant) and keys adds log_keep to the scores. As a mask it would do the same,
    # but for the gradient of a mask torch holds all t x t scores.
    one = torch.full_like(query[..., :1], 1 / scaling)
    extra = log_keep[:, None, :, None].expand_as(one).to(key.dtype)
    # GPU kernels ask for widths that 8 divides.
    width = query.shape[-1]
    zeros = torch.zeros_like(query[..., :1]).expand(*query.shape[:-1], -(width + 1) % 8)
    out = nn.functional.scaled_dot_product_attention(
        torch.cat([query, one, zeros], dim=-1),
        torch.cat([key, extra, zeros], dim=-1),
        torch.cat([value, torch.zeros_like(one), zeros], dim=-1),
        scale=scaling,
    )
    return out[..., :width].transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, keep_weighted_attention)


def block_estimates(
    cells: Cells,
    block: Sequence[int],
    genes_of_cell: Sequence[np.ndarray],
    planned: Sequence[Sequence[PlannedEdit]],
    measure: Measure,
    done: Callable[[int], Any] = lambda n: None,
) -> Effects:
    """Estimated effects of deletions of single genes, as `effects.block_effects` returns the exact ones.

    With states, only shifts are estimated, one backward pass a state, and cosine similarities are NaN: these take
    DIRECTIONS passes.

    block  numbers of the cells
    """
    starts = np.cumsum([0, *map(len, planned)])
    n_states = 0 if measure.states_sd is None else len(measure.states_sd)
    out = Effects(np.full(starts[-1], np.nan, np.float32), np.empty((starts[-1], n_states), np.float32), [])
    found = out.shift_ns if n_states else out.cosine_n
    n_special = len(cells.wrapping)
    lengths = np.array([len(genes) + n_special for genes in genes_of_cell])
    for chosen in batches_by_length(lengths, measure.max_tokens):
        with torch.inference_mode(False), torch.enable_grad():
            cell = _Differentiable(cells, [genes_of_cell[i] for i in chosen], measure)
            numbers = [block[i] for i in chosen]
            estimates = cell.shifts(measure.states_sd) if n_states else cell.cosine_similarities(numbers)
        for of_cell, i in zip(estimates.cpu().numpy(), chosen, strict=True):
            # Genes follow <cls>, where there is one.
            tokens = [p.positions[0] + bool(n_special) for p in planned[i]]
            found[starts[i] : starts[i + 1]] = of_cell[tokens]
            done(len(tokens))
    if not np.isfinite(found).all():
        raise ValueError("The model's embeddings are not finite: its weights hold NaN, or overflow in this precision.")
    return out


class _Differentiable:
    """Some cells, padded, and their hidden states as a function of keep weights and positions.

    is_gene   (n, t) tokens of genes: neither special ones nor padding
    x         (n, t, d) hidden states of the layer measured
    """

    def __init__(self, cells: Cells, genes_of_cell: Sequence[np.ndarray], measure: Measure):
        encoder, self.pooling = measure.encoder, measure.pooling
        self.device = next(encoder.parameters()).device
        rows = [cells.wrapped(genes) for genes in genes_of_cell]
        lengths = torch.tensor([len(row) for row in rows])
        ids = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
        place = torch.arange(ids.shape[1])
        first = len(cells.wrapping[:1])
        self.is_gene = ((place >= first) & (place < lengths[:, None] - first)).to(self.device)
        there = (place < lengths[:, None]).to(self.device)
        # Nothing that is deleted stands before the first gene.
        above = torch.where(place > first, place - 1, place).to(self.device)
        with torch.no_grad():
            positions = encoder.embeddings.position_embeddings.weight
            self.step_td = positions[above] - positions[: len(place)]
            # The model adds the positions themselves.
            halfway = encoder.get_input_embeddings()(ids.to(self.device)) + self.step_td / 2
            log_keep = torch.where(there, 0.0, LOG_ABSENT)
        self.embeds, self.log_keep = halfway.requires_grad_(), log_keep.requires_grad_()
        with _keep_weighted(encoder):
            x = encoder(inputs_embeds=self.embeds, num_layers=measure.n_layers, log_keep=self.log_keep)
        self.x = x.last_hidden_state.float()

    def shifts(self, states_sd: Any) -> torch.Tensor:
        """(n, t, states) change of the cosine similarity to each state when each token is deleted."""
        states = torch.as_tensor(states_sd, device=self.device, dtype=self.x.dtype)
        if self.pooling == "cls":
            pooled = self.x[:, 0]
        else:
            weight = (self.log_keep.exp() * self.is_gene).unsqueeze(-1)
            pooled = (self.x * weight).sum(dim=1) / weight.sum(dim=1)
        to_state = cosine_similarity(pooled.unsqueeze(1), states.unsqueeze(0), dim=-1)
        return torch.stack([self._changes(to_state[:, s].sum()) for s in range(len(states))], dim=-1)

    def cosine_similarities(self, seeds: Sequence[int]) -> torch.Tensor:
        """(n, t) cosine similarity before and after when each token is deleted.

        A change dx of an embedding x turns it by an angle of tangent |dx across x| / |x|. The mean of its square over
        genes is the mean square, over random signs z, of the change of the scalar sum of z . x across x / |x|.

        seeds  one for each cell, so that a cell's values do not depend on those it is batched with
        """
        compared = self.is_gene if self.pooling == "mean" else torch.zeros_like(self.is_gene)
        if self.pooling == "cls":
            compared[:, 0] = True
        x = self.x.detach()
        norm = x.norm(dim=-1, keepdim=True)
        unit = x / norm
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        square = torch.zeros_like(x[..., 0])
        for _ in range(DIRECTIONS):
            z = torch.zeros_like(x)
            for row, real, generator in zip(z, compared, generators, strict=True):
                signs = torch.randint(2, (int(real.sum()), x.shape[-1]), generator=generator) * 2.0 - 1
                row[real] = signs.to(self.device)
            across = (z - (z * unit).sum(dim=-1, keepdim=True) * unit) / norm
            square += self._changes((self.x * across).sum()) ** 2
        return (1 + square / (DIRECTIONS * compared.sum(dim=1, keepdim=True))).rsqrt()

    def _changes(self, scalar: torch.Tensor) -> torch.Tensor:
        """(n, t) change of a sum over cells when each token is deleted, to first order."""
        by_keep, by_embeds = torch.autograd.grad(
            scalar, (self.log_keep, self.embeds), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        of_move = (by_embeds.float() * self.step_td).sum(dim=-1)
        behind = of_move.flip(1).cumsum(dim=1).flip(1) - of_move
        return behind - by_keep


@contextlib.contextmanager
def _keep_weighted(encoder: Any) -> Iterator[None]:
    before = encoder.config._attn_implementation
    encoder.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        encoder.config._attn_implementation = before
