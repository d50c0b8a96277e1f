"""Small responses that the tests of the model share: lines on plates, drugs with effects, controls, structures."""

import numpy as np
import pandas as pd

from cellglot.drug_response.data import ResponseData

GENES = 13
SMILES = {"ethanol": "CCO", "benzene": "c1ccccc1", "aniline": "Nc1ccccc1", "acetone": "CC(C)=O", "urea": "NC(N)=O"}


def responses(n_replicates=3, lines=("A549", "MCF7"), seed=0):
    """Wells of each drug at two doses in each line, half of them on each of two plates, with three controls a plate."""
    rng = np.random.default_rng(seed)
    base = {line: 8 + rng.normal(size=GENES) for line in lines}
    effect = {drug: rng.normal(size=GENES) for drug in SMILES}
    rows = [("DMSO", line, 0.0, True, plate) for line in lines for plate in "PQ" for _ in range(3)]
    rows += [
        (drug, line, dose, False, "PQ"[i % 2])
        for line in lines
        for drug in SMILES
        for dose in (0.1, 10.0)
        for i in range(n_replicates)
    ]
    obs = pd.DataFrame(rows, columns=["drug", "cell_line", "dose", "is_control", "plate"])
    obs.index = pd.Index([f"well{i}" for i in range(len(obs))])
    values = [
        base[line] + (0 if control else (1 + np.log10(dose)) * effect[drug]) + 0.05 * rng.normal(size=GENES)
        for drug, line, dose, control, _ in rows
    ]
    genes = pd.DataFrame({"gene_symbol": [f"GENE{i}" for i in range(GENES)]}, index=[f"GENE{i}" for i in range(GENES)])
    return ResponseData(np.array(values, dtype=np.float32), obs, genes, SMILES, ("cell_line", "plate"), "wells")
