"""AdamW and its learning rate."""

import math
from typing import Any

import torch

from .loop_config import LoopConfig


def make_optimizer(model: torch.nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """Fused AdamW over the parameters that are trained."""
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate, fused=True)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings decay; biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate_at(step: int, n_steps: int, config: LoopConfig) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then linear or half-cosine decay to zero, or none."""
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * n_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / math.ceil(warmup)
    left = (n_steps - step) / max(n_steps - warmup, 1)
    factor = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[config.schedule]
    return config.learning_rate * factor
