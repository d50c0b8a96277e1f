"""Ranges of one-dimensional HDF5 data sets, inflated by several threads at once.

h5py reads and inflates under one lock of the process, so threads that read through it wait for each other. Here a
thread takes the lock only to fetch the chunks as they are stored, and inflates them outside it: with isal, or with zlib
on the few platforms that isal does not support, which takes about twice as long.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from .ordered_map import MAX_THREADS

InflateError: Any
try:
    from isal.igzip_lib import IsalError as InflateError
    from isal.isal_zlib import decompress
except ImportError:
    from zlib import decompress
    from zlib import error as InflateError

# Filters that are undone here; the identifiers are those of the HDF5 library (H5Zpublic.h).
DEFLATE, SHUFFLE = 1, 2
# Chunks kept for the range that goes on where one ended: one end and one beginning for each thread.
CHUNKS_KEPT = 2 * MAX_THREADS


def range_reader(dataset: Any) -> Callable[[int, int], np.ndarray]:
    """(start, stop) -> values of a one-dimensional h5py data set, for any number of threads in any order.

    Chunks that are plain, deflated or shuffled are read as the module says, all else (lzf, blosc, contiguous or virtual
    layouts, strings) by h5py. As in slices, a range ends where the data set ends.
    Raises  OSError for a chunk that cannot be inflated to its size
    """
    if dataset.ndim != 1 or dataset.chunks is None or dataset.is_virtual or dataset.dtype.kind not in "iuf":
        return lambda start, stop: dataset[start:stop]
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    # Of a chunk that was never written, only h5py knows what stands for it.
    n_chunks = -(-len(dataset) // dataset.chunks[0])
    if not set(filters) <= {DEFLATE, SHUFFLE} or dataset.id.get_num_chunks() < n_chunks:
        return lambda start, stop: dataset[start:stop]
    return _ChunkedRanges(dataset, filters).read


class _ChunkedRanges:
    """Ranges of a chunked data set whose filters are known."""

    def __init__(self, dataset: Any, filters: list[int]):
        self.dataset, self.filters = dataset, filters
        self.chunk_length, self.dtype = int(dataset.chunks[0]), dataset.dtype
        self._kept_chunk = functools.lru_cache(maxsize=CHUNKS_KEPT)(self._chunk)

    def read(self, start: int, stop: int) -> np.ndarray:
        stop = min(stop, len(self.dataset))
        values = np.empty(stop - start, dtype=self.dtype.newbyteorder("="))
        for first in range(start - start % self.chunk_length, stop, self.chunk_length):
            a, b = max(start, first), min(stop, first + self.chunk_length)
            # Neighbours of this range will want the rest of a chunk of which it takes a part.
            chunk = self._chunk(first) if b - a == self.chunk_length else self._kept_chunk(first)
            values[a - start : b - start] = chunk[a - first : b - first]
        return values

    def _chunk(self, first: int) -> np.ndarray:
        """The chunk that begins at the value `first`, at full length even at the end of the data set."""
        skipped, stored = self.dataset.id.read_direct_chunk((first,))
        for i in reversed(range(len(self.filters))):
            # The writer leaves out a filter of a chunk, and sets its bit, where it would gain nothing.
            if not skipped >> i & 1:
                stored = self._inflated(stored, first) if self.filters[i] == DEFLATE else self._unshuffled(stored)
        if len(stored) != self.chunk_length * self.dtype.itemsize:
            raise OSError(
                f"the chunk at value {first:,} of {self.dataset.name} holds {len(stored):,} bytes, not "
                f"{self.chunk_length * self.dtype.itemsize:,}"
            )
        return np.frombuffer(stored, dtype=self.dtype)

    def _inflated(self, stored: bytes, first: int) -> bytes:
        try:
            return decompress(stored, zlib.MAX_WBITS, self.chunk_length * self.dtype.itemsize)
        except InflateError as error:
            raise OSError(f"the chunk at value {first:,} of {self.dataset.name} is damaged: {error}") from error

    def _unshuffled(self, stored: bytes) -> bytes:
        """Bytes of whole values, of which the shuffle filter stored all first bytes, then all second ones, ..."""
        return np.frombuffer(stored, dtype=np.uint8).reshape(self.dtype.itemsize, -1).T.tobytes()
