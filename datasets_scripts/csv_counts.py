"""Counts from a CSV of cells x genes, read in blocks of lines that become sparse matrices at once.

The first line names the genes, the first field of every other line its cell. A file of 50,000 cells x 50,000 genes is
parsed in one pass over its bytes, in compiled code that keeps what is not zero: no dense row is ever made. Memory is
bounded by the block.

Axis letters: n cells, g genes.
"""

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import scipy.sparse as sp

from cellglot.datasets_scripts.corpus_errors import CorpusError

BYTES_PER_BLOCK = 16 << 20
COMMA, QUOTE, POINT, MINUS, PLUS, LINE_FEED, CARRIAGE_RETURN, ZERO, NINE, LOWER_E, UPPER_E = b',".-+\n\r09eE'
COMPLETE, RAGGED, NO_COUNT = range(3)


def header(path: str | Path) -> tuple[list[str], int]:
    """Names of the columns, that of the cells first, and the byte at which the first cell begins."""
    with open(path, "rb") as file:
        names = next(csv.reader(io.StringIO(file.readline().decode("utf-8-sig"))), [])
        return names, file.tell()


def count_rows(path: str | Path, progress: Callable[[int], Any] = lambda n_bytes: None) -> int:
    """Number of lines after the first; the last one need not end with a newline."""
    with open(path, "rb") as file:
        file.readline()
        n_rows, last = 0, b"\n"
        while block := file.read(BYTES_PER_BLOCK):
            n_rows, last = n_rows + block.count(b"\n"), block[-1:]
            progress(len(block))
    return n_rows + (last != b"\n")


def blocks(
    path: str | Path, start: int | None = None, stop: int | None = None, bytes_per_block: int = BYTES_PER_BLOCK
) -> Iterator[tuple[list[str], sp.csr_matrix]]:
    """(cell names, (cells, genes) float32 CSR counts) of the lines that begin at bytes `start` to before `stop`.

    Ranges that adjoin give every line once, wherever they are cut.
    Raises  CorpusError with the line's number where a line has another number of fields than the first, or a field that
            is no count
    """
    columns, first = header(path)
    start, stop = max(start or 0, first), Path(path).stat().st_size if stop is None else stop
    with open(path, "rb") as file:
        file.seek(start - 1)
        # To the end of the line that began before; a newline alone if one begins right here.
        file.readline()
        while (position := file.tell()) < stop:
            text = file.read(min(bytes_per_block, stop - position))
            if not text.endswith(b"\n"):
                text += file.readline()
            yield _parsed(path, text, position, columns)


def _parsed(path: str | Path, text: bytes, position: int, columns: list[str]) -> tuple[list[str], sp.csr_matrix]:
    n_genes, n_lines = len(columns) - 1, text.count(b"\n") + 1
    # A value that is kept takes two bytes at least, its comma and a digit.
    values, genes = np.empty(len(text) // 2, np.float32), np.empty(len(text) // 2, np.int32)
    indptr, names = np.zeros(n_lines + 1, np.int64), np.empty((n_lines, 2), np.int64)
    n_rows, status, n_fields, line_start = _parse(np.frombuffer(text, np.uint8), n_genes, values, genes, indptr, names)
    if status != COMPLETE:
        line = _line_number(path, position + line_start)
        ends_there = " It is the last one: the file is cut off." if text.find(b"\n", line_start) < 0 else ""
        if status == RAGGED:
            raise CorpusError(
                f"{path}, line {line:,}: expected {n_genes + 1:,} fields ({columns[0]} and {n_genes:,} genes), found "
                f"{n_fields:,}.{ends_there} Fetch the file again, or mend that line."
            )
        field = text[line_start:].split(b"\n", 1)[0].split(b",")[n_fields].decode(errors="replace")
        raise CorpusError(
            f"{path}, line {line:,}: expected a count of gene {columns[n_fields]!r}, found {field[:40]!r}.{ends_there}"
        )
    cells = [text[a:b].decode().strip('"') for a, b in names[:n_rows].tolist()]
    n_values = int(indptr[n_rows])
    # Copies, so that a block that waits does not hold the buffers, which are several times its size.
    data, indices = values[:n_values].copy(), genes[:n_values].copy()
    return cells, sp.csr_matrix((data, indices, indptr[: n_rows + 1]), shape=(n_rows, n_genes))


def _line_number(path: str | Path, position: int) -> int:
    """Number, from 1, of the line that begins at a byte."""
    with open(path, "rb") as file:
        n_lines = 1
        while position > 0 and (block := file.read(min(BYTES_PER_BLOCK, position))):
            n_lines, position = n_lines + block.count(b"\n"), position - len(block)
    return n_lines


@numba.njit(nogil=True)
def _parse(
    text: np.ndarray, n_genes: int, values: np.ndarray, genes: np.ndarray, indptr: np.ndarray, names: np.ndarray
) -> tuple[int, int, int, int]:  # pragma: no cover
    """Fills the arrays from whole lines; returns rows, status and, where that is not COMPLETE, fields and line's start.

    text    bytes of lines
    values  genes  (values,) non-zero counts, and their genes
    indptr  (rows + 1,) as in CSR
    names   (rows, 2) first byte of each cell's name and the one after its last
    """
    i, row, n_values = 0, 0, 0
    while i < len(text):
        line = i
        quoted = False
        while i < len(text) and text[i] != LINE_FEED and (quoted or text[i] != COMMA):
            quoted ^= text[i] == QUOTE
            i += 1
        names[row, 0], names[row, 1] = line, i
        gene = 0
        while i < len(text) and text[i] == COMMA:
            i += 1
            mantissa, n_digits, exponent = 0.0, 0, 0
            while i < len(text) and ZERO <= text[i] <= NINE:
                mantissa, n_digits, i = mantissa * 10 + (text[i] - ZERO), n_digits + 1, i + 1
            if i < len(text) and text[i] == POINT:
                i += 1
                while i < len(text) and ZERO <= text[i] <= NINE:
                    mantissa, n_digits, i = mantissa * 10 + (text[i] - ZERO), n_digits + 1, i + 1
                    exponent -= 1
            if n_digits > 0 and i < len(text) and (text[i] == LOWER_E or text[i] == UPPER_E):
                i += 1
                sign = 1
                if i < len(text) and (text[i] == MINUS or text[i] == PLUS):
                    sign = -1 if text[i] == MINUS else 1
                    i += 1
                power, n_digits = 0, 0
                while i < len(text) and ZERO <= text[i] <= NINE:
                    power, n_digits, i = power * 10 + (text[i] - ZERO), n_digits + 1, i + 1
                exponent += sign * power
            ended = i == len(text) or text[i] == COMMA or text[i] == LINE_FEED or text[i] == CARRIAGE_RETURN
            if n_digits == 0 or not ended:
                return row, NO_COUNT, gene + 1, line
            if mantissa != 0 and gene < n_genes:
                values[n_values] = mantissa * 10.0**exponent
                genes[n_values] = gene
                n_values += 1
            gene += 1
        if i < len(text) and text[i] == CARRIAGE_RETURN:
            i += 1
        if gene != n_genes:
            return row, RAGGED, gene + 1, line
        i += 1
        row += 1
        indptr[row] = n_values
    return row, COMPLETE, 0, 0
