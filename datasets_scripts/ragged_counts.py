"""The schema of every expression corpus: one row a cell, its detected genes and their counts.

`gene_index` (list of int32, ascending) and `count` (list of float32) hold a cell's non-zero counts; columns of `obs`
stand beside them. The genes themselves are stored once, in `genes.parquet` in the same folder: row i is gene_index i.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

GENE_TABLE = "genes.parquet"


def ragged_features(obs: dict[str, Any]) -> datasets.Features:
    """Features of the schema with the given `obs` columns."""
    lists = {"gene_index": datasets.List(datasets.Value("int32")), "count": datasets.List(datasets.Value("float32"))}
    return datasets.Features({"cell_name": datasets.Value("string"), **lists, **obs})


def ragged_columns(matrix_ng: sp.csr_matrix, index: str = "gene_index", value: str = "count") -> dict[str, pa.Array]:
    """The non-zero values of a CSR matrix as two list columns, a row each, made without Python objects.

    index  name of the column of ascending int32 column numbers
    value  name of the column of float32 values
    """
    if not matrix_ng.has_canonical_format or not np.all(matrix_ng.data):
        matrix_ng = sp.csr_matrix(matrix_ng, copy=True)
        matrix_ng.sum_duplicates()
        matrix_ng.eliminate_zeros()
    offsets = pa.array(matrix_ng.indptr.astype(np.int32, copy=False))
    columns = {
        index: matrix_ng.indices.astype(np.int32, copy=False),
        value: matrix_ng.data.astype(np.float32, copy=False),
    }
    return {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}


def ragged_table(counts_ng: sp.csr_matrix, obs: pd.DataFrame) -> pa.Table:
    """Rows of the schema from a block of cells.

    counts_ng  (cells, genes) CSR counts
    obs        (cells,) its annotations; the index gives cell_name
    Raises     ValueError if they are not of the same cells
    """
    if counts_ng.shape[0] != len(obs):
        raise ValueError(f"Expected a row of obs for each of {counts_ng.shape[0]:,} cells, found {len(obs):,}.")
    names = pa.array(obs.index.astype(str), type=pa.string())
    columns = {str(name): pa.Array.from_pandas(column) for name, column in obs.items()}
    return pa.table({"cell_name": names, **ragged_columns(counts_ng), **columns})


def read_ragged(folder: Path | str, split: str) -> Any:
    """One split of a prepared corpus as an AnnData: X CSR counts, var index the gene ids, obs the other columns.

    Raises  FileNotFoundError if the folder holds no such split
    """
    import anndata as ad

    folder = Path(folder)
    # The library's names: one file, or numbered ones
    files = [*folder.glob(f"*-{split}.parquet"), *sorted(folder.glob(f"*-{split}-[0-9]*-of-[0-9]*.parquet"))]
    if not files or not (folder / GENE_TABLE).exists():
        raise FileNotFoundError(f"{folder} holds no prepared split {split!r} with a {GENE_TABLE}.")
    genes = pd.read_parquet(folder / GENE_TABLE)
    table = pa.concat_tables([pq.read_table(file) for file in files])
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in table["gene_index"].chunks])
    indices, data = (
        np.concatenate([chunk.flatten().to_numpy() for chunk in table[name].chunks]) for name in ("gene_index", "count")
    )
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    counts = sp.csr_matrix((data, indices, indptr), shape=(len(table), len(genes)))
    obs = table.drop_columns(["gene_index", "count"]).to_pandas().set_index("cell_name")
    return ad.AnnData(counts, obs=obs, var=genes.set_index("gene_id"))
