"""Trains the small model of this Space, both directions, and lays out what app.py opens.

    python spaces/multiome/prepare.py                                    # half a minute on a CPU core
    python spaces/multiome/prepare.py --rna rna.h5ad --atac atac.h5ad    # with real paired cells

Without files, expression is that of the PBMCs that scanpy ships, and accessibility is simulated from it: peaks at
made-up places, each the likelier to be open the more of its few genes the cell expresses. Needs `cellglot[train]`. The
folder is a complete model directory, plus `about.json`, `frequencies.npz`, and held-out cells, `examples_*.h5ad`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import cellglot
from cellglot.datasets_scripts.pbmc import pbmc_cells
from cellglot.metrics.feature_prediction import ranking_metrics
from cellglot.serving import keep, preparing
from cellglot.tokenization.binarized_string import TASKS
from cellglot.train import pretrain
from cellglot.train.splits import held_out

HERE = Path(__file__).parent
RECIPE = Path(pretrain.__file__).parent / "recipes" / "multiome_set.yaml"
PEAKS, GENES_PER_PEAK, BASES = 1_200, 4, 900
# A type's frequencies count as if it had this many more cells, with those of all cells
EXTRA_CELLS = 5
# Held-out cells that are shown, and those that figures are of, at the most
MAX_EXAMPLES, MAX_MEASURED = 200, 1_000


def simulated_peaks(rna: Any, seed: int = 0) -> ad.AnnData:
    """Open peaks of the cells of `rna`; var["rule"] are the genes that open each.

    A peak's genes are one at random and those that correlate most with it. The log-odds that it is open are linear in
    the share of them that the cell expresses, and each cell has a depth, 1 - (1 - p)^depth.
    """
    rng = np.random.default_rng(seed)
    counts: Any = rna.X
    dense = counts.toarray()
    expression = np.log1p(dense / rna.obs["n_counts"].to_numpy()[:, None] * 1e4)
    usual = np.flatnonzero((dense > 0).mean(axis=0) >= 0.05)
    # A gene correlates most with itself, and so is the first of its own
    nearest = np.argsort(-np.corrcoef(expression[:, usual].T), axis=1)[:, :GENES_PER_PEAK]
    genes_pk = usual[nearest[rng.integers(len(usual), size=PEAKS)]]
    share_np = (dense > 0)[:, genes_pk].mean(axis=2)
    log_odds = rng.normal(-2.5, 1.0, PEAKS) + 5 * (share_np - share_np.mean(axis=0))
    depth_n = rng.lognormal(0, 0.3, len(dense))
    likely = 1 - (1 / (1 + np.exp(log_odds))) ** depth_n[:, None]
    chromosome = 1 + np.arange(PEAKS) * 22 // PEAKS
    start = np.sort(rng.choice(100_000, PEAKS, replace=False)) * 1_000
    names = [f"chr{c}-{s}-{s + BASES}" for c, s in zip(chromosome, start, strict=True)]
    rule = [", ".join(rna.var_names[genes]) for genes in genes_pk]
    opened = sp.csr_matrix((rng.random(likely.shape) < likely).astype(np.float32))
    return ad.AnnData(opened, obs=rna.obs.copy(), var=pd.DataFrame({"rule": rule}, index=pd.Index(names)))


def frequencies(present_nf: np.ndarray, types: np.ndarray) -> dict[str, np.ndarray]:
    """How often training cells have each feature: "" of all, and of each type, drawn towards it where cells are few."""
    found = {"": present_nf.mean(axis=0)}
    for name in np.unique(types):
        of_type = present_nf[types == name]
        found[name] = (of_type.sum(axis=0) + EXTRA_CELLS * found[""]) / (len(of_type) + EXTRA_CELLS)
    return found


def predicted(model: Any, processor: Any, cells: tuple[ad.AnnData, ad.AnnData], task: str) -> np.ndarray:
    """(cells, features) probabilities."""
    batch = processor(cells, task)
    with torch.no_grad():
        parts = zip(batch["input_ids"].split(64), batch["attention_mask"].split(64), strict=True)
        return torch.cat([model(*part).logits.sigmoid() for part in parts]).numpy()


def measured(
    bundle: Path, cells: tuple[ad.AnnData, ad.AnnData], types: np.ndarray, train: np.ndarray, chosen: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Frequencies in training cells, a table for each task with a row for each of "types"; and average precisions.

    train   (cells,) bool
    chosen  positions of the held-out cells that figures are of
    """
    model = cellglot.MultiomeT5ForFeaturePrediction.from_pretrained(bundle).eval()
    processor: Any = cellglot.BinarizedStringProcessor.from_pretrained(bundle)
    held = cells[0][chosen].copy(), cells[1][chosen].copy()
    known = processor.feature_extractor((cells[0][train].copy(), cells[1][train].copy()))
    truth = processor.feature_extractor(held)
    tables, figures = {}, {}
    for task, (_, target) in TASKS.items():
        usual, present = frequencies(known[target].toarray(), types[train]), truth[target].toarray() > 0
        scores = {
            "model": predicted(model, processor, held, task),
            "frequency": np.tile(usual[""], (len(chosen), 1)),
            "frequency in its type": np.stack([usual.get(name, usual[""]) for name in types[chosen]]),
        }
        figures[task] = {"share there": float(present.mean())}
        figures[task] |= {name: ranking_metrics(present, of)["pooled_average_precision"] for name, of in scores.items()}
        tables |= {task: np.stack(list(usual.values())).astype(np.float32), "types": np.array(list(usual))}
    return tables, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--rna", type=Path, help="raw counts of genes, .h5ad; obs['cell_type'] if there are types")
    parser.add_argument("--atac", type=Path, help="counts of peaks of the same cells")
    parser.add_argument("--split-by", help="column of obs whose groups are held out whole, such as batch")
    parser.add_argument("--epochs", type=int, default=12, help="fewer make a quicker, worse model")
    options = parser.parse_args()
    real = options.rna is not None
    if real != (options.atac is not None):
        parser.error("--rna and --atac go together.")
    rna = ad.read_h5ad(options.rna) if real else pbmc_cells()
    atac = ad.read_h5ad(options.atac) if real else simulated_peaks(rna)
    groups = rna.obs[options.split_by].astype(str).to_numpy(dtype=str) if options.split_by else None
    everything = np.ones(rna.n_obs, dtype=bool)
    test = held_out(np.full(rna.n_obs, ""), 0.15, groups=groups, among=everything) if real else rna.obs["held_out"]
    test, types = np.asarray(test), rna.obs.get("cell_type", pd.Series("", rna.obs_names)).astype(str).to_numpy(str)
    with preparing(options.output) as work:
        files = [f"{work}/rna.h5ad", f"{work}/atac.h5ad"]
        for adata, path in zip((rna, atac), files, strict=True):
            adata[~test].copy().write_h5ad(path)
        # On so few cells a second thread mostly waits
        training = f"--epochs {options.epochs} --learning_rate 1e-3 --min_cells 10 --cpu_threads 1".split()
        pretrain.main(["--recipe", str(RECIPE), "--cells", *files, "--output", f"{work}/run", *training])
        bundle = work / "run" / "model"
        chosen = np.random.default_rng(0).permutation(np.flatnonzero(test))[:MAX_MEASURED]
        tables, figures = measured(bundle, (rna, atac), types, ~test, chosen)
        np.savez(bundle / "frequencies.npz", allow_pickle=False, **tables)
        shown = sorted(chosen[:MAX_EXAMPLES], key=lambda cell: types[cell])
        for adata, name in zip((rna, atac), ("rna", "atac"), strict=True):
            adata[shown].copy().write_h5ad(bundle / f"examples_{name}.h5ad", compression="gzip")
        pbmc = "Real expression of human blood cells (PBMC, Zheng et al. 2017, as scanpy ships them)"
        about = {
            "examples": f"Cells of {options.rna.name} and {options.atac.name} that were held out from training."
            if real
            else f"{pbmc}; **their peaks are simulated** from it, at made-up places, by a planted rule.",
            "accessibility": "measured" if real else "simulated",
            "held_out": {"n": len(chosen), **figures},
        }
        (bundle / "about.json").write_text(json.dumps(about, indent=2))
        print(json.dumps(about["held_out"], indent=2))
        keep(bundle, options.output)
    print(f"Start the Space: python {HERE / 'app.py'}")


if __name__ == "__main__":
    main()
