"""A folder of count files, cut into shares of about equal work for tasks that run anywhere, at any time.

The cells of all files, in order of file name, are cut into contiguous shares with about the same number of stored
values. So what the tasks write, laid end to end, does not depend on how many there are. Cuts fall between blocks of
`CELLS_PER_BLOCK` cells. Files that are read in passes (CSC) are cut where a new pass begins anyway, and 10x `.mtx`
folders, which are text, not at all.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from cellglot.tokenization.count_matrix import CELLS_PER_BLOCK, CSC_VALUES_PER_PASS, CountMatrix, open_counts
from cellglot.tokenization.obs_columns import obs_column
from cellglot.train.fingerprint import fingerprint

COUNT_FILES = (".h5ad", ".loom", ".h5")
# Stored values of a task where no number of tasks is asked for: 50,000 cells of 2,555 detected genes
VALUES_PER_TASK = 128_000_000
# To know the work of a file that is not opened: bytes of a stored value, compressed
BYTES_PER_VALUE = 4


@dataclass(frozen=True)
class Shard:
    """A file of the corpus, as it was when the shares were made.

    name    relative to the folder
    digest  of its size and both ends
    n_cells None where that is not known: a 10x folder, or a file that cannot be read, which its task will say
    """

    name: str
    digest: str
    n_cells: int | None


@dataclass(frozen=True)
class Share:
    """Cells `start` to before `stop` of a shard; None: all."""

    shard: str
    start: int = 0
    stop: int | None = None

    def cells(self, matrix: CountMatrix) -> np.ndarray:
        """(n_cells,) boolean mask of the cells of this share."""
        mask = np.zeros(matrix.n_cells, dtype=bool)
        mask[self.start : self.stop] = True
        return mask


@dataclass(frozen=True)
class Plan:
    """What there is, and who does what.

    tasks      the shares of each task
    obs_types  the Arrow type of each obs column that holds those of all shards
    n_values   stored values, of files that were not opened by their size
    """

    shards: list[Shard]
    tasks: list[list[Share]]
    obs_types: dict[str, str]
    n_values: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Plan":
        return cls(
            [Shard(**shard) for shard in content["shards"]],
            [[Share(**share) for share in task] for task in content["tasks"]],
            content["obs_types"],
            content["n_values"],
        )


def corpus_files(folder: Path) -> list[Path]:
    """Count files and 10x `.mtx` folders below a folder, in order of name; or the one file given.

    Raises  ValueError if there is none
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist.")
    files = {path for path in folder.rglob("*") if path.suffix in COUNT_FILES and path.is_file()}
    files |= {path.parent for path in folder.rglob("*matrix.mtx*")}
    if not files:
        raise ValueError(f"{folder} holds no {', '.join(COUNT_FILES)} and no 10x folder with matrix.mtx.")
    return sorted(files)


def shard_path(folder: Path, name: str) -> Path:
    """Where a shard is: `folder` may be the one file itself."""
    return folder if folder.is_file() else folder / name


def shard_digest(path: Path) -> str:
    """Changes with size or ends of the file, or of a file of the folder."""
    return fingerprint(sorted(path.iterdir()) if path.is_dir() else [path], (), {})


def make_plan(folder: Path, *, n_tasks: int | None, layer: str | None, obs_columns: Sequence[str] = ()) -> Plan:
    """The shares of at most `n_tasks` tasks, the same for the same folder and number.

    n_tasks  None: one for every `VALUES_PER_TASK` stored values
    Raises   ValueError if there are no cells, an obs column is missing, or its types cannot be one; the first file's
             error if none can be read
    """
    shards: list[Shard] = []
    errors: list[Exception] = []
    units: list[Share] = []
    values_u: list[int] = []
    schema = pa.schema([])
    for path in tqdm(corpus_files(folder), "looking at files", unit="file"):
        name = path.name if path == folder else str(path.relative_to(folder))
        n_cells = None
        if path.is_file():
            try:
                with open_counts(path, layer=layer) as matrix:
                    starts, stops, values = _cuts(path, matrix, layer)
            except (OSError, ValueError) as error:
                # Its own task will say so; the others need not fail.
                errors.append(error)
            else:
                n_cells = matrix.n_cells
                schema = _widened(schema, matrix, obs_columns)
                units += [Share(name, start, stop) for start, stop in zip(starts, stops, strict=True)]
                values_u += values
        if n_cells is None:
            files = path.iterdir() if path.is_dir() else [path]
            units.append(Share(name))
            values_u.append(sum(file.stat().st_size for file in files) // BYTES_PER_VALUE)
        shards.append(Shard(name, shard_digest(path), n_cells))
    if len(errors) == len(shards):
        raise errors[0]
    if not units:
        raise ValueError(f"The {len(shards)} file(s) of {folder} hold no cells.")
    types = {field.name: str(field.type) for field in schema}
    return Plan(shards, list(_balanced(units, np.array(values_u), n_tasks)), types, sum(values_u))


def _balanced(units: list[Share], values_u: np.ndarray, n_tasks: int | None) -> Iterator[list[Share]]:
    """Contiguous units of each task, neighbours joined."""
    n_tasks = n_tasks or math.ceil((values_u.sum() + 1) / VALUES_PER_TASK)
    # Cells without any value take time too.
    work = values_u + np.array([1 if unit.stop is None else unit.stop - unit.start for unit in units])
    # A unit belongs to the task in whose part of all the work its middle falls.
    task_of_unit = ((np.cumsum(work) - work / 2) * n_tasks / work.sum()).astype(np.int64)
    for task in np.unique(task_of_unit):
        shares: list[Share] = []
        for i in np.flatnonzero(task_of_unit == task):
            unit = units[i]
            if shares and shares[-1].shard == unit.shard:
                unit = Share(unit.shard, shares.pop().start, unit.stop)
            shares.append(unit)
        yield shares


def _cuts(path: Path, matrix: CountMatrix, layer: str | None) -> tuple[list[int], list[int], list[int]]:
    """Starts and stops of the spans of cells between which a file may be cut, and their stored values.

    Raises  ValueError if the index of cells is of another number of them
    """
    import h5py

    n_cells, step, indptr = matrix.n_cells, CELLS_PER_BLOCK, None
    if n_cells == 0:
        return [], [], []
    values_per_cell = float(matrix.n_genes)
    with h5py.File(path, "r") as file:
        place = {None: "X", "raw": "raw/X"}.get(layer, layer if layer == "X" else f"layers/{layer}")
        group: Any = file.get("matrix" if path.suffix in (".h5", ".loom") else place)
        if isinstance(group, h5py.Group) and matrix.concurrent:
            indptr = np.asarray(group["indptr"], dtype=np.int64)
            if len(indptr) != n_cells + 1:
                raise ValueError(f"{matrix.name}: indptr has {len(indptr):,} entries, expected {n_cells + 1:,}.")
        elif isinstance(group, h5py.Group):
            stored: Any = group["data"]
            values_per_cell = len(stored) / n_cells
            # By gene: a task reads the whole file once for every pass.
            step = max(int(CSC_VALUES_PER_PASS / max(values_per_cell, 1)), step)
    starts = np.arange(0, n_cells, step)
    stops = np.append(starts[1:], n_cells)
    values = (stops - starts) * values_per_cell if indptr is None else indptr[stops] - indptr[starts]
    return starts.tolist(), stops.tolist(), values.astype(np.int64).tolist()


def _widened(schema: pa.Schema, matrix: CountMatrix, obs_columns: Sequence[str]) -> pa.Schema:
    """The types of obs columns that hold those of the files before and of this one."""
    missing = [name for name in obs_columns if name not in matrix.obs]
    if missing:
        raise ValueError(
            f"{matrix.name}: obs has no column {', '.join(map(repr, missing))}; "
            f"it has {', '.join(map(str, matrix.obs)) or 'none'}."
        )
    here = pa.schema([(name, obs_column(matrix.obs[name]).type) for name in obs_columns])
    try:
        return pa.unify_schemas([schema, here], promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise ValueError(
            f"{matrix.name}: a column of obs has another type than in the files before ({error}); convert it in one of "
            "them, e.g. with .astype(str)."
        ) from error
