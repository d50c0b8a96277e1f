"""First-order estimates of deletions beside exact ones: how well they rank genes, and how much sooner they are there.

    python benchmarks/perturbation_screen.py --model runs/geneformer-pbmc/model

Every gene of some monocytes among the 700 blood cells that come with the installation is deleted, as in
docs/tutorial.md. The model is a trained one, e.g. by `accelerate launch train/pretrain.py`: rank correlations depend on
it.
Contenders, each in a process of its own: exact (cosine similarities and shifts to states), and the estimates of shifts,
and of cosine similarities.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import answer_as_contender, interleaved, machine, median, print_table, save_results, worst

CONTENDERS = ("exact", "shifts", "cosines")
START, GOAL, ALTERNATIVE = "CD14+ Monocyte", "Dendritic", "CD19+ B"


def run(model: str, cells: str, answers: str, n_cells: int, seed: int, *, method: str, states: bool) -> dict[str, Any]:
    from cellglot import GeneformerModel, RankValueTokenizer
    from cellglot.perturb import CellStates, read_perturbations, write_perturbations

    encoder, tokenizer = GeneformerModel.from_pretrained(model), RankValueTokenizer.from_pretrained(model)
    options: dict[str, Any] = {"method": method, "max_cells": n_cells, "seed": seed, "progress": False}
    if states:
        embeddings = dict(np.load(f"{cells}/states.npz"))
        options["states"] = CellStates("cell_type", START, GOAL, [ALTERNATIVE], embeddings=embeddings)
    source = f"{cells}/monocytes.h5ad"
    with tempfile.TemporaryDirectory() as folder:
        write_perturbations(source, encoder, tokenizer, f"{folder}/warm", **{**options, "max_cells": 1})
        start = time.perf_counter()
        effects = read_perturbations(write_perturbations(source, encoder, tokenizer, f"{folder}/run", **options))
        seconds = time.perf_counter() - start
    effects.to_parquet(answers)
    return {"seconds": seconds, "edits": len(effects)}


def exact(cells: str, **shared: Any) -> dict[str, Any]:
    return run(cells=cells, answers=f"{cells}/exact.parquet", method="exact", states=True, **shared)


def shifts(cells: str, **shared: Any) -> dict[str, Any]:
    return run(cells=cells, answers=f"{cells}/shifts.parquet", method="gradient", states=True, **shared)


def cosines(cells: str, **shared: Any) -> dict[str, Any]:
    return run(cells=cells, answers=f"{cells}/cosines.parquet", method="gradient", states=False, **shared)


def prepare(model: str, folder: str) -> None:
    """The monocytes, and the mean embeddings of the states over all cells of them."""
    import anndata

    from cellglot import GeneformerModel, RankValueTokenizer, embed_cells
    from cellglot.datasets_scripts.pbmc import PBMC
    from cellglot.datasets_scripts.ragged_counts import read_ragged

    corpus = PBMC().prepare()
    adata = anndata.concat([read_ragged(corpus, split) for split in ("train", "validation")], merge="same")
    encoder, tokenizer = GeneformerModel.from_pretrained(model), RankValueTokenizer.from_pretrained(model)
    rows = embed_cells(adata, encoder, tokenizer, progress=False).obsm["X_geneformer"]
    of_type = adata.obs["cell_type"].to_numpy()
    means = {name: np.nanmean(rows[of_type == name], axis=0) for name in (START, GOAL, ALTERNATIVE)}
    np.savez(f"{folder}/states.npz", **means)
    adata[of_type == START].copy().write_h5ad(f"{folder}/monocytes.h5ad")


def rank_correlations(folder: str) -> dict[str, float]:
    """Spearman's, in each cell (mean and worst), and of the genes' means over cells."""
    import pandas as pd
    from scipy.stats import spearmanr

    tables = {name: pd.read_parquet(f"{folder}/{name}.parquet") for name in CONTENDERS}
    out = {}
    for value, estimates in (
        (f"shift_to_{GOAL}", "shifts"),
        (f"shift_to_{ALTERNATIVE}", "shifts"),
        (f"shift_to_{START}", "shifts"),
        ("cosine_similarity", "cosines"),
    ):
        both = tables["exact"][["cell", "gene", value]].merge(tables[estimates], on=["cell", "gene"])
        found, expected = f"{value}_y", f"{value}_x"
        in_cells = [spearmanr(cell[found], cell[expected]).statistic for _, cell in both.groupby("cell")]
        frequent = both.groupby("gene").filter(lambda rows: len(rows) >= 3).groupby("gene")[[found, expected]].mean()
        out[f"spearman_{value}"] = float(np.mean(in_cells))
        out[f"worst_cell_spearman_{value}"] = float(np.min(in_cells))
        out[f"genes_spearman_{value}"] = float(spearmanr(frequent[found], frequent[expected]).statistic)
    return out


def main() -> None:
    answer_as_contender({name: globals()[name] for name in CONTENDERS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a trained model with its tokenizer")
    parser.add_argument("--n-cells", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the sample of cells")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.model, folder)
        shared = {"model": options.model, "cells": folder, "n_cells": options.n_cells, "seed": options.seed}
        answers = interleaved(__file__, CONTENDERS, shared, repeats=options.repeats)
        correlations = rank_correlations(folder)
    results: dict[str, Any] = {"cells": options.n_cells, "edits": answers["exact"][0]["edits"]}
    for name in CONTENDERS:
        results[f"{name}_seconds"] = median(answers[name], "seconds")
        results[f"{name}_edits_per_second"] = results["edits"] / results[f"{name}_seconds"]
        results[f"{name}_peak_rss_mb"] = worst(answers[name], "peak_rss_mb")
        results[f"{name}_ratio"] = results["exact_seconds"] / results[f"{name}_seconds"]
    results |= correlations
    figures = ("seconds", "edits_per_second", "ratio", "peak_rss_mb")
    rows = [[name, *(results[f"{name}_{figure}"] for figure in figures)] for name in CONTENDERS]
    print_table([f"{results['edits']:,} deletions", "seconds", "edits/s", "ratio", "peak MB"], rows)
    print_table(["rank correlation with exact values", "Spearman"], [[name, v] for name, v in correlations.items()])
    save_results({**results, "repeats": options.repeats, "seed": options.seed, **machine()}, options.json)


if __name__ == "__main__":
    main()
