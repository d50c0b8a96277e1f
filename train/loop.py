"""The training loop of every method: data, forward, backward, clip, step, log, validate, save.

A model returns `.loss`, the mean over its labelled items; a collator turns examples into a batch. The loop weighs each
micro-batch by its labelled items, so that accumulation and several processes give the gradient of one large batch.
Every step is a pure function of seed, epoch and position, so a run that was killed goes on to the same losses.
"""

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from cellglot.onednn import OneDNNLinear

from .batches import EpochPlan, MicroBatch, steps_per_epoch
from .best_weights import BestWeights
from .checkpoint import list_checkpoints, load_state, load_weights, save_checkpoint
from .config import write_run_record
from .interrupt import Interrupt
from .loop_config import LoopConfig, RunError, check_same_options, check_same_run
from .metrics_log import MetricsLog
from .optimization import learning_rate_at
from .step_batches import Collate, batches_of_steps, collated, labelled_items, on_device
from .strategy import Strategy, make_strategy

logger = logging.getLogger(__name__)


@dataclass
class TrainingResult:
    """How a run ended: `metrics` are of the last validation, or of the best with early stopping, at `best_step`."""

    step: int
    seconds: float
    metrics: dict[str, float]
    best_step: int | None = None


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The Accelerator of a run, with trackers and CPU threads set.

    Raises  ValueError for a tracker or a strategy that is not installed
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import is_deepspeed_available, is_tensorboard_available

    unknown = [name for name in config.trackers if name not in [str(t) for t in LOGGER_TYPE_TO_CLASS]]
    if unknown:
        raise ValueError(
            f"Unknown tracker {unknown[0]!r}; accelerate knows {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}."
        )
    if "tensorboard" in config.trackers and not is_tensorboard_available():
        raise ValueError("The tracker 'tensorboard' is not installed: pip install tensorboard")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not is_deepspeed_available():
        raise ValueError('accelerate is set to DeepSpeed, which is not installed: pip install "cellglot[deepspeed]"')
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,  # type: ignore[arg-type]
        project_dir=config.output,
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "accelerate is set to gradient_accumulation_steps="
            f"{accelerator.gradient_accumulation_steps}, but this loop accumulates by itself: set batch_size and "
            "max_tokens, and accelerate's to 1."
        )
    if accelerator.device.type == "cpu":
        # `accelerate launch` sets OMP_NUM_THREADS=1, which would leave most of a CPU idle.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))
        # Cores this process may use, where the system can tell (macOS cannot)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(config.cpu_threads or max(cores // local, 1))
    return accelerator


def train(
    model: torch.nn.Module,
    examples: Any,
    lengths: np.ndarray,
    collate: Collate,
    config: LoopConfig,
    accelerator: Accelerator,
    *,
    validate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    count_items: Callable[[dict[str, Any]], int] | None = None,
    facts: dict[str, Any] | None = None,
    packed: bool = False,
) -> TrainingResult:
    """Trains `model` in place and writes checkpoints and `metrics.jsonl` to the output folder.

    examples     map-style data set; examples[i] or examples.__getitems__(indices) give dictionaries
    lengths      (examples,) tokens of each, or ones
    collate      (examples, keys) -> batch of tensors; a key (seed, epoch, example) seeds what is random about an
                 example
    validate     called at `eval_every` and at the end with the model in evaluation mode; returns figures to log
    count_items  labelled items of a batch, over which the model's loss is a mean; by default labels other than -100, or
                 the number of examples
    facts        what else run.json should say (data, device)
    packed       whether the collator lays examples end to end rather than padding them (see EpochPlan)
    Raises       RunError for a checkpoint of another run; FloatingPointError when the loss is no longer finite;
                 SystemExit(130) after Ctrl-C, with a checkpoint saved
    """
    output = Path(config.output)
    n_steps_an_epoch = steps_per_epoch(len(lengths), config.batch_size)
    n_steps = config.max_steps or math.ceil(config.epochs * n_steps_an_epoch)
    checkpoints = list_checkpoints(output / "checkpoints")
    resumed = checkpoints[-1] if config.resume and checkpoints else None
    if resumed is not None:
        check_same_run(resumed, n_steps, config)
        load_weights(model, resumed)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    strategy = make_strategy(model, accelerator, config)
    # Each process has its own dropout; the weights are those of process 0.
    set_seed(config.seed + accelerator.process_index)

    log = MetricsLog(output, accelerator, config)
    best = BestWeights(output, config.patience, accelerator) if config.patience and validate is not None else None
    step, seconds_before = 0, 0.0
    if resumed is not None:
        state = load_state(accelerator, resumed, strategy)
        step, seconds_before = state["step"], state["seconds"]
        if best is not None:
            best.load_state(state["best"])
        accelerator.print(f"Resuming at step {step:,} of {n_steps:,} from {resumed}")
    if accelerator.is_main_process:
        write_run_record(output / "run.json", config, **(facts or {}))
        if config.warmup_steps > n_steps:
            logger.warning(
                "The warm-up of %g steps is longer than the run of %d: the learning rate never gets to %g. "
                "Pass --warmup_steps 0.1 for a tenth of the run.",
                config.warmup_steps,
                n_steps,
                config.learning_rate,
            )
    log.start(step)
    started = time.perf_counter()

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    def save() -> Path:
        log.flush()
        state = {"step": step, "n_steps": n_steps, "seconds": seconds(), "config": dataclasses.asdict(config)}
        if best is not None:
            state["best"] = best.state()
        return save_checkpoint(accelerator, output / "checkpoints", strategy, state, config.keep_last)

    def run_validation() -> dict[str, float]:
        if validate is None:
            return {}
        evaluated = strategy.model_to_evaluate()
        evaluated.eval()
        with torch.no_grad():
            figures = validate(evaluated)
        evaluated.train()
        log.flush()
        log.write(step, figures)
        if best is not None:
            best.update(step, figures, strategy.whole_model)
        return figures

    # Neither a compiled model nor layers that are computed anew in the backward pass would stay with oneDNN.
    onednn = accelerator.device.type == "cpu" and not (config.compile or config.gradient_checkpointing)
    interrupt = Interrupt()
    metrics: dict[str, float] = {}
    validated_at = -1
    strategy.model.train()
    bar = tqdm(total=n_steps, initial=step, desc="train", unit="step", disable=not accelerator.is_main_process)
    with interrupt, bar:
        # A run that had stopped early before it was resumed has no steps left.
        last_step = step if best is not None and best.exhausted else n_steps
        steps = batches_of_steps(examples, lengths, collate, config, accelerator, step, last_step, packed=packed)
        for batches in steps:
            rate = learning_rate_at(step, n_steps, config)
            for group in strategy.optimizer.param_groups:
                group["lr"] = rate
            loss, norm, stop = _optimizer_step(
                strategy, batches, accelerator, count_items or labelled_items, interrupt.requested, onednn
            )
            step += 1
            log.add(step, loss, norm, rate)
            bar.update()
            if step % config.log_every == 0 or step == n_steps:
                bar.set_postfix(loss=f"{log.flush():.3f}")
            if config.eval_every and step % config.eval_every == 0:
                metrics, validated_at = run_validation(), step
                if accelerator.is_main_process:
                    bar.write("  ".join([f"step {step:,}", *(f"{k} {v:.4f}" for k, v in metrics.items())]))
            if stop:
                path = save()
                bar.close()
                accelerator.print(f"Stopped at step {step:,}; saved {path}. Go on with the same command and --resume.")
                close(accelerator, strategy)
                raise SystemExit(130)
            stopped_early = best is not None and best.exhausted
            if step % config.save_every == 0 or step == n_steps or stopped_early:
                save()
            if stopped_early:
                break
        if validated_at != step and not (best is not None and best.exhausted):
            metrics = run_validation()
    log.flush()
    # A sharded model was trained as a copy.
    model = strategy.whole_model().to(accelerator.device)
    if best is not None:
        best.restore(model)
        accelerator.print(f"Best validation at step {best.step:,} of {step:,}; its weights are kept.")
        return TrainingResult(step, seconds(), best.metrics, best.step)
    return TrainingResult(step, seconds(), metrics)


def close(accelerator: Accelerator, *prepared: Any) -> None:
    """Ends trackers and process group. Memory is freed first, or a process in ten dies while it exits."""
    accelerator.free_memory(*prepared)
    accelerator.end_training()


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module,
    examples: Any,
    lengths: np.ndarray,
    collate: Collate,
    accelerator: Accelerator,
    *,
    max_tokens: int,
    batch_size: int = 256,
    seeds: Sequence[int] = (0,),
    count_items: Callable[[dict[str, Any]], int] | None = None,
    packed: bool = False,
) -> float:
    """Loss per labelled item over a data set, the same whatever the number of processes. One pass for each seed.

    batch_size  examples that are dealt to the processes together

    All processes call the model equally often, as FSDP2 and ZeRO-3 need.
    """
    total = torch.zeros(2, dtype=_widest(accelerator.device), device=accelerator.device)
    plan = EpochPlan(
        lengths,
        batch_size=batch_size,
        max_tokens=max_tokens,
        packed=packed,
        n_processes=accelerator.num_processes,
        shuffle=False,
    )
    for seed in seeds:
        for i in range(len(plan)):
            for micro in plan.step(i)[accelerator.process_index]:
                batch = collated(examples, collate, micro, (seed, 0))
                n = (count_items or labelled_items)(batch) if micro.counts else 0
                loss = model(**on_device(batch, accelerator.device)).loss
                if n:
                    total += torch.stack([loss.detach().to(total.dtype) * n, torch.full_like(total[0], n)])
    total = accelerator.reduce(total, "sum")
    return float(total[0] / total[1])


def _optimizer_step(
    strategy: Strategy,
    batches: list[tuple[MicroBatch, dict[str, Any]]],
    accelerator: Accelerator,
    count_items: Callable[[dict[str, Any]], int],
    stop_requested: bool,
    onednn: bool,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """One step over this process's micro-batches: (mean loss of the whole step, gradient norm, stop agreed by all)."""
    device = accelerator.device
    counts = [count_items(batch) if micro.counts else 0 for micro, batch in batches]
    shared = torch.tensor([sum(counts), float(stop_requested)], dtype=_widest(device), device=device)
    if accelerator.num_processes > 1:
        shared = accelerator.reduce(shared, "sum")
    n_items = shared[0].clamp(min=1)
    total = torch.zeros((), dtype=_widest(device), device=device)
    for k, ((_, batch), count) in enumerate(zip(batches, counts, strict=True)):
        linear = OneDNNLinear() if onednn else contextlib.nullcontext()
        with strategy.micro_batch(last=k == len(batches) - 1), linear:
            loss = strategy.model(**on_device(batch, device)).loss * (count / n_items).float()
            # Processes' gradients are averaged, but each loss is already its share of the whole step.
            strategy.backward(loss * accelerator.num_processes)
        total += loss.detach()
    norm = strategy.step()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
    return total, norm, bool(shared[1])  # type: ignore[return-value]


def _widest(device: torch.device) -> torch.dtype:
    """The type that losses are summed in: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


__all__ = [
    "LoopConfig",
    "RunError",
    "TrainingResult",
    "check_same_options",
    "close",
    "learning_rate_at",
    "make_accelerator",
    "mean_loss",
    "train",
]
