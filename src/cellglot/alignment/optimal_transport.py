"""Couplings of two sets of cells by optimal transport, and the linear map nearest to one. Solvers of POT.

unbalanced  entropic, with marginals that may be missed at a price, since species differ in the share of each cell type
            (Chizat et al. 2018, arXiv:1607.05816); needs a cost between the sets, from shared genes
gromov      Gromov-Wasserstein: compares distances within either set only (Mémoli 2011), so that nothing has to be
            shared; both sets must then hold the same types in like shares
fused       both costs (Vayer et al. 2020, arXiv:1811.02834); it and gromov keep the marginals, by conditional gradients

Axis letters: n source cells, m target cells, d components, g shared genes.
"""

from typing import Any, Literal

import torch
from torch.nn.functional import normalize

# In double precision exp(-2 / epsilon) is a number down to an epsilon of 0.003. POT's stabilized solver (0.9.7) takes a
# step that only moves scale into its potentials for convergence, and may stop far from the optimum.
UNBALANCED_SOLVER = "sinkhorn"

Kind = Literal["unbalanced", "gromov", "fused"]


def cosine_cost(x_ng: torch.Tensor, y_mg: torch.Tensor) -> torch.Tensor:
    """(n, m) 1 - cosine, 0 to 2."""
    return 1 - normalize(x_ng, dim=1) @ normalize(y_mg, dim=1).T


def coupling(
    x_nd: torch.Tensor,
    y_md: torch.Tensor,
    cost_nm: torch.Tensor | None = None,
    *,
    kind: Kind = "unbalanced",
    epsilon: float = 0.05,
    marginal_penalty: float = 1.0,
    structure: float = 0.5,
    max_iterations: int = 10_000,
) -> torch.Tensor:
    """(n, m) float64 mass that goes from each source cell to each target cell; all cells weigh the same.

    x_nd, y_md        the clouds, each in its own space: their distances, in units of their mean, are what `gromov` and
                      `fused` compare
    cost_nm           between the clouds, e.g. `cosine_cost` of shared genes; `unbalanced` and `fused` need one
    epsilon           entropy of `unbalanced`, which widens the coupling
    marginal_penalty  price of a missed marginal (Kullback-Leibler) in `unbalanced`, whose mass is below 1
    structure         weight of the distances within the sets in `fused`, against the cost between them
    Raises            ValueError where a cost is missing, or the result is not finite
    """
    import ot

    n, m = len(x_nd), len(y_md)
    a, b = (torch.full((size,), 1 / size, dtype=torch.float64, device=x_nd.device) for size in (n, m))
    if kind != "gromov" and cost_nm is None:
        raise ValueError(f"{kind} transport needs a cost between the sets: pass cost_nm, or kind='gromov'.")
    cost = None if cost_nm is None else cost_nm.double()
    if kind == "unbalanced":
        plan: Any = ot.unbalanced.sinkhorn_unbalanced(
            a, b, cost, epsilon, marginal_penalty, method=UNBALANCED_SOLVER, numItermax=max_iterations
        )
    else:
        x_within, y_within = _relative_distances(x_nd), _relative_distances(y_md)
        if kind == "gromov":
            plan = ot.gromov.gromov_wasserstein(x_within, y_within, a, b, max_iter=max_iterations)
        else:
            options: dict[str, Any] = {"alpha": structure, "max_iter": max_iterations}
            plan = ot.gromov.fused_gromov_wasserstein(cost, x_within, y_within, a, b, **options)
    if not torch.isfinite(plan).all() or not plan.sum() > 0:
        raise ValueError(f"Optimal transport did not converge with epsilon {epsilon:g}: raise epsilon.")
    return plan


def _relative_distances(x_nd: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(x_nd.double(), x_nd.double())
    return distances / distances.mean()


def barycentric_map(plan_nm: torch.Tensor, y_md: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each source cell goes: (n, d) the mean of the target cells its mass goes to, and (n,) that mass.

    A cell that sends no mass goes to the origin, with weight 0.
    """
    mass = plan_nm.sum(dim=1)
    barycentres = plan_nm.to(y_md) @ y_md / mass.clamp_min(torch.finfo(mass.dtype).tiny).to(y_md)[:, None]
    return torch.where(mass[:, None] > 0, barycentres, 0.0), mass.to(y_md)
