"""The training loop of every method: data, forward, backward, clip, step, log, validate, save.

A model returns `.loss`, the mean over its labelled items; a collator turns examples into a batch. The loop weighs each
micro-batch by its labelled items, so that accumulation and several processes give the gradient of one large batch.
Every step is a pure function of seed, epoch and position, so a run that was killed goes on to the same losses.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .batches import EpochPlan, MicroBatch, steps_per_epoch
from .best_weights import BestWeights
from .checkpoint import list_checkpoints, load_checkpoint, remove_partial, save_checkpoint
from .config import option, write_run_record
from .metrics_log import MetricsLog

logger = logging.getLogger(__name__)

Collate = Callable[[Sequence[dict[str, Any]], Sequence[Sequence[int]]], dict[str, Any]]


@dataclass
class LoopConfig:
    """What the loop needs to know, whatever the method."""

    output: str = option("runs/run", "folder of the run: checkpoints, log, model")
    epochs: float = option(3.0, "passes over the training examples")
    max_steps: int | None = option(None, "optimizer steps, in place of epochs")
    batch_size: int = option(144, "examples of an optimizer step, over all processes")
    max_tokens: int = option(32768, "padded tokens of one forward pass on one process; larger steps are accumulated")
    learning_rate: float = option(1e-3, "maximum learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "learning rate after the warm-up")
    warmup_steps: float = option(10_000, "steps of linear warm-up; below 1, a share of all steps")
    weight_decay: float = option(0.001, "AdamW weight decay, for matrices and embeddings")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "arithmetic of the forward pass; absent: as `accelerate launch` was told, else float32"
    )
    gradient_checkpointing: bool = option(False, "recomputes activations in the backward pass, to save memory")
    seed: int = option(0, "seed of initialization, data order, masking and dropout")
    log_every: int = option(10, "steps between lines of the progress bar and the trackers")
    eval_every: int = option(0, "steps between validations; 0: only at the end")
    patience: int = option(
        0, "validations without a lower loss before training stops; the best weights are kept; 0: no early stopping"
    )
    save_every: int = option(1000, "steps between checkpoints")
    keep_last: int = option(2, "checkpoints to keep")
    resume: bool = option(False, "goes on from the last checkpoint of the output folder")
    overwrite: bool = option(False, "removes an earlier run from the output folder")
    trackers: list[str] = option([], "experiment trackers: tensorboard, wandb, mlflow, ... (any that accelerate knows)")
    num_workers: int = option(0, "data loader processes")
    cpu_threads: int | None = option(None, "threads of each process on CPU; all cores shared out if absent")

    def __post_init__(self) -> None:
        positive = (
            "batch_size",
            "max_tokens",
            "log_every",
            "save_every",
            "keep_last",
            "learning_rate",
            "max_grad_norm",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}.")
        if self.warmup_steps < 0 or self.eval_every < 0 or self.patience < 0:
            raise ValueError("warmup_steps, eval_every and patience cannot be negative.")
        if self.patience and not self.eval_every:
            raise ValueError("patience counts validations: set eval_every, the steps between them, too.")
        for name in ("epochs", "max_steps", "cpu_threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, found {value}.")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other.")


# Options that may differ when a run is resumed, because the losses do not depend on them
FREE_OPTIONS = {"output", "resume", "overwrite", "max_tokens", "log_every", "eval_every", "save_every", "keep_last"}
FREE_OPTIONS |= {"trackers", "num_workers", "cpu_threads", "gradient_checkpointing", "report", "cell_type", "baselines"}


class RunError(ValueError):
    """A run that cannot go on as asked."""


@dataclass
class TrainingResult:
    """How a run ended: `metrics` are of the last validation, or of the best with early stopping, at `best_step`."""

    step: int
    seconds: float
    metrics: dict[str, float]
    best_step: int | None = None


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The Accelerator of a run, with trackers and CPU threads set.

    Raises  ValueError for a tracker that is not installed
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import is_tensorboard_available

    unknown = [name for name in config.trackers if name not in [str(t) for t in LOGGER_TYPE_TO_CLASS]]
    if unknown:
        raise ValueError(
            f"Unknown tracker {unknown[0]!r}; accelerate knows {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}."
        )
    if "tensorboard" in config.trackers and not is_tensorboard_available():
        raise ValueError("The tracker 'tensorboard' is not installed: pip install tensorboard")
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


def prepare_output(config: LoopConfig, accelerator: Accelerator) -> Path:
    """The output folder, checked: empty, or resumed, or an earlier run's that is put aside until `keep_output`.

    Raises  FileExistsError if it holds a run that has begun and neither resume nor overwrite is set, or other files
    """
    output = Path(config.output)
    if accelerator.is_main_process:
        holds_run = (output / "run.json").exists()
        if holds_run and config.overwrite:
            shutil.rmtree(_put_aside(output), ignore_errors=True)
            os.rename(output, _put_aside(output))
        elif holds_run and not config.resume and any(output.glob("**/metrics.jsonl")):
            # (A run that never came to train, for an error in its options, gives way to the corrected command.)
            raise FileExistsError(
                f"{output} holds an earlier run. Pass --resume to go on with it, --overwrite to start anew, or another "
                "--output."
            )
        elif not holds_run and output.exists() and any(output.iterdir()):
            raise FileExistsError(f"{output} holds files that are no run of this script. Pass another --output.")
        output.mkdir(parents=True, exist_ok=True)
        remove_partial(output / "checkpoints")
        if not (output / "run.json").exists():
            # From here on the folder is known as a run, even if this process is killed a moment later.
            write_run_record(output / "run.json", config)
    accelerator.wait_for_everyone()
    return output


def keep_output(output: Path, accelerator: Accelerator) -> None:
    """Removes the run that was put aside: data and options of the new one are sound."""
    if accelerator.is_main_process:
        shutil.rmtree(_put_aside(output), ignore_errors=True)


def abandon_output(output: Path, accelerator: Accelerator) -> None:
    """Undoes `prepare_output` after an error in data or options: an earlier run comes back."""
    if not accelerator.is_main_process:
        return
    if _put_aside(output).exists():
        shutil.rmtree(output, ignore_errors=True)
        os.rename(_put_aside(output), output)
    elif not (output / "data" / "data.json").exists() and not list_checkpoints(output / "checkpoints"):
        (output / "run.json").unlink(missing_ok=True)


def _put_aside(output: Path) -> Path:
    return output.with_name(f".replaced-{output.name}")


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
    Raises       RunError for a checkpoint of another run; FloatingPointError when the loss is no longer finite;
                 SystemExit(130) after Ctrl-C, with a checkpoint saved
    """
    output = Path(config.output)
    n_steps_an_epoch = steps_per_epoch(len(lengths), config.batch_size)
    n_steps = config.max_steps or math.ceil(config.epochs * n_steps_an_epoch)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.learning_rate, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Each process has its own dropout; the weights are those of process 0.
    set_seed(config.seed + accelerator.process_index)

    log = MetricsLog(output, accelerator, config)
    best = BestWeights(output, config.patience, accelerator) if config.patience and validate is not None else None
    step, seconds_before = 0, 0.0
    checkpoints = list_checkpoints(output / "checkpoints")
    if config.resume and checkpoints:
        check_same_run(checkpoints[-1], n_steps, config)
        state = load_checkpoint(accelerator, checkpoints[-1], model, optimizer)
        step, seconds_before = state["step"], state["seconds"]
        if best is not None:
            best.load_state(state["best"])
        accelerator.print(f"Resuming at step {step:,} of {n_steps:,} from {checkpoints[-1]}")
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
        return save_checkpoint(accelerator, output / "checkpoints", model, optimizer, state, config.keep_last)

    def run_validation() -> dict[str, float]:
        if validate is None:
            return {}
        # Not through DDP, whose processes must all call forward equally often.
        bare = accelerator.unwrap_model(model)
        bare.eval()
        with torch.no_grad():
            figures = validate(bare)
        bare.train()
        log.flush()
        log.write(step, figures)
        if best is not None:
            best.update(step, figures, bare)
        return figures

    interrupt = Interrupt()
    metrics: dict[str, float] = {}
    validated_at = -1
    model.train()
    bar = tqdm(total=n_steps, initial=step, desc="train", unit="step", disable=not accelerator.is_main_process)
    with interrupt, bar:
        # A run that had stopped early before it was resumed has no steps left.
        last_step = step if best is not None and best.exhausted else n_steps
        for batches in _steps(examples, lengths, collate, config, accelerator, step, last_step):
            rate = learning_rate_at(step, n_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, norm, stop = _optimizer_step(
                model, optimizer, batches, accelerator, config, count_items or _labelled_items, interrupt.requested
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
                close(accelerator, model, optimizer)
                raise SystemExit(130)
            stopped_early = best is not None and best.exhausted
            if step % config.save_every == 0 or step == n_steps or stopped_early:
                save()
            if stopped_early:
                break
        if validated_at != step and not (best is not None and best.exhausted):
            metrics = run_validation()
    log.flush()
    if best is not None:
        best.restore(accelerator.unwrap_model(model))
        accelerator.print(f"Best validation at step {best.step:,} of {step:,}; its weights are kept.")
        return TrainingResult(step, seconds(), best.metrics, best.step)
    return TrainingResult(step, seconds(), metrics)


def check_same_run(path: Path, n_steps: int, config: LoopConfig) -> None:
    """Raises RunError unless a checkpoint's run had the same options and number of steps."""
    state = json.loads((path / "state.json").read_text())
    check_same_options(path, state["config"], config)
    if state["n_steps"] != n_steps:
        raise RunError(
            f"{path} belongs to a run of {state['n_steps']:,} steps, this one has {n_steps:,}: the data have changed."
        )


def check_same_options(path: Path, before: dict[str, Any], config: LoopConfig) -> None:
    """Raises RunError if options that the losses depend on differ from those that something on disk was made with."""
    current = json.loads(json.dumps(dataclasses.asdict(config)))
    # Options that are newer than what is on disk had the value that is now their default.
    before = {**json.loads(json.dumps(dataclasses.asdict(type(config)()))), **before}
    free = FREE_OPTIONS - {"eval_every"} if config.patience else FREE_OPTIONS
    changed = [k for k, v in current.items() if k not in free and before[k] != v]
    if changed:
        what = ", ".join(f"{key} was {before[key]!r} and is {current[key]!r}" for key in changed[:3])
        raise RunError(f"{path} belongs to a run with other options: {what}. Resume with the same ones.")


def close(accelerator: Accelerator, *prepared: Any) -> None:
    """Ends trackers and process group. Memory is freed first, or a process in ten dies while it exits."""
    accelerator.free_memory(*prepared)
    accelerator.end_training()


def learning_rate_at(step: int, n_steps: int, config: LoopConfig) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then linear or half-cosine decay to zero, or none."""
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * n_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / math.ceil(warmup)
    left = (n_steps - step) / max(n_steps - warmup, 1)
    factor = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[config.schedule]
    return config.learning_rate * factor


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module,
    examples: Any,
    lengths: np.ndarray,
    collate: Collate,
    accelerator: Accelerator,
    *,
    max_tokens: int,
    seeds: Sequence[int] = (0,),
    count_items: Callable[[dict[str, Any]], int] | None = None,
) -> float:
    """Loss per labelled item over a data set, the same whatever the number of processes. One pass for each seed."""
    total = torch.zeros(2, dtype=_widest(accelerator.device), device=accelerator.device)
    plan = EpochPlan(
        lengths, batch_size=256, max_tokens=max_tokens, n_processes=accelerator.num_processes, shuffle=False
    )
    for seed in seeds:
        for i in range(len(plan)):
            for micro in plan.step(i)[accelerator.process_index]:
                batch = _collated(examples, collate, micro, (seed, 0))
                n = (count_items or _labelled_items)(batch) if micro.counts else 0
                loss = model(**_on_device(batch, accelerator.device)).loss if n else torch.zeros(())
                total += torch.tensor(
                    [float(loss) * n, n], dtype=_widest(accelerator.device), device=accelerator.device
                )
    total = accelerator.reduce(total, "sum")
    return float(total[0] / total[1])


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request, answered between two steps; a later one kills at once."""

    # A launcher passes a Ctrl-C on to processes that the terminal has sent it already.
    ECHO_SECONDS = 2.0

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > self.ECHO_SECONDS:
            raise KeyboardInterrupt


def _optimizer_step(
    model: torch.nn.Module,
    optimizer: Any,
    batches: list[tuple[MicroBatch, dict[str, Any]]],
    accelerator: Accelerator,
    config: LoopConfig,
    count_items: Callable[[dict[str, Any]], int],
    stop_requested: bool,
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
        last = k == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = model(**_on_device(batch, device)).loss * (count / n_items).float()
            # Processes' gradients are averaged, but each loss is already its share of the whole step.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
    return total, norm, bool(shared[1])  # type: ignore[return-value]


def _steps(
    examples: Any,
    lengths: np.ndarray,
    collate: Collate,
    config: LoopConfig,
    accelerator: Accelerator,
    first_step: int,
    n_steps: int,
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
            seed=config.seed,
            epoch=epoch,
            n_processes=accelerator.num_processes,
        )
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
        return [(m, _collated(self.examples, self.collate, m, self.key)) for m in self.plan.step(step)[self.rank]]


def _collated(examples: Any, collate: Collate, micro: MicroBatch, key: tuple[int, int]) -> dict[str, Any]:
    indices = list(micro.examples)
    fetch = getattr(examples, "__getitems__", None)
    rows = fetch(indices) if fetch is not None else [examples[i] for i in indices]
    return collate(rows, [(*key, i) for i in indices])


def _labelled_items(batch: dict[str, Any]) -> int:
    if "labels" in batch and not batch["labels"].is_floating_point():
        return int((batch["labels"] != -100).sum())
    return len(next(iter(batch.values())))


def _widest(device: torch.device) -> torch.dtype:
    """The type that losses are summed in: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings decay; biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
