"""Which examples make each optimizer step, and how a step is shared out among processes.

A step is a fixed number of examples whatever the number of processes or their memory; it is then cut into micro-batches
that fit a token budget, the same number for every process. So the batch size is a matter of optimization and the token
budget one of memory, and the loss curve depends on the first only.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass. `counts` is False for a stand-in that only keeps the processes in step."""

    examples: tuple[int, ...]
    counts: bool = True


class EpochPlan:
    """The steps of one epoch: a pure function of the arguments, so that a resumed run makes the same.

    lengths      (examples,) tokens of each example
    batch_size   examples of a step, over all processes
    max_tokens   padded tokens of a micro-batch at the most (a longer single example still makes one)
    shuffle      False keeps the order of the examples (evaluation)

    Shuffled examples are grouped by length as transformers' LengthGroupedSampler does: megabatches of
    min(N // 4B, 50) x B examples, sorted by length in each, and the longest example first of all, so that a lack of
    memory shows at once.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        max_tokens: int,
        seed: int = 0,
        epoch: int = 0,
        n_processes: int = 1,
        shuffle: bool = True,
    ):
        self.lengths = np.asarray(lengths)
        self.batch_size, self.max_tokens, self.n_processes = batch_size, max_tokens, n_processes
        n = len(self.lengths)
        if shuffle:
            self.order = _length_grouped(self.lengths, batch_size, np.random.default_rng([seed, epoch]))
        else:
            self.order = np.arange(n)

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def step(self, i: int) -> list[list[MicroBatch]]:
        """Micro-batches of step i: one list a process, all of equal length."""
        examples = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        examples = examples[np.argsort(-self.lengths[examples], kind="stable")]
        per_process = 1
        while True:
            parts = _split_evenly(self.lengths[examples], self.n_processes * per_process)
            cost = max(int(self.lengths[examples[part][0]]) * len(examples[part]) for part in parts)
            if cost <= self.max_tokens or per_process * self.n_processes >= len(examples):
                break
            per_process += 1
        batches = [MicroBatch(tuple(examples[part].tolist())) for part in parts]
        # Fewer examples than places: a stand-in of the shortest example, which counts for nothing.
        while len(batches) < self.n_processes * per_process:
            batches.append(MicroBatch((int(examples[-1]),), counts=False))
        return [batches[rank :: self.n_processes] for rank in range(self.n_processes)]


def _length_grouped(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    n = len(lengths)
    order = rng.permutation(n)
    megabatch = max(min(n // (batch_size * 4), 50), 1) * batch_size
    for start in range(0, n, megabatch):
        part = order[start : start + megabatch]
        order[start : start + megabatch] = part[np.argsort(-lengths[part], kind="stable")]
    if n:
        longest = int(np.argmax(lengths[order]))
        order[0], order[longest] = order[longest], order[0]
    return order


def _split_evenly(lengths: np.ndarray, n_parts: int) -> list[slice]:
    """At most n_parts runs of descending lengths whose largest padded size (first x count) is as small as can be."""

    def runs(capacity: int) -> list[slice]:
        parts, start = [], 0
        while start < len(lengths):
            stop = min(start + max(capacity // max(int(lengths[start]), 1), 1), len(lengths))
            parts.append(slice(start, stop))
            start = stop
        return parts

    low, high = 1, max(int(lengths[0]), 1) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(runs(middle)) <= n_parts:
            high = middle
        else:
            low = middle + 1
    return runs(low)


def steps_per_epoch(n_examples: int, batch_size: int) -> int:
    """Optimizer steps in one epoch, the last one maybe smaller."""
    return -(-n_examples // batch_size)
