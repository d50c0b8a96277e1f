"""Predictions of a set head for many cells, streamed as sparse matrices."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from tqdm.auto import tqdm


@torch.no_grad()
def iter_predictions(
    model: Any,
    examples: Any,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    values: bool = False,
    max_tokens: int = 16_384,
    cells_per_block: int = 1_024,
) -> Iterator[sp.csr_matrix]:
    """(cells, target features) CSR float32, a block of cells of one task at a time, in the order of the examples.

    model                     a `MultiomeT5ForFeaturePrediction`; put into evaluation mode
    examples                  `len` and slices with "input_ids": a datasets.Dataset of `BinarizedStringProcessor.encode`
    threshold, top_k, values  as of `MultiomeT5ForFeaturePrediction.predict`
    max_tokens                padded tokens of a forward pass; one cell may exceed it
    """
    model.eval()
    device = model.device
    blocks = range(0, len(examples), cells_per_block)
    for start in tqdm(blocks, desc="predict", unit="block", disable=len(blocks) == 1):
        ids = [np.asarray(cell) for cell in examples[start : start + cells_per_block]["input_ids"]]
        _, n_features = model.config.target_of(int(ids[0][0]))
        # Cells of like length together, so that little is padded
        order = np.argsort([len(cell) for cell in ids], kind="stable")
        parts, rows = [], []
        for batch in batches(order, ids, max_tokens):
            longest = max(len(ids[i]) for i in batch)
            padded = np.full((len(batch), longest), model.config.pad_token_id, dtype=np.int64)
            mask = np.zeros((len(batch), longest), dtype=np.int64)
            for row, i in enumerate(batch):
                padded[row, : len(ids[i])], mask[row, : len(ids[i])] = ids[i], 1
            tensors = (torch.from_numpy(padded).to(device), torch.from_numpy(mask).to(device))
            found = model.predict(*tensors, threshold=threshold, top_k=top_k, values=values)
            arrays = (found.data.float(), found.features, found.offsets)
            parts.append(sp.csr_matrix(tuple(a.cpu().numpy() for a in arrays), shape=(len(batch), n_features)))
            rows += batch
        yield sp.csr_matrix(sp.vstack(parts, format="csr")[np.argsort(rows)])


def batches(order: Iterable[int], ids: list[np.ndarray], max_tokens: int) -> Iterator[list[int]]:
    """Cells in the given order, of rising length, in batches of at most `max_tokens` padded tokens."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(ids[i]) > max_tokens:
            yield batch
            batch = []
        batch.append(int(i))
    if batch:
        yield batch
