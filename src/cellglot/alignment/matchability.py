"""How well each cell of two aligned sets is matched by the other set: 0 not at all, 1 perfectly.

The score of a cell is the share of its mass that unbalanced optimal transport sends to the other set rather than
destroys (Chizat et al. 2018, arXiv:1607.05816). Cells without counterpart are far from all others, and what is near to
them is taken by cells that are nearer. The cost is 1 - cosine.

A low score says that nothing like this cell was found, which is also how a cell looks whose counterparts were not
sampled or that was aligned badly. Scores compare cells of one alignment, not alignments.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .csls import ROWS_PER_BLOCK
from .optimal_transport import UNBALANCED_SOLVER, cosine_cost

# Chosen on human and mouse brain cells, one cell type removed from either side at a time: mean area under the ROC curve
# 0.95 for the cells of that type, with little change from 0.02 to 0.1 and from 0.2 to 0.5.
EPSILON, MARGINAL_PENALTY = 0.05, 0.3


@dataclass(frozen=True)
class Matchability:
    """Scores of any cells of two aligned sets, from the dual potentials of a transport between some of them.

    x_nd, y_md    cells that the transport was solved for, in one space
    log_u, log_v  (n,), (m,) their potentials, float64
    """

    x_nd: torch.Tensor
    y_md: torch.Tensor
    log_u: torch.Tensor
    log_v: torch.Tensor
    epsilon: float
    marginal_penalty: float

    @classmethod
    def fit(
        cls,
        x_nd: torch.Tensor,
        y_md: torch.Tensor,
        *,
        epsilon: float = EPSILON,
        marginal_penalty: float = MARGINAL_PENALTY,
        max_cells: int = 4000,
        seed: int = 0,
    ) -> "Matchability":
        """Solves the transport between at most `max_cells` of each set, drawn at random.

        x_nd    (source cells, d) mapped into the target's space; y_md (target cells, d)
        Raises  ValueError where the potentials are not finite
        """
        import ot

        x_nd, y_md = (_drawn(cloud, max_cells, seed) for cloud in (x_nd, y_md))
        a, b = (x_nd.new_full((len(cloud),), 1 / len(cloud), dtype=torch.float64) for cloud in (x_nd, y_md))
        cost = cosine_cost(x_nd, y_md).double()
        settings: dict[str, Any] = {"method": UNBALANCED_SOLVER, "numItermax": 10_000, "log": True}
        _, log = ot.unbalanced.sinkhorn_unbalanced(a, b, cost, epsilon, marginal_penalty, **settings)
        if not (torch.isfinite(log["logu"]).all() and torch.isfinite(log["logv"]).all()):
            raise ValueError(f"Optimal transport did not converge with epsilon {epsilon:g}: raise epsilon.")
        return cls(x_nd, y_md, log["logu"], log["logv"], epsilon, marginal_penalty)

    def of_source(self, x_nd: torch.Tensor) -> torch.Tensor:
        """(n,) scores, float64 from 0 to 1, of source cells mapped into the target's space."""
        return self._kept_mass(x_nd, self.y_md, self.log_v)

    def of_target(self, y_md: torch.Tensor) -> torch.Tensor:
        """(m,) scores, float64 from 0 to 1, of target cells."""
        return self._kept_mass(y_md, self.x_nd, self.log_u)

    def _kept_mass(self, cells_nd: torch.Tensor, others_md: torch.Tensor, log_v: torch.Tensor) -> torch.Tensor:
        """(n,) share of mass that cells keep against the potentials of the others.

        The plan is a u exp(-C / epsilon) v b, with u = s^-(penalty / (epsilon + penalty)) and s = exp(-C / epsilon) v b
        at the optimum. A cell's mass is then a u s = a s^(epsilon / (epsilon + penalty)), for any cell that s is taken
        of, drawn or not.
        """
        log_b = -math.log(len(others_md))
        log_s = [
            torch.logsumexp(log_v - cosine_cost(rows, others_md).double() / self.epsilon + log_b, dim=1)
            for rows in cells_nd.split(ROWS_PER_BLOCK)
        ]
        return (torch.cat(log_s) * self.epsilon / (self.epsilon + self.marginal_penalty)).exp().clamp(max=1)


def _drawn(x_nd: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    if len(x_nd) <= n:
        return x_nd
    return x_nd[torch.randperm(len(x_nd), generator=torch.Generator().manual_seed(seed))[:n].to(x_nd.device)]
