"""Attention of every token to every token of its own cell, for padded and for packed batches.

A packed batch lays the tokens of all cells end to end, so nothing is computed on padding. How attention then keeps to
its cells depends on the attention implementation of the model (`attn_implementation`):

    sdpa               half precision on Ampere or newer: torch's variable-length flash attention; else one cell after
                       another, on a CPU by `BlockedAttention` where that is faster, or where there is dropout
    flash_attention_*  flash-attn's variable-length kernel, through transformers
    flex_attention     one product under a mask of cells; on a CPU, where torch cannot train with it, as sdpa
    eager              one cell after another, written out

torch's fused attention has no dropout on a CPU, and its float32 products run at MKL's pace there, which on AMD
processors is half of oneDNN's. `BlockedAttention` fills both gaps.

Axes: h heads, t tokens of all cells, q queries and k keys of one cell, d width of a head; n cells and heads together.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Attention weights of a block for each thread: 1 MB of float32, which stay in the caches
BLOCK_SIZE = 2**18

# Tokens of a block of flex attention's mask
FLEX_BLOCK = 128

# Keys of a cell from which on `BlockedAttention` is faster than torch's fused attention (heads of width 64)
ENOUGH_KEYS = 384

# Whether this torch can multiply by oneDNN: an operator that its compiler emits
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
        """flex attention's mask that keeps to cells. `create_block_mask` would hold all tokens x tokens meanwhile."""
        from torch.nn.attention.flex_attention import BlockMask

        def cell_of_token(offsets: torch.Tensor) -> torch.Tensor:
            cells = torch.arange(len(offsets) - 1, device=offsets.device)
            return cells.repeat_interleave(offsets.diff())

        query_cell, key_cell = cell_of_token(self.queries), cell_of_token(self.keys)
        n_queries, n_keys, size = len(query_cell), len(key_cell), FLEX_BLOCK
        firsts = torch.arange(0, n_queries, size, device=self.keys.device)
        lasts = (firsts + size).clamp(max=n_queries) - 1
        # A block of queries attends to the blocks from its first cell's first key to its last cell's last key.
        low = self.keys[query_cell[firsts]] // size
        high = (self.keys[query_cell[lasts] + 1] - 1) // size
        n_blocks = -(-n_keys // size)
        blocks = low[:, None] + torch.arange(n_blocks, device=self.keys.device, dtype=torch.int32)
        return BlockMask.from_kv_blocks(
            (high - low + 1).int()[None, None],
            blocks.clamp(max=n_blocks - 1).int()[None, None],
            BLOCK_SIZE=size,
            mask_mod=lambda n, h, q, k: query_cell[q] == key_cell[k],
            seq_lengths=(n_queries, n_keys),
        )


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
    if implementation == "sdpa" and _suits_varlen_flash(query):
        return _varlen_flash(query, key, value, cells, options["scaling"], options["dropout"])
    return _one_by_one(attend, module, query, key, value, cells, implementation, options)


def _suits_varlen_flash(query: torch.Tensor) -> bool:
    """Half precision on a GPU that FlashAttention 2 knows: Ampere or newer, so not V100 or T4."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    width = query.shape[-1]
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


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
    outs = []
    for q, k, v in parts:
        if q.shape[2] and suits_blocks(implementation, q, k, None, options["dropout"]):
            outs.append(blocked_attention(q, k, v, options["scaling"], options["dropout"]))
        elif q.shape[2]:
            outs.append(attend(module, q, k, v, attention_mask=None, **options)[0])
    return torch.cat(outs, dim=1)


def suits_blocks(
    implementation: str, query: torch.Tensor, key: torch.Tensor, attention_mask: Any, dropout: float
) -> bool:
    """Whether `blocked_attention` is the way to attend: on a CPU, without a mask, and not slower than torch's own."""
    if implementation != "sdpa" or query.device.type != "cpu" or attention_mask is not None:
        return False
    if dropout > 0:
        return True
    fast = ONEDNN and query.dtype == torch.float32 and key.shape[2] >= ENOUGH_KEYS
    return fast and not torch.compiler.is_compiling()


def blocked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
) -> torch.Tensor:
    """Attention of whole cells with dropout of its weights, (cells, h, q, d) to (cells, q, h, d)."""
    q, k, v = (x.flatten(0, 1).float() for x in (query, key, value))
    out: Any = BlockedAttention.apply(q, k, v, scaling, dropout)
    return out.view(query.shape).transpose(1, 2).to(query.dtype)


class BlockedAttention(torch.autograd.Function):
    """dropout(softmax(q k^T * scaling)) v in blocks of queries; the backward pass computes the weights anew.

    query (n, q, d), key and value (n, k, d), float32. Which weights are dropped follows from a seed that is drawn from
    torch's generator, so a run that goes on from the same state drops the same.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
    ) -> torch.Tensor:
        seed = int(torch.randint(2**62, ())) if dropout else 0
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        scaled, value_t = query * scaling, value.transpose(1, 2).contiguous()
        out = torch.empty_like(query)
        for i, rows, dropped in _blocks(query, key, dropout, seed):
            weights = _weights(scaled[i, rows], key[i])
            _drop(weights, dropped)
            out[i, rows] = _product(weights, value_t[i])
        ctx.save_for_backward(query, key, value)
        ctx.options = scaling, dropout, seed
        return out.mul_(1 / (1 - dropout)) if dropout else out

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        scaling, dropout, seed = ctx.options
        scaled, grad_out = query * scaling, grads[0].contiguous() * (1 / (1 - dropout))
        key_t = key.transpose(1, 2).contiguous()
        grad_query, grad_key_t, grad_value_t = torch.empty_like(query), torch.zeros_like(key_t), torch.zeros_like(key_t)
        for i, rows, dropped in _blocks(query, key, dropout, seed):
            weights = _weights(scaled[i, rows], key[i])
            grad_weights = _product(grad_out[i, rows], value[i])
            _drop(grad_weights, dropped)
            # In place: a fresh block costs more than what is computed on it
            grad_scores = torch.ops.aten._softmax_backward_data.out(
                grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
            )
            _drop(weights, dropped)
            grad_query[i, rows] = _product(grad_scores, key_t[i])
            # oneDNN is fast with a transposed block only as the second factor, so these gradients come transposed
            grad_key_t[i] += _product(scaled[i, rows].T, grad_scores.T)
            grad_value_t[i] += _product(grad_out[i, rows].T, weights.T)
        return grad_query.mul_(scaling), grad_key_t.transpose(1, 2), grad_value_t.transpose(1, 2), None, None


def _weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """softmax(query key^T), (rows, k)."""
    scores = _product(query, key)
    return torch.softmax(scores, dim=-1, out=scores)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T, by oneDNN where torch has it. `linear` itself would take MKL."""
    if ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return nn.functional.linear(x, weight)


def _drop(block: torch.Tensor, places: torch.Tensor | None) -> None:
    if places is not None:
        block.view(-1).index_fill_(0, places, 0.0)


def _blocks(
    query: torch.Tensor, key: torch.Tensor, dropout: float, seed: int
) -> Iterator[tuple[int, slice, torch.Tensor | None]]:
    """(head, block of its queries, places in the (rows, k) weights that are dropped); the same for a seed.

    Places are drawn for all of a head, so they do not depend on the size of the blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    n_queries, n_keys = query.shape[1], key.shape[1]
    size = max(BLOCK_SIZE * torch.get_num_threads() // n_keys, 1)
    # Blocks of like size
    starts = [n_queries * i // -(-n_queries // size) for i in range(-(-n_queries // size) + 1)]
    for head in range(query.shape[0]):
        dropped = dropped_places(n_queries * n_keys, dropout, generator) if dropout else None
        for start, end in pairwise(starts):
            if dropped is None:
                yield head, slice(start, end), None
            else:
                first, last = torch.searchsorted(dropped, torch.tensor([start * n_keys, end * n_keys])).tolist()
                yield head, slice(start, end), dropped[first:last] - start * n_keys


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


__all__ = [
    "BlockedAttention",
    "PackedCells",
    "blocked_attention",
    "dropped_places",
    "eager_attention_forward",
    "packed_attention",
    "suits_blocks",
]
