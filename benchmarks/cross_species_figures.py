"""Pictures of `cross_species.py`: Wasserstein heatmaps of human against mouse cell types, UMAP by species and class."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cross_species_spaces import NAMES, Space, Split

from cellglot.figures import save_figure, umap_coordinates

# The species' own PCA, the best of the linear alignments, the model with it, and the simplest baseline
PICTURED = ("PCA, unaligned", "PCA, transport", "model, cells, transport", "shared-ortholog PCA")
# Classes of few cells are shown together.
SHOWN_CLASSES = 8


def umap_table(space: Space, split: Split) -> pd.DataFrame:
    """x, y, species and class of all cells, training and held out."""
    cells = np.concatenate([space.cells[name] for name in NAMES])
    coordinates = umap_coordinates(cells, seed=split.seed)
    species = np.repeat(NAMES, [len(space.cells[name]) for name in NAMES])
    classes = np.concatenate([split.pair[name].class_n for name in NAMES])
    frequent = pd.Series(classes).value_counts().index[:SHOWN_CLASSES]
    classes = np.where(np.isin(classes, frequent), classes, "other")
    x, y = np.round(coordinates, 3).T
    return pd.DataFrame({"space": space.name, "x": x, "y": y, "species": species, "class": classes})


def draw_umaps(table: pd.DataFrame, path: Path) -> None:
    """A column a space; above coloured by species, below by class."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    names = list(table["space"].unique())
    axes: Any = plt.subplots(2, len(names), figsize=(3.4 * len(names), 6.6), squeeze=False)[1]
    classes = table["class"].value_counts().index
    colours = {"human": "tab:red", "mouse": "tab:blue"}
    colours |= {c: plt.get_cmap("tab10")(i) for i, c in enumerate(c for c in classes if c != "other")}
    colours["other"] = "lightgrey"
    for column, name in enumerate(names):
        # In random order, so that no species lies on the other
        cells = table[table["space"] == name].sample(frac=1, random_state=0)
        for row, by in enumerate(("species", "class")):
            ax = axes[row, column]
            ax.scatter(cells["x"], cells["y"], s=5, linewidths=0, c=[colours[label] for label in cells[by]])
            ax.set(xticks=[], yticks=[], title=name if row == 0 else "")
    for row, labels in enumerate((NAMES, classes)):
        handles = [Line2D([], [], marker="o", linestyle="", color=colours[c], label=c) for c in labels]
        axes[row, -1].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    axes[0, 0].figure.tight_layout()
    save_figure(axes[0, 0], path)


def draw_heatmaps(matrices: dict[str, pd.DataFrame], path: Path) -> None:
    """A panel a space: Wasserstein distance of each human class (row) to each mouse type; a dot marks the least."""
    import matplotlib.pyplot as plt

    height = 0.36 * len(next(iter(matrices.values()))) + 2.4
    figure, found = plt.subplots(1, len(matrices), figsize=(3.6 * len(matrices) + 1, height), sharey=True)
    axes: Any = np.atleast_1d(found)
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        values = matrix.to_numpy()
        image = ax.imshow(values, cmap="viridis_r", aspect="auto")
        ax.set_xticks(range(matrix.shape[1]), list(matrix.columns), rotation=60, ha="right", fontsize=7)
        ax.set_yticks(range(len(matrix)), [f"human {label}" for label in matrix.index], fontsize=8)
        # Of each mouse type the nearest human class
        ax.plot(range(matrix.shape[1]), values.argmin(axis=0), "r.", markersize=7)
        ax.set_title(name, fontsize=9)
        figure.colorbar(image, ax=ax, shrink=0.8, label="Wasserstein distance" if ax is axes[-1] else "")
    figure.tight_layout()
    save_figure(axes[0], path)
