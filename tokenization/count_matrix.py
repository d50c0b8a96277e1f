"""Raw counts from the files labs have, read in blocks of cells.

`open_counts` turns an AnnData, an `.h5ad` or a modality of an `.h5mu` (CSR, CSC or dense; X, a layer or `raw`), a
`.loom`, a 10x `.h5` or a 10x `.mtx` folder into a `CountMatrix`. Files are never loaded whole: memory is bounded by the
block. (An `.mtx` folder is text, and is.)

Axis letters: n cells, g genes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from .gene_ids import GENE_ID_COLUMNS
from .hdf5_ranges import range_reader

CELLS_PER_BLOCK = 512
# Non-zeros of a CSC file gathered per pass: 8 bytes each, so about 256 MB.
CSC_VALUES_PER_PASS = 32_000_000


class InputError(ValueError):
    """A request that does not fit what is in a file, as opposed to a file that cannot be read."""


@dataclass
class CountMatrix:
    """Counts of `n_cells` cells over the genes of `var`, with `read(start, stop)` for a range of cells.

    name        what to call it in a message (a path, or "AnnData")
    obs         (n_cells,) pandas DataFrame, cell annotations, cell names as index
    var         (n_genes,) pandas DataFrame, gene annotations, gene names as index
    read        (start, stop) -> (stop - start, n_genes) CSR matrix or dense array, as stored
    concurrent  whether several threads may read, in any order of cells; else one, best in file order
    """

    name: str
    obs: Any
    var: Any
    read: Callable[[int, int], Any]
    # Where else counts could be, for error messages: name -> reader
    other_matrices: dict[str, Callable[[int, int], Any]]
    concurrent: bool = False

    @property
    def n_cells(self) -> int:
        return len(self.obs)

    @property
    def n_genes(self) -> int:
        return len(self.var)

    def blocks(
        self, cells: np.ndarray | None = None, cells_per_block: int = CELLS_PER_BLOCK
    ) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """(cell positions, counts as CSR) in file order, of all cells or of those marked in a boolean mask."""
        for start, stop in self.block_ranges(cells, cells_per_block):
            yield self.read_block(start, stop, cells)

    def block_ranges(
        self, cells: np.ndarray | None = None, cells_per_block: int = CELLS_PER_BLOCK
    ) -> Iterator[tuple[int, int]]:
        """(start, stop) of the blocks that hold a cell, in file order."""
        for start in range(0, self.n_cells, cells_per_block):
            stop = min(start + cells_per_block, self.n_cells)
            if cells is None or cells[start:stop].any():
                yield start, stop

    def read_block(self, start: int, stop: int, cells: np.ndarray | None = None) -> tuple[np.ndarray, sp.csr_matrix]:
        """(positions, counts as CSR) of the cells from `start` to before `stop`, or of those of them in a mask.

        Raises  OSError if what is stored is no matrix of these cells and genes
        """
        with _named_read_errors(self.name):
            block = sp.csr_matrix(self.read(start, stop))
            if block.shape != (stop - start, self.n_genes):
                raise ValueError(f"cells {start:,} to {stop:,} of {self.n_genes:,} genes have shape {block.shape}")
            # A gene index out of range in a damaged file would be read from beyond the matrix.
            block.check_format(full_check=True)
        wanted = np.arange(start, stop) if cells is None else start + np.flatnonzero(cells[start:stop])
        return wanted, block if len(wanted) == stop - start else block[wanted - start]

    def gene_names(self, column: str | None = None) -> list[str]:
        """Gene identifiers: of a column of `var`, or of the first of `GENE_ID_COLUMNS` there is, else the index."""
        if column is not None and column not in self.var:
            raise ValueError(
                f"{self.name}: var has no column {column!r}; it has {', '.join(map(str, self.var)) or 'none'}."
            )
        column = column or next((name for name in GENE_ID_COLUMNS if name in self.var), None)
        return [str(name) for name in (self.var.index if column is None else self.var[column])]

    def cell_totals(self, cells: np.ndarray, counts_ng: sp.csr_matrix, *, check: bool = True) -> np.ndarray:
        """Total counts of each cell of a block over ALL its genes: obs["n_counts"] where present, else the row sum.

        Returns  (cells of the block,) float64
        Raises   ValueError where n_counts is not a number, zero, or smaller than the row's sum (float32 rounding apart)
        """
        # Not .sum(axis=1), which adds float32 values as float32 even where float64 is asked for.
        return self.totals_of_sums(cells, counts_ng @ np.ones(self.n_genes), check=check)

    def totals_of_sums(self, cells: np.ndarray, sums: np.ndarray, *, check: bool = True) -> np.ndarray:
        """`cell_totals` where the sums of the cells' counts are known: (cells of the block,) float64."""
        if "n_counts" not in self.obs:
            return sums
        column = self.obs["n_counts"]
        if column.dtype.kind not in "iuf":
            raise ValueError(
                f"{self.name}: obs['n_counts'] holds {column.dtype}, not numbers (e.g. {column.iloc[0]!r}). "
                "Convert the column, or delete it to use the sums of counts."
            )
        totals = column.to_numpy(dtype=np.float64, na_value=np.nan)[cells]
        bad = ~(totals >= sums * (1 - 1e-6)) | ((totals == 0) & (sums > 0)) if check else ~(totals > 0) & (sums > 0)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"{self.name}: obs['n_counts'] of cell {str(self.obs.index[cells[row]])!r} is {totals[row]:g}, smaller "
                f"than the sum of its counts ({sums[row]:g}); {int(bad.sum()):,} such cells in this block. It must be "
                "the total over all genes before any was dropped: correct the column, or delete it to use the sums."
            )
        return totals

    def looks_raw(self, read: Callable[[int, int], Any] | None = None, n_cells: int = 64) -> bool:
        """Whether the first cells hold non-negative integers only, and some value above zero."""
        values = sp.csr_matrix((read or self.read)(0, min(n_cells, self.n_cells))).data
        return bool(len(values)) and bool(np.all((values >= 0) & (values == np.rint(values)))) and values.max() > 0

    def passing_cells(self, cells: np.ndarray | None = None) -> np.ndarray | None:
        """Mask of the cells with obs["filter_pass"] == 1 among those given; None if that is all.

        Raises  ValueError if `cells` is no boolean mask of this matrix
        """
        if cells is not None and (np.asarray(cells).dtype != bool or np.shape(cells) != (self.n_cells,)):
            raise ValueError(
                f"{self.name}: expected cells as a boolean mask of its {self.n_cells:,} cells, "
                f"found {np.asarray(cells).dtype} of shape {np.shape(cells)}."
            )
        if "filter_pass" not in self.obs:
            return cells
        passed = self.obs["filter_pass"].to_numpy() == 1
        return passed if cells is None else passed & cells

    def raw_alternatives(self) -> list[str]:
        """Names of the other matrices here that look like raw counts."""
        return [name for name, read in self.other_matrices.items() if self.looks_raw(read)]


@contextlib.contextmanager
def open_counts(source: Any, *, layer: str | None = None, modality: str | None = None) -> Iterator[CountMatrix]:
    """The count matrix of an AnnData or file, open while the context lasts.

    source    AnnData, CountMatrix, or path of an `.h5ad`, `.h5mu`, `.loom`, 10x `.h5` file or 10x `.mtx` folder
    layer     None for X, "raw" for `raw`, else a name in `layers`
    modality  of an `.h5mu`
    Raises    FileNotFoundError, OSError (truncated or corrupt file), ValueError (unknown layer, modality or format)
    """
    if isinstance(source, CountMatrix):
        yield source
        return
    if hasattr(source, "obs_names") and hasattr(source, "var_names"):
        yield _from_anndata(source, layer)
        return
    if not isinstance(source, str | Path):
        raise ValueError(
            f"Expected an AnnData or the path of a file with cells, found {type(source).__name__}. "
            "Use encode_expression(counts, gene_ids) for NumPy or SciPy matrices."
        )
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir():
        if layer is not None:
            raise ValueError(f"{path} is a 10x folder, which has no layers, but layer={layer!r} was asked for.")
        yield _from_10x_folder(path)
        return
    readers = {".h5ad": _from_h5ad, ".loom": _from_loom, ".h5": _from_10x_h5}
    readers[".h5mu"] = lambda file, layer: _from_h5ad(_modality_of_h5mu(file, modality), layer)
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected one of {', '.join(readers)} or a 10x .mtx folder, found {path.suffix!r}.")
    import h5py

    with contextlib.ExitStack() as stack:
        # Not around the yield: what goes wrong in the caller's block is no fault of the file.
        with _named_read_errors(path):
            file = stack.enter_context(h5py.File(path, "r"))
            matrix = readers[path.suffix](file, layer)
        matrix.name = str(path) if modality is None else f"{path}, {modality}"
        yield matrix


@contextlib.contextmanager
def _named_read_errors(path: Any) -> Iterator[None]:
    """Low-level failures to read as one OSError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        if isinstance(error, FileNotFoundError) or "truncated or corrupt" in str(error):
            raise
        raise OSError(
            f"{path} cannot be read: truncated or corrupt, or not in the format its name says ({error}). "
            "Compare its size with the source and fetch it again."
        ) from error


def _pick_layer(name: str, layer: str | None, x: Any, layers: dict[str, Any], raw: Any) -> Any:
    """The chosen matrix among X (None), `raw` and the layers."""
    if layer in (None, "X") and x is not None:
        return x
    if layer == "raw" and raw is not None:
        return raw
    if layer in layers:
        return layers[layer]
    present = [*(["X"] if x is not None else []), *layers, *(["raw"] if raw is not None else [])]
    raise InputError(f"{name} has no {'X' if layer is None else f'layer {layer!r}'}; it has {', '.join(present)}.")


def _others(layer: str | None, x: Any, layers: dict[str, Any], raw: Any) -> dict[str, Callable[[int, int], Any]]:
    matrices = {"X": x, "raw": raw, **layers}
    layer = None if layer == "X" else layer
    return {k: v for k, v in matrices.items() if v is not None and k != ("X" if layer is None else layer)}


def _from_anndata(adata: Any, layer: str | None) -> CountMatrix:
    def reader(matrix: Any) -> Callable[[int, int], Any] | None:
        if matrix is None:
            return None
        # In memory, slicing CSC by cells costs a pass over all values for every block; one conversion does it once.
        rows: Any = matrix
        if sp.issparse(matrix) and rows.format != "csr":
            rows = rows.tocsr()
        return lambda start, stop: rows[start:stop]

    layers = dict(adata.layers)
    raw = adata.raw
    chosen = _pick_layer("The AnnData", layer, adata.X, layers, None if raw is None else raw.X)
    others = {
        name: (lambda start, stop, m=matrix: m[start:stop])
        for name, matrix in _others(layer, adata.X, layers, None if raw is None else raw.X).items()
    }
    read = reader(chosen)
    assert read is not None
    return CountMatrix("AnnData", adata.obs, adata.raw.var if layer == "raw" else adata.var, read, others)


def _modality_of_h5mu(file: Any, modality: str | None) -> Any:
    """The group of a MuData file that is laid out as an `.h5ad`."""
    if modality not in file["mod"]:
        raise InputError(f"{file.filename} has the modalities {', '.join(file['mod'])}; {modality!r} was asked for.")
    return file["mod"][modality]


def _from_h5ad(group: Any, layer: str | None) -> CountMatrix:
    import h5py
    from anndata.io import read_elem

    name = group.file.filename
    if isinstance(group.get("obs"), h5py.Dataset):
        # Written by AnnData before 0.7, with tables as compound data sets. Rare enough to be read whole.
        import warnings

        import anndata

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _from_anndata(anndata.read_h5ad(name), layer)

    x = group.get("X")
    # X may be an empty placeholder (encoding "null") when the counts live in a layer.
    x = None if x is not None and x.attrs.get("encoding-type") == "null" else x
    layers = dict(group["layers"]) if "layers" in group else {}
    raw = group.get("raw/X")
    chosen = _pick_layer(name, layer, x, layers, raw)
    return CountMatrix(
        name,
        read_elem(group["obs"]),
        read_elem(group["raw/var" if layer == "raw" else "var"]),
        _h5_reader(chosen),
        {name: _h5_reader(element) for name, element in _others(layer, x, layers, raw).items()},
        concurrent=not _is_csc(chosen),
    )


def _h5_reader(element: Any) -> Callable[[int, int], Any]:
    """Reader of cell ranges of an AnnData matrix on disk: dense data set, CSR or CSC group."""
    import h5py

    if isinstance(element, h5py.Dataset):
        return lambda start, stop: element[start:stop]
    shape = tuple(int(n) for n in element.attrs.get("shape", element.attrs.get("h5sparse_shape")))
    read = _CSCRows if _is_csc(element) else _CSRRows
    return read(element["data"], element["indices"], element["indptr"], shape).read


def _is_csc(element: Any) -> bool:
    encoding = element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "csr_matrix"))
    return (encoding.decode() if isinstance(encoding, bytes) else encoding).startswith("csc")


class _CSRRows:
    """Cell ranges of a CSR matrix on disk: one contiguous read of values and of indices each."""

    def __init__(self, data: Any, indices: Any, indptr: Any, shape: tuple[int, ...]):
        self.read_data, self.read_indices, self.shape = range_reader(data), range_reader(indices), shape
        self._indptr_on_disk, self._indptr = indptr, None

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        if self._indptr is None:
            self._indptr = self._indptr_on_disk[:].astype(np.int64)
            if len(self._indptr) != self.shape[0] + 1:
                raise ValueError(f"indptr has {len(self._indptr):,} entries for {self.shape[0]:,} cells")
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        indptr = self._indptr[start : stop + 1] - first
        values, columns = self.read_data(first, last), self.read_indices(first, last)
        return sp.csr_matrix((values, columns, indptr), (stop - start, self.shape[1]))


class _CSCRows:
    """Cell ranges of a CSC matrix on disk, which stores one gene after another.

    A pass over the whole file gathers as many next cells as `values_per_pass` allows: small files take one pass, large
    ones a few, and memory stays bounded.
    """

    values_per_read = 2_000_000

    def __init__(
        self, data: Any, indices: Any, indptr: Any, shape: tuple[int, ...], values_per_pass: int = CSC_VALUES_PER_PASS
    ):
        self.data, self.indices, self.indptr, self.shape = data, indices, indptr, shape
        self.values_per_pass = values_per_pass
        self._values_before_n: np.ndarray | None = None
        self._start, self._rows = 0, sp.csr_matrix((0, shape[1]))

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        if start < self._start or stop > self._start + self._rows.shape[0]:
            self._gather(start, stop)
        return self._rows[start - self._start : stop - self._start]

    def _gather(self, start: int, stop: int) -> None:
        if self._values_before_n is None:
            counts = np.zeros(self.shape[0] + 1, dtype=np.int64)
            for first in range(0, len(self.indices), self.values_per_read):
                cells = self.indices[first : first + self.values_per_read]
                counts[1:] += np.bincount(cells, minlength=self.shape[0])
            self._values_before_n = np.cumsum(counts)
        before = self._values_before_n
        end = int(np.searchsorted(before, before[start] + self.values_per_pass, side="right")) - 1
        end = min(max(end, stop), self.shape[0])
        # The rows before are not kept beside these.
        self._start, self._rows = start, sp.csr_matrix((0, self.shape[1]))
        row_starts = before[start : end + 1] - before[start]
        values, genes = np.empty(row_starts[-1], self.data.dtype), np.empty(row_starts[-1], np.int32)
        free = row_starts[:-1].copy()
        indptr = self.indptr[:].astype(np.int64)
        for first in range(0, len(self.indices), self.values_per_read):
            last = min(first + self.values_per_read, len(self.indices))
            cells = self.indices[first:last]
            inside = np.flatnonzero((cells >= start) & (cells < end))
            # By cell, its genes in their order: the k-th of a run goes k places behind the cell's first free one.
            rows = cells[inside].astype(np.int64) - start
            order = np.argsort(rows, kind="stable")
            rows, inside = rows[order], inside[order]
            runs = np.flatnonzero(np.diff(rows, prepend=-1))
            lengths = np.diff(runs, append=len(rows))
            places = free[rows] + np.arange(len(rows)) - np.repeat(runs, lengths)
            values[places] = self.data[first:last][inside]
            genes[places] = np.searchsorted(indptr, first + inside, side="right") - 1
            free[rows[runs]] += lengths
        self._rows = sp.csr_matrix((values, genes, row_starts), shape=(end - start, self.shape[1]))


def _from_loom(file: Any, layer: str | None) -> CountMatrix:
    """Loom keeps genes x cells in `/matrix`, annotations in `/row_attrs`, `/col_attrs` (loompy file specification)."""
    matrix = _pick_layer(file.filename, layer, file["matrix"], dict(file.get("layers", {})), None)
    return CountMatrix(
        file.filename,
        _loom_frame(file["col_attrs"], ("CellID", "obs_names", "cell_id"), matrix.shape[1]),
        _loom_frame(file["row_attrs"], ("Gene", "var_names", "Accession"), matrix.shape[0]),
        lambda start, stop: matrix[:, start:stop].T,
        {},
    )


def _loom_frame(attributes: Any, index_names: Sequence[str], length: int) -> Any:
    import pandas as pd

    columns = {}
    for name, values in attributes.items():
        if values.ndim == 1 and len(values) == length:
            read = values[:]
            columns[name] = (
                [v.decode() if isinstance(v, bytes) else v for v in read] if read.dtype.kind in "OS" else read
            )
    frame = pd.DataFrame(columns, index=pd.RangeIndex(length).astype(str))
    index = next((name for name in index_names if name in columns), None)
    return frame if index is None else frame.set_index(index, drop=False)


def _from_10x_h5(file: Any, layer: str | None) -> CountMatrix:
    """10x Genomics keeps genes x cells as CSC in `/matrix`, which is cells x genes as CSR (Cell Ranger 3 and later)."""
    import pandas as pd

    if layer is not None:
        raise InputError(f"{file.filename} is a 10x file, which has no layers, but layer={layer!r} was asked for.")
    if "matrix" not in file or "features" not in file["matrix"]:
        raise InputError(
            f"{file.filename}: expected a 10x file with /matrix/features (Cell Ranger 3 or later), "
            f"found {', '.join(file)}. Read it with scanpy and pass the AnnData."
        )
    group = file["matrix"]
    n_genes, n_cells = (int(n) for n in group["shape"][:])

    def text(dataset: Any) -> list[str]:
        return [value.decode() for value in dataset[:]]

    features = group["features"]
    var = pd.DataFrame({"gene_ids": text(features["id"])}, index=pd.Index(text(features["name"])))
    obs = pd.DataFrame(index=pd.Index(text(group["barcodes"])))
    rows = _CSRRows(group["data"], group["indices"], group["indptr"], (n_cells, n_genes))
    if "feature_type" not in features:
        return CountMatrix(file.filename, obs, var, rows.read, {}, concurrent=True)
    # Antibodies and peaks are no genes, and no part of a cell's total.
    genes = np.flatnonzero(np.array(text(features["feature_type"])) == "Gene Expression")
    return CountMatrix(
        file.filename, obs, var.iloc[genes], lambda start, stop: rows.read(start, stop)[:, genes], {}, concurrent=True
    )


def _from_10x_folder(path: Path) -> CountMatrix:
    if not any(path.glob("*matrix.mtx*")):
        raise ValueError(f"{path} is a folder without matrix.mtx or matrix.mtx.gz; pass one file, or a 10x folder.")
    try:
        import scanpy
    except ImportError as error:
        raise ImportError("Reading a 10x .mtx folder needs scanpy: pip install scanpy") from error
    with _named_read_errors(path):
        matrix = _from_anndata(scanpy.read_10x_mtx(path), None)
    matrix.name = str(path)
    return matrix


def check_counts(
    matrix: CountMatrix, cells: np.ndarray, counts_ng: sp.csr_matrix, *, allow_normalized: bool = False
) -> None:
    """Refuses a block that cannot be raw counts, naming cell, gene and value.

    Raises  ValueError for NaN or infinite, negative, or (unless allowed) non-integer values
    """

    def where(bad: np.ndarray) -> str:
        k = int(np.flatnonzero(bad)[0])
        row = int(np.searchsorted(counts_ng.indptr, k, side="right")) - 1
        cell, gene = matrix.obs.index[cells[row]], matrix.var.index[counts_ng.indices[k]]
        return f"{matrix.name}: cell {str(cell)!r}, gene {str(gene)!r} has {counts_ng.data[k]:g}"

    values = counts_ng.data
    if values.dtype.kind in "iub":
        if values.dtype.kind == "i" and len(values) and values.min() < 0:
            raise ValueError(f"{where(values < 0)}; counts cannot be negative. Pass the raw counts.")
        return
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(f"{where(bad)}; counts must be finite. Remove or repair these cells.")
    bad = values < 0
    if bad.any():
        raise ValueError(f"{where(bad)}; counts cannot be negative (scaled data?). {_counts_hint(matrix)}")
    bad = values != np.rint(values)
    if bad.any() and not allow_normalized:
        raise ValueError(
            f"{where(bad)}, not an integer: this looks normalized or log-transformed, and rank values need raw counts. "
            f"{_counts_hint(matrix)} allow_normalized=True, where it is offered, takes the values as they are."
        )


def _counts_hint(matrix: CountMatrix) -> str:
    found = matrix.raw_alternatives()
    if found:
        layer = "None" if found[0] == "X" else repr(found[0])
        return f"Raw counts seem to be in {', '.join(found)}: pass layer={layer}."
    return "No layer or `raw` here holds counts: go back to the file with the raw counts."
