"""Which cells or genes train, validate and test. Groups (donors, batches) are never split between the three."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Split:
    """Boolean masks over the same items, no item in two of them."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def k_folds(labels: np.ndarray, n_folds: int, *, groups: np.ndarray | None = None, seed: int = 0) -> list[np.ndarray]:
    """Test masks of k folds, every item in exactly one: stratified by label, whole groups if there are any.

    labels  (items,) strings
    groups  (items,) strings, or None
    Raises  ValueError for fewer groups than folds, or a label with fewer items than folds
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is not None and len(np.unique(groups)) < n_folds:
        raise ValueError(
            f"{len(np.unique(groups))} groups cannot make {n_folds} folds: pass --folds {len(np.unique(groups))}."
        )
    if groups is None:
        _check_enough(labels, n_folds, f"make {n_folds} folds that each hold every label")
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels)
    else:
        folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels, groups)
    return [_mask(test, len(labels)) for _, test in folds]


def held_out(
    labels: np.ndarray, fraction: float, *, groups: np.ndarray | None = None, among: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Mask of about a fraction of the marked items: whole groups if there are any, else stratified by label.

    among   (items,) the items to draw from
    Raises  ValueError if there is only one group, or a label has a single item
    """
    candidates = np.flatnonzero(among)
    if fraction == 0:
        return np.zeros(len(labels), dtype=bool)
    rng = np.random.default_rng(seed)
    if groups is None:
        _check_enough(labels[candidates], 2, "be both trained on and held out")
        chosen = []
        for label in np.unique(labels[candidates]):
            of_label = rng.permutation(candidates[labels[candidates] == label])
            # Each label on both sides, however rare
            n = min(max(round(fraction * len(of_label)), 1), len(of_label) - 1)
            chosen.append(of_label[:n])
        return _mask(np.concatenate(chosen), len(labels))
    names, sizes = np.unique(groups[candidates], return_counts=True)
    if len(names) < 2:
        raise ValueError(f"All {len(candidates):,} cells are of one group ({str(names[0])!r}): none can be held out.")
    order = rng.permutation(len(names))
    n_groups = int(np.searchsorted(np.cumsum(sizes[order]), fraction * len(candidates))) + 1
    chosen_groups = names[order[: min(n_groups, len(names) - 1)]]
    return among & np.isin(groups, chosen_groups)


def check_split(split: Split, labels: np.ndarray, what: str) -> None:
    """Raises ValueError unless the training items hold two labels or more, and every label that is tested."""
    known = np.unique(labels[split.train])
    if len(known) < 2:
        found = f"only {str(known[0])!r}" if len(known) else "no item"
        raise ValueError(f"{what}: expected two labels or more to train on, found {found}. Split otherwise.")
    for name, mask in (("test", split.test), ("validation", split.validation)):
        unknown = np.setdiff1d(np.unique(labels[mask]), known)
        if len(unknown):
            raise ValueError(
                f"{what}: the {name} part has {_some(unknown)}, of which no item is left to train on. Split otherwise, "
                "or drop rare labels with --min_per_class."
            )


def _check_enough(labels: np.ndarray, least: int, purpose: str) -> None:
    names, counts = np.unique(labels, return_counts=True)
    rare = names[counts < least]
    if len(rare):
        raise ValueError(
            f"{_some(rare)} {'has' if len(rare) == 1 else 'have'} fewer than {least} items and cannot {purpose}: "
            f"pass --min_per_class {least} to leave such labels out."
        )


def _some(names: Sequence[str] | np.ndarray) -> str:
    shown = ", ".join(repr(str(name)) for name in names[:3])
    return f"label {shown}" if len(names) == 1 else f"labels {shown}{', ...' if len(names) > 3 else ''}"


def _mask(indices: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    mask[indices] = True
    return mask
