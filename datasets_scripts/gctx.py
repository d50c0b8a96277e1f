"""Expression profiles out of `.gctx` files, a block of profiles at a time.

A `.gctx` file is HDF5: `/0/DATA/0/matrix` (profiles, genes), `/0/META/ROW` with one dataset per annotation of the genes
and `/0/META/COL` with one per annotation of the profiles, both with `id`. "Rows" and "columns" mean genes and profiles
there, since MATLAB sees the matrix transposed.
Format: Enache et al., Bioinformatics 2019, doi:10.1093/bioinformatics/bty784.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cellglot.datasets_scripts.corpus_errors import CorpusError

MATRIX = "/0/DATA/0/matrix"
ANNOTATIONS = {"genes": "/0/META/ROW", "profiles": "/0/META/COL"}
BLOCK_BYTES = 32 << 20
# What the Connectivity Map writes for a missing annotation, as text or as a number
MISSING = ("-666", "-666.0", "-666.000000")


class Gctx:
    """A `.gctx` file, open for reading; a context manager.

    path       the file
    gene_ids   (genes,) strings, in the order of the matrix
    n_profiles number of profiles
    Raises     CorpusError if the file is truncated, still packed, no HDF5, or lacks a dataset of the format
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = _open(self.path)
        try:
            self._matrix = self._dataset(MATRIX)
            self.gene_ids = self._strings(f"{ANNOTATIONS['genes']}/id")
            ids = self._dataset(f"{ANNOTATIONS['profiles']}/id")
            expected = (len(ids), len(self.gene_ids))
            if self._matrix.shape != expected:
                raise CorpusError(
                    f"{self.path}: the matrix is {self._matrix.shape}, but there are ids of {expected[0]:,} profiles "
                    f"and {expected[1]:,} genes. Expected (profiles, genes), as the Connectivity Map writes it."
                )
        except BaseException:
            self.close()
            raise
        self.n_profiles = len(ids)

    def profile_ids(self, start: int = 0, stop: int | None = None) -> pa.Array:
        """(stop - start,) ids, as strings."""
        return self._strings(f"{ANNOTATIONS['profiles']}/id", slice(start, stop))

    def annotations(self, of: Literal["genes", "profiles"]) -> pd.DataFrame:
        """Annotations that the file carries, all of them text; -666 is missing. The index holds the ids."""
        group = self._file[ANNOTATIONS[of]]
        assert isinstance(group, h5py.Group)
        columns = {name: self._strings(f"{ANNOTATIONS[of]}/{name}").to_pandas() for name in group}
        table = pd.DataFrame(columns).set_index("id")
        return table.mask(table.isin(MISSING))

    def gene_positions(self, gene_ids: pa.Array) -> np.ndarray:
        """(len(gene_ids),) places of these genes in the matrix.

        Raises  CorpusError if the matrix lacks one, or has one twice
        """
        require_unique(self.gene_ids, "gene ids", self.path)
        positions = positions_in(gene_ids, self.gene_ids)
        if positions.null_count:
            absent = gene_ids.filter(positions.is_null())
            raise CorpusError(
                f"{self.path} lacks {len(absent):,} of {len(gene_ids):,} genes of the gene table "
                f"({examples(absent)}); it holds {len(self.gene_ids):,} ({examples(self.gene_ids)}). "
                "Take matrix and gene table of the same release."
            )
        return positions.to_numpy()

    def blocks(
        self, start: int, stop: int, genes: np.ndarray, *, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """(start, stop, (stop - start, genes) float32 values) of consecutive blocks of profiles.

        genes        places of the genes wanted, in the order wanted
        block_bytes  bound of what is read at once; blocks end where the file's chunks end if those are smaller
        """
        first, last = int(genes.min()), int(genes.max()) + 1
        rows = max(1, block_bytes // (4 * (last - first)))
        chunk = self._matrix.chunks[0] if self._matrix.chunks else 1
        if chunk <= rows:
            rows -= rows % chunk
        while start < stop:
            end = min(stop, start - start % rows + rows)
            try:
                # HDF5 reads a range much faster than scattered columns.
                values = self._matrix[start:end, first:last]
            except OSError as error:
                raise CorpusError(
                    f"{self.path} is damaged: profiles {start:,} to {end:,} cannot be read ({error}). Fetch it again."
                ) from error
            yield start, end, np.take(values, genes - first, axis=1).astype(np.float32, copy=False)
            start = end

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _dataset(self, name: str) -> h5py.Dataset:
        dataset = self._file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise CorpusError(
                f"{self.path} has no dataset {name}; at the top it holds {', '.join(self._file) or 'nothing'}. "
                "Expected a .gctx file (GCTX1.0)."
            )
        return dataset

    def _strings(self, name: str, part: slice = slice(None)) -> pa.Array:
        values = self._dataset(name)[part]
        if values.dtype.kind not in "SO":
            values = values.astype(str)
        # MATLAB pads strings to equal length.
        return pa.array(np.char.strip(values.astype("S")), pa.binary()).cast(pa.string())


def positions_in(ids: pa.Array, all_ids: pa.Array) -> pa.Array:
    """(len(ids),) int32 places of `ids` in `all_ids`, null for those that are not there."""
    return pc.call_function("index_in", [ids], pc.SetLookupOptions(all_ids))


def require_unique(ids: pa.Array, what: str, path: Path) -> None:
    """Raises CorpusError if an id stands twice."""
    # Sorted, since a hash table of 1.3 million ids takes four times the memory.
    ordered = ids.take(pc.call_function("array_sort_indices", [ids]))
    repeated = ordered[1:].filter(pc.call_function("equal", [ordered[1:], ordered[:-1]])).unique()
    if len(repeated):
        raise CorpusError(
            f"{path}: {len(repeated):,} {what} stand there more than once ({examples(repeated)}). Expected each once."
        )


def examples(ids: pa.Array) -> str:
    """Three of them, for a message."""
    return "e.g. " + ", ".join(repr(i.as_py()) for i in ids[:3])


def _open(path: Path) -> h5py.File:
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise CorpusError(
                f"{path} is gzip-compressed, and HDF5 cannot be read through gzip: run `gunzip` on it first."
            )
    try:
        return h5py.File(path)
    except OSError as error:
        found = f"{path} ({path.stat().st_size:,} bytes)"
        if "truncated" in str(error):
            raise CorpusError(f"{found} is truncated ({error}). Delete it and fetch it again.") from error
        raise CorpusError(f"{found} is no HDF5 file, as a .gctx file has to be ({error}).") from error
