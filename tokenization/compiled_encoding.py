"""Rank-value encoding of a block of cells in compiled loops: equals `rank_encoding`, ten times as fast.

Compiled by numba on first use (seconds) and cached beside this file, or in the user's cache folder where this one is
read-only. The loops run outside the interpreter's lock, so threads encode blocks side by side. No fast-math: the order
of operations decides the last bit, and the last bit decides ties.

Axis letters: n cells, g genes of the file, v genes of the vocabulary in ascending order of token id.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from .rank_encoding import TARGET_SUM

# Bits of one radix digit: its 2,048 counters stay in the first-level cache.
DIGIT_BITS = 11
# Exchanges per gene that finishing a sort by insertion may take before the whole keys are sorted by radix.
MAX_EXCHANGES = 8


def _compiled(function: Callable) -> Any:
    """The function as machine code, with NumPy's rules of division; kept on disk where a cache folder is writable."""
    with contextlib.suppress(RuntimeError):
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    return numba.njit(nogil=True, error_model="numpy")(function)


@_compiled
def scan_block(values, indices, indptr, index_g):
    """Sums of each cell, over all genes and over those of the vocabulary, and whether all values are raw counts.

    values, indices, indptr  CSR, values float32 or float64
    index_g                  (genes of the file,) position in the vocabulary, or -1
    Returns                  (cells,) float64, (cells,) float64, bool
    """
    n_cells = len(indptr) - 1
    sums, matched = np.empty(n_cells), np.empty(n_cells)
    is_raw = True
    for n in range(n_cells):
        total = inside = 0.0
        for k in range(indptr[n], indptr[n + 1]):
            x = np.float64(values[k])
            # False for NaN, too; infinity shows in the total.
            is_raw &= (x >= 0) & (x == np.floor(x))
            total += x
            if index_g[indices[k]] >= 0:
                inside += x
        sums[n], matched[n] = total, inside
        is_raw &= total < np.inf
    return sums, matched, is_raw


@_compiled
def encode_block(
    values, indices, indptr, index_g, n_counts_n, medians_v, token_ids_v, max_genes, first_token, last_token, tokens
):
    """Writes the cells' tokens end to end into `tokens`.

    values, indices, indptr  CSR of non-negative values, columns in any order
    n_counts_n               (cells,) total counts of each cell
    first_token, last_token  around each cell that is not empty; negative for none
    tokens                   int32, with room for them all
    Returns                  (cells + 1,) int64 offsets of the cells in `tokens`, and how many cells were cut
    """
    n_vocabulary = len(medians_v)
    counts_v = np.zeros(n_vocabulary)
    detected = np.empty(n_vocabulary + 1, np.int32)
    ranked = np.empty(n_vocabulary)
    keys = ranked.view(np.uint64)
    order, spare = np.empty(n_vocabulary, np.int32), np.empty(n_vocabulary, np.int32)
    starts = np.empty(1 << DIGIT_BITS, np.int32)
    offsets = np.zeros(len(indptr), np.int64)
    end = n_truncated = 0
    for n in range(len(indptr) - 1):
        # Columns that mean the same gene are summed in the order they are stored in.
        for k in range(indptr[n], indptr[n + 1]):
            v = index_g[indices[k]]
            if v >= 0:
                counts_v[v] += values[k]
        n_detected = 0
        for v in range(n_vocabulary):
            detected[n_detected] = v
            n_detected += counts_v[v] != 0
        # Values are positive, so they compare as their bits do.
        least, most = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0)
        for i in range(n_detected):
            v = detected[i]
            ranked[i] = counts_v[v] / n_counts_n[n] * TARGET_SUM / medians_v[v]
            counts_v[v] = 0
            least, most = min(least, keys[i]), max(most, keys[i])
        for i in range(n_detected):
            keys[i] = most - keys[i]
        order, spare = _stable_order(keys, n_detected, most - least, order, spare, starts)

        length = min(n_detected, max_genes)
        n_truncated += length < n_detected
        if length and first_token >= 0:
            tokens[end] = first_token
            end += 1
        for i in range(length):
            tokens[end + i] = token_ids_v[detected[order[i]]]
        end += length
        if length and last_token >= 0:
            tokens[end] = last_token
            end += 1
        offsets[n + 1] = end
    return offsets, n_truncated


@_compiled
def _stable_order(keys, n_keys, largest, order, spare, starts):
    """Positions of the first `n_keys` keys in ascending order, equal ones in the order they are in.

    The highest two digits below the top bit of the largest key are sorted by radix, which leaves little to an insertion
    sort: keys of equal digits that still differ. Where they are many after all, every digit is sorted by radix.
    Returns  the array of `order` and `spare` that holds the result, and the other one
    """
    n_bits = 0
    while n_keys and largest >> np.uint64(n_bits):
        n_bits += 1
    order, spare = _radix_order(keys, n_keys, max(0, n_bits - 2 * DIGIT_BITS), n_bits, order, spare, starts)
    exchanges = 0
    for i in range(1, n_keys):
        position, j = order[i], i
        while j and keys[order[j - 1]] > keys[position]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = position
        exchanges += i - j
        if exchanges > MAX_EXCHANGES * n_keys:
            return _radix_order(keys, n_keys, 0, n_bits, order, spare, starts)
    return order, spare


@_compiled
def _radix_order(keys, n_keys, low_bit, high_bit, order, spare, starts):
    """Positions of the keys, stable in ascending order of their bits from `low_bit` to below `high_bit`."""
    digit = np.uint64((1 << DIGIT_BITS) - 1)
    for i in range(n_keys):
        order[i] = i
    for bit in range(low_bit, high_bit, DIGIT_BITS):
        shift = np.uint64(bit)
        starts[:] = 0
        for i in range(n_keys):
            starts[keys[i] >> shift & digit] += 1
        before = 0
        for d in range(len(starts)):
            count = starts[d]
            starts[d] = before
            before += count
        for i in range(n_keys):
            d = keys[order[i]] >> shift & digit
            spare[starts[d]] = order[i]
            starts[d] += 1
        order, spare = spare, order
    return order, spare
