"""Figures of perturbation statistics: a DataFrame in, matplotlib axes out. Needs the extra `train`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from ..tokenization.gene_ids import examples
from .targets import CELL, JOINER

# Up, down and neither, told apart by colour-blind readers too
UP, DOWN, NEITHER = "#c2410c", "#1d4ed8", "#9ca3af"


def plot_shift_ranking(
    statistics: pd.DataFrame,
    state: str | None = None,
    *,
    n_genes: int = 12,
    min_cells: int = 3,
    labels: Mapping[str, str] | None = None,
    ax: Any = None,
) -> Any:
    """Genes by their mean effect, the strongest of either side named, with the 95% interval of each mean.

    statistics  of `shifts_to_states`, or of `impact_mixture` or `mean_effects` (then: how far the similarity fell)
    state       state to plot, the first by default
    n_genes     genes to show on each side
    min_cells   leaves out genes perturbed in fewer cells, whose means are the most extreme by chance; if any has more
    labels      gene -> name to show, e.g. symbols

    The interval is Student's over cells; it takes cells as independent, and one cell has none.
    """
    import matplotlib.pyplot as plt

    table, title, x_label = _mean_and_interval(statistics, state)
    two_sided = "shift" in statistics
    often = table["n_cells"] >= min_cells
    table = (table[often] if often.any() else table).sort_values("mean_effect", ascending=False)
    n_shown = 2 * n_genes if two_sided else n_genes
    gap = len(table) > n_shown and two_sided
    shown = pd.concat([table.iloc[:n_genes], table.iloc[-n_genes:]]) if gap else table.iloc[:n_shown]
    ax = ax or plt.subplots(figsize=(6.4, 1.2 + 0.24 * len(shown)))[1]
    y = -np.arange(len(shown), dtype=float)
    if gap:
        y[n_genes:] -= 1
        between = f"{len(table) - len(shown):,} genes between"
        centred = {"ha": "center", "va": "center", "transform": ax.get_yaxis_transform()}
        ax.text(0.5, -n_genes, between, color="#6b7280", fontsize="small", **centred)
    verdict = next((name for name in ("significant", "impact") if name in shown), None)
    filled = np.ones(len(shown), dtype=bool) if verdict is None else shown[verdict].to_numpy(dtype=bool)
    effect, colours = shown["mean_effect"].to_numpy(), np.where(shown["mean_effect"] > 0, UP, DOWN)
    ax.axvline(0, color="#d1d5db", lw=1, zorder=0)
    ax.errorbar(effect, y, xerr=shown["half"].fillna(0), fmt="none", ecolor="#6b7280", elinewidth=1)
    ax.scatter(effect, y, s=34, zorder=3, c=np.where(filled, colours, "white"), edgecolors=colours)
    names = [f"{gene_label(gene, labels)}  ({n})" for gene, n in zip(shown["gene"], shown["n_cells"], strict=True)]
    ax.set_yticks(y, names)
    ax.margins(y=0.03)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    legend = f"(n) cells{f', at least {min_cells}' if often.any() and min_cells > 1 else ''}"
    legend += "; 95% interval of the mean" if shown["half"].notna().any() else ""
    legend += "" if verdict is None else f"; filled: {verdict}"
    ax.set(title=title, xlabel=f"{x_label}\n{legend}")
    ax.locator_params(axis="x", nbins=5)
    return ax


def _mean_and_interval(statistics: pd.DataFrame, state: str | None) -> tuple[pd.DataFrame, str, str]:
    """The genes' table with columns mean_effect and half (of the interval), the title and the axis' label."""
    if "shift" in statistics:
        table = _of_state(statistics, state)
        title, x_label = f"Shift to {table['state'].iloc[0]}", "cos(perturbed, state) - cos(cell, state)"
        table = table.assign(mean_effect=table["shift"])
    else:
        name = "cosine_similarity" if "cosine_similarity" in statistics else "mean"
        if name not in statistics:
            raise ValueError(f"Expected a table of statistics, found the columns {examples(statistics.columns, 9)}.")
        table = statistics[statistics["affected"] == CELL] if "affected" in statistics else statistics
        title, x_label = "Effect on cells", "1 - cosine similarity before and after"
        table = table.assign(mean_effect=1 - table[name])
    if "standard_error" not in table:
        # `mean_effects` has the deviation of the population: divided by n - 1 it makes the standard error.
        table["standard_error"] = table["sd"] / np.sqrt((table["n_cells"] - 1).where(table["n_cells"] > 1))
    quantile = student.ppf(0.975, np.maximum(table["n_cells"].to_numpy() - 1, 1))
    return table.assign(half=table["standard_error"] * quantile), title, x_label


def plot_volcano(
    statistics: pd.DataFrame,
    state: str | None = None,
    *,
    n_labels: int = 10,
    labels: Mapping[str, str] | None = None,
    ax: Any = None,
) -> Any:
    """Effect of each gene against the evidence for it; the strongest significant genes are named.

    statistics  of `shifts_to_states`, or of `versus_null` (then right is what acts more strongly than in null cells)
    state       state to plot, the first by default
    n_labels    genes to name: significant ones by p-value, or where there is none those of the smallest p-values
    labels      gene -> name to show, e.g. symbols
    """
    import matplotlib.pyplot as plt

    table, title, x_label = _effect_and_evidence(statistics, state)
    ax = ax or plt.subplots(figsize=(6.4, 4.8))[1]
    # A p-value that underflows to zero would lie beyond every axis.
    evidence = -np.log10(np.maximum(table["p_value"].to_numpy(), np.finfo(float).tiny))
    effect, significant = table["effect"].to_numpy(), table["significant"].to_numpy(dtype=bool)
    colours = np.where(significant, np.where(effect > 0, UP, DOWN), NEITHER)
    ax.axvline(0, color="#d1d5db", lw=1, zorder=0)
    size = 8 + 24 * np.sqrt(table["n_cells"].to_numpy() / table["n_cells"].max())
    order = np.argsort(significant, kind="stable")
    ax.scatter(effect[order], evidence[order], s=size[order], c=colours[order], linewidths=0, alpha=0.8)
    if significant.any():
        # Benjamini-Hochberg's threshold lies at the largest p-value that passes.
        ax.axhline(evidence[significant].min(), color="#9ca3af", lw=0.8, ls="--", zorder=0)
    named = np.flatnonzero(significant) if significant.any() else np.arange(len(table))
    # A gene that no null cell has stands nowhere.
    named = named[np.isfinite(effect[named])]
    named = named[np.argsort(-evidence[named], kind="stable")][:n_labels]
    ax.margins(x=0.25, y=0.08)
    _name_points(ax, effect[named], evidence[named], [gene_label(g, labels) for g in table["gene"].to_numpy()[named]])
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(
        title=f"{title}: {int(significant.sum()):,} of {len(table):,} genes significant",
        xlabel=f"{x_label}\nlarger dots: more cells",
        ylabel="$-\\log_{10}$ p",
    )
    return ax


def _effect_and_evidence(statistics: pd.DataFrame, state: str | None) -> tuple[pd.DataFrame, str, str]:
    """The genes' table with a column effect, above 0 where the axis' right side is, the title and the axis' label."""
    if "shift" in statistics:
        table = _of_state(statistics, state)
        x_label = "cos(perturbed, state) - cos(cell, state)"
        return table.assign(effect=table["shift"]), f"Shift to {table['state'].iloc[0]}", x_label
    if not {"difference", "value"}.issubset(statistics):
        raise ValueError(
            "Expected the table of shifts_to_states or versus_null, which have p-values; found the columns "
            f"{examples(statistics.columns, 9)}."
        )
    value = str(statistics["value"].iloc[0])
    if value == "cosine_similarity":
        # A similarity falls the more, the larger the effect.
        what, sign = "mean of 1 - cosine similarity", -1
    else:
        what, sign = f"mean {value.replace('_', ' ', 2)}", 1
    x_label = f"{what}, minus that of null cells\nright: acts more strongly than in null cells"
    return statistics.assign(effect=sign * statistics["difference"]), "Against null cells", x_label


def _name_points(ax: Any, x: np.ndarray, y: np.ndarray, names: list[str]) -> None:
    """Names in a column on either side, level with their points where there is room, and a line to each."""
    # Height of a line of text, in the axis' own scale
    height = ax.figure.get_size_inches()[1] * ax.get_position().height * 72
    low, high = ax.get_ylim()
    line = 11 * (high - low) / height
    width = np.ptp(ax.get_xlim())
    for right in (True, False):
        side = np.flatnonzero((x >= 0) == right)
        last = np.inf
        column = 0.0 if len(side) == 0 else x[side].max() if right else x[side].min()
        for i in side[np.argsort(-y[side], kind="stable")]:
            place = min(y[i], last - line)
            last = place
            ax.annotate(
                names[i],
                (x[i], y[i]),
                xytext=(column + (0.03 if right else -0.03) * width, place),
                ha="left" if right else "right",
                va="center",
                fontsize="small",
                arrowprops={"arrowstyle": "-", "color": "#9ca3af", "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
            )


def _of_state(statistics: pd.DataFrame, state: str | None) -> pd.DataFrame:
    found = list(statistics["state"].unique())
    state = found[0] if state is None else state
    if state not in found:
        raise ValueError(f"No statistics of state {state!r}; there are {examples(found, 9)}.")
    return statistics[statistics["state"] == state]


def gene_label(gene: str, labels: Mapping[str, str] | None) -> str:
    """Symbols in place of ids, also of genes perturbed together."""
    return JOINER.join((labels or {}).get(name, name) for name in str(gene).split(JOINER))
