"""The ways to find W of equation 7 (Pang & Tegnér 2020): two point clouds in, a linear map either way out.

adversarial_alignment  no discriminator tells mapped cells from the target's (the paper); needs nothing shared
ortholog_alignment     rotation on pairs of cells that are each other's nearest in shared one-to-one orthologs
gene_alignment         rotation on the orthologous genes themselves: the coefficients of a gene in either PCA are a pair
transport_alignment    linear map to where transport sends each cell; with orthologs, or by distances within either set

All but a least-squares map are a rotation times a scale, so that the way back is the inverse. All raise ValueError for
clouds that hold no cells, differ in components, or are not finite.
Axis letters: n source cells, m target cells, d components, g shared genes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .adversarial import (
    AdversarialOptions,
    adversarial_rotation,
    nearest_rotation,
    principal_axes_rotation,
    random_rotation,
)
from .csls import mean_matched_cosine, mutual_pairs
from .optimal_transport import Kind, barycentric_map, cosine_cost, coupling
from .procrustes import least_squares, procrustes, refine


@dataclass(frozen=True)
class Alignment:
    """A linear map from source to target and one back, (d, d) each: rows of cells are mapped by `x_nd @ forward_dd.T`.

    criterion  mean cosine of CSLS-matched cells, which needs no label; higher is nearer
    facts      what the method did, as JSON can write it
    """

    forward_dd: torch.Tensor
    backward_dd: torch.Tensor
    criterion: float
    facts: dict[str, Any]


def adversarial_alignment(
    x_nd: torch.Tensor,
    y_md: torch.Tensor,
    options: AdversarialOptions | None = None,
    *,
    start: Literal["axes", "random"] | torch.Tensor = "axes",
    restarts: Iterable[int] = range(3),
    refinements: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Alignment:
    """The best of several adversarial rotations, each refined by Procrustes on mutual neighbours.

    x_nd, y_md   (source cells, d), (target cells, d), floats on one device, centred
    start        axes: principal axes onto principal axes, by skewness in restart 0, at random sides in others;
                 random: any rotation; or a map (d, d) whose rotation all restarts begin with
    restarts     numbers of the restarts, at least one, which decide their seeds: processes may share them out
    refinements  iterations of `refine`; 0 for the adversarial rotation itself
    """
    _check_clouds(x_nd, y_md)
    options = options or AdversarialOptions()
    best: Alignment | None = None
    for restart in restarts:
        if isinstance(start, torch.Tensor):
            first = nearest_rotation(start)
        elif start == "axes":
            first = principal_axes_rotation(x_nd, y_md, seed=None if restart == 0 else seed + restart)
        else:
            first = random_rotation(x_nd, seed + restart)
        found = adversarial_rotation(x_nd, y_md, first, options, seed=seed + restart, progress=progress)
        spread = (y_md.square().mean() / x_nd.square().mean()).sqrt()
        refined = refine(found.rotation_dd * spread, x_nd, y_md, n_iterations=refinements, k=options.neighbours)
        facts = {
            "restart": restart,
            "criteria": found.criteria,
            "discriminator_losses": found.losses,
            "refinement_criteria": refined.criteria,
            "refinement_pairs": refined.n_pairs,
        }
        if best is None or refined.criterion > best.criterion:
            best = _similarity(refined.map_dd, refined.criterion, facts)
    if best is None:
        raise ValueError("Expected the number of one restart at least, found none.")
    return best


def ortholog_alignment(
    x_nd: torch.Tensor, y_md: torch.Tensor, x_ng: torch.Tensor, y_mg: torch.Tensor, *, k: int = 10
) -> Alignment:
    """Rotation and scale on the mutual CSLS neighbours in the expression of shared genes.

    x_nd, y_md  (source cells, d), (target cells, d)
    x_ng, y_mg  the same cells' expression of shared one-to-one orthologs, centred by species
    """
    _check_clouds(x_nd, y_md)
    _check_clouds(x_ng, y_mg)
    rows, columns = mutual_pairs(x_ng, y_mg, k)
    w = procrustes(x_nd[rows], y_md[columns], scaled=True)
    return _similarity(w, mean_matched_cosine(x_nd @ w.T, y_md, k), {"pairs": len(rows)})


def gene_alignment(
    x_nd: torch.Tensor, y_md: torch.Tensor, x_dg: torch.Tensor, y_dg: torch.Tensor, *, k: int = 10
) -> Alignment:
    """Rotation that best maps each shared gene's coefficients in the source's PCA to those in the target's.

    x_nd, y_md  (source cells, d), (target cells, d): for the scale, the ratio of their root mean squares
    x_dg, y_dg  (d, g) components of either PCA, columns of the shared one-to-one orthologs in one order
    """
    _check_clouds(x_nd, y_md)
    spread = (y_md.square().mean() / x_nd.square().mean()).sqrt()
    w = procrustes(x_dg.T, y_dg.T) * spread
    return _similarity(w, mean_matched_cosine(x_nd @ w.T, y_md, k), {"genes": x_dg.shape[1]})


def transport_alignment(
    x_nd: torch.Tensor,
    y_md: torch.Tensor,
    x_ng: torch.Tensor | None = None,
    y_mg: torch.Tensor | None = None,
    *,
    kind: Kind = "unbalanced",
    linear_map: Literal["rotation", "least_squares"] = "rotation",
    ridge: float = 0.1,
    k: int = 10,
    **options: Any,
) -> Alignment:
    """The linear map nearest to where optimal transport sends the cells, each weighted by the mass it sends.

    x_ng, y_mg  (n, g), (m, g) expression of shared genes, centred by species, whose cosine is the cost; not for gromov
    linear_map  rotation times scale, or least squares with `ridge`, fitted either way for itself: nearer to the target
                by any distance, because it draws cells to the means of their types
    options     of `coupling`
    """
    _check_clouds(x_nd, y_md)
    cost = None if x_ng is None or y_mg is None or kind == "gromov" else cosine_cost(x_ng, y_mg)
    plan = coupling(x_nd, y_md, cost, kind=kind, **options)
    to_y, of_x = barycentric_map(plan, y_md)
    facts = {"mass": float(plan.sum())}
    if linear_map == "rotation":
        w = procrustes(x_nd, to_y, of_x)
        # Means of cells spread less than cells.
        w = w * ((of_x.sum() * y_md.square().sum() / len(y_md)) / (of_x[:, None] * x_nd.square()).sum()).sqrt()
        return _similarity(w, mean_matched_cosine(x_nd @ w.T, y_md, k), facts)
    to_x, of_y = barycentric_map(plan.T, x_nd)
    w, back = least_squares(x_nd, to_y, of_x, ridge=ridge), least_squares(y_md, to_x, of_y, ridge=ridge)
    return Alignment(w, back, mean_matched_cosine(x_nd @ w.T, y_md, k), facts)


def _check_clouds(x_nd: torch.Tensor, y_md: torch.Tensor) -> None:
    """Raises ValueError unless both clouds have cells of the same components, finite and not all zero."""
    if x_nd.ndim != 2 or y_md.ndim != 2 or x_nd.shape[1] != y_md.shape[1] or not len(x_nd) or not len(y_md):
        raise ValueError(
            "Expected cells of as many components on either side, (n, d) and (m, d); found "
            f"{tuple(x_nd.shape)} and {tuple(y_md.shape)}."
        )
    for side, cloud in (("source", x_nd), ("target", y_md)):
        if not cloud.isfinite().all():
            raise ValueError(f"Some {side} cells hold NaN or infinite values: leave them out.")
        if not cloud.any():
            raise ValueError(f"All {len(cloud):,} {side} cells are zero: there is nothing to align.")


def _similarity(w_dd: torch.Tensor, criterion: float, facts: dict[str, Any]) -> Alignment:
    """An alignment by a rotation times a scale c: the inverse is W^T / c^2."""
    scale = torch.linalg.matrix_norm(w_dd, 2)
    return Alignment(w_dd, w_dd.T / scale**2, criterion, {**facts, "scale": float(scale)})
