"""Counts as text, one `gene<TAB>cell<TAB>count` a line, numbered from one, without a header: how sci-Plex is published.

Such files have some 10^9 lines. Where the lines are ordered by cell, the lines of any range of cells are found by
bisection of the file, and read in blocks: memory is bounded by the block, and parts of a file can be read in any order
or by several processes. A file in another order is sorted once, on disk.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import scipy.sparse as sp
from tqdm.auto import tqdm

from cellglot.datasets_scripts.corpus_errors import CorpusError

COLUMNS = ("gene", "cell", "count")
LARGEST = 2**31 - 1
BYTES_PER_READ = 8 << 20
# Places that are looked at to tell whether a file is ordered; the rest is checked as it is read.
PLACES = 1_000
# Lines sorted at once: 12 bytes each, some times over
LINES_PER_BUCKET = 8_000_000


def is_by_cell(path: Path) -> bool:
    """Whether the cells ascend from line to line, as far as the first lines and a thousand places of the file tell."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = _parsed(path, _whole_lines(file, size))[1] if size else np.empty(0, dtype=np.int32)
        places = [_cell_after(file, path, size * k // PLACES) for k in range(PLACES)]
    return bool(np.all(np.diff(first) >= 0) and np.all(np.diff([p for p in places if p is not None]) >= 0))


def triplet_blocks(
    path: Path, shape: tuple[int, int], cells: range, cells_per_block: int = 512
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """(number of the first cell from zero, counts of consecutive cells) of a file whose lines are ordered by cell.

    shape    (cells, genes) of the whole matrix
    cells    which cells to read, from zero
    Yields   (<= cells_per_block, genes) float32 CSR; cells without a line are empty rows
    Raises   CorpusError for a number out of range, a line that is no triplet, or cells that descend
    """
    n_cells, n_genes = shape
    with path.open("rb") as file:
        # The first and the last range begin and end with the file, so that no line is left out of all ranges.
        stop = path.stat().st_size if cells.stop == n_cells else _offset_of_cell(file, path, cells.stop + 1)
        file.seek(_offset_of_cell(file, path, cells.start + 1) if cells.start else 0)
        block_start = cells.start
        rest: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * 3
        while True:
            lines = _whole_lines(file, stop)
            gene, cell, count = _parsed(path, lines)
            _check(path, file.tell(), (gene, cell, count), (n_genes, n_cells))
            gene, cell, count = (np.concatenate(pair) for pair in zip(rest, (gene, cell, count), strict=True))
            if len(cell) and (cell[0] <= block_start or cell[-1] > cells.stop or np.any(np.diff(cell) < 0)):
                raise CorpusError(
                    f"{path}: the lines before byte {file.tell():,} are not in ascending order of cells, though most "
                    "of the file is. Sort it (sort -s -n -k 2,2) and put it into --data-dir."
                )
            # The last cell of these lines may go on in the next ones.
            complete = cells.stop if not lines else int(cell[-1]) - 1 if len(cell) else block_start
            while block_start < cells.stop and min(block_start + cells_per_block, cells.stop) <= complete:
                block_stop = min(block_start + cells_per_block, cells.stop)
                indptr = np.searchsorted(cell, np.arange(block_start + 1, block_stop + 2))
                values = count[: indptr[-1]].astype(np.float32)
                yield (
                    block_start,
                    sp.csr_matrix((values, gene[: indptr[-1]] - 1, indptr), (block_stop - block_start, n_genes)),
                )
                gene, cell, count = gene[indptr[-1] :], cell[indptr[-1] :], count[indptr[-1] :]
                block_start = block_stop
            if not lines:
                return
            rest = [gene, cell, count]


def sort_by_cell(path: Path, target: Path, n_cells: int, lines_per_bucket: int = LINES_PER_BUCKET) -> None:
    """Writes the lines of a file in ascending order of cells, through buckets on disk, each sorted in memory.

    target            written aside and renamed; the disk needs room for the file and about as much again
    lines_per_bucket  lines that fit into memory, about: cells are taken to be of like size
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = _whole_lines(file, size)
    n_lines = max(1, size * first.count(b"\n") // max(1, len(first)))
    n_buckets = -(-n_lines // lines_per_bucket)
    cells_per_bucket = -(-n_cells // n_buckets)
    buckets = [target.with_name(f"{target.name}.{k}.bucket") for k in range(-(-n_cells // cells_per_bucket))]
    partial = target.with_name(target.name + ".tmp")
    try:
        for bucket in buckets:
            bucket.write_bytes(b"")
        with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc="Sorting by cell") as bar:
            while lines := _whole_lines(file, size):
                triplets = np.stack(_parsed(path, lines), axis=1)
                _check(path, file.tell(), list(triplets.T), (LARGEST, n_cells))
                of_line = (triplets[:, 1] - 1) // cells_per_bucket
                order = np.argsort(of_line, kind="stable")
                ends = np.searchsorted(of_line[order], np.arange(len(buckets) + 1))
                for k in np.flatnonzero(np.diff(ends)):
                    with buckets[k].open("ab") as bucket:
                        triplets[order[ends[k] : ends[k + 1]]].tofile(bucket)
                bar.update(len(lines))
        with partial.open("wb") as sorted_lines:
            for bucket in buckets:
                triplets = np.fromfile(bucket, dtype=np.int32).reshape(-1, 3)
                triplets = triplets[np.argsort(triplets[:, 1], kind="stable")]
                table = pa.table(dict(zip(COLUMNS, triplets.T, strict=True)))
                options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
                pyarrow.csv.write_csv(table, sorted_lines, options)
                bucket.unlink()
        partial.replace(target)
    finally:
        for leftover in (*buckets, partial):
            leftover.unlink(missing_ok=True)


def _whole_lines(file: BinaryIO, stop: int) -> bytes:
    """The next lines of a file, about BYTES_PER_READ of them, none of which begins at `stop` or later."""
    lines = file.read(max(0, min(BYTES_PER_READ, stop - file.tell())))
    return lines + file.readline() if lines and not lines.endswith(b"\n") else lines


def _parsed(path: Path, lines: bytes) -> list[np.ndarray]:
    """Genes, cells and counts of whole lines, int32 each."""
    if not lines:
        return [np.empty(0, dtype=np.int32)] * 3
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(lines),
            read_options=pyarrow.csv.ReadOptions(column_names=COLUMNS, use_threads=False, block_size=len(lines) + 1),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.int32())),
        )
    except pa.ArrowInvalid as error:
        raise CorpusError(
            f"{path}: expected lines of three whole numbers, gene, cell and count, with tabs between them ({error}). "
            "Fetch the file again if its end is missing."
        ) from error
    return [table[name].to_numpy() for name in COLUMNS]


def _check(path: Path, offset: int, triplets: Sequence[np.ndarray], shape: tuple[int, int]) -> None:
    """Raises CorpusError for a number below one, or above the (genes, cells) that there are."""
    for name, numbers, most in zip(COLUMNS, triplets, (*shape, LARGEST), strict=True):
        bad = (numbers < 1) | (numbers > most)
        if bad.any():
            expected = "1 or more" if most == LARGEST else f"1 to {most:,}, as the annotations have"
            raise CorpusError(
                f"{path}: a line before byte {offset:,} has {name} {numbers[bad][0]:,}, expected {expected}. "
                "Check that matrix and annotations are of one screen."
            )


def _cell_after(file: BinaryIO, path: Path, offset: int) -> int | None:
    """The cell of the first line that begins at `offset` or after it; None behind the last line."""
    file.seek(max(0, offset - 1))
    if offset:
        file.readline()
    cell = _parsed(path, file.readline())[1]
    return int(cell[0]) if len(cell) else None


def _offset_of_cell(file: BinaryIO, path: Path, cell: int) -> int:
    """Where the lines of a cell, or of the first cell after it, begin."""
    low, high = 0, path.stat().st_size
    while low < high:
        middle = (low + high) // 2
        found = _cell_after(file, path, middle)
        low, high = (middle + 1, high) if found is not None and found < cell else (low, middle)
    # No line of a smaller cell begins at `low` or after it: the next one is the cell's first.
    file.seek(max(0, low - 1))
    if low:
        file.readline()
    return file.tell()
