"""The collated micro-batches of each step, on this process."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from .batches import EpochPlan, MicroBatch, steps_per_epoch
from .loop_config import LoopConfig

Collate = Callable[[Sequence[dict[str, Any]], Sequence[Sequence[int]]], dict[str, Any]]


def batches_of_steps(
    examples: Any,
    lengths: np.ndarray,
    collate: Collate,
    config: LoopConfig,
    accelerator: Accelerator,
    first_step: int,
    n_steps: int,
    *,
    packed: bool,
) -> Iterator[list[tuple[MicroBatch, dict[str, Any]]]]:
    """This process's micro-batches of each step from `first_step` on."""
    n_an_epoch = steps_per_epoch(len(lengths), config.batch_size)
    step = first_step
    while step < n_steps:
        epoch, position = divmod(step, n_an_epoch)
        last = min(n_an_epoch, position + n_steps - step)
        plan = EpochPlan(
            lengths,
            batch_size=config.batch_size,
            max_tokens=config.max_tokens,
            packed=packed,
            seed=config.seed,
            epoch=epoch,
            n_processes=accelerator.num_processes,
            blocks=getattr(examples, "block_of_example", None),
        )
        if hasattr(examples, "follow"):
            examples.follow(plan.order[position * config.batch_size :])
        shards = _StepBatches(examples, collate, plan, (config.seed, epoch), accelerator.process_index)
        yield from DataLoader(
            shards,
            batch_size=None,
            sampler=range(position, last),
            num_workers=config.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            # An own generator: the loader would otherwise draw from the one that dropout uses, and a resumed run
            # differ.
            generator=torch.Generator(),
        )
        step += last - position


class _StepBatches(Dataset):
    """Maps a step to this process's collated micro-batches."""

    def __init__(self, examples: Any, collate: Collate, plan: EpochPlan, key: tuple[int, int], rank: int):
        self.examples, self.collate, self.plan, self.key, self.rank = examples, collate, plan, key, rank

    def __getitem__(self, step: int) -> list[tuple[MicroBatch, dict[str, Any]]]:
        return [(m, collated(self.examples, self.collate, m, self.key)) for m in self.plan.step(step)[self.rank]]


def collated(examples: Any, collate: Collate, micro: MicroBatch, key: tuple[int, int]) -> dict[str, Any]:
    indices = list(micro.examples)
    fetch = getattr(examples, "__getitems__", None)
    rows = fetch(indices) if fetch is not None else [examples[i] for i in indices]
    return collate(rows, [(*key, i) for i in indices])


def labelled_items(batch: dict[str, Any]) -> int:
    if "labels" in batch and not batch["labels"].is_floating_point():
        return int((batch["labels"] != -100).sum())
    return len(next(iter(batch.values())))


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
