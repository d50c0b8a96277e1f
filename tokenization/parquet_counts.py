"""Counts of a prepared corpus in Parquet, read in blocks of cells as those of any other file.

The layout is that of the dataset scripts: columns `gene_index` (ascending) and `count` hold a cell's non-zero counts,
other columns annotate the cell, and row i of `genes.parquet` in the same folder names gene_index i. Corpora that were
published without counts have a column `expression` in their place.
"""

import bisect
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from .count_matrix import CountMatrix

GENE_TABLE = "genes.parquet"
VALUES = ("count", "expression")


def is_parquet_corpus(path: Path) -> bool:
    """Whether a path is a folder with a gene table, or a Parquet file beside one."""
    return (path / GENE_TABLE).exists() or (path.suffix == ".parquet" and (path.parent / GENE_TABLE).exists())


def parquet_counts(path: Path) -> CountMatrix:
    """Counts of a corpus: of one of its files, or of all files of its folder in order of name.

    Memory is bounded by a row group and the annotations. `read` is quick in file order only.
    Raises  ValueError if there are no files with those columns
    """
    import pandas as pd
    import pyarrow.parquet as pq

    folder, names = (path, sorted(path.glob("*.parquet"))) if path.is_dir() else (path.parent, [path])
    files = [pq.ParquetFile(name) for name in names if name.name != GENE_TABLE]
    value = next((v for v in VALUES if files and v in files[0].schema_arrow.names), VALUES[0])
    counted = [file for file in files if {"gene_index", value} <= set(file.schema_arrow.names)]
    if not counted or len(counted) < len(files):
        raise ValueError(f"{path}: expected Parquet files with columns gene_index and count beside {GENE_TABLE}.")
    genes = pd.read_parquet(folder / GENE_TABLE)
    columns = [name for name in counted[0].schema_arrow.names if name not in ("gene_index", value)]
    obs = pd.concat([file.read(columns).to_pandas() for file in counted], ignore_index=True)
    obs.index = pd.Index(obs.pop("cell_name") if "cell_name" in obs else obs.index.astype(str))
    rows = _RowGroups(counted, len(genes), value)
    return CountMatrix(str(path), obs, genes.set_index("gene_id", drop=False), rows.read, {})


class _RowGroups:
    """Cell ranges of row groups, of which the last read stays at hand: the next range goes on in it."""

    def __init__(self, files: Iterable, n_genes: int, value: str):
        self.value = value
        self.groups = [(file, i) for file in files for i in range(file.num_row_groups)]
        self.starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for file, i in self.groups)]).tolist()
        self.n_genes, self._kept, self._rows = n_genes, -1, sp.csr_matrix((0, n_genes))

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        first, last = bisect.bisect_right(self.starts, start) - 1, bisect.bisect_left(self.starts, stop)
        parts = []
        for group in range(first, last):
            before = self.starts[group]
            parts.append(self._group(group)[max(start - before, 0) : stop - before])
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def _group(self, group: int) -> sp.csr_matrix:
        if group != self._kept:
            file, i = self.groups[group]
            table = file.read_row_group(i, ["gene_index", self.value]).combine_chunks()
            indices, counts = (table[name].chunk(0) for name in ("gene_index", self.value))
            indptr = np.concatenate([[0], np.cumsum(indices.value_lengths().to_numpy())])
            shape = (table.num_rows, self.n_genes)
            self._rows = sp.csr_matrix((counts.flatten().to_numpy(), indices.flatten().to_numpy(), indptr), shape)
            self._kept = group
        return self._rows
