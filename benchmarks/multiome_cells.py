"""Real paired cells of `multiome.py`: files, what is held out, matrices in the order that all methods share."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from cellglot.multiome import SourceCells
from cellglot.tokenization.binarized_string import TASKS, BinarizedStringProcessor

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CELLGLOT_DATA", ROOT.parent / "shared" / "data"))
FILES = {
    "scicar": (
        "multiome/scicar2018_a549_rna_2641x1185.h5ad",
        "multiome/scicar2018_a549_atac_2641x52761_binary.h5ad",
    ),
    "bmmc": (
        "multiome/bmmc_multiome_neurips2021_v1_rna_500x600.h5ad",
        "multiome/bmmc_multiome_neurips2021_v1_atac_500x600.h5ad",
    ),
}
TITLES = {"scicar": "sci-CAR, A549", "bmmc": "NeurIPS 2021 BMMC starter"}
# sci-CAR has no batches: so many of the cells are held out at random. BMMC: batch s1d2 is, as its column is_train says,
# and a seed takes so many of the cells on either side, or all splits would be one
TEST_FRACTION, TAKEN = 0.2, 0.8
# Training cells set aside for thresholds and for when to stop
VALIDATION_FRACTION = 0.1
# A feature must be there in such a share of the training cells
MIN_SHARE = 0.01
TARGET_SUM = 1e4


@dataclass(frozen=True)
class Pair:
    """Both modalities of the same cells; rna.X is log-normalized, as the competition does it where it is of its data.

    umis_n, fragments_n  total counts of each cell
    batch_n              label of each cell's batch
    is_train             (n,) of batches that may train, or None without batches
    """

    name: str
    rna: Any
    atac: Any
    umis_n: np.ndarray
    fragments_n: np.ndarray
    batch_n: np.ndarray
    is_train: np.ndarray | None


def read_pair(name: str) -> Pair:
    rna, atac = (ad.read_h5ad(DATA / file) for file in FILES[name])
    counts: list[Any] = [rna.X, atac.X]
    assert rna.obs_names.equals(atac.obs_names)
    umis, fragments = (np.asarray(matrix.sum(axis=1)).ravel() for matrix in counts)
    with_batches = "batch" in rna.obs
    # The competition divides by scran's size factors, which are of all genes; only 600 of them are in the file.
    factors = rna.obs["size_factors"].to_numpy() if with_batches else umis / TARGET_SUM
    rna.X = sp.csr_matrix(counts[0].multiply(1 / factors[:, None])).log1p().astype(np.float32)
    batches = rna.obs["batch"].astype(str).to_numpy() if with_batches else np.full(rna.n_obs, "all")
    is_train = rna.obs["is_train"].to_numpy(dtype=bool) if with_batches else None
    return Pair(name, rna, atac, umis, fragments, batches, is_train)


@dataclass(frozen=True)
class Masks:
    """(n,) masks of the cells that train, that thresholds are chosen on, and that are held out; no cell in two."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def masks(pair: Pair, seed: int) -> Masks:
    """The cells of a seed."""
    rng, n = np.random.default_rng(seed), pair.rna.n_obs
    if pair.is_train is None:
        test = _drawn(np.ones(n, dtype=bool), TEST_FRACTION, rng)
        known = ~test
    else:
        known, test = (_drawn(side, TAKEN, rng) for side in (pair.is_train, ~pair.is_train))
    validation = _drawn(known, VALIDATION_FRACTION, rng)
    return Masks(known & ~validation, validation, test)


def _drawn(among: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    candidates = np.flatnonzero(among)
    chosen = np.zeros(len(among), dtype=bool)
    chosen[rng.permutation(candidates)[: round(fraction * len(candidates))]] = True
    return chosen


@dataclass(frozen=True)
class Split:
    """One seed's view of a pair: features that enough training cells have, and the matrices over them."""

    pair: Pair
    seed: int
    cells: Masks

    @cached_property
    def processor(self) -> BinarizedStringProcessor:
        return self.new_processor("set")

    def new_processor(self, encoding: str) -> BinarizedStringProcessor:
        least = int(np.ceil(MIN_SHARE * self.cells.train.sum()))
        pair = (self.pair.rna, self.pair.atac)
        options: dict[str, Any] = {"expression_values": "log_normalized", "encoding": encoding}
        return BinarizedStringProcessor.from_cells(pair, train=self.cells.train, min_cells=least, **options)

    @cached_property
    def present(self) -> dict[str, sp.csr_matrix]:
        """Modality -> (n, f) CSR of ones."""
        found = self.processor.feature_extractor((self.pair.rna, self.pair.atac))
        return {name: sp.csr_matrix(found[name]) for name in ("expression", "accessibility")}

    @cached_property
    def values(self) -> dict[str, sp.csr_matrix]:
        """Modality -> (n, f) CSR of log-normalized expression, and of accessibility as it is: 0 or 1."""
        genes = self.processor.feature_extractor.genes
        return {"expression": sp.csr_matrix(self.pair.rna[:, genes].X), "accessibility": self.present["accessibility"]}

    def source(self, task: str, cells: np.ndarray) -> SourceCells:
        """What baselines read of some cells."""
        modality = TASKS[task][0]
        totals = self.pair.umis_n if modality == "expression" else self.pair.fragments_n
        return SourceCells(self.values[modality][cells], totals[cells], self.pair.batch_n[cells])

    def facts(self) -> dict[str, Any]:
        """Cells, features and densities."""
        counts: dict[str, Any] = {
            name: int(getattr(self.cells, name).sum()) for name in ("train", "validation", "test")
        }
        for modality, matrix in self.present.items():
            counts[f"{modality}_features"] = matrix.shape[1]
            counts[f"{modality}_density"] = matrix.nnz / np.prod(matrix.shape)
        return counts
