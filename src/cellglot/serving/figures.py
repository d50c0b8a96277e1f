"""Figures for light and dark pages and phones: transparent, grey text, narrow, long names beside their bars."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

GREY, ACCENT, REST = "#8a8f98", "#14a89a", "#9db4c0"
# Inches; a phone shows it at about half this size
WIDTH = 5.0


def new_axes(height: float, title: str) -> Any:
    """Axes of a new figure that pyplot does not keep (it would hold every session's)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    # Over the whole width, which long titles need
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    return figure.add_subplot()


def finished(ax: Any) -> Any:
    """The figure, every text and line in the grey that both pages show."""
    ax.patch.set_alpha(0)
    for text in ax.figure.findobj(match=lambda artist: hasattr(artist, "set_fontsize")):
        text.set_color(GREY)
        # A stranger's names may hold a dollar sign, which else begins a formula
        text.set_parse_math(False)
    ax.tick_params(colors=GREY, which="both")
    for spine in ax.spines.values():
        spine.set_color(GREY)
    ax.spines[["top", "right"]].set_visible(False)
    return ax.figure


def cut(name: object, length: int) -> str:
    """A name that fits beside its bar."""
    text = str(name)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def plot_bars(names: Sequence[str], values: Any, *, title: str, axis: str, marked: Sequence[str] = ()) -> Any:
    """Figure of one horizontal bar a name, the first on top; those of `marked` stand out.

    names, values  as long as each other
    axis           what the values are, with their unit
    """
    ax = new_axes(0.9 + 0.26 * max(len(names), 2), title)
    colours = [ACCENT if name in marked or not marked else REST for name in names]
    ax.barh(np.arange(len(names)), np.asarray(values, float), color=colours)
    ax.set_yticks(np.arange(len(names)), [cut(name, 32) for name in names], fontsize=9)
    ax.invert_yaxis()
    ax.set_xlabel(axis, fontsize=9)
    return finished(ax)


def plot_cells(xy: np.ndarray, labels: Sequence[str], *, title: str, colours: Mapping[str, Any] | None = None) -> Any:
    """Figure of cells in two dimensions, coloured by label, the most frequent first in a legend below.

    xy       (cells, 2)
    colours  of each label, in place of a palette
    """
    import matplotlib
    import pandas as pd

    names = pd.Series(np.asarray(labels, dtype=str))
    counts = names.value_counts()
    ax = new_axes(4.2 + 0.2 * ((len(counts) + 1) // 2), title)
    palette: Any = matplotlib.colormaps["tab20"]
    for i, name in enumerate(counts.index):
        chosen = xy[(names == name).to_numpy()]
        ax.scatter(
            *chosen.T,
            s=float(np.clip(6000 / len(xy), 3, 14)),
            linewidths=0,
            color=palette(i % 20) if colours is None else colours[name],
            label=f"{cut(name, 26)} ({len(chosen)})",
        )
    ax.set(xticks=[], yticks=[])
    legend = ax.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([24])
    return finished(ax)


def plot_matrix(values_rc: Any, rows: Sequence[str], columns: Sequence[str], *, title: str, bar: str) -> Any:
    """Figure of a heat map with its numbers written in where they fit.

    values_rc  (rows, columns); NaN stays empty
    bar        what the values are
    """
    values_rc = np.asarray(values_rc, float)
    ax = new_axes(1.6 + 0.34 * len(rows), title)
    image = ax.imshow(values_rc, aspect="auto", cmap="viridis")
    ax.set_yticks(np.arange(len(rows)), [cut(name, 24) for name in rows], fontsize=8)
    ax.set_xticks(np.arange(len(columns)), [cut(name, 24) for name in columns], fontsize=8, rotation=40, ha="right")
    ax.figure.colorbar(image, ax=ax, label=bar, shrink=0.8).ax.tick_params(colors=GREY, labelsize=8)
    figure = finished(ax)
    if values_rc.size <= 80:
        middle = (np.nanmin(values_rc) + np.nanmax(values_rc)) / 2
        for (i, j), value in np.ndenumerate(values_rc):
            if np.isfinite(value):
                ax.text(
                    j,
                    i,
                    f"{value:.2g}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value < middle else "black",
                )
    return figure
