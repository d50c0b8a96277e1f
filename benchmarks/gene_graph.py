"""Cell types by the gene-graph classifier: the paper's tables in form, and whether the biology in the graph matters.

    python benchmarks/gene_graph.py --json benchmarks/results/gene_graph.json

On real cells: Kang et al. 2018 PBMCs, donors 1256 and 1488 held out; the same with 25 training cells a type; Tian et
al. 2019, CEL-seq2 for training and Drop-seq for testing, the 3,000 genes that vary most among training cells, and all
22,746. Rows: random or autoencoder start; all genes or those with a neighbour; no graph, STRING's over its largest
score, with diagonal, by degrees, each cell's own by attention along STRING's edges, both; two shuffled graphs (the
genes exchanged; the edges exchanged, each gene with as many as before); baselines on the same genes and cells.

A seed is an initialization, an order of cells, a shuffle and, with 25 cells a type, a draw of cells. ± is half a 95%
interval over seeds. Epochs are about what the classifier without a graph needed with training donor 1015 (or the batch
sc_celseq2) held out, cut to save time; the learning rate is Adam's usual one. 25 minutes of CPU; finished parts below
--work are not computed again, and --minutes stops after a while. Data: the folder CELLGLOT_DATA, else ../shared/data.
"""

import argparse
import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from measure import machine, print_table, save_results
from scipy import stats
from tqdm.auto import tqdm

from cellglot.gene_graph import GeneGraph, align_edges, gene_names, read_edges, read_expression
from cellglot.metrics.baselines import BASELINES, baseline_scores
from cellglot.metrics.classification import classification_metrics
from cellglot.modeling.gene_graph import (
    GeneGraphConfig,
    GeneGraphForReconstruction,
    GeneGraphForSequenceClassification,
)
from cellglot.onednn import OneDNNLinear
from cellglot.train.config import write_json

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CELLGLOT_DATA", ROOT.parent / "shared" / "data"))
EDGES = "graph/pin_string.tsv.gz"
HIDDEN, BATCH, RATE, AUTOENCODER_EPOCHS, NEIGHBOURS = [512, 128], 64, 1e-3, 10, 15
# Baselines whose figures differ from seed to seed although the cells do not
RANDOM_BASELINES = ("random forest",)
# Table 1 and 2 of the paper, test accuracy in percent on its own data (20,499 genes; 1,817 connected ones)
PAPER = {
    "random start": 51.48,
    "autoencoder start": 48.68,
    "all genes": {"no graph": 52.36, "normalized": 53.1, "normalized, diagonal": 51.73},
    "connected genes": {"no graph": 49.98, "normalized": 47.46, "normalized, diagonal": 47.43},
}


@dataclass(frozen=True)
class Cells:
    """A table: which cells are trained and tested on, which genes, for how long.

    n_genes    that vary most among the training cells; None: all
    per_class  training cells of each type at the most
    rows       names of `ROWS`; None: all
    """

    file: str
    column: str
    test_groups: tuple[str, ...]
    epochs: int
    n_genes: int | None = None
    per_class: int | None = None
    rows: tuple[str, ...] | None = None


KANG = Cells("cells/kang2018_pbmc_12261x1287.h5ad", "donor", ("1256", "1488"), epochs=3)
SCMIXOLOGY = Cells("cells/tian2019_scmixology_celseq2_dropseq.h5ad", "batch", ("sc_dropseq",), epochs=4, n_genes=3_000)
TABLES = {
    "kang": KANG,
    "kang, 25 cells a type": replace(KANG, per_class=25, epochs=30),
    "scmixology": SCMIXOLOGY,
    "scmixology, all genes": replace(SCMIXOLOGY, n_genes=None, rows=("no graph", "global")),
}


@dataclass(frozen=True)
class Row:
    """A classifier. graph: "string", "exchanged genes" or "exchanged edges"."""

    smoothing: str = "none"
    diagonal: int = 0
    score_scaling: str = "maximum"
    connected: bool = False
    autoencoder: bool = False
    graph: str = "string"


GLOBAL, INDIVIDUAL = Row("global"), Row("individual")
ROWS = {
    "no graph": Row(),
    "no graph, autoencoder start": Row(autoencoder=True),
    "global": GLOBAL,
    "global, autoencoder start": replace(GLOBAL, autoencoder=True),
    "global, diagonal": replace(GLOBAL, diagonal=1),
    "global, by degrees": replace(GLOBAL, score_scaling="degree"),
    "individual": INDIVIDUAL,
    "both": Row("both"),
    "connected genes, no graph": Row(connected=True),
    "connected genes, global": replace(GLOBAL, connected=True),
    "connected genes, global, diagonal": replace(GLOBAL, connected=True, diagonal=1),
    "global, exchanged genes": replace(GLOBAL, graph="exchanged genes"),
    "global, exchanged edges": replace(GLOBAL, graph="exchanged edges"),
    "individual, exchanged edges": replace(INDIVIDUAL, graph="exchanged edges"),
}
# Row -> the rows that it is compared with, seed by seed
CONTRASTS = {
    "no graph, autoencoder start": ("no graph",),
    "global": ("no graph", "global, exchanged genes", "global, exchanged edges"),
    "global, diagonal": ("global",),
    "global, by degrees": ("global",),
    "individual": ("no graph", "individual, exchanged edges"),
    "both": ("no graph",),
    "connected genes, no graph": ("no graph",),
    "connected genes, global": ("connected genes, no graph",),
    "connected genes, global, diagonal": ("connected genes, global",),
}


@dataclass(frozen=True)
class Split:
    """Cells of a table: expression (cells, genes) CSR, class numbers, and positions of both parts."""

    expression: sp.csr_matrix
    labels: np.ndarray
    classes: list[str]
    train: np.ndarray
    test: np.ndarray
    graph: GeneGraph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="stops after so long; run again to go on")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/gene_graph"), help="folder of the parts")
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is absent: set CELLGLOT_DATA to the folder of the data.")
    jobs = [(seed, table, row) for seed in range(args.seeds) for table in args.tables for row in rows_of(table, seed)]
    started = time.monotonic()
    found: dict[tuple[int, str, str], dict[str, Any]] = {}
    for seed, table, row in (bar := tqdm(jobs, unit="part")):
        bar.set_description(f"{table}: {row}, seed {seed}")
        path = args.work / table.replace(" ", "_") / str(seed) / f"{row.replace(' ', '_')}.json"
        if not path.exists():
            if args.minutes and time.monotonic() - started > 60 * args.minutes:
                raise SystemExit(f"{len(found)} of {len(jobs)} parts are done; run the same command to go on.")
            write_json(path, measured(table, row, seed))
        found[seed, table, row] = json.loads(path.read_text())
    record: dict[str, Any] = {"seeds": list(range(args.seeds)), "tables": {}, "paper": PAPER}
    for table in args.tables:
        record["tables"][table] = summarized(table, found, args.seeds)
        print_summary(table, record["tables"][table])
    record["settings"] = {
        "tables": {name: asdict(TABLES[name]) for name in args.tables},
        "rows": {name: asdict(row) for name, row in ROWS.items()},
        **{"hidden_sizes": HIDDEN, "batch_size": BATCH, "learning_rate": RATE},
        **{"autoencoder_epochs": AUTOENCODER_EPOCHS, "neighbours": NEIGHBOURS},
    }
    files = dict.fromkeys([*(TABLES[name].file for name in args.tables), EDGES])
    record["data"] = {file: hashlib.sha256((DATA / file).read_bytes()).hexdigest() for file in files}
    save_results(record | machine(), args.json)


def rows_of(table: str, seed: int) -> list[str]:
    """Classifiers and baselines of a table; those that would give the same again, in the first seed only."""
    chosen = TABLES[table]
    baselines = [*BASELINES, "nearest neighbours"]
    if seed and chosen.per_class is None:
        baselines = list(RANDOM_BASELINES)
    return [*(chosen.rows or ROWS), *baselines]


def measured(table: str, name: str, seed: int) -> dict[str, Any]:
    """Figures of one classifier or baseline on the test cells, and the CPU seconds it took."""
    split, started = prepared(table, seed if TABLES[table].per_class else 0), time.process_time()
    scores = network_scores(table, name, split, seed) if name in ROWS else baseline(name, split, seed)
    truth = np.array(split.classes)[split.labels[split.test]]
    figures = classification_metrics(truth, scores, split.classes, seed=0)
    return figures | {"seconds": time.process_time() - started}


@lru_cache(maxsize=2)
def prepared(table: str, seed: int) -> Split:
    chosen, path = TABLES[table], DATA / TABLES[table].file
    every = gene_names(path)
    names: dict[str, Any] = {"n_genes": len(every), "gene_ids": list(every.ids)}
    expression, obs, _ = read_expression(path, GeneGraphConfig(**names))
    codes = obs["cell_type"].astype("category").cat
    labels = codes.codes.to_numpy().astype(np.int64)
    tested = obs[chosen.column].astype(str).isin(chosen.test_groups).to_numpy()
    train = np.flatnonzero(~tested)
    if chosen.per_class is not None:
        drawn = np.random.default_rng(seed).permutation(train)
        train = np.sort(np.concatenate([drawn[labels[drawn] == k][: chosen.per_class] for k in np.unique(labels)]))
    if chosen.n_genes is not None:
        x = expression[train]
        variance = np.asarray(x.multiply(x).mean(axis=0)).ravel() - np.asarray(x.mean(axis=0)).ravel() ** 2
        genes = np.sort(np.argsort(-variance, kind="stable")[: chosen.n_genes])
        every, expression = every.select(genes), sp.csr_matrix(expression[:, genes])
    graph = align_edges(string_edges(), every)
    return Split(expression, labels, list(codes.categories), train, np.flatnonzero(tested), graph)


@lru_cache(maxsize=1)
def string_edges() -> Any:
    return read_edges(DATA / EDGES)


def network_scores(table: str, name: str, split: Split, seed: int) -> np.ndarray:
    """(test cells, classes) logits of a classifier trained on the training cells."""
    model, x = trained(table, name, split, seed)
    with torch.no_grad():
        parts = [batch_of(x, split.test[i : i + 256]) for i in range(0, len(split.test), 256)]
        return torch.cat([model(part).logits for part in parts]).numpy()


def trained(table: str, name: str, split: Split, seed: int) -> tuple[Any, sp.csr_matrix]:
    """A classifier trained on the training cells, and the expression of all cells over its genes."""
    row, epochs = ROWS[name], TABLES[table].epochs
    graph, x = shuffled(split.graph, row.graph, seed), split.expression
    if row.connected:
        kept = np.flatnonzero(graph.degrees())
        graph, x = graph.connected(), sp.csr_matrix(x[:, kept])
    labels = {"id2label": dict(enumerate(split.classes)), "label2id": {k: i for i, k in enumerate(split.classes)}}
    sizes: dict[str, Any] = {"hidden_sizes": HIDDEN, **graph.config_options(), **labels, "label_name": "cell_type"}
    kind = {field: getattr(row, field) for field in ("smoothing", "diagonal", "score_scaling")}
    torch.manual_seed(seed)
    model = GeneGraphForSequenceClassification(GeneGraphConfig(**sizes, **kind))
    if row.smoothing != "none":
        model.set_graph(graph.pairs, graph.scores)
    if row.autoencoder:
        autoencoder = fitted(GeneGraphForReconstruction(GeneGraphConfig(**sizes)), x, split, AUTOENCODER_EPOCHS, seed)
        model.gene_graph.layers.load_state_dict(autoencoder.gene_graph.layers.state_dict())
    return fitted(model, x, split, epochs, seed, labelled=True), x


def shuffled(graph: GeneGraph, kind: str, seed: int) -> GeneGraph:
    shuffles = {"exchanged genes": graph.shuffled, "exchanged edges": graph.rewired}
    return graph if kind == "string" else shuffles[kind](seed)


def fitted(model: Any, x: sp.csr_matrix, split: Split, epochs: int, seed: int, *, labelled: bool = False) -> Any:
    """The model after some passes over the training cells, in evaluation mode. Adam as the paper's."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, fused=True)
    rng = np.random.default_rng(seed)
    model.train()
    for _ in range(epochs):
        order = rng.permutation(split.train)
        for start in range(0, len(order), BATCH):
            cells = order[start : start + BATCH]
            labels = {"labels": torch.from_numpy(split.labels[cells])} if labelled else {}
            # As the training loop does
            with OneDNNLinear():
                model(batch_of(x, cells), **labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def batch_of(x: sp.csr_matrix, cells: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x[cells].toarray())


def baseline(name: str, split: Split, seed: int) -> np.ndarray:
    """(test cells, classes) scores of a baseline on the same genes."""
    x_train, x_test = (split.expression[cells].toarray() for cells in (split.train, split.test))
    y = np.array(split.classes)[split.labels[split.train]]
    if name != "nearest neighbours":
        return baseline_scores(name, x_train, y, x_test, split.classes, seed=seed)
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(NEIGHBOURS, metric="cosine").fit(x_train, y).predict_proba(x_test)


def summarized(table: str, found: dict[tuple[int, str, str], dict[str, Any]], n_seeds: int) -> dict[str, Any]:
    """rows: mean, interval over seeds and values of accuracy and macro F1; contrasts: differences seed by seed."""
    first = prepared(table, 0)
    degrees = first.graph.degrees()
    facts = {"n_train": len(first.train), "n_test": len(first.test), "n_genes": len(degrees)}
    facts |= {"n_connected": int((degrees > 0).sum()), "n_edges": len(first.graph.pairs)}
    rows: dict[str, Any] = {}
    for name in rows_of(table, 0):
        runs = [found[seed, table, name] for seed in range(n_seeds) if (seed, table, name) in found]
        rows[name] = {key: interval([run[key] for run in runs]) for key in ("accuracy", "macro_f1")}
        rows[name] |= {
            "over_cells": [runs[0]["low"], runs[0]["high"]],
            "seconds": float(np.mean([r["seconds"] for r in runs])),
        }
    contrasts = {
        f"{name} - {other}": {
            key: interval((np.array(rows[name][key]["values"]) - rows[other][key]["values"]).tolist())
            for key in ("accuracy", "macro_f1")
        }
        for name, others in CONTRASTS.items()
        for other in others
        if name in rows and other in rows
    }
    return {**facts, "rows": rows, "contrasts": contrasts}


def interval(values: list[float]) -> dict[str, Any]:
    """Mean over seeds and half the width of its 95% interval (Student's t); None for a single value."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "ci": None if half is None else float(half), "values": values}


def print_summary(table: str, summary: dict[str, Any]) -> None:
    print(
        f"\n## {table}: {summary['n_train']:,} training and {summary['n_test']:,} test cells, {summary['n_genes']:,} "
        f"genes, {summary['n_connected']:,} of them with {summary['n_edges']:,} edges\n"
    )
    rows = [
        [name, _text(row["accuracy"]), "{:.3f} to {:.3f}".format(*row["over_cells"]), _text(row["macro_f1"])]
        for name, row in summary["rows"].items()
    ]
    print_table(["classifier", "accuracy", "95% over cells", "macro F1"], rows)
    print()
    rows = [
        [name, *(_text(row[key], "+") for key in ("accuracy", "macro_f1"))]
        for name, row in summary["contrasts"].items()
    ]
    print_table(["difference", "accuracy", "macro F1"], rows)


def _text(found: dict[str, Any], sign: str = "") -> str:
    return f"{found['mean']:{sign}.3f}" + ("" if found["ci"] is None else f" ± {found['ci']:.3f}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
