"""Blocks of counts into blocks of tokens: checks, totals, rank-value encoding, special tokens.

`BlockEncoder` does it in one of two ways with one result: with NumPy, at once, for few cells; or with compiled loops,
about ten times as fast once they are loaded, in as many threads as there are cores. `encoded_blocks` picks the way.
"""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from .count_matrix import CountMatrix, check_counts
from .ordered_map import available_threads, ordered_map
from .rank_encoding import rank_value_block

# NumPy encodes this many cells in the 0.3 s that it takes to load numba and the compiled loops.
FEW_CELLS = 1024


@dataclass(frozen=True)
class EncodedBlock:
    """Tokens of a block of cells, and what was seen on the way.

    rows     (cells,) positions of the cells in their file
    tokens   (tokens,) int32, the cells laid end to end, special tokens included; none for an empty cell
    offsets  (cells + 1,) int64, where each cell begins and ends in them
    """

    rows: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    n_truncated: int
    total_counts: float
    matched_counts: float


class BlockEncoder:
    """Encodes blocks of the cells of one count matrix; may be called by several threads.

    index_g        (genes of the file,) position of each column's gene in the vocabulary, or -1; columns of one gene are
                   summed
    medians_v      (genes of the vocabulary,) float64
    token_ids_v    (genes of the vocabulary,) int32, ascending
    max_length     tokens a cell at the most, special tokens included
    special        tokens before and after each cell, or none
    n_cells        how many cells are to come, which decides whether it pays to load the compiled loops
    """

    def __init__(
        self,
        matrix: CountMatrix,
        index_g: np.ndarray,
        medians_v: np.ndarray,
        token_ids_v: np.ndarray,
        *,
        max_length: int,
        special: tuple[int, int] | None,
        n_cells: int,
        allow_normalized: bool = False,
    ):
        self.matrix, self.index_g, self.medians_v, self.token_ids_v = matrix, index_g, medians_v, token_ids_v
        self.special, self.max_genes = special, max_length - (2 if special else 0)
        self.compiled, self.allow_normalized = n_cells > FEW_CELLS, allow_normalized
        columns = np.flatnonzero(index_g >= 0)
        self.selector_gv = sp.csr_matrix(
            (np.ones(len(columns)), (columns, index_g[columns])), shape=(len(index_g), len(medians_v))
        )

    def __call__(self, rows: np.ndarray, counts_ng: sp.csr_matrix) -> EncodedBlock:
        """Tokens of a block.

        rows       (cells,) positions of the cells in the matrix
        counts_ng  (cells, genes of the file) as of `CountMatrix.read_block`, which checks the indices
        Raises     ValueError for what cannot be raw counts (`check_counts`) or totals of them (`cell_totals`)
        """
        encode = self._encode_compiled if self.compiled else self._encode_with_numpy
        return encode(rows, counts_ng)

    def _encode_with_numpy(self, rows: np.ndarray, counts_ng: sp.csr_matrix) -> EncodedBlock:
        check_counts(self.matrix, rows, counts_ng, allow_normalized=self.allow_normalized)
        sums = counts_ng @ np.ones(len(self.index_g))
        matched = counts_ng @ (self.index_g >= 0).astype(np.float64)
        totals = self.matrix.totals_of_sums(rows, sums, check=not self.allow_normalized)
        # One gene more than fits is asked for, only to tell truncated cells from those that just fit.
        tokens, offsets = rank_value_block(
            counts_ng, totals, self.selector_gv, self.medians_v, self.token_ids_v, max_genes=self.max_genes + 1
        )
        lengths = np.diff(offsets)
        truncated = lengths > self.max_genes
        tokens = np.delete(tokens, offsets[1:][truncated] - 1)
        lengths = lengths - truncated
        if self.special:
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            filled = lengths > 0
            # At equal positions numpy.insert keeps the order given: the last of one cell before the first of the next.
            where = np.stack([offsets[:-1][filled], offsets[1:][filled]], axis=1).ravel()
            tokens = np.insert(tokens, where, np.tile(np.array(self.special, dtype=np.int32), int(filled.sum())))
            lengths = lengths + 2 * filled
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return EncodedBlock(rows, tokens, offsets, int(truncated.sum()), float(sums.sum()), float(matched.sum()))

    def _encode_compiled(self, rows: np.ndarray, counts_ng: sp.csr_matrix) -> EncodedBlock:
        from .compiled_encoding import encode_block, scan_block

        # Machine code is made for each type of its arguments: contiguous, writable, and two kinds of values will do.
        kind = np.float32 if counts_ng.data.dtype == np.float32 else np.float64
        counts = [np.require(counts_ng.data, kind, ["C", "W"])]
        counts += [np.require(array, None, ["C", "W"]) for array in (counts_ng.indices, counts_ng.indptr)]
        sums, matched, is_raw = scan_block(*counts, self.index_g)
        if not is_raw:
            check_counts(self.matrix, rows, counts_ng, allow_normalized=self.allow_normalized)
        totals = self.matrix.totals_of_sums(rows, sums, check=not self.allow_normalized)
        before, after = self.special or (-1, -1)
        # At most a token for each stored value, and pages that are never written cost nothing.
        room = np.minimum(np.diff(counts_ng.indptr), self.max_genes).sum(dtype=np.int64) + 2 * len(rows)
        tokens = np.empty(room, dtype=np.int32)
        offsets, n_truncated = encode_block(
            *counts, self.index_g, totals, self.medians_v, self.token_ids_v, self.max_genes, before, after, tokens
        )
        return EncodedBlock(rows, tokens[: offsets[-1]], offsets, n_truncated, float(sums.sum()), float(matched.sum()))


def encoded_blocks(
    matrix: CountMatrix,
    cells: np.ndarray | None,
    cells_per_block: int,
    encoder: BlockEncoder,
    threads: int | None = None,
) -> Generator[EncodedBlock]:
    """Encoded blocks of the matrix in file order, of all cells or of those marked in a boolean mask.

    A compiled encoder reads and encodes as many blocks at once as there are threads (None: as many as are worth
    starting), and one waits to be taken. Close the iterator before the file.
    """
    if not encoder.compiled:
        for rows, counts in matrix.blocks(cells, cells_per_block):
            yield encoder(rows, counts)
        return
    threads = threads or available_threads()
    if matrix.concurrent:
        ranges = matrix.block_ranges(cells, cells_per_block)
        yield from ordered_map(lambda span: encoder(*matrix.read_block(*span, cells)), ranges, threads=threads)
    else:
        blocks = matrix.blocks(cells, cells_per_block)
        yield from ordered_map(lambda block: encoder(*block), blocks, threads=threads)
