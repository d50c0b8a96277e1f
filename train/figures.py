"""Figures of a training run: tables in, matplotlib axes out."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def plot_loss_curve(log: Sequence[dict[str, Any]], references: dict[str, float] | None = None, ax: Any = None) -> Any:
    """Training loss (thin: each step; thick: running mean) and validation loss over steps, reference losses as lines.

    log         lines of `metrics.jsonl`
    references  name -> loss in nats
    """
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=(6.4, 4))[1]
    steps = np.array([line["step"] for line in log if "loss" in line])
    losses = np.array([line["loss"] for line in log if "loss" in line])
    ax.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.7)
    window = max(len(losses) // 50, 1)
    if len(losses) >= window:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        ax.plot(steps[window - 1 :], smooth, color="tab:blue", label="training")
    points = [(line["step"], line["validation_loss"]) for line in log if "validation_loss" in line]
    if points:
        ax.plot(*zip(*points, strict=True), color="tab:orange", marker="o", markersize=3, label="validation")
    for style, (name, value) in zip(("--", ":", "-."), (references or {}).items(), strict=False):
        ax.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name} ({value:.2f})")
    ax.set(xlabel="optimizer step", ylabel="masked-gene loss (nats)", title="Pre-training")
    ax.legend(frameon=False)
    return ax
