"""Masked-gene batches: 15% of a cell's genes selected; 80% become <mask>, 10% a random gene, 10% stay.

Which genes are selected depends on the seed, the epoch and the cell only, never on the batch or the process, so that a
resumed run, another batch size or another number of processes masks the same genes. Special tokens are neither selected
nor drawn as replacements. (The original masks <cls> and <eos> as if they were genes: `include_special_tokens`.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .packing import packed_cells

IGNORED_LABEL = -100


def mask_genes(
    input_ids: np.ndarray,
    rng: np.random.Generator,
    *,
    gene_token_ids: np.ndarray,
    mask_token_id: int,
    probability: float = 0.15,
    include_special_tokens: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """One cell's tokens with genes masked, and the labels.

    input_ids       (tokens,) of one cell; left unchanged
    gene_token_ids  (genes,) ascending: the tokens that are genes
    Returns         (tokens,) masked ids and (tokens,) labels, -100 where nothing is to be predicted; int64 both
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    # Special tokens have the ids below the first gene.
    candidates = np.ones(len(ids), dtype=bool) if include_special_tokens else ids >= gene_token_ids[0]
    # All draws are made for every token, so that the selection of one never shifts those of others.
    select, kind, replacement = (
        rng.random(len(ids)),
        rng.random(len(ids)),
        rng.integers(len(gene_token_ids), size=len(ids)),
    )
    selected = candidates & (select < probability)
    labels = np.where(selected, ids, IGNORED_LABEL)
    masked = np.where(selected & (kind < 0.8), mask_token_id, ids)
    masked = np.where(selected & (kind >= 0.8) & (kind < 0.9), gene_token_ids[replacement], masked)
    return masked, labels


@dataclass
class MaskedGeneCollator:
    """Packs cells into a batch with masked genes.

    tokenizer  the `RankValueTokenizer` that made the cells
    """

    tokenizer: Any
    probability: float = 0.15
    include_special_tokens: bool = False

    def __post_init__(self) -> None:
        self._gene_token_ids = np.asarray(self.tokenizer.gene_token_ids)

    def __call__(self, rows: Sequence[dict[str, Any]], keys: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What `packed_cells` returns, and labels (1, tokens of all cells).

        rows  one dictionary with input_ids a cell
        keys  one key of integers a cell (seed, epoch, cell): all the randomness there is
        """
        import torch

        masked = [
            mask_genes(
                row["input_ids"],
                np.random.default_rng(key),
                gene_token_ids=self._gene_token_ids,
                mask_token_id=self.tokenizer.mask_token_id,
                probability=self.probability,
                include_special_tokens=self.include_special_tokens,
            )
            for row, key in zip(rows, keys, strict=True)
        ]
        labels = np.concatenate([labels for _, labels in masked])
        return packed_cells([ids for ids, _ in masked]) | {"labels": torch.from_numpy(labels).unsqueeze(0)}
