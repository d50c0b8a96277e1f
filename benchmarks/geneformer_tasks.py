"""What a Geneformer is worth on labelled cells and genes, beside simple baselines and networks without pre-training.

    python benchmarks/geneformer_tasks.py kang        --json benchmarks/results/geneformer_kang.json
    python benchmarks/geneformer_tasks.py scmixology  --json benchmarks/results/geneformer_scmixology.json
    python benchmarks/geneformer_tasks.py dosage      --json benchmarks/results/geneformer_dosage.json

kang        cell types of PBMCs, donors 1256 and 1488 held out (Kang et al. 2018)
scmixology  cell lines, CEL-seq2 -> Drop-seq (Tian et al. 2019)
dosage      dosage-sensitive transcription factors, 5 folds over genes (Theodoris et al. 2023)

Pre-training sees the training cells only, without labels (dosage: the CEL-seq2 cells). Finished runs below --work are
not done again. Data: the folder CELLGLOT_DATA, else ../shared/data.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import sklearn
from scipy import stats

from cellglot import __version__
from cellglot.train import finetune, pretrain
from cellglot.train.config import write_json
from cellglot.train.fingerprint import fingerprint

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CELLGLOT_DATA", ROOT.parent / "shared" / "data"))
KANG = "cells/kang2018_pbmc_12261x1287.h5ad"
SCMIXOLOGY = "cells/tian2019_scmixology_celseq2_dropseq.h5ad"
DOSAGE = "gene_labels/dosage_sensitivity_TFs.tsv"

# The same for pre-trained and untrained networks; nothing here was chosen on the test cells or genes.
PRETRAINING = {"schedule": "cosine", "warmup_steps": 0.1, "batch_size": 32, "validation_fraction": 0.05}
FINETUNING = {"warmup_steps": 0.1, "batch_size": 12, "save_every": 10**9}
TASKS: dict[str, dict[str, Any]] = {
    "kang": {
        "file": KANG,
        "column": "donor",
        "held_out": ["1256", "1488"],
        "pretraining": {"epochs": 3, "learning_rate": 5e-3, "num_hidden_layers": 3},
        # Rate and epochs chosen with donor 1016 of the training donors held out
        "finetuning": {
            "labels": "cell_type",
            "pooling": "mean",
            "epochs": 3,
            "learning_rate": 1e-3,
            "max_length": 128,
        },
    },
    "scmixology": {
        "file": SCMIXOLOGY,
        "column": "batch",
        "held_out": ["sc_dropseq"],
        "pretraining": {"epochs": 6, "learning_rate": 3e-3, "num_hidden_layers": 6, "max_length": 512},
        # Rate and epochs chosen with another batch of CEL-seq2 (sc_celseq2) held out
        "finetuning": {
            "labels": "cell_type",
            "pooling": "mean",
            "epochs": 4,
            "learning_rate": 1e-3,
            "max_length": 256,
        },
    },
}
# Rate and epochs as for scmixology
DOSAGE_FINETUNING = {"folds": 5, "epochs": 4, "learning_rate": 1e-3, "max_length": 512, "class_weights": "balanced"}
UNTRAINED_DEPTHS = (6, 4, 3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "dosage"])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each network; for dosage, 5 folds each")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="folder of the runs")
    parser.add_argument("--threads", type=int, help="CPU threads; absent: all cores")
    parser.add_argument("--max_cells", type=int, default=400, help="dosage: cells that the genes are seen in")
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is absent: set CELLGLOT_DATA to the folder of the data.")
    table, settings = dosage(args) if args.task == "dosage" else cell_types(args.task, args)
    print(f"\n{markdown(table)}")
    if args.json:
        record = {
            "task": args.task,
            "seeds": list(range(args.seeds)),
            "figures": table.to_dict("records"),
            "settings": settings,
            "data": fingerprint([DATA / settings["file"]], [str(DATA / DOSAGE)] if args.task == "dosage" else [], {}),
            **run_record(args.work / args.task),
        }
        write_json(args.json, record)


def cell_types(name: str, args: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Figures of every seed's networks and baselines on the held-out cells, summarized."""
    task, work = TASKS[name], args.work / name
    model = pretrained(name, args)
    options = {**FINETUNING, **task["finetuning"], "split_by": task["column"], "test_groups": task["held_out"]}
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for network, extra in (("pre-trained", {}), ("untrained", {"untrained": "true", "baselines": "false"})):
            report = finetuned(work / network, model, DATA / task["file"], args, seed=seed, **options, **extra)
            for row, figures in report["splits"][0]["metrics"]["cell_type"].items():
                if row == "this model" or not extra:
                    runs.setdefault(f"Geneformer, {network}" if row == "this model" else row, []).append(figures)
    return summarized(runs), {**task, "pretraining": {**PRETRAINING, **task["pretraining"]}, "finetuning": options}


def dosage(args: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Figures over folds of genes (and seeds) of networks of several depths and of baselines on expression."""
    work, model = args.work / "dosage", pretrained("scmixology", args)
    options = {**FINETUNING, **DOSAGE_FINETUNING, "gene_labels": DATA / DOSAGE, "max_cells": args.max_cells}
    runs: dict[str, list[dict[str, float]]] = {}
    networks = {"Geneformer, pre-trained, 6 layers": {}} | {
        f"Geneformer, untrained, {n} layer{'s' * (n > 1)}": {
            "untrained": "true",
            "num_hidden_layers": n,
            "baselines": "false",
        }
        for n in UNTRAINED_DEPTHS
    }
    for seed in range(args.seeds):
        for network, extra in networks.items():
            folder = work / network.replace(", ", "-").replace(" ", "-").lower()
            report = finetuned(folder, model, training_cells("scmixology", args), args, seed=seed, **options, **extra)
            for split in report["splits"]:
                for row, figures in split["metrics"][Path(DOSAGE).stem].items():
                    if row == "this model" or not extra:
                        runs.setdefault(network if row == "this model" else row, []).append(figures)
    # Seeds share folds: they are averaged first, so that the interval is one over folds of genes.
    folds = {name: [mean_figures(found[fold::5]) for fold in range(5)] for name, found in runs.items()}
    task = TASKS["scmixology"]
    settings = {**task, "pretraining": {**PRETRAINING, **task["pretraining"]}}
    return summarized(folds), {**settings, "finetuning": {**options, "gene_labels": DOSAGE}}


def pretrained(name: str, args: argparse.Namespace) -> Path:
    """Model directory of a masked LM trained on the training cells of a task."""
    output = args.work / name / "pretraining"
    if not (output / "model").exists():
        options = {**PRETRAINING, **TASKS[name]["pretraining"], "data": training_cells(name, args), "output": output}
        pretrain.main(words({**options, "overwrite": "true", "save_every": 10**9, **threads(args)}))
    return output / "model"


def training_cells(name: str, args: argparse.Namespace) -> Path:
    """Count file of the cells that are not held out."""
    path, task = args.work / name / "training_cells.h5ad", TASKS[name]
    if not path.exists():
        cells = ad.read_h5ad(DATA / task["file"])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.h5ad")
        cells[~cells.obs[task["column"]].isin(task["held_out"])].copy().write_h5ad(partial)
        partial.replace(path)
    return path


def finetuned(output: Path, model: Path, data: Path, args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """metrics.json of a run of train/finetune.py, in a folder named after its options."""
    output = output.with_name(
        f"{output.name}-{options['seed']}-{fingerprint([], (), {**options, 'data': '', 'gene_labels': ''})[:8]}"
    )
    if not (output / "metrics.json").exists():
        run = {"model": model, "data": data, "output": output, "overwrite": "true", **threads(args), **options}
        finetune.main(words(run))
    return json.loads((output / "metrics.json").read_text())


def mean_figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: float(np.mean([run[key] for run in runs])) for key in ("accuracy", "macro_f1", "macro_auroc")}


def run_record(work: Path) -> dict[str, Any]:
    """Machine and versions, as the last run wrote them down."""
    path = max(work.glob("**/run.json"), key=lambda path: path.stat().st_mtime)
    record = json.loads(path.read_text())
    machine = (
        f"{record['torch_threads']} CPU threads of {os.cpu_count()}, {platform.machine()}, device {record['device']}"
    )
    return {
        "versions": {**record["versions"], "cellglot": __version__, "scikit-learn": sklearn.__version__},
        "machine": machine,
    }


def threads(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.threads is None else {"cpu_threads": args.threads}


def words(options: dict[str, Any]) -> list[str]:
    """Options as command-line words."""
    out = []
    for name, value in options.items():
        out += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return out


def summarized(runs: dict[str, list[dict[str, float]]]) -> pd.DataFrame:
    """Mean and 95% interval (Student's t over the runs) of each figure, and of accuracy the one over cells.

    The first is of seeds or folds, and none where all runs agree; the second a bootstrap of the first run's test items.
    """
    rows = []
    for name, figures in runs.items():
        row: dict[str, Any] = {"model": name, "runs": len(figures)}
        for key in ("accuracy", "macro_f1", "macro_auroc"):
            values = np.array([f[key] for f in figures])
            row[key] = float(values.mean())
            # Rounding of equal values is no spread.
            sd = values.std(ddof=1) if len(values) > 1 and np.ptp(values) > 1e-9 else 0.0
            row[f"{key}_interval"] = (
                float(stats.t.ppf(0.975, len(values) - 1) * sd / np.sqrt(len(values))) if sd else 0.0
            )
        row |= {key: figures[0][key] for key in ("low", "high") if key in figures[0]}
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    over_cells = "low" in table
    head = ["model", "accuracy", *(["95% over cells"] if over_cells else []), "macro F1", "AUROC", "runs"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in table.to_dict("records"):
        cells = [
            f"{row[key]:.3f}" + (f" ± {row[f'{key}_interval']:.3f}" if row[f"{key}_interval"] else "")
            for key in ("accuracy", "macro_f1", "macro_auroc")
        ]
        if over_cells:
            cells.insert(1, f"{row['low']:.3f} to {row['high']:.3f}")
        lines.append(f"| {row['model']} | {' | '.join(cells)} | {row['runs']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
