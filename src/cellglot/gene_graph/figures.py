"""Figure of the important part of a network: tables and an optional matplotlib ax in, the ax out. Extra `train`."""

from typing import Any

import numpy as np


def plot_importance_network(genes: Any, edges: Any, label: str, *, n_edges: int = 40, ax: Any = None) -> Any:
    """The most important edges of a class and the genes they join.

    genes, edges  as of `gene_importance`. Both directions of an edge, and all graphs and layers, are summed
    label         the class
    n_edges       drawn at the most
    Line width is an edge's importance, red for the class and blue against it; so is the colour of a gene.
    Raises        ValueError for a class without edges
    """
    import matplotlib.pyplot as plt
    import networkx as nx

    chosen = edges[edges["label"] == label]
    chosen = chosen[chosen["gene"] != chosen["neighbor"]]
    if not len(chosen):
        found = ", ".join(map(str, edges["label"].unique())) or "none"
        raise ValueError(
            f"There are no edges for {label!r}; the table has {found}. A model with smoothing='none' has no graph."
        )
    ends = np.sort(chosen[["gene", "neighbor"]].to_numpy(dtype=str), axis=1)
    pairs = chosen.assign(a=ends[:, 0], b=ends[:, 1]).groupby(["a", "b"], sort=True)["importance"].sum()
    pairs = pairs[pairs.abs().sort_values(ascending=False, kind="stable").index[:n_edges]]
    graph = nx.Graph()
    for (a, b), value in pairs.items():  # type: ignore[misc]
        graph.add_edge(a, b, importance=value)
    of_class = genes[genes["label"] == label].set_index("gene_id")
    names, values = of_class["gene_symbol"].to_dict(), of_class["importance"].to_dict()
    # As far apart on the page as by edges; springs draw cliques together until nothing can be read
    far = 1 + max(max(steps.values()) for _, steps in nx.all_pairs_shortest_path_length(graph))
    apart = {a: dict.fromkeys(graph, far) | dict(steps) for a, steps in nx.all_pairs_shortest_path_length(graph)}
    place = nx.kamada_kawai_layout(graph, dist=apart)
    ax = ax or plt.subplots(figsize=(7.6, 6.4))[1]
    colours = plt.get_cmap("RdBu_r")
    strength = np.array([graph.edges[edge]["importance"] for edge in graph.edges])
    reach = max(float(np.abs(strength).max()), 1e-12)
    nx.draw_networkx_edges(
        graph,
        place,
        ax=ax,
        width=(0.4 + 4 * np.abs(strength) / reach).tolist(),
        edge_color=["tab:red" if value > 0 else "tab:blue" for value in strength],  # type: ignore[arg-type]
        alpha=0.5,
    )
    of_gene = [values[gene] for gene in graph]
    limit = max(float(np.abs(of_gene).max()), 1e-12)
    drawn = nx.draw_networkx_nodes(
        graph,
        place,
        ax=ax,
        node_color=of_gene,  # type: ignore[arg-type]
        cmap=colours,
        vmin=-limit,
        vmax=limit,
        node_size=160,
        edgecolors="grey",
        linewidths=0.5,
    )
    above = {gene: (x, y + 0.045) for gene, (x, y) in place.items()}
    nx.draw_networkx_labels(graph, above, labels={gene: names[gene] for gene in graph}, font_size=8, ax=ax)
    ax.figure.colorbar(drawn, ax=ax, label="importance of the gene", fraction=0.04, pad=0.02)
    ax.set_title(f"{label}: the {len(pairs)} most important edges", fontsize="medium", loc="left")
    ax.set_axis_off()
    return ax
