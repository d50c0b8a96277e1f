"""Cells laid end to end: a batch without padding, as Geneformer's `forward` takes it."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def packed_cells(input_ids: Sequence[np.ndarray]) -> dict[str, Any]:
    """A packed batch of PyTorch tensors.

    input_ids  (tokens,) token ids of each cell, none empty
    Returns    input_ids and position_ids (1, tokens of all cells) int64, positions beginning anew with each cell;
               cu_seqlens (cells + 1,) int32, where cells begin, and the end; max_seqlen, tokens of the longest cell
    """
    import torch

    lengths = np.array([len(ids) for ids in input_ids])
    assert lengths.min(initial=1) > 0
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return {
        "input_ids": torch.from_numpy(np.concatenate(input_ids).astype(np.int64)).unsqueeze(0),
        "position_ids": torch.from_numpy(positions).unsqueeze(0),
        "cu_seqlens": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        "max_seqlen": int(lengths.max()),
    }
