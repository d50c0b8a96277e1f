"""Expression and accessibility of the same cells, from wherever labs keep them, read in blocks of cells.

`open_pairs` takes an AnnData or file with both modalities in var["feature_types"], two of them (a pair, a mapping, a
MuData or its `.h5mu`), one of them alone, or the Parquet folder that `datasets_scripts/bmmc_multiome.py` writes.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from .count_matrix import CELLS_PER_BLOCK, CountMatrix, open_counts
from .gene_ids import examples

EXPRESSION, ACCESSIBILITY = "expression", "accessibility"
# The benchmark's names, then Cell Ranger's
FEATURE_TYPES = {EXPRESSION: ("GEX", "Gene Expression"), ACCESSIBILITY: ("ATAC", "Peaks")}
# Keys of mappings and MuData
MODALITY_KEYS = {EXPRESSION: (EXPRESSION, "rna", "gex"), ACCESSIBILITY: (ACCESSIBILITY, "atac", "peaks")}


@dataclass
class Modality:
    """One modality of some cells.

    matrix   all that the file holds
    columns  positions in it of the features of this modality, ascending
    """

    matrix: CountMatrix
    columns: np.ndarray

    @property
    def shares_matrix(self) -> bool:
        """Whether the matrix has features of another modality too."""
        return len(self.columns) < self.matrix.n_genes

    def names(self, column: str | None = None) -> list[str]:
        """Feature names: the index of `var`, or one of its columns.

        Raises  ValueError for a column that is not there
        """
        if column is not None and column not in self.matrix.var:
            raise ValueError(
                f"{self.matrix.name}: var has no column {column!r}; it has "
                f"{', '.join(map(str, self.matrix.var)) or 'none'}."
            )
        source = self.matrix.var.index if column is None else self.matrix.var[column]
        return [str(name) for name in np.asarray(source)[self.columns]]


@dataclass
class PairedCells:
    """The modalities at hand; where there are both, row i of each is the same cell.

    splits  of the corpus they are from, whether these cells are of one of them or of all
    """

    expression: Modality | None
    accessibility: Modality | None
    splits: tuple[str, ...] = ()

    @property
    def present(self) -> dict[str, Modality]:
        found = {EXPRESSION: self.expression, ACCESSIBILITY: self.accessibility}
        return {name: modality for name, modality in found.items() if modality is not None}

    @property
    def first(self) -> CountMatrix:
        return next(iter(self.present.values())).matrix

    @property
    def n_cells(self) -> int:
        return self.first.n_cells

    @property
    def obs(self) -> Any:
        return self.first.obs

    def blocks(
        self, cells: np.ndarray | None = None, cells_per_block: int = CELLS_PER_BLOCK
    ) -> Iterator[tuple[np.ndarray, dict[str, sp.csr_matrix]]]:
        """(cell positions, values of each modality over all columns of its matrix), a block of cells at a time.

        cells   (cells,) boolean mask
        Raises  ValueError for another kind of mask
        """
        if cells is not None and (np.asarray(cells).dtype != bool or np.shape(cells) != (self.n_cells,)):
            raise ValueError(
                f"{self.first.name}: expected a boolean mask of its {self.n_cells:,} cells, found "
                f"{np.asarray(cells).dtype} of shape {np.shape(cells)}."
            )
        for start, stop in self.first.block_ranges(cells, cells_per_block):
            read: dict[int, sp.csr_matrix] = {}
            rows = np.empty(0, np.int64)
            for modality in self.present.values():
                if id(modality.matrix) not in read:
                    rows, read[id(modality.matrix)] = modality.matrix.read_block(start, stop, cells)
            yield rows, {name: read[id(modality.matrix)] for name, modality in self.present.items()}


@contextlib.contextmanager
def open_pairs(
    cells: Any, *, alone: str = EXPRESSION, layer: str | Mapping[str, str] | None = None, split: str | None = None
) -> Iterator[PairedCells]:
    """The modalities of some cells, open while the context lasts.

    cells   AnnData, CountMatrix or path of a file with var["feature_types"] ("GEX" and "ATAC", or Cell Ranger's names);
            (expression, accessibility), a mapping or an object with `.mod` of these, either may be None; an `.h5mu`; or
            a Parquet folder
    alone   what one matrix without var["feature_types"] is of
    layer   name of the layer, or one for each modality
    split   of a Parquet folder
    Raises  ValueError for cells that are not paired, OSError for files that cannot be read
    """
    if isinstance(cells, PairedCells):
        yield cells
        return
    layers = {EXPRESSION: layer, ACCESSIBILITY: layer} if layer is None or isinstance(layer, str) else dict(layer)
    if isinstance(cells, str | Path):
        # A corpus builder writes its default config into a folder of that name.
        for folder in (Path(cells), Path(cells) / "default"):
            if (folder / "peaks.parquet").exists():
                if layer is not None:
                    raise ValueError(
                        f"{folder} is a Parquet folder, which has no layers, but layer={layer!r} was asked for."
                    )
                yield _parquet_pairs(folder, split)
                return
    if split is not None:
        raise ValueError(f"split={split!r} is for a Parquet folder with genes.parquet and peaks.parquet.")
    parts = _parts(cells)
    with contextlib.ExitStack() as stack:
        if parts is None:
            matrix = stack.enter_context(open_counts(cells, layer=layers[alone]))
            yield _by_feature_type(matrix, alone)
            return
        opened = {
            name: stack.enter_context(open_counts(part, layer=layers.get(name), modality=modality))
            for name, (part, modality) in parts.items()
            if part is not None
        }
        found = {name: _whole(matrix, name) for name, matrix in opened.items()}
        pairs = PairedCells(found.get(EXPRESSION), found.get(ACCESSIBILITY))
        check_paired(pairs)
        yield pairs


def check_paired(pairs: PairedCells) -> None:
    """Raises ValueError unless both modalities have the same cells in the same order."""
    if pairs.expression is None or pairs.accessibility is None:
        return
    ours, theirs = pairs.expression.matrix, pairs.accessibility.matrix
    if ours.obs.index.equals(theirs.obs.index):
        return
    shared = ours.obs.index.intersection(theirs.obs.index)
    only = ours.obs.index.difference(theirs.obs.index, sort=False)
    where = (
        f"Expression ({ours.name}) has {ours.n_cells:,} cells, accessibility ({theirs.name}) {theirs.n_cells:,}; "
        f"{len(shared):,} barcodes match"
    )
    if len(shared) == ours.n_cells == theirs.n_cells:
        raise ValueError(
            f"{where}, but in another order. Reorder one: accessibility = accessibility[expression.obs_names]."
        )
    raise ValueError(
        f"{where}{f', e.g. {examples(only)} have no partner' if len(only) else ''}. Expected the same cells in the "
        "same order: subset both to the shared barcodes (are suffixes such as '-1' spelled alike?)."
    )


def _parts(cells: Any) -> dict[str, tuple[Any, str | None]] | None:
    """(source, its modality in a file of several) of expression and accessibility; None for what is one matrix."""
    if isinstance(cells, tuple | list):
        if len(cells) != 2 or all(part is None for part in cells):
            found = "neither" if len(cells) == 2 else f"{len(cells)} items"
            raise ValueError(f"Expected a pair (expression, accessibility), one of which may be None; found {found}.")
        return {name: (part, None) for name, part in zip(FEATURE_TYPES, cells, strict=True)}
    if isinstance(cells, str | Path) and Path(cells).suffix == ".h5mu":
        keys = _modality_keys(_h5mu_modalities(Path(cells)))
        return {name: (cells, key) for name, key in keys.items()}
    found = getattr(cells, "mod", cells if isinstance(cells, Mapping) else None)
    if found is None:
        return None
    return {name: (found[key], None) for name, key in _modality_keys(list(found)).items()}


def _modality_keys(found: list[str]) -> dict[str, str]:
    """Which of some keys are expression and accessibility."""
    keys = {
        name: next((key for key in found if str(key).lower() in known), None) for name, known in MODALITY_KEYS.items()
    }
    if not any(keys.values()):
        expected = ", ".join(key for known in MODALITY_KEYS.values() for key in known)
        raise ValueError(f"Expected modalities named {expected}; found {examples(found)}.")
    return {name: key for name, key in keys.items() if key is not None}


def _h5mu_modalities(path: Path) -> list[str]:
    import h5py

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with h5py.File(path, "r") as file:
            return list(file["mod"])  # type: ignore[arg-type]
    except (OSError, KeyError) as error:
        raise OSError(f"{path} cannot be read as MuData: {error}") from error


def _whole(matrix: CountMatrix, name: str) -> Modality:
    """All columns of a matrix, or those of this modality where it has more."""
    if "feature_types" not in matrix.var:
        return Modality(matrix, np.arange(matrix.n_genes))
    columns = _columns(matrix, name)
    if not len(columns):
        raise ValueError(
            f"{matrix.name}: was given for {name}, but no var['feature_types'] is {' or '.join(FEATURE_TYPES[name])}; "
            f"there is {examples(matrix.var['feature_types'].unique())}. The order is (expression, accessibility)."
        )
    return Modality(matrix, columns)


def _by_feature_type(matrix: CountMatrix, alone: str) -> PairedCells:
    if "feature_types" not in matrix.var:
        found = {alone: Modality(matrix, np.arange(matrix.n_genes))}
    else:
        found = {name: Modality(matrix, _columns(matrix, name)) for name in FEATURE_TYPES}
        found = {name: modality for name, modality in found.items() if len(modality.columns)}
    if not found:
        raise ValueError(
            f"{matrix.name}: no feature has var['feature_types'] GEX or ATAC (nor 'Gene Expression', 'Peaks'); there "
            f"is {examples(matrix.var['feature_types'].unique())}."
        )
    return PairedCells(found.get(EXPRESSION), found.get(ACCESSIBILITY))


def _columns(matrix: CountMatrix, name: str) -> np.ndarray:
    return np.flatnonzero(matrix.var["feature_types"].isin(FEATURE_TYPES[name]))


# ---- Parquet

# bmmc_multiome-train-00000-of-00002.parquet: as `datasets` names the files of a split
_SPLIT = re.compile(r"(?:^|-)([A-Za-z_]\w*)(?:-\d+-of-\d+)?\.parquet$")


def _parquet_pairs(folder: Path, split: str | None) -> PairedCells:
    import pandas as pd
    import pyarrow.parquet as pq

    tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in ("genes", "peaks")}
    side_tables = {folder / f"{name}.parquet" for name in tables}
    named = {file: _SPLIT.search(file.name) for file in sorted(set(folder.glob("*.parquet")) - side_tables)}
    splits = tuple(dict.fromkeys(match[1] for match in named.values() if match is not None))
    files = [file for file, match in named.items() if split is None or (match is not None and match[1] == split)]
    if not files:
        has = f" of split {split!r}; its splits are {', '.join(splits) or 'none'}" if split is not None else ""
        raise FileNotFoundError(f"{folder} holds no cells{has}.")
    opened = [pq.ParquetFile(file) for file in files]
    lists = ("gene_index", "count", "peak_index", "peak_count")
    labels = [name for name in opened[0].schema_arrow.names if name not in lists]
    obs = pd.concat([file.read(columns=labels).to_pandas() for file in opened]).set_index("cell_name")
    groups = _RowGroups(opened)

    def matrix(index: str, value: str, var: Any) -> CountMatrix:
        read = functools.partial(groups.rows, index, value, len(var))
        return CountMatrix(str(folder), obs, var, read, {})

    genes = tables["genes"].set_index("gene_symbol" if "gene_symbol" in tables["genes"] else "gene_id", drop=False)
    expression = matrix("gene_index", "count", genes)
    accessibility = matrix("peak_index", "peak_count", tables["peaks"].set_index("peak_id", drop=False))
    return PairedCells(_whole(expression, EXPRESSION), _whole(accessibility, ACCESSIBILITY), splits)


class _RowGroups:
    """Ranges of cells of Parquet files; the row group that was read last is kept."""

    def __init__(self, files: list[Any]):
        self.groups = [(file, group) for file in files for group in range(file.num_row_groups)]
        lengths = [file.metadata.row_group(group).num_rows for file, group in self.groups]
        self.ends = np.cumsum(lengths)
        self._last: tuple[int, Any] = (-1, None)

    def rows(self, index: str, value: str, n_columns: int, start: int, stop: int) -> sp.csr_matrix:
        """(stop - start, n_columns) CSR of two list columns."""
        parts = []
        while start < stop:
            k = int(np.searchsorted(self.ends, start, side="right"))
            first = int(self.ends[k - 1]) if k else 0
            end = min(stop, int(self.ends[k]))
            if self._last[0] != k:
                file, group = self.groups[k]
                self._last = (k, file.read_row_group(group))
            table = self._last[1].slice(start - first, end - start)
            columns = [table[name].combine_chunks() for name in (index, value)]
            lengths = columns[0].value_lengths().to_numpy()
            indices, data = (column.flatten().to_numpy() for column in columns)
            parts.append(
                sp.csr_matrix((data, indices, np.concatenate([[0], np.cumsum(lengths)])), (end - start, n_columns))
            )
            start = end
        return sp.csr_matrix(sp.vstack(parts, format="csr"))
