"""Which cells or genes train, validate and test. Groups (donors, batches) are never split between the three."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNLABELLED = ""
# Draws of groups to choose from, and how far from the fraction asked for is near enough
GROUP_DRAWS = 200
NEAR = 0.05


@dataclass
class Split:
    """Boolean masks over the same items, no item in two of them."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def k_folds(labels: np.ndarray, n_folds: int, *, groups: np.ndarray | None = None, seed: int = 0) -> list[np.ndarray]:
    """Test masks of k folds, every item in exactly one: stratified by label, whole groups if there are any.

    labels  (items,) strings; "" is a stratum like others, of which any number will do
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
    with warnings.catch_warnings():
        # It says that a label has fewer items than folds, which "" may have, and labels of whole groups.
        warnings.filterwarnings("ignore", message="The least populated class")
        folds = list(folds)
    return [_mask(test, len(labels)) for _, test in folds]


def held_out(
    labels: np.ndarray, fraction: float, *, groups: np.ndarray | None = None, among: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Mask of about a fraction of the marked items: whole groups if there are any, else stratified by label.

    among   (items,) the items to draw from
    Raises  ValueError if nothing is marked, there is only one group, or a label has a single item
    """
    candidates = np.flatnonzero(among)
    if not len(candidates):
        raise ValueError("All items are held out already: none is left to train on. Test on less.")
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
    # Groups may differ much in size: the first of some draws that comes near the fraction and leaves every label to
    # train on, else the best of them.
    best, least = None, (math.inf, math.inf)
    for _ in range(GROUP_DRAWS):
        order = rng.permutation(len(names))
        excess = np.abs(np.cumsum(sizes[order])[:-1] - fraction * len(candidates)) / len(candidates)
        n = int(excess.argmin()) + 1
        mask = among & np.isin(groups, names[order[:n]])
        n_lost = len(np.unique(labels[among])) - len(np.unique(labels[among & ~mask]))
        if (n_lost, excess[n - 1]) < least:
            best, least = mask, (n_lost, float(excess[n - 1]))
        if n_lost == 0 and excess[n - 1] < NEAR:
            return mask
    assert best is not None
    return best


def check_split(split: Split, labels: np.ndarray, what: str) -> None:
    """Raises ValueError unless the training items hold two labels or more, and every label that is tested.

    labels  (items,) strings, "" where unknown
    """
    labelled = labels != UNLABELLED
    if split.test.any() and not (split.test & labelled).any():
        raise ValueError(f"{what}: no item of the test part has a label. Split otherwise.")
    split = Split(split.train & labelled, split.validation & labelled, split.test & labelled)
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


def joint_labels(columns: Sequence[np.ndarray], least: int) -> np.ndarray:
    """(items,) one label to stratify several labels by: their combination; "" for combinations of few items.

    least  items that a combination needs
    """
    joined = np.array(["\n".join(row) for row in zip(*columns, strict=True)])
    names, index, counts = np.unique(joined, return_inverse=True, return_counts=True)
    return np.where(counts[index] >= least, names[index], UNLABELLED)


def _check_enough(labels: np.ndarray, least: int, purpose: str) -> None:
    names, counts = np.unique(labels[labels != UNLABELLED], return_counts=True)
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
