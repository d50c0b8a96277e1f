"""What predictions of responses to perturbations are worth: Tan et al.'s figures, and those that expose the mean.

A treated profile is like every other profile, so that predicting the control already correlates at 0.9 and more. The
figures are therefore also of changes: from control, and from the centroid of all treated profiles, which takes away
what all treatments have in common (Viñas Torné et al. 2025, Systema). A prediction that is the same for every
condition scores 0 in the latter and 1/2 in centroid accuracy.

Axis letters: n true profiles (cells, wells), m predicted ones, k controls, g genes, c conditions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from .cell_correlation import CONSTANT, best_match_correlation, check_cells, sampled_best_match_correlation
from .differential_genes import differential_overlap, differential_scores, top_genes
from .energy_distance import energy_distance
from .wasserstein import exact_wasserstein

# Numbers of differentially expressed genes in the paper's Table 2
DE_SIZES = (50, 10)
# Optimal transport is cubic in cells.
TRANSPORTED_CELLS = 1_000


@dataclass(frozen=True)
class Response:
    """The profiles of one condition.

    true       (n, g) measured under the treatment
    predicted  (m, g) predicted for it
    control    (k, g) measured without
    """

    true: np.ndarray
    predicted: np.ndarray
    control: np.ndarray


def correlation(a_g: np.ndarray, b_g: np.ndarray) -> float:
    """Pearson's correlation over genes; 0 where one side does not vary."""
    a, b = (np.asarray(x, dtype=np.float64) - np.mean(x, dtype=np.float64) for x in (a_g, b_g))
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if lengths[0] <= CONSTANT * np.linalg.norm(a_g) or lengths[1] <= CONSTANT * np.linalg.norm(b_g):
        return 0.0
    return float(a @ b / (lengths[0] * lengths[1]))


def change_correlation(true_g: np.ndarray, predicted_g: np.ndarray, reference_g: np.ndarray) -> float:
    """Pearson's correlation of true and predicted change of the mean profile from a reference; 0 without a change.

    reference_g  mean control profile, or the centroid of all treated profiles. Not a single control well: its noise
                 would be in both changes, and correlate
    """
    true, predicted = (np.asarray(x, dtype=np.float64) - reference_g for x in (true_g, predicted_g))
    if min(np.linalg.norm(true), np.linalg.norm(predicted)) <= CONSTANT * np.linalg.norm(reference_g):
        return 0.0
    return correlation(true, predicted)


def centroid_accuracy(true_cg: np.ndarray, predicted_cg: np.ndarray) -> np.ndarray:
    """(c,) of each condition, the share of the others whose true mean lies farther from its prediction than its own.

    true_cg, predicted_cg  mean profile of each condition, in the same order
    Returns  1 where the own is nearest; a tie counts half. One prediction for all conditions has a mean of 1/2
    Raises   ValueError for other shapes or fewer than two conditions
    Source   Viñas Torné et al. 2025, "centroid accuracy"
    """
    from scipy.spatial.distance import cdist

    check_cells(true_cg, predicted_cg)
    if len(true_cg) != len(predicted_cg) or len(true_cg) < 2:
        raise ValueError(
            f"Expected the means of two conditions or more, true and predicted; found {len(true_cg)} and "
            f"{len(predicted_cg)}."
        )
    distances = cdist(predicted_cg, true_cg)
    own = np.diag(distances)[:, None]
    farther = (distances > own) + 0.5 * (distances == own)
    # Its own ties with itself.
    return (farther.sum(axis=1) - 0.5) / (len(true_cg) - 1)


def response_metrics(
    response: Response,
    *,
    centroid_g: np.ndarray | None = None,
    training_scores_g: np.ndarray | None = None,
    n_dis_cells: int = 30,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of one condition.

    centroid_g         mean of all treated TRAINING profiles; without it there is no `delta_centroid`
    training_scores_g  scores of the genes on training conditions (`mean_scores`), which choose DE50 and DE10; without
                       them, the true test profiles against the controls choose, as in the authors' lists
    n_dis_cells        true and predicted cells that the sampled `dis` draws
    Returns            mean, mean_de50, mean_de10: Pearson of true and predicted mean profile; dis and dis_sampled
                       likewise; delta, delta_centroid: of the changes; mse of the mean profiles; energy and wasserstein
                       (W_2, of 1,000 cells at most) distance; de_overlap of the 50 genes that change most; n_true,
                       n_predicted, n_control; de_genes_from ("training" or "test")
    Raises             ValueError for empty sets, other genes, or values that are not finite
    """
    true, predicted, control = response.true, response.predicted, response.control
    check_cells(true, predicted)
    check_cells(true, control)
    chosen_on: Literal["training", "test"] = "test" if training_scores_g is None else "training"
    scores = differential_scores(true, control) if training_scores_g is None else training_scores_g
    means = [profiles.mean(axis=0, dtype=np.float64) for profiles in (true, predicted, control)]
    figures: dict[str, Any] = {}
    for suffix, genes in [("", None), *((f"_de{size}", top_genes(scores, size)) for size in DE_SIZES)]:
        columns = slice(None) if genes is None else genes
        figures[f"mean{suffix}"] = correlation(means[0][columns], means[1][columns])
        figures[f"dis{suffix}"] = best_match_correlation(true, predicted, genes=genes)
        figures[f"dis_sampled{suffix}"] = sampled_best_match_correlation(
            true, predicted, genes=genes, n_cells=n_dis_cells, seed=seed
        )
    figures["delta"] = change_correlation(means[0], means[1], means[2])
    if centroid_g is not None:
        figures["delta_centroid"] = change_correlation(means[0], means[1], centroid_g)
    rng = np.random.default_rng(seed)
    clouds = [
        cells[rng.choice(len(cells), min(len(cells), TRANSPORTED_CELLS), replace=False)] for cells in (true, predicted)
    ]
    return figures | {
        "mse": float(np.square(means[0] - means[1]).mean()),
        "energy": energy_distance(true, predicted),
        "wasserstein": exact_wasserstein(*clouds),
        "de_overlap": differential_overlap(true, predicted, control),
        "n_true": len(true),
        "n_predicted": len(predicted),
        "n_control": len(control),
        "de_genes_from": chosen_on,
    }


def response_table(responses: Mapping[Any, Response], **options: Any) -> pd.DataFrame:
    """`response_metrics` of every condition (rows, by name), with `centroid_accuracy` among them where there are two.

    options  of `response_metrics`
    Raises   ValueError without a condition, and as `response_metrics`
    """
    if not responses:
        raise ValueError("Expected the responses of one condition or more, found none.")
    table = pd.DataFrame([response_metrics(response, **options) for response in responses.values()])
    table.index = pd.Index(list(responses), name="condition", tupleize_cols=False)
    if len(responses) > 1:
        true, predicted = (
            np.stack([getattr(response, side).mean(axis=0, dtype=np.float64) for response in responses.values()])
            for side in ("true", "predicted")
        )
        table["centroid_accuracy"] = centroid_accuracy(true, predicted)
    return table


def mean_figures(table: pd.DataFrame) -> dict[str, Any]:
    """Mean of each figure over the conditions of a `response_table`, n_conditions, and where DE genes are from."""
    means = table.drop(columns=["de_genes_from"]).astype(float).mean()
    figures = {str(name): float(value) for name, value in means.items()}
    return {**figures, "n_conditions": len(table), "de_genes_from": str(table["de_genes_from"].iloc[0])}
