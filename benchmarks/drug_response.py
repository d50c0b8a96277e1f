"""Responses to drugs: the drug response model beside CPA, cVAE and the simplest predictions, on real data.

    python benchmarks/drug_response.py --seeds 5 --json benchmarks/results/drug_response.json

In the form of Tables 1, 2 and 3 of Tan, Wang & Zhang: L1000 (HT115, 70 unseen drugs; pre-training on other plates,
basal profiles and consensus signatures) and single cells (interferon-beta, a cell type and a donor held out). A seed
is a split and an initialization; seed 0 of L1000 is the split of the reference figures. Nothing is fitted on test
profiles, training times are chosen by conditions held out within the training part. ± is a 95% interval over seeds.

A piece (job and seed) takes some minutes on one core, and --workers of them run side by side; finished rows and pieces
below --work are not computed again. --only does some jobs. Data: the folder CELLGLOT_DATA, else ../shared/data.
--cell-eval scores the single cells by cell-eval's full profile as well, where it is installed.
"""

import os

# Before torch: every worker has one core.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drug_response_cell_eval import cell_eval_figures, check_cell_eval
from drug_response_data import DATA, FILES, Task, interferon_tasks, l1000_task
from drug_response_figures import draw_changes
from drug_response_models import GENES, LITERAL, LOOP, PROFILE, TransformerResponse, chosen, pretrained, quiet
from drug_response_pretraining import EPOCHS, MASK_RATIOS, Encoder, pretraining
from measure import machine, save_results
from scipy import stats

from cellglot.drug_response.baselines import Baseline, baselines
from cellglot.drug_response.evaluation import predicted_responses, training_scores, treated_centroid
from cellglot.drug_response.learned_baselines import AutoencoderBaseline
from cellglot.metrics.response import mean_figures, response_table
from cellglot.tokenization.expression_features import ExpressionFeatureExtractor
from cellglot.train.config import write_json

PACKAGES = ("anndata", "scikit-learn", "scipy", "rdkit", "pot")
PRETRAINED_ROWS = ("BERT_whole", "BERT_subset", "BERT_subset, MLP decoder")
Rows = list[tuple[str, dict[str, Any]]]
# Job -> the data set whose tables its rows go to
DATA_SETS = dict.fromkeys(("l1000", "l1000_genes", "l1000_published_size"), "l1000")
DATA_SETS |= dict.fromkeys(("interferon", "interferon_recipes"), "interferon")
JOBS = (*DATA_SETS, "speed")
# The best of the simple means, which rows are compared with seed by seed, and the figures that are
REFERENCES = {"l1000": "treated mean of the plate", "interferon": "additive"}
COMPARED = ("mean", "delta", "delta_centroid", "mse", "energy")
# Epochs to choose from; a token a gene is too dear to choose.
GRID = (2, 4, 8, 16)
AUTOENCODER_GRID = (5, 20, 40)
GENE_EPOCHS = 2
# Of the authors' code at its published size, where an epoch is dear: at a quarter of its width, 2 were always chosen.
PUBLISHED_SIZE_GRID = (1, 2, 4)
AUTOENCODERS = {"batch_size": 128, "learning_rate": 1e-3, "cpu_threads": 1}
# As train/recipes/finetune_drug_response_small.yaml, whose options were chosen on the splits of seeds 1 to 3
RECIPE_EPOCHS = 12
_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "condition_dropout"), 0.3)
RECIPE: dict[str, Any] = {
    "settings": {"response_loss": "robust", "decoder_size": 32, **_DROPOUT},
    "loop": {"learning_rate": 5e-4, "weight_decay": 0.01},
}
# Tan, Wang & Zhang, Tables 1 and 2 (sciplex3); Table 2 is mean/dis of all genes
PAPER = {
    "table 1": {
        "one task, 80%, subset": {"mask_rmse": 1.07},
        "one task, 15%, whole": {"mask_rmse": 0.52},
        "four tasks, 15%, subset": {
            "cell_line_accuracy": 0.9549,
            "drug_accuracy": 0.2139,
            "dose_rmse": 1.55,
            "mask_rmse": 0.64,
        },
    },
    "table 2": {
        "random": [0.970, 0.649],
        "kNN": [0.981, 0.719],
        "CPA": [0.985, 0.734],
        "CPA_transfer": [0.979, 0.730],
        "cVAE": [0.968, 0.716],
        "BERT": [0.920, 0.740],
        "BERT_transfer": [0.920, 0.738],
        "BERT_whole": [0.966, 0.720],
        "BERT_subset": [0.964, 0.719],
    },
    "minutes per epoch": {"CPA": 4.41, "BERT": 0.38, "ratio": 11.6},
}
# The paper's rows, ours behind, then what is simpler.
ORDER = ("random", "kNN", "CPA", "CPA_transfer", "cVAE", "BERT", "BERT_transfer", "BERT_whole", "BERT_subset")
# Columns of the first table of each data set, those of them that are also compared with the reference row, and the rest
SHOWN = {
    "mean": "mean",
    "dis": "dis",
    "delta": "delta",
    "delta_centroid": "delta centroid",
    "centroid_accuracy": "centroid accuracy",
    "mse": "MSE",
    "energy": "energy",
}
PAIRED_SHOWN = {"mean": "mean, paired", "delta": "delta, paired"}
FURTHER_SHOWN = {
    "mean_de50": "mean DE50",
    "mean_de10": "mean DE10",
    "dis_de50": "dis DE50",
    "dis_de10": "dis DE10",
    "dis_sampled": "dis 30x30",
    "wasserstein": "Wasserstein",
    "de_overlap": "DE overlap",
}
PRETRAINING_SHOWN = {
    "mask_rmse": "mask RMSE",
    "cell_line_accuracy": "cell accuracy",
    "drug_accuracy": "drug accuracy",
    "dose_rmse": "dose RMSE",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="splits and initializations")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), help="jobs to do")
    parser.add_argument("--workers", type=int, default=2, help="pieces side by side, one core each")
    parser.add_argument("--json", type=Path, help="file for the figures; a picture goes beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/drug_response"), help="folder of the pieces")
    parser.add_argument("--cell-eval", action="store_true", help="cell-eval's full profile of the single cells too")
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is absent: set CELLGLOT_DATA to the folder of the data.")
    if args.cell_eval:
        check_cell_eval()
    work = args.work / "with-cell-eval" if args.cell_eval else args.work
    pieces = [(job, seed) for seed in range(args.seeds) for job in args.only if job != "speed"]
    todo = [(job, seed) for job, seed in pieces if not (work / f"{job}-{seed}.json").exists()]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(piece, *one, work, args.cell_eval): one for one in todo}
        for n, future in enumerate(as_completed(futures), 1):
            future.result()
            print(f"{n} of {len(todo)} pieces: {futures[future][0]}, seed {futures[future][1]}", flush=True)
    if "speed" in args.only and not (work / "speed.json").exists():
        # Alone, since it is timed
        write_json(work / "speed.json", speed())
    record: dict[str, Any] = {"seeds": list(range(args.seeds)), "paper": PAPER, "tables": {}}
    found = {one: read(work / f"{one[0]}-{one[1]}.json") for one in pieces}
    for job in [job for job in args.only if job != "speed"]:
        records = [found[job, seed] for seed in range(args.seeds)]
        for table in records[0]["tables"]:
            rows = summarized([one["tables"][table] for one in records])
            record["tables"].setdefault(f"{DATA_SETS[job]}, {table}", {}).update(rows)
        record[f"{job} epochs"] = [one["epochs"] for one in records]
        record[f"{job} seconds"] = [one["seconds"] for one in records]
    record["differences"] = {
        name: differences(rows, REFERENCES[name.split(", ")[0]])
        for name, rows in record["tables"].items()
        if name.endswith("DE genes of training conditions")
    }
    if "speed" in args.only:
        record["speed"] = read(work / "speed.json")
    print_tables(record)
    record |= {"settings": settings(), "data": hashes(), **machine()}
    record["versions"] |= {name: metadata.version(name) for name in PACKAGES}
    save_results(record, args.json)
    if args.json:
        draw_changes(drawn_tables(record["tables"]), args.json.with_suffix(".png"))


def piece(job: str, seed: int, work: Path, cell_eval: bool) -> None:
    """Computes the figures of one job and seed, and keeps them."""
    torch.set_num_threads(1)
    quiet()
    warnings.simplefilter("ignore")
    begun = time.perf_counter()
    # Bars of hundreds of small runs would bury the benchmark's own lines.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        jobs = {job.__name__: job for job in (l1000, l1000_genes, l1000_published_size, interferon, interferon_recipes)}
        results = jobs[job](seed, work, cell_eval)
    write_json(work / f"{job}-{seed}.json", {**results, "seconds": time.perf_counter() - begun})


def l1000(seed: int, work: Path, cell_eval: bool) -> dict[str, Any]:
    """Tables 1, 2 and 3 of L1000, one token a profile."""
    task = l1000_task(seed)
    transfer = task.unlabelled["transfer"]
    found = Figures(task, work / f"l1000-{seed}")
    kept = work / f"l1000-{seed}" / "pre-training.json"
    encoders: dict[str, Encoder] = {}
    if not kept.exists():
        table_1, encoders = pretraining(task, seed)
        write_json(kept, table_1)
    elif not all(map(found.has, PRETRAINED_ROWS)):
        encoders = pretraining(task, seed, MASK_RATIOS[:1])[1]
    for baseline in baselines(seed):
        found.add(baseline.fit(task.train))
    for model_type, name, options in (
        ("cpa", "CPA", {}),
        ("cpa", "CPA_transfer", {"transfer": transfer}),
        ("cvae", "cVAE", {}),
    ):
        found.choose(name, AUTOENCODER_GRID, autoencoder(model_type, name, seed, **options))
    rows: Rows = [
        ("BERT", {}),
        ("BERT_transfer", {"transfer": transfer}),
        ("BERT_whole", {"encoder": encoders.get("whole")}),
        ("BERT_subset", {"encoder": encoders.get("subset")}),
        ("BERT, MLP decoder", {"settings": {"decoder": "mlp"}}),
        ("BERT_subset, MLP decoder", {"settings": {"decoder": "mlp"}, "encoder": encoders.get("subset")}),
        ("BERT, trained on the treated", {"settings": {"training_input": "self"}}),
        ("BERT, change", {"settings": {"decoder": "mlp", "predicts": "change"}}),
        ("BERT, change from additive", {"additive": True, "settings": {"decoder": "mlp", "predicts": "change"}}),
    ]
    for name, options in rows:
        found.choose(name, GRID, transformer(name, seed, **options))
    found.choose("BERT, recipe", (RECIPE_EPOCHS,), transformer("BERT, recipe", seed, **RECIPE))
    found.choose("BERT, authors' code", GRID, literal(seed))
    return {"tables": {"pre-training": read(kept), **found.tables}, "epochs": found.epochs}


def l1000_genes(seed: int, work: Path, cell_eval: bool) -> dict[str, Any]:
    """Rows of Tables 2 and 3 with one token a gene."""
    found = Figures(l1000_task(seed), work / f"l1000_genes-{seed}")
    for decoder in ("lstm", "mlp"):
        options = {"loop": {"max_tokens": 16 * 979}, "seed": seed, "settings": {**GENES, "decoder": decoder}}
        name = f"BERT, genes, {decoder.upper()} decoder"
        found.choose(name, (GENE_EPOCHS,), partial(TransformerResponse, name, **options))
    return {"tables": found.tables, "epochs": found.epochs}


def l1000_published_size(seed: int, work: Path, cell_eval: bool) -> dict[str, Any]:
    """The authors' code at its published width: 57M parameters."""
    found = Figures(l1000_task(seed), work / f"l1000_published_size-{seed}")
    name = "BERT, authors' code, published size"
    settings = {"nonnegative": LITERAL["nonnegative"]}
    options = {"preset": "literal", "settings": settings, "seed": seed, "loop": {"learning_rate": 5e-4}}
    found.choose(name, PUBLISHED_SIZE_GRID, partial(TransformerResponse, name, **options))
    return {"tables": found.tables, "epochs": found.epochs}


def interferon(seed: int, work: Path, cell_eval: bool) -> dict[str, Any]:
    """Table 2 of single cells: means over the two donors."""
    records, epochs = [], []
    for number, task in enumerate(interferon_tasks(seed)):
        found = Figures(task, work / f"interferon-{seed}-{number}", cell_eval)
        for baseline in baselines(seed):
            # One drug, a protein, at one dose; and no control of the test part has treated cells to train on.
            if baseline.name != "ridge" and "of the plate" not in baseline.name:
                found.add(baseline.fit(task.train))
        for model_type, name in (("cpa", "CPA"), ("cvae", "cVAE")):
            found.choose(name, AUTOENCODER_GRID, autoencoder(model_type, name, seed, drug_encoder="id"))
        encoders = {name: masked_encoder(task, name, seed) for name in ("subset", "whole")}
        rows: Rows = [
            ("BERT", {}),
            ("BERT_whole", {"encoder": encoders["whole"]}),
            ("BERT_subset", {"encoder": encoders["subset"]}),
            ("BERT, MLP decoder", {"settings": {"decoder": "mlp"}}),
            ("BERT, trained on the treated", {"settings": {"training_input": "self"}}),
            ("BERT, change", {"settings": {"decoder": "mlp", "predicts": "change"}}),
            ("BERT, change from additive", {"additive": True, "settings": {"decoder": "mlp", "predicts": "change"}}),
        ]
        for name, options in rows:
            found.choose(name, GRID, transformer(name, seed, drug_encoder="id", **options))
        records.append(found.tables)
        epochs.append(found.epochs)
    return {"tables": {name: averaged([one[name] for one in records]) for name in records[0]}, "epochs": epochs}


def interferon_recipes(seed: int, work: Path, cell_eval: bool) -> dict[str, Any]:
    """Rows of the settings of train/recipes/finetune_drug_response_interferon.yaml: means over the two donors."""
    records = []
    for number, task in enumerate(interferon_tasks(seed)):
        found = Figures(task, work / f"interferon_recipes-{seed}-{number}")
        for decoder, epochs in (("mlp", 30), ("lstm", 60)):
            name = f"BERT, recipe, {decoder.upper()} decoder"
            settings = {"decoder": decoder, "predicts": "change", "cell_line_dropout": 0.5}
            found.choose(name, (epochs,), transformer(name, seed, settings, drug_encoder="id"))
        records.append(found.tables)
    return {"tables": {name: averaged([one[name] for one in records]) for name in records[0]}, "epochs": {}}


class Figures:
    """Rows of a task's table: with DE genes chosen on training conditions, and on the true test profiles.

    folder     where finished rows are kept, and found again
    cell_eval  whether there is a table of cell-eval's figures too
    """

    def __init__(self, task: Task, folder: Path, cell_eval: bool = False):
        self.task, self.folder, self.cell_eval = task, folder, cell_eval
        self.options = {"centroid_g": treated_centroid(task.train)}
        self.scores = training_scores(task.train)
        self.tables: dict[str, dict[str, dict[str, float]]] = {}
        self.epochs: dict[str, float] = {}

    def choose(self, name: str, grid: Any, make: Any) -> None:
        """A row for what `make(epochs)` gives, epochs chosen on held-out training conditions."""
        path = self._path(name)
        if not path.exists():
            predictor, epochs = chosen(make, self.task, grid)
            write_json(path, {"tables": self._rows(predictor), "epochs": epochs})
        kept = read(path)
        self.epochs[name] = kept["epochs"]
        for table, figures in kept["tables"].items():
            self.tables.setdefault(table, {})[name] = figures

    def has(self, name: str) -> bool:
        """Whether the row is finished."""
        return self._path(name).exists()

    def add(self, predictor: Baseline) -> None:
        """A row of a fitted predictor, which takes no time to speak of."""
        for table, figures in self._rows(predictor).items():
            self.tables.setdefault(table, {})[predictor.name] = figures

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_').replace(',', '')}.json"

    def _rows(self, predictor: Baseline) -> dict[str, dict[str, float]]:
        """table -> figures"""
        task = self.task
        responses = predicted_responses(predictor, task.data, task.split, by=task.by, control_by=task.control_by)
        tables: dict[str, dict[str, float]] = {}
        for scores in (self.scores, None):
            figures = mean_figures(response_table(responses, **self.options, training_scores_g=scores))
            source = figures.pop("de_genes_from")
            tables[f"DE genes of {source} {'conditions' if scores is not None else 'profiles'}"] = figures
        if self.cell_eval:
            folder = self._path(predictor.name).with_suffix("")
            tables["cell-eval"] = cell_eval_figures(responses, task.data.gene_ids, folder)
        return tables


def transformer(name: str, seed: int, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    chosen_settings = {**PROFILE, **(settings or {})}
    return partial(TransformerResponse, name, settings=chosen_settings, seed=seed, **options)


def literal(seed: int) -> Any:
    options = {"preset": "literal", "settings": LITERAL, "loop": {"learning_rate": 5e-4}}
    return partial(TransformerResponse, "BERT, authors' code", seed=seed, **options)


def autoencoder(model_type: str, name: str, seed: int, **options: Any) -> Any:
    loop = {**AUTOENCODERS, "seed": seed}
    return lambda epochs: AutoencoderBaseline(model_type, name=name, loop={**loop, "epochs": epochs}, **options)


def masked_encoder(task: Task, source: str, seed: int) -> Encoder:
    """An encoder pre-trained on unlabelled cells, 15% of the genes hidden."""
    parts = task.unlabelled[source]
    extractor = ExpressionFeatureExtractor.fit(task.train, scaling="center")
    # As many steps from either source: a large one needs fewer passes.
    epochs = EPOCHS * len(parts[0]) / sum(len(part) for part in parts)
    none = [np.zeros(len(part), dtype=bool) for part in parts]
    model, _ = pretrained(parts, none, extractor, mask_ratio=0.15, epochs=epochs, seed=seed)
    return model.model.state_dict(), extractor


def speed() -> dict[str, float]:
    """Seconds of an epoch over the same wells, in turns, medians of five.

    CPA at its published size, the authors' code at its own and at the benchmark's, and ours.
    """
    train = l1000_task(0).train
    contenders = {
        "CPA": lambda: AutoencoderBaseline("cpa", loop={"batch_size": 128, "epochs": 3, "cpu_threads": 1}),
        "authors' code, published size": lambda: TransformerResponse(
            "literal", 1, preset="literal", scaling="none", loop={"batch_size": 512}
        ),
        "authors' code, a quarter as wide": lambda: literal(0)(3),
        "BERT, a token a profile": lambda: transformer("BERT", 0)(3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(5):
        for name, make in contenders.items():
            seconds[name].append(make().fit(train).seconds_per_epoch)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ratios = {f"CPA / {name}": medians["CPA"] / value for name, value in medians.items() if name != "CPA"}
    return {**medians, **ratios}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def averaged(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """row -> figure -> mean over several tables of the same rows."""
    return {
        row: {figure: float(np.mean([table[row][figure] for table in tables])) for figure in figures}
        for row, figures in tables[0].items()
    }


def summarized(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """row -> figure -> mean over seeds, half the width of its 95% interval (Student's t), values."""
    return {
        row: {figure: interval([table[row][figure] for table in tables]) for figure in figures}
        for row, figures in tables[0].items()
    }


def differences(rows: dict[str, Any], reference: str) -> dict[str, dict[str, Any]]:
    """row -> figure -> interval of its difference from a reference row of the same seeds."""
    if reference not in rows:
        return {}
    return {
        row: {
            figure: interval(list(np.subtract(rows[row][figure]["values"], rows[reference][figure]["values"])))
            for figure in COMPARED
        }
        for row in rows
        if row != reference
    }


def interval(values: list[float]) -> dict[str, Any]:
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "ci": half, "values": [float(value) for value in values]}


def print_tables(record: dict[str, Any]) -> None:
    """Main figures, with their differences from the reference row paired by seed, and in a second table the others."""
    for name, rows in record["tables"].items():
        paired = record.get("differences", {}).get(name, {})
        if "pre-training" in name:
            parts = [(PRETRAINING_SHOWN, {})]
        elif "cell-eval" in name:
            parts = [({figure: figure for figure in next(iter(rows.values()))}, {})]
        else:
            parts = [(SHOWN, PAIRED_SHOWN if paired else {}), (FURTHER_SHOWN, {})]
        for shown, compared in parts:
            columns = {figure: title for figure, title in shown.items() if any(figure in row for row in rows.values())}
            print(f"\n## {name}" + (f"; paired with {REFERENCES[name.split(', ')[0]]}" if compared else "") + "\n")
            print("| | " + " | ".join([*columns.values(), *compared.values()]) + " |")
            print("|" + "---|" * (len(columns) + len(compared) + 1))
            for row in sorted(rows, key=lambda r: (ORDER.index(r) if r in ORDER else len(ORDER), list(rows).index(r))):
                cells = [text(rows[row].get(figure)) for figure in columns]
                cells += [text(paired.get(row, {}).get(figure)) for figure in compared]
                print(f"| {row} | " + " | ".join(cells) + " |")
    if "speed" in record:
        print("\n## seconds per epoch of 547 wells, one core\n\n| | |\n|---|---|")
        for name, value in record["speed"].items():
            print(f"| {name} | {value:.3g} |")


def drawn_tables(tables: dict[str, Any]) -> dict[str, Any]:
    """data set -> rows of its table."""
    drawn: dict[str, Any] = {}
    for name, rows in tables.items():
        job, table = name.split(", ", 1)
        if table == "DE genes of training conditions":
            drawn[job] = rows
    return drawn


def text(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    digits = 1 if abs(figure["mean"]) >= 10 else 3
    half = "" if figure["ci"] is None else f" ± {figure['ci']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{half}"


def settings() -> dict[str, Any]:
    """What the models were, and how long they trained."""
    grids = {"epochs of BERT": GRID, "of a token a gene": GENE_EPOCHS, "of CPA and cVAE": AUTOENCODER_GRID}
    grids["of the authors' code at its published size"] = PUBLISHED_SIZE_GRID
    return {"a token a profile": PROFILE, "a token a gene": GENES, "authors' code": LITERAL, "loop": LOOP, **grids}


def hashes() -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in FILES.items()}


if __name__ == "__main__":
    main()
