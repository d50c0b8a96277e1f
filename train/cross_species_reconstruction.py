"""How well masked entries of held-out cells are reconstructed, beside the simplest ways to guess them.

Axis letters: n cells, k components, g genes. Components are centred on the training cells of their source, so the mean
of a masked entry is 0. Within a source they are uncorrelated on training cells, so the best linear map, too, can only
guess about 0 there: what beats both has found a structure that is not linear.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

# Training cells of each source that the linear map and the nearest cells are found among, at the most
REFERENCE_CELLS = 20_000
NEIGHBOURS = 10
CELLS_PER_BLOCK = 1_024


def linear_map(cells_nk: np.ndarray, probability: float) -> np.ndarray:
    """(k, k) matrix B, diagonal 0: column j of (x with masked entries 0) B is the best linear guess of a masked x_j.

    cells_nk     training cells of one source
    probability  share of the entries that is masked, each by itself

    With S = sum of x'x over the cells, D its diagonal and p the probability, the masked cells have the second moments
    A = (1 - p)^2 S + p (1 - p) D. Regression of each entry on the others is in the inverse of A (the partial
    covariances): B_ij = -(A^-1)_ij / ((A^-1)_jj (1 - p)).
    """
    second_kk = np.zeros((cells_nk.shape[1],) * 2)
    for start in range(0, len(cells_nk), CELLS_PER_BLOCK):
        block = cells_nk[start : start + CELLS_PER_BLOCK].astype(np.float64)
        second_kk += block.T @ block
    kept, diagonal = 1 - probability, np.diag(second_kk)
    # Components without any variance have no say, and would make the matrix singular.
    ridge = np.finfo(np.float64).eps * max(diagonal.max(), np.finfo(np.float64).tiny)
    inverse_kk = np.linalg.inv(kept**2 * second_kk + np.diag(probability * kept * diagonal + ridge))
    map_kk = -inverse_kk / (np.diag(inverse_kk) * kept)
    np.fill_diagonal(map_kk, 0)
    return map_kk.astype(np.float32)


def nearest_mean(cells_nk: np.ndarray, masked_nk: np.ndarray, reference_nk: np.ndarray) -> np.ndarray:
    """(n, k) mean of the `NEIGHBOURS` reference cells that are nearest in the entries that are not masked."""
    guesses = np.empty_like(cells_nk)
    squares_nk = reference_nk**2
    for start in range(0, len(cells_nk), CELLS_PER_BLOCK):
        part = slice(start, start + CELLS_PER_BLOCK)
        seen = ~masked_nk[part]
        distances = seen.astype(np.float32) @ squares_nk.T - 2 * (cells_nk[part] * seen) @ reference_nk.T
        k = min(NEIGHBOURS, len(reference_nk))
        nearest = np.argpartition(distances, k - 1, axis=1)[:, :k]
        for row, neighbours in enumerate(nearest):
            guesses[start + row] = reference_nk[neighbours].mean(axis=0)
    return guesses


@torch.no_grad()
def reconstructions(
    model: Any, cells_nk: np.ndarray, source_n: np.ndarray, masked_nk: np.ndarray, *, cells_per_pass: int
) -> np.ndarray:
    """(n, k) what the model makes of cells with entries masked; `cells_per_pass` of them see each other."""
    device = next(model.parameters()).device
    model.eval()
    parts = []
    for start in range(0, len(cells_nk), cells_per_pass):
        part = slice(start, start + cells_per_pass)
        output = model(
            projections=torch.from_numpy(cells_nk[part]).to(device),
            source=torch.from_numpy(source_n[part]).to(device),
            masked=torch.from_numpy(masked_nk[part]).to(device),
        )
        parts.append(output.reconstructions.float().cpu().numpy())
    return np.concatenate(parts)


def masked_entry_errors(
    cells_nk: np.ndarray, masked_nk: np.ndarray, guesses: Mapping[str, np.ndarray], *, n_bootstrap: int = 1000
) -> pd.DataFrame:
    """Mean squared error of the masked entries by each way to guess them, and the share of their variance explained.

    guesses  name -> (n, k)
    Returns  columns guess, mse, explained (1 - mse / that of the mean, which is 0), low, high (95% bootstrap interval
             of `explained` over cells), components (share of the components that are guessed better than by their mean)
    """
    truth_nk = np.where(masked_nk, cells_nk, 0).astype(np.float64)
    of_mean_n = (truth_nk**2).sum(axis=1)
    of_mean_k = (truth_nk**2).sum(axis=0)
    draws = np.random.default_rng(0).integers(len(cells_nk), size=(n_bootstrap, len(cells_nk)))
    rows = []
    for name, guess_nk in guesses.items():
        squared_nk = np.where(masked_nk, (cells_nk - guess_nk).astype(np.float64) ** 2, 0)
        of_guess_n = squared_nk.sum(axis=1)
        spread = 1 - of_guess_n[draws].sum(axis=1) / of_mean_n[draws].sum(axis=1)
        low, high = np.quantile(spread, [0.025, 0.975])
        seen_k = of_mean_k > 0
        rows.append(
            {
                "guess": name,
                "mse": float(of_guess_n.sum() / masked_nk.sum()),
                "explained": float(1 - of_guess_n.sum() / of_mean_n.sum()),
                "low": float(low),
                "high": float(high),
                "components": float((squared_nk.sum(axis=0) < of_mean_k)[seen_k].mean()),
            }
        )
    return pd.DataFrame(rows)


def gene_space_errors(
    blocks: Iterator[np.ndarray], guesses: Mapping[str, np.ndarray], inverse: Any, *, mean_g: np.ndarray
) -> pd.DataFrame:
    """Share of the variance of expression that each reconstruction explains, through the inverse projection.

    blocks   (cells, g) log-normalized expression of the held-out cells in their order, some at a time
    guesses  name -> (n, k) projections
    inverse  (cells, k) -> (cells, g)
    mean_g   expression of the mean training cell: the reference that explains nothing
    Returns  columns guess, mse, explained
    """
    start, n_entries, of_mean = 0, 0, 0.0
    of_guess = dict.fromkeys(guesses, 0.0)
    for expression_ng in blocks:
        part = slice(start, start + len(expression_ng))
        n_entries, of_mean = n_entries + expression_ng.size, of_mean + _squares(expression_ng - mean_g)
        for name, guess_nk in guesses.items():
            of_guess[name] += _squares(expression_ng - inverse(guess_nk[part]))
        start = part.stop
    rows = [{"guess": n, "mse": e / n_entries, "explained": 1 - e / of_mean} for n, e in of_guess.items()]
    return pd.DataFrame(rows)


def _squares(x: np.ndarray) -> float:
    return float((x.astype(np.float64) ** 2).sum())
