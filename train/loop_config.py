"""Options of the training loop, and which of them a resumed run may change."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import option
from .publishing import PublishingOptions


@dataclass
class LoopConfig(PublishingOptions):
    """What the loop needs to know, whatever the method."""

    output: str = option("runs/run", "folder of the run: checkpoints, log, model")
    epochs: float = option(3.0, "passes over the training examples")
    max_steps: int | None = option(None, "optimizer steps, in place of epochs")
    batch_size: int = option(144, "examples of an optimizer step, over all processes")
    max_tokens: int = option(
        32768, "tokens of one forward pass on one process, padding included; larger steps are accumulated"
    )
    learning_rate: float = option(1e-3, "maximum learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "learning rate after the warm-up")
    warmup_steps: float = option(10_000, "steps of linear warm-up; below 1, a share of all steps")
    weight_decay: float = option(0.001, "AdamW weight decay, for matrices and embeddings")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "arithmetic of the forward pass; absent: as `accelerate launch` was told, else float32"
    )
    gradient_checkpointing: bool = option(False, "recomputes activations in the backward pass, to save memory")
    compile: bool = option(False, "torch.compile of the model: minutes at the start, DDP or one process only")
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
        super().__post_init__()
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

    def free_options(self) -> set[str]:
        """Options that may differ when a run is resumed, because the losses do not depend on them."""
        return FREE_OPTIONS - {"eval_every"} if self.patience else FREE_OPTIONS


# Those that are free whatever the method
FREE_OPTIONS = {"output", "resume", "overwrite", "max_tokens", "log_every", "eval_every", "save_every", "keep_last"}
FREE_OPTIONS |= {"trackers", "num_workers", "cpu_threads", "gradient_checkpointing", "report", "cell_type", "baselines"}
FREE_OPTIONS |= {"push_to_hub", "private"}


class RunError(ValueError):
    """A run that cannot go on as asked."""


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
    free = config.free_options()
    changed = [k for k, v in current.items() if k not in free and before[k] != v]
    if changed:
        what = ", ".join(f"{key} was {before[key]!r} and is {current[key]!r}" for key in changed[:3])
        raise RunError(f"{path} belongs to a run with other options: {what}. Resume with the same ones.")
