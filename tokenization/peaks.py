"""Peaks by name: chr-start-end or chr:start-end, on whatever genome the file is of."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .gene_ids import examples

_PEAK = re.compile(r"([^\s:-]+)[:-](\d+)-(\d+)")
_CHROMOSOME_PREFIX = re.compile(r"^chr", re.IGNORECASE)


class Peaks(NamedTuple):
    """Chromosomes (peaks,) str as spelled, starts and ends (peaks,) int64 in base pairs as written."""

    chromosome: np.ndarray
    start: np.ndarray
    end: np.ndarray


def parse_peaks(names: Iterable[str]) -> Peaks:
    """Chromosome, start and end of each peak.

    Raises  ValueError naming those that are neither chr-start-end nor chr:start-end with start below end
    """
    names = [str(name) for name in names]
    found = [_PEAK.fullmatch(name) for name in names]
    bad = [name for name, m in zip(names, found, strict=True) if m is None or int(m[2]) >= int(m[3])]
    if bad:
        raise ValueError(
            f"{len(bad):,} of {len(names):,} peaks are malformed, e.g. {examples(bad)}; expected chr-start-end or "
            "chr:start-end with start below end, e.g. 'chr1-633515-633525'."
        )
    fields = [m.groups() for m in found if m is not None]
    return Peaks(
        np.array([field[0] for field in fields], dtype=object),
        np.array([int(field[1]) for field in fields], dtype=np.int64),
        np.array([int(field[2]) for field in fields], dtype=np.int64),
    )


def peak_keys(names: Iterable[str]) -> list[tuple[str, int, int]]:
    """What makes two spellings the same peak: chromosomes are compared without "chr", and MT is M.

    Raises  ValueError as `parse_peaks`
    """
    chromosomes, starts, ends = parse_peaks(names)
    short = [_CHROMOSOME_PREFIX.sub("", str(name)) for name in chromosomes]
    return [
        ("M" if name == "MT" else name, start, end)
        for name, start, end in zip(short, starts.tolist(), ends.tolist(), strict=True)
    ]
