"""The embedded default corpus: 700 real PBMC cells that scanpy ships, as raw counts.

`scanpy.datasets.pbmc68k_reduced()` holds 700 cells and 765 variable genes of the 68,000 PBMCs of Zheng et al.,
"Massively parallel digital transcriptional profiling of single cells", Nature Communications 2017, with ten labels from
bulk RNA-seq references. `raw` there is log(1 + counts / n_counts * factor), rounded to three decimals; the counts come
back as expm1(raw) divided by each cell's smallest value, which is one count, rounded.

    python datasets_scripts/pbmc.py --output data/pbmc
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, command_line, row_parts
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_features, ragged_table

# Share of the cells held out, and the seed of the draw, which is stratified by cell type
VALIDATION_FRACTION = 0.15
SPLIT_SEED = 0
# `raw` is rounded to three decimals, so a count x comes back within x * 0.0005 times two; measured: 0.112 at the most
MAX_ROUNDING = 0.25


def recover_counts(log_values_ng: sp.csr_matrix | np.ndarray) -> sp.csr_matrix:
    """Raw counts from log(1 + counts * factor of the cell), given that each cell's smallest count is one.

    log_values_ng  (cells, genes)
    Returns        (cells, genes) float32 CSR of integers
    Raises         ValueError if the values are no multiples of the smallest one
    """
    scaled = sp.csr_matrix(log_values_ng, dtype=np.float64, copy=True)
    scaled.eliminate_zeros()
    scaled.data = np.expm1(scaled.data)
    smallest = np.minimum.reduceat(scaled.data, scaled.indptr[:-1])
    counts = scaled.data / np.repeat(smallest, np.diff(scaled.indptr))
    error = np.abs(counts - np.rint(counts)).max()
    if error > MAX_ROUNDING:
        raise ValueError(f"Expected multiples of each cell's smallest value, found one that is {error:.2f} off.")
    scaled.data = np.rint(counts).astype(np.float32)
    return scaled.astype(np.float32)


def pbmc_cells() -> Any:
    """AnnData of all 700: raw counts, obs["cell_type"], ["n_counts"], and ["held_out"], true of validation cells."""
    import anndata as ad

    builder = PBMC()
    reduced = builder._cells
    obs = reduced.obs.rename(columns={"bulk_labels": "cell_type"})[["cell_type", "n_counts"]]
    obs["held_out"] = np.isin(np.arange(len(obs)), builder._positions["validation"])
    return ad.AnnData(recover_counts(reduced.raw.X), obs=obs, var=reduced.raw.var[[]])


class PBMC(CorpusBuilder):
    """700 PBMCs, 765 genes, ten cell types; train and validation split by cell."""

    VERSION = datasets.Version("1.0.0")
    # Inside scanpy
    SOURCES = {"default": []}
    CARD = {
        "license": "bsd-3-clause",
        "pretty_name": "700 PBMCs of Zheng et al. 2017",
        "tags": ["biology", "single-cell"],
    }
    LABELS = ("cell_type",)

    def _info(self) -> datasets.DatasetInfo:
        obs = {
            "cell_type": datasets.Value("string"),
            # Total over all genes of the experiment, of which 765 are kept here
            "n_counts": datasets.Value("float32"),
        }
        return datasets.DatasetInfo(
            description="700 peripheral blood mononuclear cells with raw counts of 765 variable genes.",
            features=ragged_features(obs),
            homepage="https://scanpy.readthedocs.io/en/stable/generated/scanpy.datasets.pbmc68k_reduced.html",
            license="BSD-3-Clause, that of scanpy, which ships the cells; the article is CC BY 4.0",
            citation="Zheng et al., Nature Communications 8, 14049 (2017), doi:10.1038/ncomms14049",
        )

    @cached_property
    def _cells(self) -> Any:
        import warnings

        import scanpy

        with warnings.catch_warnings():
            # The file that scanpy ships is in AnnData's older format.
            warnings.simplefilter("ignore")
            return scanpy.datasets.pbmc68k_reduced()

    @cached_property
    def _positions(self) -> dict[str, np.ndarray]:
        from sklearn.model_selection import train_test_split

        train, validation = train_test_split(
            np.arange(self._cells.n_obs),
            test_size=VALIDATION_FRACTION,
            random_state=SPLIT_SEED,
            stratify=self._cells.obs["bulk_labels"],
        )
        return {"train": np.sort(train), "validation": np.sort(validation)}

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        return {split: row_parts(split, len(cells)) for split, cells in self._positions.items()}

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        cells = self._positions[part.file]
        obs = self._cells.obs.iloc[cells].rename(columns={"bulk_labels": "cell_type"})
        yield ragged_table(recover_counts(self._cells.raw.X[cells]), obs[["cell_type", "n_counts"]])

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        return {GENE_TABLE: pd.DataFrame({"gene_id": self._cells.raw.var_names.astype(str)})}


if __name__ == "__main__":
    command_line(PBMC)
