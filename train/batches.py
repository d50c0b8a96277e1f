"""Which examples make each optimizer step, and how a step is shared out among processes.

A step is a fixed number of examples whatever the number of processes or their memory; it is then cut into micro-batches
that fit a token budget, the same number for every process. So the batch size is a matter of optimization and the token
budget one of memory, and the loss curve depends on the first only.

Processes wait for each other once a step (DDP) or at every layer (FSDP, ZeRO-3), so the slowest sets the pace: they get
equal shares of a step's tokens, not of its cells. (Attention computes with the square of a cell's length, but weighing
cells by that changes nothing: the heaviest share of a step's compute is within 2% of the mean either way, for 2 to 12
processes and lengths that are spread log-normally.)
"""

import heapq
from dataclasses import dataclass

import numpy as np

# Steps whose examples are sorted by length together, at the most
MEGABATCH_STEPS = 50
# Blocks of examples that are mixed at any time, where examples come in blocks
WINDOW = 16


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass. `counts` is False for a stand-in that only keeps the processes in step."""

    examples: tuple[int, ...]
    counts: bool = True


class EpochPlan:
    """The steps of one epoch: a pure function of the arguments, so that a resumed run makes the same.

    lengths      (examples,) tokens of each example
    batch_size   examples of a step, over all processes
    max_tokens   tokens of a micro-batch at the most (a longer single example still makes one)
    packed       True: the collator lays examples end to end, and a micro-batch has as many tokens as they have;
                 False: it pads them, to longest x count
    shuffle      False keeps the order of the examples (evaluation)
    blocks       (examples,) number of the block that each is read with, where it is dear to read examples one by one:
                 blocks are then shuffled, and the examples of `WINDOW` of them at any time

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
        packed: bool = False,
        seed: int = 0,
        epoch: int = 0,
        n_processes: int = 1,
        shuffle: bool = True,
        blocks: np.ndarray | None = None,
    ):
        self.lengths, self.packed = np.asarray(lengths), packed
        self.batch_size, self.max_tokens, self.n_processes = batch_size, max_tokens, n_processes
        n = len(self.lengths)
        if shuffle:
            rng = np.random.default_rng([seed, epoch])
            order = rng.permutation(n) if blocks is None else _shuffled_blocks(blocks, rng)
            self.order = _length_grouped(order, self.lengths, batch_size)
        else:
            self.order = np.arange(n)

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def step(self, i: int) -> list[list[MicroBatch]]:
        """Micro-batches of step i: one list a process, all of equal length."""
        examples = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        examples = examples[np.argsort(-self.lengths[examples], kind="stable")]
        shares = self._packed(examples) if self.packed else self._padded(examples)
        n_micro = max(len(share) for share in shares)
        # Fewer examples than places: a stand-in of the shortest example, which counts for nothing.
        stand_in = MicroBatch((int(examples[-1]),), counts=False)
        return [
            [MicroBatch(tuple(part.tolist())) for part in share] + [stand_in] * (n_micro - len(share))
            for share in shares
        ]

    def _packed(self, examples: np.ndarray) -> list[list[np.ndarray]]:
        """Shares of about equal tokens, each cut into equally many micro-batches of about equal tokens."""
        shares = [examples[part] for part in balanced(self.lengths[examples], self.n_processes)]
        n_micro = max(1, *(-(-self._tokens(share) // self.max_tokens) for share in shares))
        while True:
            cut = [[share[part] for part in balanced(self.lengths[share], n_micro) if part] for share in shares]
            if all(self._fits(part) for share in cut for part in share):
                return cut
            n_micro += 1

    def _padded(self, examples: np.ndarray) -> list[list[np.ndarray]]:
        """Runs of about equal length, so that little is padded, dealt out in turn."""
        per_process = 1
        while True:
            parts = _runs_of_equal_size(self.lengths[examples], self.n_processes * per_process)
            fit = all(self._fits(examples[part]) for part in parts)
            if fit or per_process * self.n_processes >= len(examples):
                return [
                    [examples[part] for part in parts[rank :: self.n_processes]] for rank in range(self.n_processes)
                ]
            per_process += 1

    def _fits(self, examples: np.ndarray) -> bool:
        return len(examples) == 1 or self._tokens(examples) <= self.max_tokens

    def _tokens(self, examples: np.ndarray) -> int:
        lengths = self.lengths[examples]
        if self.packed or not len(lengths):
            return int(lengths.sum())
        return int(lengths.max()) * len(lengths)


def balanced(weights: np.ndarray, n_parts: int) -> list[list[int]]:
    """Items dealt into parts of about equal weight, heaviest item first, each to the part that is lightest so far.

    weights  (items,) not negative
    Returns  n_parts lists of indices, the heaviest part first; empty where there are fewer items
    Source   Graham 1969, "Bounds on multiprocessing timing anomalies": the heaviest part weighs less than 4/3 of the
             best possible
    """
    # Of equally light parts the one with fewest items, so that items without weight are spread too.
    heap = [(0.0, 0, part) for part in range(n_parts)]
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    for item in np.argsort(-weights, kind="stable").tolist():
        weight, count, part = heap[0]
        parts[part].append(item)
        heapq.heapreplace(heap, (weight + float(weights[item]), count + 1, part))
    return [parts[part] for _, _, part in sorted(heap, key=lambda entry: (-entry[0], -entry[1], entry[2]))]


def _shuffled_blocks(blocks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All examples, each at most `WINDOW` blocks later than its block's turn."""
    turn = rng.permutation(int(blocks.max(initial=-1)) + 1)
    return np.argsort(turn[blocks] + WINDOW * rng.random(len(blocks)), kind="stable")


def _length_grouped(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    n = len(lengths)
    megabatch = max(min(n // (batch_size * 4), MEGABATCH_STEPS), 1) * batch_size
    for start in range(0, n, megabatch):
        part = order[start : start + megabatch]
        order[start : start + megabatch] = part[np.argsort(-lengths[part], kind="stable")]
    if n:
        longest = int(np.argmax(lengths[order]))
        order[0], order[longest] = order[longest], order[0]
    return order


def _runs_of_equal_size(lengths: np.ndarray, n_parts: int) -> list[slice]:
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
