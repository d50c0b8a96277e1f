"""Figures shared by the tools and the training scripts: arrays in, matplotlib axes out. Needs the extra `train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


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
        legend = ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")
        for handle in legend.legend_handles:
            # The dots of thousands of cells are too small to show a colour.
            handle.set_sizes([24])
    ax.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[], title="Cell embeddings")
    return ax


def save_figure(ax: Any, path: Path) -> None:
    """Writes the figure of `ax` in the format of the path's suffix (PNG, PDF, SVG, ...) and closes it."""
    import matplotlib.pyplot as plt

    formats = ax.figure.canvas.get_supported_filetypes()
    kind = path.suffix.lstrip(".").lower()
    if kind not in formats:
        raise ValueError(f"{path}: expected a figure's name to end in one of {', '.join(formats)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    ax.figure.savefig(partial, dpi=144, bbox_inches="tight", format=kind)
    partial.replace(path)
    plt.close(ax.figure)
