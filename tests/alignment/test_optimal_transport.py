from typing import Any

import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist

from cellglot.alignment.optimal_transport import barycentric_map, cosine_cost, coupling

from .clouds import types


def pair():
    x, _ = types({0: 13, 1: 11, 2: 7}, seed=1)
    y, _ = types({0: 5, 1: 12, 2: 12}, seed=2)
    return x, y, cosine_cost(x, y)


def test_cost_equals_a_plain_loop():
    x, y, cost = pair()
    loop = [[1 - float(a @ b / (a.norm() * b.norm())) for b in y] for a in x]
    np.testing.assert_allclose(cost, loop, atol=1e-6)


def test_unbalanced_equals_pot_s_other_solver_and_exact_transport_in_the_limit():
    x, y, cost = pair()
    a, b = np.full(31, 1 / 31), np.full(29, 1 / 29)
    other = ot.unbalanced.sinkhorn_unbalanced(a, b, cost.double().numpy(), 0.05, 1.0, method="sinkhorn_stabilized")
    np.testing.assert_allclose(coupling(x, y, cost), other, atol=1e-6)
    # Balanced in the limit
    nearly_exact = coupling(x, y, cost, epsilon=0.02, marginal_penalty=50)
    exact = ot.emd2(a, b, cost.double().numpy())
    assert float((nearly_exact * cost).sum()) == pytest.approx(exact, rel=0.1)


def test_gromov_and_fused_equal_pot_on_relative_distances():
    x, y, cost = pair()
    x_within, y_within = (cdist(cloud, cloud) for cloud in (x, y))
    x_within, y_within = x_within / x_within.mean(), y_within / y_within.mean()
    a, b = np.full(31, 1 / 31), np.full(29, 1 / 29)
    plain: Any = ot.gromov.gromov_wasserstein(x_within, y_within, a, b)
    np.testing.assert_allclose(coupling(x, y, kind="gromov"), plain, atol=1e-6)
    plain = ot.gromov.fused_gromov_wasserstein(cost.double().numpy(), x_within, y_within, a, b, alpha=0.5)
    np.testing.assert_allclose(coupling(x, y, cost, kind="fused"), plain, atol=1e-6)


def test_cells_go_to_their_own_type():
    x, types_x = types({0: 13, 1: 11, 2: 7}, seed=1)
    y, types_y = types({0: 5, 1: 12, 2: 12}, seed=2)
    plan = coupling(x, y, cosine_cost(x, y), marginal_penalty=0.1).numpy()
    same = types_x[:, None] == types_y[None]
    assert plan[same].sum() > 0.9 * plan.sum()
    assert plan.sum() < 1


def test_gromov_finds_equal_shares_of_types_in_a_space_of_other_dimensions():
    x, types_x = types({0: 20, 1: 12, 2: 6}, seed=1)
    other = torch.randn(11, 17, generator=torch.Generator().manual_seed(0))
    y = types({0: 20, 1: 12, 2: 6}, seed=2)[0] @ torch.linalg.qr(other.T)[0].T
    plan = coupling(x, y, kind="gromov").numpy()
    same = types_x[:, None] == types_x[None]
    assert plan[same].sum() > 0.9


def test_barycentres_equal_a_plain_loop_and_cells_without_mass_weigh_nothing():
    _, y, _ = pair()
    plan = torch.rand(5, 29, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan[3] = 0
    barycentres, mass = barycentric_map(plan, y)
    for i in (0, 1, 2, 4):
        expected = sum(plan[i, j] * y[j].double() for j in range(29)) / plan[i].sum()
        torch.testing.assert_close(barycentres[i].double(), expected, atol=1e-6, rtol=0)
    assert mass[3] == 0
    assert (barycentres[3] == 0).all()


def test_missing_cost_is_refused():
    x, y, _ = pair()
    with pytest.raises(ValueError, match="unbalanced transport needs a cost"):
        coupling(x, y)
