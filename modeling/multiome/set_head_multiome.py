"""The set head: a score and a value for every feature of the other modality, in one pass.

A cell's vector is scored against the embeddings of all target features, the same that the encoder reads them with, so
116,490 peaks cost no weights beyond their embeddings and two biases each. Scores are made some features at a time.

Axes: n cells, f target features, d width, l labels of a cell.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear, logsigmoid
from torch.utils.checkpoint import checkpoint
from transformers import T5Config

# Scores that are held at once: 64 MiB of float32, of which the loss makes about ten in passing
SCORES_AT_ONCE = 2**24


def asymmetric_loss(
    scores: torch.Tensor, present: torch.Tensor, gamma_positive: float, gamma_negative: float, margin: float
) -> torch.Tensor:
    """Asymmetric loss of each score (Ridnik et al. 2021, equations 4 to 7); p is the sigmoid of the score.

    Of features that are there: -(1 - p)^gamma_positive log p. Of others: -q^gamma_negative log(1 - q) with
    q = max(p - margin, 0).

    scores   (n, f)
    present  (n, f) bool
    Returns  (n, f) float32
    """
    scores = scores.float()
    p = torch.sigmoid(scores)
    positive = logsigmoid(scores)
    if gamma_positive:
        positive = positive * (1 - p) ** gamma_positive
    # Without a margin log(1 - p) is exact even where p rounds to 1.
    q = (p - margin).clamp(min=0) if margin else p
    negative = torch.log1p(-q) if margin else logsigmoid(-scores)
    if gamma_negative:
        negative = negative * q**gamma_negative
    return -torch.where(present, positive, negative)


def dense_rows(features: torch.Tensor, values: torch.Tensor | None, n_features: int) -> torch.Tensor:
    """(n, f) bool of the features that are there, or float32 of their values; features outside 0 to f are passed over.

    features  (n, l) int64
    values    (n, l)
    """
    inside = (features >= 0) & (features < n_features)
    # What is outside goes to a column too many.
    columns = torch.where(inside, features, n_features)
    kind = torch.bool if values is None else torch.float32
    dense = torch.zeros(len(features), n_features + 1, dtype=kind, device=features.device)
    dense.scatter_(1, columns, torch.ones_like(columns, dtype=kind) if values is None else values.to(kind))
    return dense[:, :n_features]


@dataclass
class SparseFeatures:
    """Some features of each cell: (entries,) features and data end to end, (n + 1,) offsets where each cell begins."""

    features: torch.Tensor
    data: torch.Tensor
    offsets: torch.Tensor


class SetHead(nn.Module):
    """Scores and values of target features from what the encoder read and what it made of it.

    A cell's vector: its task token's hidden state, the mean hidden state and the mean embedding of its tokens, through
    a residual layer. The mean embedding is a path around the encoder: what is linear in the features that a cell has is
    learned at once. Then score_f = z . e_f + b_f, where z is a projection of the vector and e_f the feature's
    embedding; values likewise, with a projection and a bias of their own.
    """

    def __init__(self, config: T5Config, n_features: int):
        super().__init__()
        d = config.d_model
        self.cell = nn.Linear(3 * d, d)
        self.score, self.value = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.score_bias = nn.Parameter(torch.zeros(n_features))
        self.value_bias = nn.Parameter(torch.zeros(n_features))
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, embeddings: torch.Tensor, x: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, d) each, what scores and values are made of, from embeddings and hidden states x (n, t, d)."""
        mask = (torch.ones_like(x[..., 0]) if attention_mask is None else attention_mask.to(x.dtype)).unsqueeze(-1)
        # A mean of many vectors is short; T5's norm is of length only.
        bag, mean = (nn.functional.rms_norm((y * mask).sum(dim=1), y.shape[-1:]) for y in (embeddings, x))
        cell = torch.relu(self.cell(self.dropout(torch.cat([x[:, 0], mean, bag], dim=-1)))) + bag
        return self.score(cell), self.value(cell)


@dataclass
class TargetTable:
    """What a set head compares cells with: embeddings (f, d) and biases (f,) of the target features."""

    embeddings: torch.Tensor
    score_bias: torch.Tensor
    value_bias: torch.Tensor

    def chunks(self, n_cells: int) -> list["TargetTable"]:
        """Parts of the features whose scores for so many cells may be held at once."""
        size = max(SCORES_AT_ONCE // max(n_cells, 1), 1)
        parts = zip(self.embeddings.split(size), self.score_bias.split(size), self.value_bias.split(size), strict=True)
        return [TargetTable(*part) for part in parts]

    def scores(self, z: torch.Tensor) -> torch.Tensor:
        """(n, f) scores of (n, d)."""
        return linear(z, self.embeddings.to(z.dtype), self.score_bias.to(z.dtype))

    def values(self, z: torch.Tensor) -> torch.Tensor:
        """(n, f) values of (n, d)."""
        return linear(z, self.embeddings.to(z.dtype), self.value_bias.to(z.dtype))


def summed_losses(
    table: TargetTable,
    z: torch.Tensor,
    z_value: torch.Tensor,
    present: torch.Tensor | None,
    values: torch.Tensor | None,
    gammas: tuple[float, float, float],
    value_weight: float,
) -> torch.Tensor:
    """Sum over cells and features of asymmetric loss and weighted squared error, a chunk of features at a time.

    present, values  (n, f) or None, which leaves out that part
    gammas           gamma_positive, gamma_negative, margin
    """

    def loss_of(
        table: TargetTable,
        z: torch.Tensor,
        z_value: torch.Tensor,
        present: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> torch.Tensor:
        total = z.new_zeros((), dtype=torch.float32)
        if present is not None:
            total = total + asymmetric_loss(table.scores(z), present, *gammas).sum()
        if values is not None:
            total = total + value_weight * (table.values(z_value).float() - values).square().sum()
        return total

    chunks = table.chunks(len(z))
    if len(chunks) == 1:
        return loss_of(table, z, z_value, present, values)
    total, start = z.new_zeros((), dtype=torch.float32), 0
    for chunk in chunks:
        part = slice(start, start + len(chunk.score_bias))
        start = part.stop
        known = [None if t is None else t[:, part] for t in (present, values)]
        # Scores are computed anew in the backward pass rather than held.
        total = total + checkpoint(loss_of, chunk, z, z_value, *known, use_reentrant=False)  # type: ignore[operator]
    return total


@torch.no_grad()
def best_features(
    table: TargetTable,
    z: torch.Tensor,
    z_value: torch.Tensor,
    *,
    threshold: float | None,
    top_k: int | None,
    values: bool,
) -> SparseFeatures:
    """Of each cell the features with the highest probabilities (`top_k`), or with those from `threshold` on.

    Returns  features ascending within a cell, and their probabilities, or values where `values` is set
    """
    found: list[tuple[torch.Tensor, ...]] = []
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    start = 0
    for chunk in table.chunks(len(z)):
        probabilities = torch.sigmoid(chunk.scores(z).float())
        data = chunk.values(z_value).float() if values else probabilities
        if top_k is None:
            assert threshold is not None
            rows, columns = (probabilities >= threshold).nonzero(as_tuple=True)
            found.append((rows, columns + start, data[rows, columns]))
        else:
            columns = torch.arange(start, start + probabilities.shape[1], device=z.device).expand_as(probabilities)
            if best is not None:
                probabilities = torch.cat([best[0], probabilities], dim=1)
                columns = torch.cat([best[1], columns], dim=1)
                data = torch.cat([best[2], data], dim=1)
            chosen = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1).indices
            best = tuple(t.gather(1, chosen) for t in (probabilities, columns, data))  # type: ignore[assignment]
        start += chunk.score_bias.shape[0]
    if best is not None:
        rows = torch.arange(len(z), device=z.device).unsqueeze(1).expand_as(best[1])
        found = [(rows.flatten(), best[1].flatten(), best[2].flatten())]
    rows, columns, data = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = (rows * start + columns).argsort()
    offsets = torch.zeros(len(z) + 1, dtype=torch.int64, device=z.device)
    offsets[1:] = torch.bincount(rows, minlength=len(z)).cumsum(0)
    return SparseFeatures(columns[order], data[order], offsets)
