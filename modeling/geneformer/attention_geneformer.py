"""Attention of every token to every token of its own cell, for padded and for packed batches.

A packed batch lays the tokens of all cells end to end, so nothing is computed on padding. How attention then keeps to
its cells depends on the attention implementation of the model (`attn_implementation`):

    sdpa               CUDA, half precision: torch's variable-length flash attention; else one cell after another
    flash_attention_*  flash-attn's variable-length kernel, through transformers
    flex_attention     one product under a mask of cells; on a CPU, where torch cannot train with it, as sdpa
    eager              one cell after another, written out

torch's fused attention has no dropout on a CPU: `DropoutAttention` fills the gap, in blocks that stay in the cache.

Axes: h heads, t tokens of all cells, q queries and k keys of one cell, d width of a head.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Numbers of a block of attention weights: 2 MB of float32, which stay in the caches
BLOCK_SIZE = 2**19


@dataclass(frozen=True)
class PackedCells:
    """Where the cells of a packed batch begin, and the end.

    keys     (cells + 1,) int32 offsets in all tokens
    queries  (cells + 1,) int32 offsets in the tokens whose output is wanted; `keys` where all are
    longest  tokens of the longest cell: of no cell are there more queries or keys
    """

    keys: torch.Tensor
    queries: torch.Tensor
    longest: int

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """(queries, keys) of each cell."""
        return list(zip(self.queries.diff().tolist(), self.keys.diff().tolist(), strict=True))

    @cached_property
    def block_mask(self) -> Any:
        """flex attention's mask that keeps to cells."""
        from torch.nn.attention.flex_attention import create_block_mask

        def cell_of_token(offsets: torch.Tensor) -> torch.Tensor:
            cells = torch.arange(len(offsets) - 1, device=offsets.device)
            return cells.repeat_interleave(offsets.diff())

        query_cell, key_cell = cell_of_token(self.queries), cell_of_token(self.keys)
        sizes: Any = {"B": None, "H": None, "Q_LEN": len(query_cell), "KV_LEN": len(key_cell)}
        return create_block_mask(lambda n, h, q, k: query_cell[q] == key_cell[k], **sizes, device=str(self.keys.device))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling + mask) v, with the weights. query, key, value (n, h, t, d); returns (n, t, h, d)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def packed_attention(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cells: PackedCells,
    *,
    implementation: str,
    **options: Any,
) -> torch.Tensor:
    """Attention within each cell of a packed batch, (1, tokens, h, d).

    attend             transformers' interface of the implementation
    query, key, value  (1, h, tokens, d)
    options            scaling, dropout, and what else `attend` takes
    """
    if implementation.startswith("flash_attention"):
        # In transformers' words
        options |= {"cu_seq_lens_q": cells.queries, "cu_seq_lens_k": cells.keys}
        options |= {"max_length_q": cells.longest, "max_length_k": cells.longest}
        return attend(module, query, key, value, None, **options)[0]
    if implementation == "flex_attention":
        if query.device.type != "cpu":
            return attend(module, query, key, value, cells.block_mask, **options)[0]
        implementation, attend = "sdpa", sdpa_attention_forward
    if implementation == "sdpa" and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen_flash(query, key, value, cells, options["scaling"], options["dropout"])
    return _one_by_one(attend, module, query, key, value, cells, implementation, options)


def _varlen_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cells: PackedCells, scaling: float, dropout: float
) -> torch.Tensor:
    """torch's variable-length flash attention, CUDA in half precision."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, cells.queries, cells.keys, cells.longest, cells.longest, scale=scaling)
        assert isinstance(out, torch.Tensor)
        return out.unsqueeze(0)
    # The public function has no dropout; the operator under it does.
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, cells.queries, cells.keys, cells.longest, cells.longest, dropout, False, False, scale=scaling
    )[0]
    return out.unsqueeze(0)


def _one_by_one(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cells: PackedCells,
    implementation: str,
    options: dict[str, Any],
) -> torch.Tensor:
    """One cell after another, but for those whose output nobody wants."""
    n_queries, n_keys = zip(*cells.lengths, strict=True)
    parts = zip(query.split(n_queries, dim=2), key.split(n_keys, dim=2), value.split(n_keys, dim=2), strict=True)
    wanted = [qkv for qkv, n in zip(parts, n_queries, strict=True) if n]
    if implementation == "sdpa" and options["dropout"] > 0 and query.device.type == "cpu":
        outs = [_with_dropout(*qkv, options["scaling"], options["dropout"]) for qkv in wanted]
    else:
        outs = [attend(module, *qkv, attention_mask=None, **options)[0] for qkv in wanted]
    return torch.cat(outs, dim=1)


def _with_dropout(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
) -> torch.Tensor:
    """Attention of one cell, (1, h, q, d) to (1, q, h, d), with dropout of its weights."""
    q, k, v = (x[0].float() for x in (query, key, value))
    out: Any = DropoutAttention.apply(q, k, v, scaling, dropout)
    return out.transpose(0, 1).unsqueeze(0).to(query.dtype)


class DropoutAttention(torch.autograd.Function):
    """dropout(softmax(q k^T * scaling)) v in blocks of queries; the backward pass computes the weights anew.

    query (h, q, d), key and value (h, k, d), float32. Which weights are dropped follows from a seed that is drawn from
    torch's generator, so a run that goes on from the same state drops the same.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
    ) -> torch.Tensor:
        seed = int(torch.randint(2**62, ()))
        scaled = query * scaling
        out = torch.empty_like(query)
        for rows, dropped in _blocks(query, key, dropout, seed):
            weights = torch.softmax(torch.bmm(scaled[:, rows], key.transpose(1, 2)), dim=-1)
            weights.view(-1).index_fill_(0, dropped, 0.0)
            out[:, rows] = torch.bmm(weights, value)
        ctx.save_for_backward(query, key, value)
        ctx.options = scaling, dropout, seed
        return out.mul_(1 / (1 - dropout))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        scaling, dropout, seed = ctx.options
        scaled, grad_out = query * scaling, grads[0] * (1 / (1 - dropout))
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for rows, dropped in _blocks(query, key, dropout, seed):
            weights = torch.softmax(torch.bmm(scaled[:, rows], key.transpose(1, 2)), dim=-1)
            grad_weights = torch.bmm(grad_out[:, rows], value.transpose(1, 2))
            grad_weights.view(-1).index_fill_(0, dropped, 0.0)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # pyright: ignore
            weights.view(-1).index_fill_(0, dropped, 0.0)
            grad_value.baddbmm_(weights.transpose(1, 2), grad_out[:, rows])
            grad_query[:, rows] = torch.bmm(grad_scores, key)
            grad_key.baddbmm_(grad_scores.transpose(1, 2), scaled[:, rows])
        return grad_query.mul_(scaling), grad_key, grad_value, None, None


def _blocks(query: torch.Tensor, key: torch.Tensor, dropout: float, seed: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of queries, and the places in the (h, rows, k) weights of each that are dropped; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    heads, n_queries, n_keys = query.shape[0], query.shape[1], key.shape[1]
    size = max(BLOCK_SIZE // (heads * n_keys), 1)
    for start in range(0, n_queries, size):
        rows = slice(start, min(start + size, n_queries))
        yield rows, dropped_places(heads * (rows.stop - start) * n_keys, dropout, generator)


def dropped_places(n: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Ascending places among 0..n-1, each chosen on its own with the same probability.

    Gaps between such places are geometric, so only what is chosen is drawn: at 2%, a fiftieth of the random numbers.
    """
    mean = n * probability
    places = torch.zeros(0, dtype=torch.int64)
    last = -1
    while last < n - 1:
        # Almost always enough at once
        gaps = torch.empty(int(mean + 5 * math.sqrt(mean)) + 8, dtype=torch.int64)
        gaps.geometric_(probability, generator=generator)
        more = gaps.cumsum_(0).add_(last)
        places = more if len(places) == 0 else torch.cat([places, more])
        last = int(places[-1])
    return places[: int(torch.searchsorted(places, n))]


__all__ = ["DropoutAttention", "PackedCells", "dropped_places", "eager_attention_forward", "packed_attention"]
