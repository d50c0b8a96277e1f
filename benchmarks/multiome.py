"""Gene expression <-> chromatin accessibility: the multiome T5 beside the competition's methods and simpler ones.

    python benchmarks/multiome.py --seeds 5 --json benchmarks/results/multiome.json

On real cells: sci-CAR (Cao et al. 2018, A549, 2,641 cells; no batches, so 20% of the cells are held out) and the
starter data of the NeurIPS 2021 competition (500 cells of bone marrow, 600 genes, 600 peaks; batch s1d2 held out). A
seed is a split and an initialization; features are chosen, methods trained, and thresholds set on training cells only.
Every method's set is what it scores at or above the threshold that has the best F1 on its validation cells. ± is a 95%
interval over seeds; differences from the frequency baseline are paired by seed. A picture goes beside the JSON.

Minutes for each split and network on two cores; what is finished below --work is not computed again, so that a run that
is stopped, even by `timeout`, goes on where it was. Predictions of seed 0 are left there as AnnData. Data: the folder
CELLGLOT_DATA, else ../shared/data. DANCE is measured where the extra `benchmark-multiome` is installed.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from measure import machine, print_table, save_results
from multiome_cells import DATA, FILES, MIN_SHARE, TITLES, Split, masks, read_pair
from multiome_methods import METHODS, SET_HEAD_TRAINING, T5, T5_TRAINING, Prediction, predictions
from scipy import stats
from tqdm.auto import tqdm

from cellglot.metrics.feature_prediction import (
    best_f1_threshold,
    precision_at_true_size,
    ranking_metrics,
    set_metrics,
    value_metrics,
)
from cellglot.tokenization.binarized_string import TASKS
from cellglot.train.config import write_json

# Lee et al., "Translating the Code of Life": accuracy, which it does not define, of 250 + 250 inputs
PAPER = {"theirs": "65.8 to 68.3", "KAUST": 84.6, "Cajal": 87.8, "Dengkw": 86.9, "DANCE": 91.1}
# RMSE of the competition's own methods in its first phase, on all genes and 10,000 peaks: other data than here
COMPETITION_RMSE = {
    "gex2atac": {"mean": 0.1616, "linear": 0.1596, "nearest cells": 0.1604, "zeros": 0.1748},
    "atac2gex": {"mean": 0.2852, "linear": 0.2738, "nearest cells": 0.2695, "zeros": 0.3422},
}
# No code of it is in the competition's collection, and no description was found.
WITHOUT_CODE = {"KAUST": "no public implementation"}
COLUMNS = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "F1": "f1",
    "Jaccard": "jaccard",
    "precision at k": "precision_at_k",
    "AUROC, pooled": "pooled_auroc",
    "per feature": "feature_auroc",
    "average precision, pooled": "pooled_average_precision",
    "per feature ": "feature_average_precision",
    "RMSE": "rmse",
    "Pearson, cell": "pearson_per_cell",
    "Pearson, feature": "pearson_per_feature",
}
DIFFERENCES = ("f1", "precision_at_k", "pooled_auroc", "feature_auroc", "pooled_average_precision", "rmse")
PACKAGES = ("scikit-learn", "scipy", "anndata", "torch-geometric")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="splits and initializations")
    parser.add_argument("--data", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--json", type=Path, help="file for the figures; the picture is written beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/multiome"), help="folder of the runs")
    parser.add_argument(
        "--summarize",
        action="store_true",
        help="computes nothing: tables of the methods that every seed has below --work",
    )
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is absent: set CELLGLOT_DATA to the folder of the data.")
    if "DANCE" in args.methods and importlib.util.find_spec("torch_geometric") is None:
        print("DANCE is left out: torch-geometric is not installed.")
        args.methods.remove("DANCE")
    found: dict[str, list[dict[str, Any]]] = {}
    with tqdm(total=len(args.data) * args.seeds * len(args.methods), unit="method") as bar:
        for name in args.data:
            for seed in range(args.seeds):
                split = Split(pair := read_pair(name), seed, masks(pair, seed))
                record: dict[str, Any] = {"facts": split.facts(), "methods": {}}
                for method in args.methods:
                    if args.summarize and not figures_file(method, args.work / name / str(seed)).exists():
                        continue
                    bar.set_description(f"{name}, seed {seed}, {method}")
                    record["methods"][method] = finished(method, split, args.work / name / str(seed))
                    bar.update()
                found.setdefault(name, []).append(record)
    results: dict[str, Any] = {"seeds": list(range(args.seeds)), "figures": {}}
    for name, records in found.items():
        results["figures"][name] = summarized(records)
        print_tables(name, results["figures"][name])
    if args.json:
        draw(results["figures"], args.json.with_suffix(".png"))
    results |= {"paper, accuracy": PAPER, "competition, RMSE": COMPETITION_RMSE, "without code": WITHOUT_CODE}
    results |= {"settings": settings(), "data": hashes(args.data), **machine()}
    results["versions"] |= {package: version for package in PACKAGES if (version := _version(package))}
    save_results(results, args.json)


def finished(method: str, split: Split, work: Path) -> dict[str, Any]:
    """Task -> figures of a method on a split: those of an earlier run, or measured and kept."""
    path = figures_file(method, work)
    if not path.exists():
        started = time.perf_counter()
        told = predictions(method, split, work)
        seconds = time.perf_counter() - started
        figures = {task: measured(prediction, split, task) for task, prediction in told.items()}
        if split.seed == 0:
            for task, prediction in told.items():
                threshold = figures[task].get("threshold")
                adata = as_anndata(prediction, threshold, split, task, method)
                write_anndata(adata, path.with_name(f"{path.stem}_{task}.h5ad"))
        write_json(path, {**figures, "seconds": seconds})
    return json.loads(path.read_text())


def figures_file(method: str, work: Path) -> Path:
    return work / f"{method.lower().replace(',', '').replace(' ', '_')}.json"


def measured(prediction: Prediction, split: Split, task: str) -> dict[str, float]:
    """All figures of one method, task and split."""
    modality = TASKS[task][1]
    truth = {part: split.present[modality][getattr(split.cells, part)].toarray() > 0 for part in ("validation", "test")}
    if prediction.scores is None:
        assert prediction.present is not None
        assert prediction.tested is not None
        return {**set_metrics(truth["test"][prediction.tested], prediction.present), "cells": len(prediction.tested)}
    threshold = best_f1_threshold(truth["validation"], prediction.scores["validation"])
    scores = prediction.scores["test"]
    figures = {
        **set_metrics(truth["test"], chosen(scores, threshold)),
        **ranking_metrics(truth["test"], scores),
        "precision_at_k": precision_at_true_size(truth["test"], scores),
        "threshold": threshold,
        "cells": len(scores),
    }
    if prediction.values is not None:
        figures |= value_metrics(split.values[modality][split.cells.test].toarray(), prediction.values)
    return figures


def chosen(scores: np.ndarray, threshold: float) -> np.ndarray:
    """(n, f) the predicted sets. A score of 0 says that the feature is never there, whatever the threshold."""
    return (scores >= threshold) & (scores > 0)


def as_anndata(prediction: Prediction, threshold: float | None, split: Split, task: str, method: str) -> ad.AnnData:
    """Predictions of the test cells: X values as the competition takes them, or the sets where there are none; layers
    "present" (the sets, sparse) and "scores"."""
    cells = np.flatnonzero(split.cells.test)
    if prediction.tested is not None:
        cells = cells[prediction.tested]
    scores = None if prediction.scores is None else prediction.scores["test"]
    if scores is None:
        assert prediction.present is not None
        sets = sp.csr_matrix(prediction.present.astype(np.float32))
    else:
        assert threshold is not None
        sets = sp.csr_matrix(chosen(scores, threshold).astype(np.float32))
    modality = TASKS[task][1]
    adata = ad.AnnData(
        sets if prediction.values is None else prediction.values, obs=split.pair.rna.obs.iloc[cells].copy()
    )
    adata.var_names = split.processor.feature_extractor.features(modality)
    adata.layers["present"] = sets
    if scores is not None:
        adata.layers["scores"] = scores
    adata.uns.update({"method_id": method, "dataset_id": split.pair.name, "task": task})
    return adata


def write_anndata(adata: ad.AnnData, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    adata.write_h5ad(partial, compression="gzip")
    os.replace(partial, path)


def summarized(records: list[dict[str, Any]]) -> dict[str, Any]:
    """task -> "methods" and "differences" from the frequency baseline -> method -> figure -> mean, ci, values."""
    tables: dict[str, Any] = {"facts": records[0]["facts"]}
    for task in TASKS:
        by_method = {
            method: [record["methods"][method][task] for record in records]
            for method in records[0]["methods"]
            if all(method in record["methods"] for record in records)
        }
        tables[task] = {
            "methods": {
                method: {figure: interval([seed[figure] for seed in seeds]) for figure in seeds[0]}
                for method, seeds in by_method.items()
            },
            "differences": {
                method: {
                    figure: interval(
                        [a[figure] - b[figure] for a, b in zip(seeds, by_method["frequency"], strict=True)]
                    )
                    for figure in DIFFERENCES
                    if figure in seeds[0]
                }
                for method, seeds in by_method.items()
                if method not in ("zeros", "frequency") and "frequency" in by_method
            },
        }
    return tables


def interval(values: list[float]) -> dict[str, Any]:
    """Mean over seeds and half the width of its 95% interval (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "ci": None if half is None else float(half), "values": values}


def print_tables(name: str, figures: dict[str, Any]) -> None:
    facts = figures["facts"]
    cells = ", ".join(f"{facts[part]:,} {part}" for part in ("train", "validation", "test"))
    print(f"\n## {TITLES[name]}: {cells} cells")
    for task, (_, modality) in TASKS.items():
        share = f"{facts[f'{modality}_features']:,} features, {facts[f'{modality}_density']:.1%} there"
        print(f"\n### {task}: {share}\n")
        rows = [[method, *_texts(found, COLUMNS.values())] for method, found in figures[task]["methods"].items()]
        rows += [[method, why, *[""] * (len(COLUMNS) - 1)] for method, why in WITHOUT_CODE.items()]
        print_table([task, *COLUMNS], rows)
        print("\nDifference from the frequency baseline:\n")
        names = {figure: column for column, figure in COLUMNS.items()}
        rows = [
            [method, *_texts(found, DIFFERENCES, sign="+")] for method, found in figures[task]["differences"].items()
        ]
        print_table([task, *(names[figure].strip() for figure in DIFFERENCES)], rows)


def _texts(found: dict[str, Any], figures: Any, sign: str = "") -> list[str]:
    return [_text(found.get(figure), sign) for figure in figures]


def _text(found: dict[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return ""
    return f"{found['mean']:{sign}.4f}" + ("" if found["ci"] is None else f" ± {found['ci']:.4f}")


def draw(figures: dict[str, Any], path: Path) -> None:
    """How much each method gains on the frequency baseline: a panel a data set and task, with intervals. The T5 is left
    out, which is too far behind to share an axis."""
    import matplotlib.pyplot as plt

    shown = {"pooled_average_precision": "average precision", "feature_auroc": "AUROC per feature", "f1": "F1"}
    panels = [(name, task) for name in figures for task in TASKS]
    order = [m for m in METHODS if m != T5 and any(m in figures[name][task]["differences"] for name, task in panels)]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 4.2), sharey=True, squeeze=False)
    for axis, (name, task) in zip(axes[0], panels, strict=True):
        rows = figures[name][task]["differences"]
        for k, (key, label) in enumerate(shown.items()):
            known = [(y + 0.22 * (k - 1), rows[method][key]) for y, method in enumerate(order) if method in rows]
            means, halves = ([found[part] or 0 for _, found in known] for part in ("mean", "ci"))
            axis.errorbar(means, [y for y, _ in known], xerr=halves, fmt="o", ms=4, lw=1.2, label=label)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(f"{TITLES[name]}\n{' to '.join(TASKS[task])}", fontsize=9)
        axis.set_xlabel("gain on the frequency baseline", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_yticks(range(len(order)), order)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(shown), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"saved {path}")


def settings() -> dict[str, Any]:
    return {"least share of training cells": MIN_SHARE, "set head": SET_HEAD_TRAINING, "T5": T5_TRAINING}


def hashes(names: list[str]) -> dict[str, str]:
    """SHA-256 of each file."""
    files = [file for name in names for file in FILES[name]]
    return {file: hashlib.sha256((DATA / file).read_bytes()).hexdigest() for file in files}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
