"""The schema of every expression corpus: one row a cell, its detected genes and their counts.

`gene_index` (list of int32, ascending) and `count` (list of float32) hold a cell's non-zero counts; columns of `obs`
stand beside them. The genes themselves are stored once, in `genes.parquet` in the same folder: row i is gene_index i.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import scipy.sparse as sp

GENE_TABLE = "genes.parquet"


def ragged_features(obs: dict[str, Any]) -> datasets.Features:
    """Features of the schema with the given `obs` columns."""
    lists = {"gene_index": datasets.List(datasets.Value("int32")), "count": datasets.List(datasets.Value("float32"))}
    return datasets.Features({"cell_name": datasets.Value("string"), **lists, **obs})


class RaggedCountsBuilder(datasets.GeneratorBasedBuilder):
    """Base of the corpus builders: a gene table beside the data, written and renamed together with it."""

    # The library sets it before it builds anything.
    _output_dir: str

    def gene_table(self) -> pd.DataFrame:
        """(genes,) DataFrame with column gene_id, in the order of gene_index."""
        raise NotImplementedError

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        super()._download_and_prepare(*args, **kwargs)
        # `_output_dir` is a temporary folder here; the library renames it when all of it is written.
        self.gene_table().to_parquet(Path(self._output_dir) / GENE_TABLE, index=False)

    def prepare(self) -> Path:
        """Builds the corpus as Parquet unless it is there already; returns its folder."""
        self.download_and_prepare(file_format="parquet")
        return Path(self._output_dir)


def ragged_rows(counts_ng: sp.csr_matrix) -> list[dict[str, np.ndarray]]:
    """gene_index and count of each cell of a CSR matrix."""
    counts = sp.csr_matrix(counts_ng, copy=True)
    counts.eliminate_zeros()
    counts.sort_indices()
    cells = zip(counts.indptr[:-1], counts.indptr[1:], strict=True)
    return [{"gene_index": counts.indices[a:b].astype(np.int32), "count": counts.data[a:b]} for a, b in cells]


def read_ragged(folder: Path | str, split: str) -> Any:
    """One split of a prepared corpus as an AnnData: X CSR counts, var index the gene ids, obs the other columns.

    Raises  FileNotFoundError if the folder holds no such split
    """
    import anndata as ad

    folder = Path(folder)
    files = sorted(folder.glob(f"*-{split}*.parquet"))
    if not files or not (folder / GENE_TABLE).exists():
        raise FileNotFoundError(f"{folder} holds no prepared split {split!r} with a {GENE_TABLE}.")
    genes = pd.read_parquet(folder / GENE_TABLE)
    table = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    lengths = table["gene_index"].map(len).to_numpy()
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.concatenate([*table["gene_index"], np.empty(0, dtype=np.int32)])
    data = np.concatenate([*table["count"], np.empty(0, dtype=np.float32)])
    counts = sp.csr_matrix((data, indices, indptr), shape=(len(table), len(genes)))
    obs = table.drop(columns=["gene_index", "count"]).set_index("cell_name")
    return ad.AnnData(counts, obs=obs, var=genes.set_index("gene_id"))
