"""Figures of an attention analysis: a table and an optional matplotlib ax in, the ax out. Needs the extra `train`."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def plot_head_effects(
    comparison: Any, ax: Any = None, *, matched: bool = False, alpha: float = 0.05, title: str = ""
) -> Any:
    """Layers by heads: how much more a set is attended than its background; a dot where that is significant.

    comparison  as of `compare_gene_sets`
    matched     shows the effect among genes matched by rank and by the number of cells that hold them
    """
    import matplotlib.pyplot as plt

    suffix = "_matched" if matched else ""
    auc = comparison.pivot(index="layer", columns="head", values=f"auc{suffix}")
    fdr = comparison.pivot(index="layer", columns="head", values=f"fdr{suffix}").to_numpy()
    layers, heads = auc.shape
    ax = ax or plt.subplots(figsize=(1.6 + 0.42 * heads, 1.2 + 0.36 * layers))[1]
    # Both panels of one analysis share a scale, or the eye compares what cannot be compared.
    reach = max(float(np.abs(comparison[["auc", "auc_matched"]].to_numpy() - 0.5).max()), 0.05)
    image = ax.imshow(auc, cmap="RdBu_r", vmin=0.5 - reach, vmax=0.5 + reach, aspect="auto")
    significant = fdr < alpha
    y, x = np.nonzero(significant)
    dark = np.abs(auc.to_numpy()[y, x] - 0.5) > 0.6 * reach
    ax.scatter(x, y, s=12, c=np.where(dark, "white", "black"), linewidths=0)
    more = significant & (auc.to_numpy() > 0.5)
    what = "matched by rank and cells" if matched else "attention as it is"
    lines = [title] if title else []
    less = significant & ~more
    lines.append(f"{what}: {more.sum()} of {auc.size} heads more ({more.mean():.0%}), {less.sum()} less")
    ax.set_title("\n".join(lines), fontsize="medium")
    ax.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    ax.set_xticklabels(auc.columns)
    ax.set_yticklabels(auc.index)
    ax.figure.colorbar(image, ax=ax, label="AUC: set over background", fraction=0.05, pad=0.03)
    return ax


def plot_attention_by_rank(by_rank: Any, ax: Any = None) -> Any:
    """Every head's attention along the ranks, heads of a layer together: log2 of attention over even attention.

    by_rank  as of `attention_by_rank`
    """
    import matplotlib.pyplot as plt

    grid = by_rank.pivot(index=["layer", "head"], columns="last_rank", values="attention")
    layers = grid.index.get_level_values("layer").to_numpy()
    heads = len(layers) // len(np.unique(layers))
    ax = ax or plt.subplots(figsize=(7, 1.2 + 0.1 * max(len(grid), 24)))[1]
    # Attention of exactly 0 has no logarithm: shown as the end of the scale.
    values = np.log2(np.maximum(grid.to_numpy(), 1e-6))
    reach = float(np.clip(np.quantile(np.abs(values), 0.98), 0.1, 4))
    longest = int(grid.columns.max())
    image = ax.imshow(
        values, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto", extent=(0.5, longest + 0.5, len(grid), 0)
    )
    for edge in np.flatnonzero(np.diff(layers)) + 1:
        ax.axhline(edge, color="black", linewidth=0.8)
    ax.set(xlabel="rank of the attended gene (1: highest)", ylabel=f"layer ({heads} heads each)")
    ax.set_yticks(np.arange(len(np.unique(layers))) * heads + heads / 2, labels=np.unique(layers).tolist())
    ax.tick_params(axis="y", length=0)
    ax.set_title("Ranks attended by each head", fontsize="medium")
    ax.figure.colorbar(image, ax=ax, label="attention, log2 (0: even)", extend="both", fraction=0.04, pad=0.02)
    return ax


def plot_rank_diversity(diversity: Any, ax: Any = None) -> Any:
    """Breadth of the ranks each layer's heads survey, and divergence between its heads.

    diversity  as of `rank_diversity`
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    ax = ax or plt.subplots(figsize=(4.6, 3.4))[1]
    breadth_line = ax.plot(diversity["layer"], diversity["breadth"], marker="o", color="tab:purple", label="breadth")
    ax.set(xlabel="layer", ylabel="breadth of a head (1: all ranks)")
    ax.set_ylim(min(0.9 * float(diversity["breadth"].min()), 0.95), 1.005)
    # Two measures of different size, each with its own axis
    right = ax.twinx()
    divergence_line = right.plot(
        diversity["layer"], diversity["divergence"], marker="s", color="tab:orange", label="divergence"
    )
    right.set_ylabel("divergence between heads (0: all alike)")
    right.set_ylim(0, max(1.1 * float(diversity["divergence"].max()), 0.01))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.label.set_color("tab:purple")
    right.yaxis.label.set_color("tab:orange")
    ax.legend(
        handles=[*breadth_line, *divergence_line],
        frameon=False,
        fontsize="small",
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
    )
    ax.set_title("Diversity of the ranks attended", fontsize="medium")
    return ax


def plot_sets_by_layer(table: Any, gene_sets: Mapping[str, Iterable[str]], ax: Any = None) -> Any:
    """Attention to the genes of each set in each layer, mean over heads: boxes of genes (such as central, peripheral).

    table      as of `attention_to_genes`
    gene_sets  names of the table's genes, by the name of the set
    """
    import matplotlib.pyplot as plt

    by_layer = table.groupby(["layer", "gene"], sort=True)["attention"].mean().unstack("gene")
    layers = by_layer.index.to_numpy()
    ax = ax or plt.subplots(figsize=(2.2 + 0.75 * len(layers), 3.8))[1]
    width = 0.8 / len(gene_sets)
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    handles = []
    for i, (name, genes) in enumerate(gene_sets.items()):
        values = by_layer.loc[:, by_layer.columns.isin(list(genes))]
        boxes = ax.boxplot(
            list(values.to_numpy()),
            positions=np.arange(len(layers)) + (i - (len(gene_sets) - 1) / 2) * width,
            widths=0.85 * width,
            patch_artist=True,
            # Of thousands of genes, those beyond the whiskers would be a black smear.
            showfliers=values.shape[1] <= 500,
            flierprops={"marker": ".", "markersize": 2, "markeredgecolor": colours[i % 10]},
            medianprops={"color": "black"},
            boxprops={"facecolor": colours[i % 10], "alpha": 0.6, "linewidth": 0.7},
            whiskerprops={"linewidth": 0.7},
            capprops={"linewidth": 0.7},
            manage_ticks=False,
        )
        handles.append((boxes["boxes"][0], f"{name} ({values.shape[1]:,} genes)"))
    ax.axhline(1, color="grey", linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xticks(range(len(layers)), labels=layers.tolist())
    ax.set(xlabel="layer", ylabel="attention received (1: even)", xlim=(-0.6, len(layers) - 0.4))
    ax.legend(*zip(*handles, strict=True), frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    ax.set_title("Attention to the genes of each set, mean over heads", fontsize="medium")
    return ax
