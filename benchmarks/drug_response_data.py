"""Real responses that `drug_response.py` measures on, over one set of gene identifiers.

HT115: L1000 level 3 of one colon line, 70 of 349 drugs held out. Other profiles of L1000, to pre-train on: a plate of
A375 (60 perturbagens, six doses), basal profiles of 165 lines, consensus signatures of 1,170 drugs. Interferon-beta:
Kang et al. 2018, blood cells of two lupus patients, one cell type of one patient held out; to pre-train on, the control
cells of eight patients, without those of the first file.
"""

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from cellglot.drug_response.data import ResponseData
from cellglot.drug_response.reading import read_responses
from cellglot.drug_response.splits import ResponseSplit, hold_out_drugs, hold_out_type_and_donor

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CELLGLOT_DATA", ROOT.parent / "shared" / "data"))
FILES = {
    "HT115": DATA / "drug/l1000_level3_HT115_681x978.h5ad",
    "A375": DATA / "drug/l1000_cmappy_test_377x978.h5ad",
    "basal": DATA / "drug/l1000_basal_165celllines_x978.tsv.gz",
    "consensus": DATA / "drug/lincs_consensus_zscores_drugbank_1170x978.tsv.gz",
    "landmarks": DATA / "drug/l1000_landmark_978.csv",
    "structures": DATA / "drug/lincs_drugs_smiles.csv.gz",
    "interferon": DATA / "cells/kang2018_ifnb_1556x1267.h5ad",
    "blood": DATA / "cells/kang2018_pbmc_12261x1287.h5ad",
}
HELD_OUT_DRUGS, VALIDATION_DRUGS = 70, 40
# Of these every seed holds out one, for each donor in turn.
CELL_TYPES = ("B cells", "CD14+ Monocytes", "CD4 T cells", "CD8 T cells", "FCGR3A+ Monocytes")


@dataclass(frozen=True)
class Task:
    """Responses, and what of them is held out.

    inner       the same within the training part, to choose training times by
    by          columns that make a condition; control_by, in which its controls agree with it
    unlabelled  name -> profiles for pre-training, never of the test part
    """

    data: ResponseData
    split: ResponseSplit
    inner: ResponseSplit
    by: tuple[str, ...]
    control_by: tuple[str, ...]
    unlabelled: dict[str, list[ResponseData]]

    @property
    def train(self) -> ResponseData:
        return self.data.select(self.split.train)


@cache
def l1000() -> tuple[ResponseData, ResponseData, ResponseData, ResponseData]:
    """(HT115, A375, basal profiles, consensus signatures), genes of all by Entrez id."""
    ht115, a375 = read_responses(FILES["HT115"]), read_responses(FILES["A375"])
    landmarks = pd.read_csv(FILES["landmarks"], dtype=str)
    # Symbols of either release of the annotation
    entrez = dict(zip(landmarks["gene_symbol"], landmarks["gene_id"], strict=True))
    entrez |= dict(zip(a375.gene_ids, a375.genes["entrez_id"].astype(str), strict=True))
    ht115 = replace(ht115, genes=_by_entrez([entrez[symbol] for symbol in ht115.gene_ids]))
    structures = pd.read_csv(FILES["structures"], header=None, index_col=0)[1].str.strip()
    ids = a375.obs.drop_duplicates("drug").set_index("drug")["pert_id"].astype(str)
    smiles = {str(drug): structures[i] for drug, i in ids.items() if i in structures.index}
    known = a375.is_control | np.isin(a375.drug, [str(drug) for drug in smiles])
    a375 = replace(a375.select(known), smiles=smiles)
    a375 = replace(a375, genes=_by_entrez(a375.genes["entrez_id"].astype(str)))
    basal = pd.read_csv(FILES["basal"], sep="\t", index_col=0)
    basal_data = _unlabelled(basal.to_numpy(), [entrez[s] for s in basal.columns], list(basal.index), "basal profiles")
    z = pd.read_csv(FILES["consensus"], sep="\t", index_col=0)
    # As expression: each gene's mean over control wells, which no split holds out, and z of its standard deviations
    controls = pd.DataFrame(ht115.expression[ht115.is_control], columns=ht115.genes["entrez_id"])[list(z.columns)]
    values = controls.mean().to_numpy() + z.to_numpy() * controls.std().to_numpy()
    return ht115, a375, basal_data, _unlabelled(values, list(z.columns), ["consensus"] * len(z), "consensus signatures")


def l1000_task(seed: int) -> Task:
    """HT115 with 70 drugs held out; seed 0 is the split of the reference figures."""
    ht115, a375, basal, consensus = l1000()
    split = hold_out_drugs(ht115, HELD_OUT_DRUGS, seed=seed)
    train = ht115.select(split.train)
    inner = hold_out_drugs(train, VALIDATION_DRUGS, seed=seed)
    sources = {"subset": [train, a375], "whole": [train, a375, basal, consensus], "transfer": [a375]}
    return Task(ht115, split, inner, ("drug",), ("cell_line",), sources)


@cache
def interferon() -> tuple[ResponseData, ResponseData]:
    """(responses to interferon-beta, control cells of other patients or barcodes)."""
    data = read_responses(FILES["interferon"], layout="interferon")
    controls = ad.read_h5ad(FILES["blood"])
    controls.obs["condition"] = "ctrl"
    blood = read_responses(controls, layout="interferon")
    return data, blood.select(~blood.obs.index.isin(data.obs.index))


def interferon_tasks(seed: int) -> list[Task]:
    """Cell type number `seed` held out with one donor, then with the other."""
    data, blood = interferon()
    held_out = CELL_TYPES[seed % len(CELL_TYPES)]
    tasks = []
    for donor in sorted(data.obs["donor"].astype(str).unique()):
        split = hold_out_type_and_donor(data, held_out, donor)
        train = data.select(split.train)
        treated = ~train.is_control
        validated = CELL_TYPES[(seed + 1) % len(CELL_TYPES)]
        test = treated & (train.cell_line == validated)
        inner = ResponseSplit(~test, test, [validated])
        sources = {"subset": [train], "whole": [train, blood]}
        tasks.append(Task(data, split, inner, ("cell_line", "donor"), ("cell_line", "donor"), sources))
    return tasks


def _by_entrez(ids: list[str] | pd.Series) -> pd.DataFrame:
    names = [str(i) for i in ids]
    return pd.DataFrame({"entrez_id": names}, index=pd.Index(names))


def _unlabelled(values: np.ndarray, genes: list[str], lines: list[str], name: str) -> ResponseData:
    """Profiles without a treatment."""
    obs = pd.DataFrame({"drug": "none", "cell_line": lines, "dose": 0.0, "is_control": True})
    return ResponseData(values.astype(np.float32), obs, _by_entrez(genes), name=name)
