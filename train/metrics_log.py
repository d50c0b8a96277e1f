"""The log of a run: `metrics.jsonl`, and whatever experiment trackers were asked for."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator


class MetricsLog:
    """`metrics.jsonl`: one line a step or validation, written by the main process; and the trackers.

    Losses stay on the device until they are flushed, so that logging does not stall a GPU at every step.
    """

    def __init__(self, output: Path, accelerator: Accelerator, config: Any):
        self.path, self.accelerator, self.config = output / "metrics.jsonl", accelerator, config
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []
        self._last_loss = math.nan

    def start(self, step: int) -> None:
        """Drops lines after `step` (of a run that was killed after its last checkpoint) and opens the trackers."""
        if self.accelerator.is_main_process:
            kept = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
            partial = self.path.with_suffix(".tmp")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self.path)
        if self.config.trackers:
            self.accelerator.init_trackers("trackers", config=_flat(self.config))

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor, rate: float) -> None:
        self._pending.append((step, loss.detach(), norm, rate))

    def flush(self) -> float:
        """Writes what is pending; returns the mean training loss of it (of the last flush if nothing is)."""
        pending, self._pending = self._pending, []
        losses = [float(loss) for _, loss, _, _ in pending]
        for (step, _, norm, rate), loss in zip(pending, losses, strict=True):
            # With fp16, the loss scaler skips a step whose gradient overflows.
            scaled = self.accelerator.scaler is not None
            if not math.isfinite(loss) or not (scaled or math.isfinite(float(norm))):
                raise FloatingPointError(
                    f"Loss or gradient of step {step:,} is not finite ({loss:g}, {float(norm):g}); the last checkpoint "
                    "is intact. Lower learning_rate, lengthen warmup_steps, or use bf16 instead of fp16."
                )
            self.write(step, {"loss": loss, "grad_norm": float(norm), "learning_rate": rate}, track=False)
        if pending:
            self._last_loss = float(np.mean(losses))
            self._track(pending[-1][0], {"loss": self._last_loss, "learning_rate": pending[-1][3]})
        return self._last_loss

    def write(self, step: int, figures: dict[str, float], *, track: bool = True) -> None:
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        if track:
            self._track(step, figures)

    def _track(self, step: int, figures: dict[str, float]) -> None:
        if self.config.trackers:
            self.accelerator.log(figures, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _flat(config: Any) -> dict[str, Any]:
    """The configuration as trackers take it."""
    values = vars(config)
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}
