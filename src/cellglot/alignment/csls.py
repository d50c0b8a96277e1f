"""Cross-domain similarity local scaling (CSLS): nearest neighbours between two point clouds, hubs held down.

Conneau, Lample et al., "Word Translation Without Parallel Data", ICLR 2018 (arXiv:1710.04087), section 2.3:

    CSLS(x, y) = 2 cos(x, y) - r_T(x) - r_S(y)

r_T(x) is the mean cosine of x to its k nearest points of the target, r_S(y) that of y to its k nearest of the source.
In many dimensions some points are near to everything; what they gain in cosine they lose in r.

Axis letters: n source cells, m target cells, d components. The (n, m) similarities exist a block of rows at a time.
"""

import torch
from torch.nn.functional import normalize

ROWS_PER_BLOCK = 2048


def mean_neighbour_cosine(x_nd: torch.Tensor, y_md: torch.Tensor, k: int = 10) -> torch.Tensor:
    """(n,) mean cosine of each row of x to the k rows of y nearest to it: r_T(x), or r_S(y) with the clouds swapped.

    Clouds of fewer than k cells count as a whole. A cell at the origin has cosine 0 to everything.
    """
    k = min(k, len(y_md))
    y_md = normalize(y_md, dim=1)
    blocks = normalize(x_nd, dim=1).split(ROWS_PER_BLOCK)
    return torch.cat([(block @ y_md.T).topk(k, dim=1).values.mean(dim=1) for block in blocks])


def csls_nearest(x_nd: torch.Tensor, y_md: torch.Tensor, k: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest neighbours under CSLS: (n,) row of y for each of x, and (m,) row of x for each of y."""
    r_target, r_source = mean_neighbour_cosine(x_nd, y_md, k), mean_neighbour_cosine(y_md, x_nd, k)
    x_nd, y_md = normalize(x_nd, dim=1), normalize(y_md, dim=1)
    of_x = []
    best = torch.full((len(y_md),), -torch.inf, dtype=y_md.dtype, device=y_md.device)
    of_y = torch.zeros(len(y_md), dtype=torch.long, device=y_md.device)
    for start in range(0, len(x_nd), ROWS_PER_BLOCK):
        rows = slice(start, start + ROWS_PER_BLOCK)
        scores = 2 * x_nd[rows] @ y_md.T - r_target[rows, None] - r_source[None]
        of_x.append(scores.argmax(dim=1))
        score, row = scores.max(dim=0)
        of_y = torch.where(score > best, row + start, of_y)
        best = torch.maximum(score, best)
    return torch.cat(of_x), of_y


def mutual_pairs(x_nd: torch.Tensor, y_md: torch.Tensor, k: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x and rows of y, (pairs,) each, that are each other's nearest neighbour under CSLS."""
    of_x, of_y = csls_nearest(x_nd, y_md, k)
    rows = torch.arange(len(of_x), device=of_x.device)
    mutual = of_y[of_x] == rows
    return rows[mutual], of_x[mutual]


def mean_matched_cosine(x_nd: torch.Tensor, y_md: torch.Tensor, k: int = 10) -> float:
    """Mean cosine of the cells of x to their CSLS neighbours in y: the unsupervised criterion of section 3.

    It needs no pair that is known, and follows the quality of a rotation closely enough to choose among several.
    """
    of_x, _ = csls_nearest(x_nd, y_md, k)
    return float((normalize(x_nd, dim=1) * normalize(y_md[of_x], dim=1)).sum(dim=1).mean())
