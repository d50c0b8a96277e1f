"""Generation that stays within what can be true: features of the target modality, none twice."""

import torch
from transformers import LogitsProcessor

from .configuration_multiome import MultiomeT5Config


class TargetFeatures(LogitsProcessor):
    """Leaves each row the features of its task's target that it has not written yet, and the end.

    With expression bins, a bin follows each gene. It keeps no state, so beams may be reordered between its calls.

    task_token_ids  (cells,) the task token of each cell; the rows of beams or samples of a cell follow each other
    """

    def __init__(self, config: MultiomeT5Config, task_token_ids: torch.Tensor):
        assert isinstance(config.eos_token_id, int)
        self.eos_token_id, device = config.eos_token_id, task_token_ids.device
        tokens = torch.arange(config.vocab_size, device=device)
        self.bins = None
        if config.num_bins and config.first_bin_token_id is not None:
            self.bins = slice(config.first_bin_token_id, config.first_bin_token_id + config.num_bins)
            self.genes = config.target_of(config.atac2gex_token_id)
        kinds, kind_of_cell = task_token_ids.unique(return_inverse=True)
        blocked = []
        for task in kinds.tolist():
            first, n = config.target_of(task)
            blocked.append((tokens < first) | (tokens >= first + n))
        # One row for each task at hand, and which one a cell takes
        self.blocked, self.kind_of_cell = torch.stack(blocked), kind_of_cell

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores (rows, vocabulary) of the next token, -inf where it may not be; input_ids (rows, tokens so far)."""
        rows_per_cell = len(scores) // len(self.kind_of_cell)
        blocked = self.blocked[self.kind_of_cell.repeat_interleave(rows_per_cell)]
        blocked.scatter_(1, input_ids, True)
        blocked[:, self.eos_token_id] = False
        if self.bins is not None:
            first, n = self.genes
            after_gene = (input_ids[:, -1] >= first) & (input_ids[:, -1] < first + n)
            blocked |= after_gene.unsqueeze(1)
            blocked[:, self.bins] = ~after_gene.unsqueeze(1)
        return scores.masked_fill(blocked, -torch.inf)  # type: ignore[return-value]


__all__ = ["TargetFeatures"]
