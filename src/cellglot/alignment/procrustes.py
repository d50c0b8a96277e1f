"""Linear maps between point clouds whose rows are paired, and their refinement on pairs found by CSLS.

A map W (d, d) sends the cell x to W x, equation 7 of Pang & Tegnér 2020; for rows, `x_nd @ W.T`.
Axis letters: n cells, d components.
"""

from dataclasses import dataclass

import torch

from .csls import mean_matched_cosine, mutual_pairs


def procrustes(
    x_nd: torch.Tensor, y_nd: torch.Tensor, weights_n: torch.Tensor | None = None, *, scaled: bool = False
) -> torch.Tensor:
    """The orthogonal W (d, d) with the least sum of |W x - y|^2 over the pairs.

    x_nd, y_nd  (pairs, d)
    weights_n   (pairs,) of the pairs, not negative; equal if absent
    scaled      times |Y| / |X|, so that what is mapped spreads as far as the target. Least squares would shrink the map
                by as much as the pairs are noisy; and with this scale the way back is the inverse.
    Source      Schönemann 1966: W = U V^T, with U S V^T the singular value decomposition of Y^T X
    """
    weighted_x = x_nd if weights_n is None else x_nd * weights_n[:, None]
    weighted_y = y_nd if weights_n is None else y_nd * weights_n[:, None]
    u, _, vh = torch.linalg.svd(y_nd.T @ weighted_x)
    rotation = u @ vh
    return rotation * ((weighted_y * y_nd).sum() / (weighted_x * x_nd).sum()).sqrt() if scaled else rotation


def least_squares(
    x_nd: torch.Tensor, y_nd: torch.Tensor, weights_n: torch.Tensor | None = None, *, ridge: float = 0.1
) -> torch.Tensor:
    """Any W (d, d) with the least sum of |W x - y|^2 over the pairs, plus a penalty on |W|^2.

    x_nd, y_nd  (pairs, d)
    weights_n   (pairs,) of the pairs, not negative; equal if absent
    ridge       penalty, as a share of the mean over components of the weighted sum of squares of x: without one, fewer
                pairs than components leave W undetermined
    """
    weighted_x = x_nd if weights_n is None else x_nd * weights_n[:, None]
    gram = weighted_x.T @ x_nd
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + penalty, weighted_x.T @ y_nd).T


@dataclass(frozen=True)
class Refinement:
    """What `refine` found.

    map_dd     (d, d) W, a rotation times a scale
    criterion  its mean cosine of CSLS-matched cells
    criteria   of the start and of each iteration
    n_pairs    mutual neighbours of each iteration
    """

    map_dd: torch.Tensor
    criterion: float
    criteria: list[float]
    n_pairs: list[int]


def refine(
    map_dd: torch.Tensor, x_nd: torch.Tensor, y_md: torch.Tensor, *, n_iterations: int = 5, k: int = 10
) -> Refinement:
    """Procrustes on the mutual CSLS neighbours of W x and y, again and again; the best by the criterion is kept.

    map_dd  (d, d) to start from, itself a candidate
    x_nd    (source cells, d); y_md (target cells, d): in no order
    Source  Conneau, Lample et al. 2018, sections 2.2 and 3
    """
    best = map_dd
    criteria = [mean_matched_cosine(x_nd @ map_dd.T, y_md, k)]
    n_pairs: list[int] = []
    for _ in range(n_iterations):
        rows, columns = mutual_pairs(x_nd @ map_dd.T, y_md, k)
        map_dd = procrustes(x_nd[rows], y_md[columns], scaled=True)
        n_pairs.append(len(rows))
        criteria.append(mean_matched_cosine(x_nd @ map_dd.T, y_md, k))
        if criteria[-1] == max(criteria):
            best = map_dd
    return Refinement(best, max(criteria), criteria, n_pairs)
