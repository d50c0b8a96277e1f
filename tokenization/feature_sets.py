"""Cells as sets of features: binarization of blocks of cells, and the order in which a set is told.

Axis letters: n cells, g columns of a file.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp


@dataclass(frozen=True)
class FeatureSets:
    """The features of each of some cells, laid end to end.

    features  (entries,) int32 positions in the vocabulary of a modality, ascending within a cell unless ranked
    offsets   (cells + 1,) int64, where each cell begins and ends
    levels    (entries,) float32 log-normalized expression, where asked for; None of what is only there or not
    """

    features: np.ndarray
    offsets: np.ndarray
    levels: np.ndarray | None

    @property
    def n_cells(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def matrix(self, n_features: int) -> sp.csr_matrix:
        """(cells, n_features) CSR float32 of ones."""
        data = np.ones(len(self.features), dtype=np.float32)
        matrix = sp.csr_matrix((data, self.features.copy(), self.offsets), shape=(self.n_cells, n_features))
        matrix.sort_indices()
        return matrix


def feature_sets(
    values_ng: sp.csr_matrix,
    position_g: np.ndarray,
    *,
    cut_n: np.ndarray | None = None,
    with_levels: bool = False,
    scale_n: np.ndarray | None = None,
) -> FeatureSets:
    """Entries of each cell that are at or above its cut, as positions in the vocabulary.

    values_ng   (cells, columns) counts or levels, not negative
    position_g  (columns,) int32 position of a column's feature in the vocabulary, or -1; no position twice
    cut_n       (cells,) least value that counts, above zero; None: anything above zero
    scale_n     (cells,) factor before log(1 + x) that makes levels of values; None: the values are the levels
    """
    if not values_ng.has_sorted_indices:
        values_ng = values_ng.sorted_indices()
    lengths = np.diff(values_ng.indptr)
    positions = position_g[values_ng.indices]
    keep = positions >= 0
    keep &= values_ng.data > 0 if cut_n is None else values_ng.data >= np.repeat(cut_n, lengths)
    features, levels = positions[keep], None
    # Entries kept before each place: at the ends of rows, where cells begin
    offsets = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])[values_ng.indptr]
    if with_levels:
        levels = values_ng.data[keep]
        if scale_n is not None:
            levels = np.log1p(levels * np.repeat(scale_n, np.diff(offsets)))
        levels = levels.astype(np.float32, copy=False)
    known = position_g[position_g >= 0]
    if np.all(np.diff(known) > 0):
        return FeatureSets(features, offsets, levels)
    data = np.empty(len(features), dtype=np.float32) if levels is None else levels
    rows = sp.csr_matrix((data, features, offsets), shape=(len(lengths), int(known.max(initial=0)) + 1))
    rows.sort_indices()
    return FeatureSets(rows.indices, offsets, None if levels is None else rows.data)


def ranked(sets: FeatureSets) -> FeatureSets:
    """The same sets, each cell's features by falling level; at equal level in order of the vocabulary."""
    assert sets.levels is not None
    cells = np.repeat(np.arange(sets.n_cells), sets.lengths)
    order = np.lexsort((sets.features, -sets.levels, cells))
    return FeatureSets(sets.features[order], sets.offsets, sets.levels[order])


def ragged_gather(table: np.ndarray, table_offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a ragged table laid end to end: table[table_offsets[r] : table_offsets[r + 1]] of all r.

    Returns  (entries,) of the table's type, (rows + 1,) int64 where each row begins
    """
    starts = table_offsets[rows]
    lengths = table_offsets[rows + 1] - starts
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    where = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return table[where], offsets
