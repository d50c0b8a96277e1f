"""Mean effects of each perturbed gene on each other gene, of a run whose rows may not fit in memory.

Rows are read a piece at a time and summed up by pair of genes: only the pairs need to fit. Sums are merged by their
means and squared deviations, as squares of numbers close to 1 would cancel.
Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from .run import finished_parts, read_run
from .statistics import mean_effects
from .targets import CELL

ROWS_PER_READ = 250_000
# A pair's key has the number of the affected gene in these bits, and that of the perturbed one above them.
BITS = 32
# Sums that may wait to be merged with the rest
MAX_WAITING = 2_000_000


@dataclass(frozen=True)
class _Sums:
    """Values summed up by key, keys in order of their first value.

    key_k   (keys,) int64
    n_k     (keys,) number of values
    mean_k  (keys,) float64
    m2_k    (keys,) float64 sum of the squared deviations from the mean
    """

    key_k: np.ndarray
    n_k: np.ndarray
    mean_k: np.ndarray
    m2_k: np.ndarray


def mean_effects_of_folder(folder: Path) -> pd.DataFrame:
    """`mean_effects` of all rows in the folder of a finished run.

    Raises  FileNotFoundError if parts are missing
    """
    on_cells = mean_effects(read_run(folder, only_cells=True).to_pandas())
    if "affected" not in on_cells:
        return on_cells
    codes: dict[str, int] = {}
    waiting: list[_Sums] = []
    for sums in _sums_of_pieces(folder, codes):
        waiting.append(sums)
        # The first holds what was merged so far: merging when as much again waits costs each sum a few merges.
        if sum(len(s.key_k) for s in waiting[1:]) > max(MAX_WAITING, len(waiting[0].key_k)):
            waiting = [_merged(waiting)]
    total = _merged(waiting)
    names = np.array(list(codes), dtype=object)
    on_genes = pd.DataFrame(
        {
            "gene": names[total.key_k >> BITS],
            "affected": names[total.key_k & ((1 << BITS) - 1)],
            "n_cells": total.n_k,
            "mean": total.mean_k,
            "sd": np.sqrt(total.m2_k / total.n_k),
        }
    )
    return pd.concat([on_cells, on_genes.sort_values("mean", kind="stable")], ignore_index=True)


def _sums_of_pieces(folder: Path, codes: dict[str, int]) -> Iterator[_Sums]:
    """Sums of the effects on genes of some rows after the others; numbers the names of genes as it meets them."""
    columns = ["gene", "affected", "cosine_similarity"]
    for path in finished_parts(folder):
        with pq.ParquetFile(path, read_dictionary=columns[:2]) as file:
            for rows in file.iter_batches(ROWS_PER_READ, columns=columns):
                gene, affected = (_coded(rows.column(name), codes) for name in columns[:2])
                on_gene = affected != codes.setdefault(CELL, len(codes))
                key = (gene << BITS | affected)[on_gene]
                value = rows.column("cosine_similarity").to_numpy()[on_gene].astype(np.float64)
                yield _merged([_Sums(key, np.ones(len(key), dtype=np.int64), value, np.zeros(len(key)))])


def _coded(column: Any, codes: dict[str, int]) -> np.ndarray:
    """(rows,) int64 numbers of a dictionary-encoded column's names."""
    numbers = [codes.setdefault(name, len(codes)) for name in column.dictionary.to_pylist()]
    return np.array(numbers, dtype=np.int64)[column.indices.to_numpy()]


def _merged(sums: Sequence[_Sums]) -> _Sums:
    """The sums of all values together."""
    key, n, mean, m2 = (np.concatenate([getattr(s, name) for s in sums]) for name in ("key_k", "n_k", "mean_k", "m2_k"))
    keys, first, of_key = np.unique(key, return_index=True, return_inverse=True)
    n_k = np.bincount(of_key, n)
    mean_k = np.bincount(of_key, n * mean) / n_k
    m2_k = np.bincount(of_key, m2 + n * (mean - mean_k[of_key]) ** 2)
    order = np.argsort(first)
    return _Sums(keys[order], n_k[order].astype(np.int64), mean_k[order], m2_k[order])
