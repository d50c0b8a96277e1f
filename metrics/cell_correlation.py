"""`dis`: how well every true cell is met by the predicted cell that is most like it (Tan et al., section 3.3).

dis = mean over true cells i of the maximum over predicted cells j of Pearson's correlation of x_i and x_j over genes.

The more predicted cells there are, the larger it is: compare figures of equally many only. It asks nothing of the
predicted cells that no true one is like, and rises when the prediction is copied controls: read it beside others.

Axis letters: n true cells, m predicted cells, g genes.
"""

import numpy as np

# Correlations that are held at once: 1,024 x 4,096 in float32 are 17 MB
TRUE_AT_ONCE = 1_024
PREDICTED_AT_ONCE = 4_096
# Spread below this share of a cell's size is rounding
CONSTANT = 1e-6


def best_match_correlation(true_ng: np.ndarray, predicted_mg: np.ndarray, *, genes: np.ndarray | None = None) -> float:
    """Mean over true cells of the highest correlation with any predicted cell.

    true_ng, predicted_mg  expression on one scale, dense
    genes                  indices of the genes to correlate over; all if absent
    Returns  -1 to 1. A cell without spread correlates 0 with every other
    Raises   ValueError for empty sets, other genes, or values that are not finite

    Memory beyond the arguments: float32 copies of the predicted cells and of a block of true ones, and one block of
    correlations, whatever the number of cells.
    """
    check_cells(true_ng, predicted_mg)
    columns = slice(None) if genes is None else genes
    unit_mg = np.concatenate(
        [_unit_rows(predicted_mg[i : i + TRUE_AT_ONCE, columns]) for i in range(0, len(predicted_mg), TRUE_AT_ONCE)]
    )
    total = 0.0
    for i in range(0, len(true_ng), TRUE_AT_ONCE):
        block = _unit_rows(true_ng[i : i + TRUE_AT_ONCE, columns])
        best = np.full(len(block), -np.inf, dtype=np.float32)
        for j in range(0, len(unit_mg), PREDICTED_AT_ONCE):
            np.maximum(best, (block @ unit_mg[j : j + PREDICTED_AT_ONCE].T).max(axis=1), out=best)
        total += float(best.sum(dtype=np.float64))
    return total / len(true_ng)


def sampled_best_match_correlation(
    true_ng: np.ndarray,
    predicted_mg: np.ndarray,
    *,
    genes: np.ndarray | None = None,
    n_cells: int = 30,
    n_draws: int = 1,
    seed: int = 0,
) -> float:
    """The same between random cells, as the authors' code has it: 30 true and 30 predicted, drawn once.

    n_cells  drawn of each set without replacement; all of a set that has fewer
    n_draws  draws to average over
    Raises   as `best_match_correlation`
    """
    check_cells(true_ng, predicted_mg)
    rng = np.random.default_rng(seed)

    def draw(cells: np.ndarray) -> np.ndarray:
        return cells[rng.choice(len(cells), min(n_cells, len(cells)), replace=False)]

    draws = [best_match_correlation(draw(true_ng), draw(predicted_mg), genes=genes) for _ in range(n_draws)]
    return float(np.mean(draws))


def check_cells(true_ng: np.ndarray, predicted_mg: np.ndarray) -> None:
    """Raises ValueError unless both are sets of cells over the same genes, with finite values."""
    if true_ng.ndim != 2 or predicted_mg.ndim != 2 or true_ng.shape[1] != predicted_mg.shape[1]:
        raise ValueError(
            f"Expected true and predicted cells over the same genes, (n, g) and (m, g); found {true_ng.shape} and "
            f"{predicted_mg.shape}. Bring the prediction to the genes of the truth, in their order."
        )
    if not len(true_ng) or not len(predicted_mg):
        raise ValueError(
            f"Expected a cell or more of each, found {len(true_ng):,} true and {len(predicted_mg):,} predicted."
        )
    if not np.isfinite(true_ng).all() or not np.isfinite(predicted_mg).all():
        raise ValueError("Some cells hold NaN or infinite values: leave them out.")


def _unit_rows(cells: np.ndarray) -> np.ndarray:
    """(cells, g) float32, each cell centred over its genes and of length 1; of length 0 where it has no spread."""
    size = np.linalg.norm(cells, axis=1)
    centred = cells - cells.mean(axis=1, dtype=np.float64, keepdims=True)
    length = np.linalg.norm(centred, axis=1)
    constant = length <= CONSTANT * size
    return np.where(constant[:, None], 0, centred / np.where(constant, 1, length)[:, None]).astype(np.float32)
