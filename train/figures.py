"""Figures of a training run: tables or arrays in, matplotlib axes out."""

from collections.abc import Sequence
from pathlib import Path
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


def umap_coordinates(embeddings: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """(cells, 2) UMAP of (cells, width) embeddings."""
    import warnings

    import umap

    with warnings.catch_warnings():
        # A fixed seed means one thread, which is what we want.
        warnings.filterwarnings("ignore", message="n_jobs value")
        return np.asarray(
            umap.UMAP(n_neighbors=min(15, len(embeddings) - 1), random_state=seed).fit_transform(embeddings)
        )


def plot_umap(coordinates: np.ndarray, labels: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Cells in two dimensions, coloured by label, the most frequent labels first in the legend."""
    import matplotlib.pyplot as plt
    import pandas as pd

    ax = ax or plt.subplots(figsize=(7.6, 4.6))[1]
    size = float(np.clip(6000 / len(coordinates), 1, 14))
    if labels is None:
        ax.scatter(*coordinates.T, s=size, linewidths=0)
    else:
        names = pd.Series(np.asarray(labels, dtype=str))
        colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
        for i, name in enumerate(names.value_counts().index):
            chosen = coordinates[(names == name).to_numpy()]
            ax.scatter(
                *chosen.T, s=size, linewidths=0, color=colours[i % len(colours)], label=f"{name} ({len(chosen)})"
            )
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=1.5, fontsize="small")
    ax.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[], title="Cell embeddings")
    return ax


def save_figure(ax: Any, path: Path) -> None:
    """Writes the figure of `ax` as PNG and closes it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    ax.figure.savefig(partial, dpi=144, bbox_inches="tight", format="png")
    partial.replace(path)
    plt.close(ax.figure)
