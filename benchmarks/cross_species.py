"""Human and mouse brain cells in one space, and translated: the cross-species model beside simpler ways.

    python benchmarks/cross_species.py --seeds 5 --json benchmarks/results/cross_species.json

On real cells: human cortex (Darmanis et al. 2015) with mouse brain by MERFISH (Zhang, Zhuang et al. 2023) or with mouse
cortex and hippocampus (Zeisel et al. 2015, 200 genes). A seed is a split of the cells (30% held out, by class) and an
initialization; genes, PCA, models and alignments are fitted on training cells, without labels, and everything is
measured on held-out ones. ± is a 95% interval over seeds. Pictures go beside the JSON.

A split takes a minute on one core; finished ones below --work are not computed again. Data: the folder CELLGLOT_DATA,
else ../shared/data. Harmony and scVI are measured where the extra `benchmark-cross-species` is installed.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cross_species_cells import (
    CATEGORY_CELLS,
    DATA,
    HUMAN,
    MOUSE,
    ORTHOLOGS,
    TAXONOMY_1,
    TAXONOMY_2,
    TEST_FRACTION,
    categories,
    read_pair,
    training_cells,
)
from cross_species_figures import PICTURED, draw_heatmaps, draw_umaps, umap_table
from cross_species_measures import (
    NEIGHBOURS,
    cluster_figures,
    matchability_figures,
    reconstruction_figures,
    transfer_figures,
    translation_figures,
    translations,
    type_matrix,
    wasserstein_figures,
)
from cross_species_spaces import ADVERSARIAL, N_COMPONENTS, TOKEN_AXES, TRAINING, alignments, prepare, spaces
from measure import machine, print_table, save_results
from scipy import stats
from tqdm.auto import tqdm

from cellglot.train.config import write_json

# Pang & Tegnér 2020, Tables 1 and 2; see docs/cross_species.md for what differs.
PAPER = {
    "wasserstein": {"CNS": "7.91 ± 0.012", "PNS": "8.85 ± 0.011", "non-neural": "8.30 ± 0.003"},
    "cluster accuracy, taxonomy 1 / 2": {"SAUCIE": "10/15, 8/15", "PCA": "12/15, 9/15", "theirs": "13/15, 10/15"},
}
# The mouse cells of all classes are pictured, in seed 0.
UMAP_OF = "merfish"
OPTIONAL = {"harmonypy": "Harmony", "scvi": "scVI"}
PACKAGES = ("pot", "scikit-learn", "scipy", "umap-learn", "anndata", "harmonypy", "scvi-tools")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="splits and initializations")
    parser.add_argument("--mouse", nargs="+", choices=list(MOUSE), default=list(MOUSE), help="mouse sets")
    parser.add_argument("--json", type=Path, help="file for the figures; pictures are written beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/cross_species"), help="folder of the runs")
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is absent: set CELLGLOT_DATA to the folder of the data.")
    for package, name in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name} is left out: {package} is not installed.")
    results = {}
    with tqdm(total=args.seeds * len(args.mouse), unit="split") as bar:
        for mouse in args.mouse:
            for seed in range(args.seeds):
                bar.set_description(f"{mouse}, seed {seed}")
                results[mouse, seed] = finished(mouse, seed, args.work / mouse / str(seed))
                bar.update()
    record: dict[str, Any] = {"seeds": list(range(args.seeds)), "figures": {}, "paper": PAPER}
    for mouse in args.mouse:
        record["figures"][mouse] = summarized([results[mouse, seed] for seed in range(args.seeds)])
        print_tables(mouse, record["figures"][mouse])
        if args.json:
            draw(mouse, [results[mouse, seed] for seed in range(args.seeds)], args)
    record |= {"settings": settings(), "data": hashes(args.mouse), **machine()}
    record["versions"] |= {name: found for name in PACKAGES if (found := _version(name))}
    save_results(record, args.json)


def finished(mouse: str, seed: int, work: Path) -> dict[str, Any]:
    """The figures of a split: those of an earlier run, or computed and kept."""
    path = work / "figures.json"
    if not path.exists():
        write_json(path, measured(mouse, seed, work))
    return json.loads(path.read_text())


def measured(mouse: str, seed: int, work: Path) -> dict[str, Any]:
    """All figures of one split: spaces, reconstruction, translation (row -> figure -> value), matrices."""
    pair = read_pair(mouse)
    train = {name: training_cells(species, seed) for name, species in pair.items()}
    split, models = prepare(pair, seed, train, work)
    found = alignments(split)
    record: dict[str, Any] = {"spaces": {}, "reconstruction": {}, "matrices": {}}
    pictures = []
    for raw in spaces(split, models, found):
        space = raw.normalized(train)
        figures = {**wasserstein_figures(space, split), **cluster_figures(space, split)}
        record["spaces"][space.name] = figures | transfer_figures(space, split) | matchability_figures(space, split)
        if space.reconstructions is not None:
            record["reconstruction"][space.name] = reconstruction_figures(space, split)
        if space.name in PICTURED:
            record["matrices"][space.name] = type_matrix(space, split).to_dict("split")
            if mouse == UMAP_OF and seed == 0:
                pictures.append(umap_table(space, split))
    if pictures:
        pd.concat(pictures).to_csv(work / "umap.csv", index=False)
    ways = translations(split, models, found)
    record["translation"] = {name: translation_figures(way, split) for name, way in ways}
    record["cells"] = {name: {"train": int(mask.sum()), "held out": int((~mask).sum())} for name, mask in train.items()}
    record["shared_genes"] = len(pair["human"].shared_g)
    return record


def summarized(records: list[dict[str, Any]]) -> dict[str, Any]:
    """table -> row -> figure -> mean, 95% interval (half its width) and values over seeds."""
    tables: dict[str, Any] = {}
    for table in ("spaces", "reconstruction", "translation"):
        tables[table] = {
            row: {
                figure: interval([record[table][row][figure] for record in records])
                for figure in records[0][table][row]
            }
            for row in records[0][table]
            if all(row in record[table] for record in records)
        }
    matrices = {name: frame.round(4).to_dict("split") for name, frame in mean_matrices(records).items()}
    facts = {name: records[0][name] for name in ("cells", "shared_genes")}
    return {**tables, "wasserstein human class x mouse type": matrices, **facts}


def mean_matrices(records: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """space -> Wasserstein distances of human classes (rows) to mouse types (columns), mean over seeds."""
    means = {}
    for name in records[0]["matrices"]:
        seeds = [pd.DataFrame(**record["matrices"][name]) for record in records]
        means[name] = sum(seeds[1:], seeds[0]) / len(seeds)
    return means


def interval(values: list[float | None]) -> dict[str, Any]:
    """Mean over seeds and half the width of its 95% interval (Student's t); None where a figure does not exist."""
    if any(value is None for value in values):
        return {"mean": None, "ci": None, "values": values}
    known = np.array(values, dtype=float)
    half = stats.t.ppf(0.975, len(known) - 1) * stats.sem(known) if len(known) > 1 else None
    return {"mean": float(known.mean()), "ci": None if half is None else float(half), "values": values}


def print_tables(mouse: str, figures: dict[str, Any]) -> None:
    cells = "; ".join(f"{name} {n['train']:,} + {n['held out']:,}" for name, n in figures["cells"].items())
    print(f"\n## {mouse}: {cells} cells, {figures['shared_genes']:,} shared orthologs\n")
    n = next(iter(figures["spaces"].values()))["n_categories"]["mean"]
    columns = {
        "Wasserstein, same class": "wasserstein",
        "different": "wasserstein_different",
        "ratio": "wasserstein_ratio",
        f"taxonomy 1, of {n:.0f}": "taxonomy_1",
        "taxonomy 2": "taxonomy_2",
        "macro F1 mouse to human": "mouse to human",
        "human to mouse": "human to mouse",
        "matchability": "matchability",
    }
    _print(figures["spaces"], columns, "space")
    names = [f"{name}{what}" for what in (" expression", ", of PCA's") for name in ("human", "mouse")]
    _print(figures["reconstruction"], dict(zip(names, names, strict=True)), "reconstruction")
    names = [f"{way}, {what}" for way in ("mouse to human", "human to mouse") for what in _CORRELATIONS]
    _print(figures["translation"], dict(zip(names, names, strict=True)), "translation")


_CORRELATIONS = ("orthologs", "all genes", "means")


def _print(table: dict[str, Any], columns: dict[str, str], head: str) -> None:
    known = {name: key for name, key in columns.items() if any(key in row for row in table.values())}
    digits = {key: 1 if key.startswith("taxonomy") else 3 for key in known.values()}
    rows = [[row, *(_text(found.get(key), n) for key, n in digits.items())] for row, found in table.items()]
    print_table([head, *known], rows)
    print()


def _text(found: dict[str, Any] | None, digits: int = 3) -> str:
    if found is None or found["mean"] is None:
        return ""
    return f"{found['mean']:.{digits}f}" + ("" if found["ci"] is None else f" ± {found['ci']:.{digits}f}")


def draw(mouse: str, records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Heatmaps of the mean over seeds, and the UMAP of seed 0, beside the JSON."""
    stem = args.json.with_suffix("")
    draw_heatmaps(mean_matrices(records), Path(f"{stem}_{mouse}_wasserstein.png"))
    if mouse == UMAP_OF:
        draw_umaps(pd.read_csv(args.work / mouse / "0" / "umap.csv"), Path(f"{stem}_{mouse}_umap.png"))


def settings() -> dict[str, Any]:
    return {
        "training": {**TRAINING, "token_axes": TOKEN_AXES},
        "adversarial": asdict(ADVERSARIAL),
        "n_components": N_COMPONENTS,
        "test_fraction": TEST_FRACTION,
        "neighbours": NEIGHBOURS,
        "category_cells": CATEGORY_CELLS,
        "taxonomy_1": TAXONOMY_1,
        "taxonomy_2": TAXONOMY_2,
        "categories": {mouse: list(categories(read_pair(mouse))) for mouse in MOUSE},
    }


def hashes(mouse: list[str]) -> dict[str, str]:
    """SHA-256 of each file."""
    files = [HUMAN, *(MOUSE[name] for name in mouse), ORTHOLOGS]
    return {file: hashlib.sha256((DATA / file).read_bytes()).hexdigest() for file in files}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    main()
