"""Early stopping: keeps the weights with the lowest validation loss, and says when to stop waiting for a lower one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LOSS = "validation_loss"


class BestWeights:
    """Weights of the best validation so far, on disk. Only parameters that are trained are kept.

    patience  validations without a lower loss before `exhausted`
    """

    def __init__(self, folder: Path, patience: int, accelerator: Any):
        self.path, self.patience, self.accelerator = folder / "best.safetensors", patience, accelerator
        self.metrics: dict[str, float] = {}
        self.step = 0
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        return self.waited >= self.patience

    def update(self, step: int, metrics: dict[str, float], whole_model: Callable[[], torch.nn.Module]) -> None:
        """Takes note of a validation; keeps the weights if its loss is the lowest.

        whole_model  gives the bare model with all its weights; called by every process or by none
        """
        if LOSS not in metrics:
            raise ValueError(f"Early stopping needs a {LOSS!r} among the validation figures, found {list(metrics)}.")
        # Not `>=`: a loss that is not a number is no improvement either.
        if not metrics[LOSS] < self.metrics.get(LOSS, math.inf):
            self.waited += 1
            return
        self.metrics, self.step, self.waited = dict(metrics), step, 0
        model = whole_model()
        if self.accelerator.is_main_process:
            partial = self.path.with_suffix(".tmp")
            save_file({name: p.detach().contiguous().cpu() for name, p in _trained(model)}, str(partial))
            partial.replace(self.path)

    def restore(self, model: torch.nn.Module) -> None:
        """Puts the best weights into the bare model, on every process."""
        if not self.metrics:
            raise FloatingPointError("No validation loss was a finite number. Lower learning_rate.")
        self.accelerator.wait_for_everyone()
        best = load_file(str(self.path))
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(best[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on counting."""
        return {"metrics": self.metrics, "step": self.step, "waited": self.waited}

    def load_state(self, state: dict[str, Any]) -> None:
        self.metrics, self.step, self.waited = state["metrics"], state["step"], state["waited"]


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
