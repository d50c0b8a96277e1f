"""Figures of a training run: tables in, matplotlib axes out."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def plot_loss_curve(
    log: Sequence[dict[str, Any]],
    references: dict[str, float] | None = None,
    *,
    ylabel: str = "masked-gene loss (nats)",
    ax: Any = None,
) -> Any:
    """Training loss (thin: each step; thick: running mean) and validation loss over steps, reference losses as lines.

    log         lines of `metrics.jsonl`
    references  name -> loss in the unit of the log
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
        ax.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name} ({value:.3g})")
    ax.set(xlabel="optimizer step", ylabel=ylabel, title="Pre-training")
    ax.legend(frameon=False)
    return ax


def plot_criteria(criteria: dict[str, Sequence[float]], *, ax: Any = None) -> Any:
    """The criterion that chooses an adversarial alignment, over epochs; 0 is the start.

    criteria  name of the pair of species -> mean cosine of CSLS-matched cells at the start and after each epoch
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    ax = ax or plt.subplots(figsize=(6.4, 4))[1]
    for name, values in criteria.items():
        ax.plot(range(len(values)), values, marker="o", markersize=3, label=name)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="mean cosine of matched cells", title="Adversarial alignment")
    ax.legend(frameon=False)
    return ax


def plot_confusion(table: Any, *, title: str = "", ax: Any = None) -> Any:
    """Confusion matrix: colour is the share of a true class, numbers are items.

    table  (classes, classes) items, rows true, columns predicted
    """
    import matplotlib.pyplot as plt

    n = len(table)
    side = float(np.clip(0.5 * n + 1.5, 3.4, 14))
    ax = ax or plt.subplots(figsize=(side + 1, side))[1]
    counts = table.to_numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if n <= 30:
        for i in range(n):
            for j in range(n):
                if counts[i, j]:
                    colour = "white" if share[i, j] > 0.6 else "black"
                    ax.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=colour, fontsize="small")
    ax.set_xticks(range(n), table.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(n), table.index)
    ax.set(xlabel="predicted", ylabel="label", title=title)
    ax.figure.colorbar(image, ax=ax, label="share of the label", fraction=0.046, pad=0.04)
    return ax


def plot_roc(
    labels: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    classes: Sequence[str],
    *,
    title: str = "",
    ax: Any = None,
) -> Any:
    """ROC curves, one class against the rest (two classes: one curve); with several folds their mean, and +- 1 sd.

    labels, scores  for each fold: (items,) class names; (items, classes)
    """
    import matplotlib.pyplot as plt

    from cellglot.metrics.classification import area_under_roc

    ax = ax or plt.subplots(figsize=(5.4, 4.6))[1]
    ax.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1)
    grid = np.linspace(0, 1, 201)
    colours = plt.get_cmap("tab20" if len(classes) > 10 else "tab10").colors  # type: ignore[attr-defined]
    shown = list(enumerate(classes))[:1] if len(classes) == 2 else list(enumerate(classes))
    for i, name in shown:
        pairs = [(truth == name, s[:, i]) for truth, s in zip(labels, scores, strict=True)]
        pairs = [(positive, s) for positive, s in pairs if positive.any() and not positive.all()]
        if not pairs:
            continue
        curves = np.stack([_true_positive_rate(positive, s, grid) for positive, s in pairs])
        areas = np.array([area_under_roc(positive, s) for positive, s in pairs])
        spread = f" ± {areas.std(ddof=1):.2f}" if len(areas) > 1 else ""
        mean = curves.mean(axis=0)
        label = f"{name} ({areas.mean():.2f}{spread})"
        ax.plot([0, *grid], [0, *mean], color=colours[i % len(colours)], label=label)
        if len(curves) > 1:
            sd = curves.std(axis=0, ddof=1)
            low, high = np.clip(mean - sd, 0, 1), np.clip(mean + sd, 0, 1)
            ax.fill_between(grid, low, high, color=colours[i % len(colours)], alpha=0.15, linewidth=0)
    ax.set(xlabel="false positive rate", ylabel="true positive rate", title=title, xlim=(-0.01, 1), ylim=(0, 1.01))
    beside = len(shown) > 6
    ax.legend(
        loc="center left" if beside else "lower right",
        bbox_to_anchor=(1.02, 0.5) if beside else None,
        frameon=False,
        fontsize="small",
        title="area under the curve",
    )
    return ax


def _true_positive_rate(positive: np.ndarray, scores: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Share of positives found at each false positive rate of `grid`."""
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(positive, scores)
    return np.interp(grid, false_positive, true_positive)
