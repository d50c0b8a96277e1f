"""Trains the small model of this Space on the PBMCs that scanpy ships, and lays out what app.py opens.

    python spaces/gene_graph/prepare.py                                # a quarter of a minute on two CPU cores
    python spaces/gene_graph/prepare.py --edges STRING_OR_OTHER_FILE   # with a network of your own

Without a file the network is one of co-expression: each gene with those that correlate most with it over the training
cells. Needs `cellglot[train]`. The folder is a complete model directory, plus `about.json` and `examples.h5ad`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from cellglot.datasets_scripts.pbmc import pbmc_cells
from cellglot.serving import keep, preparing
from cellglot.train import finetune, pretrain

HERE = Path(__file__).parent
NEIGHBORS = 6


def coexpression(adata: ad.AnnData) -> pd.DataFrame:
    """Edges gene_a, gene_b, score: correlation of log-normalized expression, the NEIGHBORS strongest of each gene."""
    counts: Any = adata.X
    dense = counts.toarray()
    expression = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
    varies = expression.std(axis=0) > 0
    genes = adata.var_names[varies].to_numpy()
    correlation = np.corrcoef(expression[:, varies].T)
    np.fill_diagonal(correlation, -1)
    best = np.argsort(-correlation, axis=1)[:, :NEIGHBORS]
    rows = np.repeat(np.arange(len(genes)), NEIGHBORS)
    table = pd.DataFrame({"gene_a": genes[rows], "gene_b": genes[best.ravel()]})
    table["score"] = correlation[rows, best.ravel()]
    return table[table["score"] > 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--edges", type=Path, help="network: STRING, BioGRID, or a table of two columns of genes")
    parser.add_argument("--epochs", type=int, help="of each training; fewer make a quicker, worse model")
    options = parser.parse_args()
    cells = pbmc_cells()
    with preparing(options.output) as work:
        edges = options.edges
        if edges is None:
            edges = work / "coexpression.tsv"
            coexpression(cells[~cells.obs["held_out"]]).to_csv(edges, sep="\t", index=False)
        epochs = ["--epochs", str(options.epochs)] if options.epochs else []
        first, second = f"{work}/autoencoder", f"{work}/cell-types"
        recipes = Path(finetune.__file__).parent / "recipes"
        pretrain.main(["--recipe", str(recipes / "gene_graph_pbmc.yaml"), "--output", first, *epochs])
        network = ["--smoothing", "global", "--edges", str(edges)]
        recipe = str(recipes / "finetune_gene_graph_pbmc.yaml")
        finetune.main(["--recipe", recipe, "--model", f"{first}/model", "--output", second, *network, *epochs])
        bundle = Path(second) / "model"
        cells.write_h5ad(bundle / "examples.h5ad", compression="gzip")
        figures = json.loads((bundle / "metrics.json").read_text())["metrics"]["cell_type"]
        about = {
            "examples": "700 human blood cells (PBMC) of Zheng et al. 2017, as scanpy ships them.",
            "network": edges.name if options.edges else "genes that are expressed together in the training cells",
            "held_out": {
                "n": figures["this model"]["n"],
                "model": figures["this model"]["accuracy"],
                "logistic regression": figures["logistic regression"]["accuracy"],
            },
        }
        (bundle / "about.json").write_text(json.dumps(about, indent=2))
        keep(bundle, options.output)
    print(f"Start the Space: python {HERE / 'app.py'}")


if __name__ == "__main__":
    main()
