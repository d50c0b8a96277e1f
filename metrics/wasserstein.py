"""Wasserstein distances between two sets of cells: exact on resamples, sliced for large sets, by class, between types.

Of order p, with Euclidean distances: W_p = (min over couplings of the mean of |x - y|^p)^(1/p). A translation by t has
W_p = |t| for every p; two Gaussians have W_2^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)).

Between finite samples of one distribution the distance is not 0, and the less so the more dimensions there are: compare
figures of equal `n_cells` and dimensions only. Solvers: POT (`pip install pot`).

Axis letters: n and m cells, d dimensions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

# Cells drawn of a set in each resample, as a share of it at the most: with all of them resamples would not differ.
RESAMPLED_SHARE = 0.8
# Along which POT sorts all cells at once, in several arrays of cells x directions
DIRECTIONS_AT_ONCE = 16


def exact_wasserstein(x_nd: np.ndarray, y_md: np.ndarray, *, order: int = 2) -> float:
    """W_order of two sets of cells of equal weight, by network simplex (`ot.emd2`), cubic in the number of cells.

    Raises  ValueError for empty sets, other dimensions or orders, or values that are not finite
    """
    import ot

    _check(x_nd, y_md, order)
    # Centred, since squared distances are differences of large numbers far from the origin
    centre = np.concatenate([x_nd, y_md]).mean(axis=0, dtype=np.float64)
    costs = ot.dist(x_nd - centre, y_md - centre, metric="sqeuclidean" if order == 2 else "euclidean")
    # Without weights all cells weigh the same. The default limit of steps ends early for some thousand cells.
    total: Any = ot.emd2([], [], costs, numItermax=10_000_000)
    return float(max(total, 0.0) ** (1 / order))


def sliced_wasserstein(
    x_nd: np.ndarray, y_md: np.ndarray, *, order: int = 2, n_projections: int = 200, seed: int = 0
) -> float:
    """Sliced W_order: root of the mean, over random directions, of W_order^order of what the sets look like along one.

    Sorting takes the place of transport, so that any number of cells will do. It is smaller than W: a translation by t
    has a sliced W_2 of |t| / sqrt(d).
    Raises  as `exact_wasserstein`
    """
    import ot

    _check(x_nd, y_md, order)
    centre = np.concatenate([x_nd, y_md]).mean(axis=0, dtype=np.float64)
    clouds: Any = (x_nd - centre, y_md - centre)
    directions: Any = ot.sliced.get_random_projections(x_nd.shape[1], n_projections, seed)
    total: Any = 0.0
    for start in range(0, n_projections, DIRECTIONS_AT_ONCE):
        some = directions[:, start : start + DIRECTIONS_AT_ONCE]
        distance: Any = ot.sliced_wasserstein_distance(*clouds, projections=some, p=order)
        total += some.shape[1] * distance**order
    return float((total / n_projections) ** (1 / order))


def _check(x_nd: np.ndarray, y_md: np.ndarray, order: int) -> None:
    if order not in (1, 2):
        raise ValueError(f"Expected order 1 or 2, found {order}.")
    if x_nd.ndim != 2 or y_md.ndim != 2 or x_nd.shape[1] != y_md.shape[1] or not len(x_nd) or not len(y_md):
        raise ValueError(
            f"Expected two sets of cells in one space, (n, d) and (m, d); found {x_nd.shape} and {y_md.shape}."
        )
    if not np.isfinite(x_nd).all() or not np.isfinite(y_md).all():
        raise ValueError("Some cells hold NaN or infinite values: leave them out.")


def resampled_wasserstein(
    x_nd: np.ndarray,
    y_md: np.ndarray,
    *,
    n_cells: int = 1000,
    n_resamples: int = 10,
    order: int = 2,
    sliced: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """(n_resamples,) distances between random cells of either set, drawn without replacement.

    n_cells  drawn of each set, at the most, and at most 80% of it
    sliced   whether distances are sliced ones
    Raises   as `exact_wasserstein`, and ValueError for no cells or resamples
    """
    if n_cells < 1 or n_resamples < 1:
        raise ValueError(f"Expected n_cells and n_resamples of 1 or more, found {n_cells} and {n_resamples}.")
    distance: Any = sliced_wasserstein if sliced else exact_wasserstein
    rng = np.random.default_rng(seed)

    def draw(cells: np.ndarray) -> np.ndarray:
        n = max(min(n_cells, int(RESAMPLED_SHARE * len(cells))), min(len(cells), 1))
        return cells[rng.choice(len(cells), n, replace=False)] if n else cells

    return np.array([distance(draw(x_nd), draw(y_md), order=order) for _ in range(n_resamples)])


def wasserstein_by_class(
    x_nd: np.ndarray,
    x_classes: Sequence[str] | np.ndarray,
    y_md: np.ndarray,
    y_classes: Sequence[str] | np.ndarray,
    **options: Any,
) -> pd.DataFrame:
    """Distance of each class of x to the same class of y: Pang & Tegnér 2020, Table 1, with x human and y mouse.

    options  of `resampled_wasserstein`
    Returns  a row for each class of both sets (sorted), then "average" over them: class, mean and sd over resamples,
             n_x, n_y
    Raises   ValueError without a shared class
    """
    x_classes, y_classes = np.asarray(x_classes), np.asarray(y_classes)
    shared = np.intersect1d(x_classes, y_classes)
    if not len(shared):
        raise ValueError(
            f"The sets share no class: {', '.join(np.unique(x_classes)[:3])}, ... and "
            f"{', '.join(np.unique(y_classes)[:3])}, ... Name the classes of both alike."
        )
    draws = [resampled_wasserstein(x_nd[x_classes == c], y_md[y_classes == c], **options) for c in shared]
    rows = [
        {"class": c, **_mean_and_sd(drawn), "n_x": int((x_classes == c).sum()), "n_y": int((y_classes == c).sum())}
        for c, drawn in zip(shared, draws, strict=True)
    ]
    average = {"class": "average", **_mean_and_sd(np.mean(draws, axis=0))}
    counts = {name: sum(row[name] for row in rows) for name in ("n_x", "n_y")}
    return pd.DataFrame([*rows, average | counts])


def _mean_and_sd(draws: np.ndarray) -> dict[str, float]:
    return {"mean": float(draws.mean()), "sd": float(draws.std(ddof=1)) if len(draws) > 1 else float("nan")}


def wasserstein_matrix(
    x_nd: np.ndarray,
    x_types: Sequence[str] | np.ndarray,
    y_md: np.ndarray,
    y_types: Sequence[str] | np.ndarray,
    *,
    progress: bool = True,
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Distances of every cell type of x (rows) to every cell type of y (columns): mean and sd over resamples.

    options  of `resampled_wasserstein`
    """
    x_types, y_types = np.asarray(x_types), np.asarray(y_types)
    names = np.unique(x_types), np.unique(y_types)
    mean, sd = (pd.DataFrame(np.nan, index=pd.Index(names[0]), columns=pd.Index(names[1])) for _ in range(2))
    pairs = [(a, b) for a in names[0] for b in names[1]]
    for a, b in tqdm(pairs, desc="Wasserstein distances", unit="pair", disable=not progress, leave=False):
        figures = _mean_and_sd(resampled_wasserstein(x_nd[x_types == a], y_md[y_types == b], **options))
        mean.loc[a, b], sd.loc[a, b] = figures["mean"], figures["sd"]
    return mean, sd
