"""Trains the small model of this Space, and lays out what app.py opens.

    python spaces/drug_response/prepare.py                    # a quarter of a minute on two CPU cores
    python spaces/drug_response/prepare.py --data l1000.h5ad --recipe train/recipes/finetune_drug_response_small.yaml

Without a file the cells are real, the PBMCs that scanpy ships, and their responses simulated (`simulated_responses`).
With a file, the recipe says what is held out. Needs `cellglot[train,drug]`. The folder is a complete model directory,
plus `about.json` and `responses.h5ad`.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from cellglot import DrugResponseForConditionalGeneration, ExpressionFeatureExtractor, read_responses
from cellglot.datasets_scripts.pbmc import pbmc_cells
from cellglot.drug_response import ResponseSplit
from cellglot.drug_response.data import TREATMENT
from cellglot.serving import keep, preparing
from cellglot.train import finetune
from cellglot.train.config import parse_config
from cellglot.train.finetune_drug_response import DrugResponseFinetuneConfig, held_out_figures, make_split, read_data

HERE = Path(__file__).parent
# Made up, two of a family each: these share structure, and most of what they do
STRUCTURES = {
    "simulated drug A": "CCCCc1ccccc1C(=O)NCC",
    "simulated drug B": "CCCCc1ccccc1C(=O)NCCC",
    "simulated drug C": "C1CCCCC1SCCOCC",
    "simulated drug D": "C1CCCCC1SCCOCCC",
    "simulated drug E": "CCN(CC)CCCCC#N",
    "simulated drug F": "CCN(CC)CCCCCC#N",
}
DOSES = (0.1, 1.0, 10.0)
MYELOID = ("CD14+ Monocyte", "Dendritic")
# Treated cells of each type, drug and dose; types with fewer real cells than the second are left out
CELLS, MIN_CELLS = 20, 30
# Genes that change in all types, for the family and for the drug; in one lineage only; in one type only
PROGRAM = {"family": 40, "drug": 20, "lineage": 40, "type": 15}


def simulated_responses(seed: int = 0) -> ad.AnnData:
    """Raw counts of controls and of treated cells, in the columns of `ResponseData`; obs["part"] "train" or "test".

    The real cells are the controls. A treated cell is one of them, drawn at random: a gene that goes down keeps a
    random part of its counts, one that goes up gets further ones, Poisson, at the rate of its type. log2 fold changes
    are the sum of PROGRAM times d / (d + d_half) times how sensitive the type is. Each drug is held out in one type.
    """
    rng = np.random.default_rng(seed)
    cells = pbmc_cells()
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    types = [str(name) for name, n in cells.obs["cell_type"].value_counts().items() if n >= MIN_CELLS]
    matrix: Any = cells.X
    counts = matrix.toarray()
    expressed = np.flatnonzero(counts.mean(axis=0) > 0.1)
    programs: dict[tuple[str, str], np.ndarray] = {}

    def program(kind: str, of: str) -> np.ndarray:
        if (kind, of) not in programs:
            chosen = rng.choice(expressed, PROGRAM[kind], replace=False)
            change = np.zeros(cells.n_vars)
            change[chosen] = rng.choice([-1, 1], len(chosen)) * rng.uniform(0.5, 2.5, len(chosen))
            programs[kind, of] = change
        return programs[kind, of]

    sensitivity = dict(zip(types, rng.uniform(0.6, 1.4, len(types)), strict=True))
    kept = np.isin(labels, types)
    parts = [counts[kept]]
    tables = [pd.DataFrame({"drug": "none", "cell_line": labels[kept], "dose_um": 0.0, "part": "train"})]
    for i, drug in enumerate(STRUCTURES):
        half = 10 ** rng.uniform(-1, 0.5)
        for line in types:
            lineage = "myeloid" if line in MYELOID else "lymphoid"
            change = program("family", f"{i // 2}") + program("drug", drug)
            change = change + program("lineage", f"{drug} {lineage}") + program("type", f"{drug} {line}")
            of_type = counts[labels == line]
            rates = of_type.sum(axis=0) / of_type.sum()
            for dose in DOSES:
                fold = 2 ** (change * sensitivity[line] * dose / (dose + half))
                before = of_type[rng.choice(len(of_type), CELLS)]
                kept_counts = rng.binomial(before.astype(int), np.minimum(fold, 1))
                gained = rng.poisson(np.maximum(fold - 1, 0) * rates * before.sum(axis=1, keepdims=True))
                parts.append((kept_counts + gained).astype(np.float32))
                part = "test" if line == types[i % len(types)] else "train"
                row = {"drug": drug, "cell_line": line, "dose_um": dose, "part": part, "smiles": STRUCTURES[drug]}
                tables.append(pd.DataFrame([row] * CELLS))
    obs = pd.concat(tables, ignore_index=True)
    obs["is_control"] = obs["drug"] == "none"
    obs["smiles"] = obs["smiles"].fillna("")
    return ad.AnnData(np.concatenate(parts), obs=obs.set_axis(obs.index.astype(str)), var=cells.var[[]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--data", type=Path, help="measured responses, as of cellglot.read_responses")
    parser.add_argument(
        "--recipe", type=Path, default=HERE / "recipe.yaml", help="of finetune.py --method drug_response"
    )
    parser.add_argument("--epochs", type=int, help="fewer make a quicker, worse model")
    options = parser.parse_args()
    with preparing(options.output) as work:
        source = options.data or work / "training.h5ad"
        arguments = ["--method", "drug_response", "--recipe", str(options.recipe), "--data", str(source)]
        arguments += ["--output", f"{work}/run", *(["--epochs", str(options.epochs)] if options.epochs else [])]
        if options.data is None:
            arguments += ["--counts", "true"]
            cells = simulated_responses()
            cells[cells.obs["part"] == "train"].copy().write_h5ad(source)
            data = read_responses(cells, counts=True)
            test = (data.obs["part"] == "test").to_numpy()
            split = ResponseSplit(~test, test, [])
        else:
            config = parse_config(DrugResponseFinetuneConfig, arguments)
            data = read_data(config)
            split = make_split(config, data)
        finetune.main(arguments)
        bundle = work / "run" / "model"
        model = DrugResponseForConditionalGeneration.from_pretrained(bundle).eval()
        extractor = ExpressionFeatureExtractor.from_pretrained(bundle)
        rows = held_out_figures(model, extractor, data, split)
        # No change at all is what the control mean predicts
        figures = {row["predictor"]: row["delta"] for row in rows[::-1] if row["predictor"] != "control mean"}
        obs = data.obs[[*dict.fromkeys([*TREATMENT, *data.pair_by])]]
        obs = obs.assign(part=np.select([split.test, split.train], ["test", "train"], "neither"))
        dataclasses.replace(data, obs=obs).to_anndata().write_h5ad(bundle / "responses.h5ad", compression="gzip")
        about = {
            "data": f"Measured responses of {data.name}."
            if options.data
            else "**Simulated responses** of real cells: 700 human blood cells (PBMC) of Zheng et al. 2017, as scanpy "
            "ships them, to drugs that do not exist, whose programs of genes and doses were made up.",
            "pair_by": data.pair_by,
            "dose_known": any(name in data.obs for name in ("dose_um", "pert_dose")),
            "held_out": {
                "n": len(obs.loc[split.test, ["drug", "cell_line"]].drop_duplicates()),
                "correlation of change": figures,
            },
        }
        (bundle / "about.json").write_text(json.dumps(about, indent=2))
        keep(bundle, options.output)
    print(f"Start the Space: python {HERE / 'app.py'}")


if __name__ == "__main__":
    main()
