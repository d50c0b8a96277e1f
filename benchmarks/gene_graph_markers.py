"""Do gene importances of a trained classifier name the markers of the cell types? Kang et al. 2018, held-out donors.

    python benchmarks/gene_graph_markers.py --json benchmarks/results/gene_graph_markers.json \\
        --figure docs/images/gene_graph_b_cells.png

Ranks of known markers among the genes of each type: by importance in the classifier with each cell's own graph, with
the global graph and without one (mean over the held-out cells of the type, seed 0); beside the two simplest ways, the
difference of mean log expression, and logistic regression's coefficient times mean expression. Two minutes of CPU.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from gene_graph import DATA, KANG, Split, prepared, trained
from measure import machine, print_table, save_results

from cellglot.figures import save_figure
from cellglot.gene_graph import gene_importance, plot_importance_network

# Markers in use for PBMCs (Kang et al. 2018; Zheng et al. 2017), of those that the file's 1,287 genes include
MARKERS = {
    "B cells": ["CD79A", "CD37", "CD74"],
    "CD14+ Monocytes": ["CD14", "LYZ", "S100A8", "S100A9"],
    "CD4 T cells": ["IL7R", "LTB", "CCR7", "LEF1"],
    "Dendritic cells": ["HLA-DQA1", "CST3"],
    "FCGR3A+ Monocytes": ["FCGR3A", "MS4A7"],
    "NK cells": ["GNLY", "NKG7", "GZMB"],
}
CLASSIFIERS = ("individual", "global", "no graph")
PICTURED = "B cells"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--figure", type=Path, help=f"file for the network of {PICTURED}")
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is absent: set CELLGLOT_DATA to the folder of the data.")
    split = prepared("kang", 0)
    test = np.isin(np.arange(len(split.labels)), split.test)
    scores = simple_scores(split)
    for name in CLASSIFIERS:
        model, _ = trained("kang", name, split, 0)
        genes, edges = gene_importance(DATA / KANG.file, model, cells=test, labels="cell_type", progress=False)
        scores[name] = genes.pivot(index="gene_symbol", columns="label", values="importance")
        if args.figure and name == CLASSIFIERS[0]:
            save_figure(plot_importance_network(genes, edges, PICTURED, n_edges=30), args.figure)
    ranks: dict[str, Any] = {name: found.rank(ascending=False, method="min") for name, found in scores.items()}
    rows = [[label, marker, *(int(r.loc[marker, label]) for r in ranks.values())] for label, marker in _pairs()]
    summary = {
        name: {
            "median_rank": float(np.median([row[2 + i] for row in rows])),
            "among_first_20": int(sum(row[2 + i] <= 20 for row in rows)),
        }
        for i, name in enumerate(ranks)
    }
    record = {"ranks": [dict(zip(["type", "marker", *ranks], row, strict=True)) for row in rows], "summary": summary}
    print_ranks(record)
    save_results({**record, "first_genes": first_genes(scores), **machine()}, args.json)


def print_ranks(record: dict[str, Any]) -> None:
    """Two tables: the rank of each marker by each way, and the ways summed up."""
    print_table(list(record["ranks"][0]), [list(row.values()) for row in record["ranks"]])
    print()
    rows = [[name, *found.values()] for name, found in record["summary"].items()]
    print_table(["ranked by", "median rank", f"of {len(record['ranks'])} markers among the first 20"], rows)


def _pairs() -> list[tuple[str, str]]:
    return [(label, marker) for label, markers in MARKERS.items() for marker in markers]


def simple_scores(split: Split) -> dict[str, pd.DataFrame]:
    """(genes, types) by name: scores of training cells that need no network."""
    from sklearn.linear_model import LogisticRegression

    x, y = split.expression[split.train], split.labels[split.train]
    of_class = [np.asarray(x[y == k].mean(axis=0)).ravel() for k in range(len(split.classes))]
    others = [np.asarray(x[y != k].mean(axis=0)).ravel() for k in range(len(split.classes))]
    regression = LogisticRegression(C=0.1, max_iter=2000).fit(x, y)
    tables = {
        "difference of means": np.stack(of_class) - np.stack(others),
        "logistic regression": regression.coef_ * np.stack(of_class),
    }
    symbols = split.graph.genes.labels()
    return {name: pd.DataFrame(table.T, index=symbols, columns=split.classes) for name, table in tables.items()}


def first_genes(scores: dict[str, Any], n: int = 10) -> dict[str, dict[str, list[str]]]:
    """way -> type -> its first genes."""
    return {
        name: {label: table[label].nlargest(n).index.tolist() for label in table.columns}
        for name, table in scores.items()
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
