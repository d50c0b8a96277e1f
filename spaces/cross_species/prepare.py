"""Trains the small model of this Space, aligns it, and lays out what app.py opens.

    python spaces/cross_species/prepare.py                    # half a minute on two CPU cores
    python spaces/cross_species/prepare.py --human HUMAN.h5ad --mouse MOUSE.h5ad --orthologs ORTHOLOGS.csv

Without files, human is one half of the PBMCs that scanpy ships, and "mouse" is simulated from the other half. Needs
`cellglot[train]`. The folder is a complete model directory, plus `about.json`, `human.h5ad`, `mouse.h5ad` (with those
that nothing was fitted to marked `held_out`) and `orthologs.csv`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellglot import PCAProjectionFeatureExtractor
from cellglot.datasets_scripts.pbmc import pbmc_cells
from cellglot.serving import keep, preparing
from cellglot.train import align, pretrain
from cellglot.train.ortholog_table import read_orthologs, shared_genes
from cellglot.train.splits import held_out

HERE = Path(__file__).parent
RECIPES = Path(align.__file__).parent / "recipes"
# Of each species at the most, so that the bundle stays small; of the mouse cells that share is not trained on
MAX_CELLS, HELD_OUT = 4000, 0.4
# Patches of a cell's own components, not other cells: what becomes of a cell then does not depend on who else was
# uploaded, and translations are as good (docs/cross_species.md).
AXIS = ["--token_axis", "components", "--num_patches", "5"]
# Steps this small are no faster on two cores.
THREADS = ["--cpu_threads", "1"]


def simulated_mouse(cells: Any, seed: int = 0) -> Any:
    """The cells as if of a mouse: a third of the genes not measured, and every gene of the others captured otherwise.

    Counts are drawn anew (Poisson) around 0.6 of what they were, times a factor of each gene (lognormal, sigma 0.7).
    Names are the human ones in lower case but for the first letter.
    """
    rng = np.random.default_rng(seed)
    mouse = cells[:, rng.permutation(cells.n_vars)[: 2 * cells.n_vars // 3]].copy()
    factors_g = 0.6 * rng.lognormal(0, 0.7, mouse.n_vars)
    mouse.X = sp.csr_matrix(rng.poisson(mouse.X.toarray() * factors_g).astype(np.float32))
    mouse.var_names = [str(name).capitalize() for name in mouse.var_names]
    return mouse


def embedded_cells() -> tuple[Any, Any, pd.DataFrame]:
    """Human cells, simulated mouse cells, and their orthologs: genes of one name."""
    cells = pbmc_cells()
    half = marked(cells.obs["cell_type"], 0.5)
    human, mouse = cells[~half].copy(), simulated_mouse(cells[half])
    names = pd.Series(human.var_names, index=[str(name).capitalize() for name in human.var_names])
    return human, mouse, pd.DataFrame({"human": names[mouse.var_names].to_numpy(), "mouse": mouse.var_names})


def marked(labels: Any, share: float) -> np.ndarray:
    """(cells,) mask of a share of each label; labels of one cell are not marked."""
    labels = labels.astype(str).to_numpy(dtype=str)
    names, code, n_of = np.unique(labels, return_inverse=True, return_counts=True)
    return held_out(names[code], share, among=n_of[code] > 1)


def read_cells(path: Path, column: str) -> Any:
    """Counts and types of a file, or of a sample of MAX_CELLS."""
    cells: Any = ad.read_h5ad(path)
    if column not in cells.obs:
        raise SystemExit(f"{path}: expected a column {column!r} in obs, found {', '.join(map(str, cells.obs))}.")
    cells = cells[np.sort(np.random.default_rng(0).permutation(cells.n_obs)[:MAX_CELLS])].copy()
    return ad.AnnData(cells.X, obs=cells.obs[[column]].rename(columns={column: "cell_type"}), var=cells.var)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--human", type=Path, help=".h5ad of raw counts, with a column of cell types")
    parser.add_argument("--mouse", type=Path, help="likewise")
    parser.add_argument("--orthologs", type=Path, help="table of gene pairs, as of train/align.py")
    parser.add_argument("--cell-type", default="cell_type", help="column of obs in both files")
    parser.add_argument("--epochs", type=int, help="of pre-training; fewer make a quicker, worse model")
    options = parser.parse_args()
    files = (options.human, options.mouse, options.orthologs)
    if any(files) and not all(files):
        parser.error("--human, --mouse and --orthologs belong together")
    with preparing(options.output) as work:
        if all(files):
            human, mouse = (read_cells(path, options.cell_type) for path in files[:2])
            orthologs, told = options.orthologs, {"human": options.human.name, "mouse": options.mouse.name}
        else:
            human, mouse, table = embedded_cells()
            orthologs = work / "by_name.csv"
            table.to_csv(orthologs, index=False)
            told = {
                "human": f"{human.n_obs} human blood cells (PBMC) of Zheng et al. 2017",
                "mouse": f"**simulated**, from {mouse.n_obs} other human blood cells: mouse gene names, a third of the "
                "genes left out, counts of each gene rescaled and thinned",
            }
        mouse.obs["held_out"] = marked(mouse.obs["cell_type"], HELD_OUT)
        human.write_h5ad(work / "human.h5ad")
        mouse[~mouse.obs["held_out"]].copy().write_h5ad(work / "mouse.h5ad")
        sources = [f"{name}={work / name}.h5ad" for name in ("human", "mouse")]
        epochs = ["--epochs", str(options.epochs)] if options.epochs else []
        first = ["--recipe", str(RECIPES / "cross_species_brain_small.yaml"), "--output", str(work / "pretrained")]
        columns = ["--cell_type", "cell_type", "--report", "false", "--sources", *sources]
        pretrain.main([*first, *columns, *AXIS, *THREADS, *epochs])
        second = ["--recipe", str(RECIPES / "align_brain_small.yaml"), "--output", str(work / "aligned")]
        trained = ["--model", str(work / "pretrained" / "model"), "--orthologs", str(orthologs)]
        align.main([*second, *trained, "--method", "optimal_transport"])
        bundle = work / "aligned" / "model"
        human.write_h5ad(bundle / "human.h5ad", compression="gzip")
        mouse.write_h5ad(bundle / "mouse.h5ad", compression="gzip")
        shared_table(orthologs, bundle).to_csv(bundle / "orthologs.csv", index=False)
        (bundle / "about.json").write_text(json.dumps(told, indent=2))
        keep(bundle, options.output)
    print(f"Start the Space: python {HERE / 'app.py'}")


def shared_table(orthologs: Path, bundle: Path) -> pd.DataFrame:
    """Positions of the shared genes among those of each species' projection."""
    extractor: Any = PCAProjectionFeatureExtractor.from_pretrained(bundle)
    names = ("human", "mouse")
    genes = [extractor.gene_ids(name) for name in names]
    symbols = (extractor.gene_symbols("human"), extractor.gene_symbols("mouse"))
    shared = shared_genes(read_orthologs(orthologs), *genes, name=str(orthologs), symbols=symbols)
    return pd.DataFrame({"human": shared.index_a, "mouse": shared.index_b})


if __name__ == "__main__":
    main()
