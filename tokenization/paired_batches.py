"""Batches of encoded pairs of modalities, as the multiome models take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORED_LABEL = -100


@dataclass
class PairedCellCollator:
    """Pads encoded cells into a batch of PyTorch tensors.

    pad_token_id       of the tokenizer
    begins_feature     (vocabulary,) bool, the tokens that a feature's name begins with; absent: all
    max_source_length  tokens of an input at the most: of a longer one the first and the last stay (task and end), and
                       of the rest a random sample of whole features in their order, drawn anew with every key. Not the
                       beginning, which is chromosome 1
    max_target_length  of the labels likewise; the rest counts as nothing to write, so leave it out for set heads
    """

    pad_token_id: int
    begins_feature: np.ndarray | None = None
    max_source_length: int | None = None
    max_target_length: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]], keys: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
        """input_ids, attention_mask; labels, value_features and values of rows that have them.

        rows     dictionaries as of `BinarizedStringProcessor.iter_encoded`
        keys     one key of integers a cell (seed, epoch, cell): all the randomness there is; the row's place if absent
        Returns  (cells, tokens) int64; labels and value_features are padded with -100, values (float32) with 0
        """
        keys = [(n,) for n in range(len(rows))] if keys is None else keys
        ids = [
            sampled(np.asarray(row["input_ids"]), self.max_source_length, 1, key, self.begins_feature)
            for row, key in zip(rows, keys, strict=True)
        ]
        batch = {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([np.ones(len(i), np.int64) for i in ids], 0),
        }
        if "labels" in rows[0]:
            labels = [
                sampled(np.asarray(row["labels"]), self.max_target_length, 0, key, self.begins_feature)
                for row, key in zip(rows, keys, strict=True)
            ]
            batch["labels"] = padded(labels, IGNORED_LABEL)
        if "values" in rows[0]:
            batch["value_features"] = padded([np.asarray(row["value_features"]) for row in rows], IGNORED_LABEL)
            batch["values"] = padded([np.asarray(row["values"], np.float32) for row in rows], 0)
        return batch


def sampled(
    ids: np.ndarray,
    max_length: int | None,
    n_first: int,
    key: Sequence[int],
    begins_feature: np.ndarray | None = None,
) -> np.ndarray:
    """At most `max_length` of some ids in their order: the `n_first` first, the last, a random sample of the features
    between them, each with all its tokens."""
    if max_length is None or len(ids) <= max_length:
        return ids
    inside = ids[n_first:-1]
    begins = np.ones(len(inside), dtype=bool) if begins_feature is None else begins_feature[inside]
    feature = np.cumsum(begins) - 1
    drawn = np.random.default_rng(key).permutation(int(begins.sum()))
    room = np.cumsum(np.bincount(feature)[drawn]) <= max_length - n_first - 1
    return np.concatenate([ids[:n_first], inside[np.isin(feature, drawn[room])], ids[-1:]])


def padded(rows: Sequence[np.ndarray], value: float) -> Any:
    """(rows, longest) tensor, int64 or float32 as the rows are."""
    import torch

    kind = np.float32 if len(rows) and rows[0].dtype == np.float32 else np.int64
    out = np.full((len(rows), max((len(row) for row in rows), default=0)), value, dtype=kind)
    for n, row in enumerate(rows):
        out[n, : len(row)] = row
    return torch.from_numpy(out)
