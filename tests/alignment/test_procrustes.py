import torch

from cellglot.alignment.procrustes import least_squares, procrustes, refine

from .clouds import rotation, types


def cloud(n=41, d=7, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_exact_rotation_is_found_exactly():
    x, q = cloud(), torch.linalg.qr(cloud(7, 7, seed=2))[0]
    torch.testing.assert_close(procrustes(x, x @ q.T), q)
    torch.testing.assert_close(procrustes(x, 3 * x @ q.T, scaled=True), 3 * q)


def test_no_small_turn_of_the_found_rotation_is_better():
    x, y = cloud(), cloud(seed=1)
    w = procrustes(x, y)
    torch.testing.assert_close(w @ w.T, torch.eye(7, dtype=torch.float64))
    error = (x @ w.T - y).square().sum()
    for seed in range(5):
        skew = cloud(7, 7, seed=10 + seed)
        turned = torch.matrix_exp(0.05 * (skew - skew.T)) @ w
        assert (x @ turned.T - y).square().sum() > error


def test_weights_are_repetitions_of_pairs():
    x, y = cloud(), cloud(seed=1)
    times = torch.arange(41) % 3
    repeated = torch.repeat_interleave(torch.arange(41), times)
    for fit in (lambda *a: procrustes(*a, scaled=True), lambda *a: least_squares(*a, ridge=0.3)):
        torch.testing.assert_close(fit(x, y, times.double()), fit(x[repeated], y[repeated]))


def test_scale_of_noisy_pairs_keeps_the_spread_of_the_target():
    x, q = cloud(400), rotation(7).double()
    y = 2 * x @ q.T + cloud(400, seed=3)
    w = procrustes(x, y, scaled=True)
    torch.testing.assert_close((x @ w.T).square().mean(), y.square().mean())


def test_least_squares_without_ridge_is_numpy_s_and_shrinks_with_it():
    x, y = cloud(), cloud(seed=1)
    torch.testing.assert_close(least_squares(x, y, ridge=0), torch.linalg.lstsq(x, y).solution.T)
    assert least_squares(x, y, ridge=1).norm() < least_squares(x, y, ridge=0.01).norm()
    # Fewer pairs than components
    assert torch.isfinite(least_squares(x[:3], y[:3], ridge=0.1)).all()


def test_refinement_finds_the_rotation_from_a_near_start_and_never_returns_worse_than_the_start():
    x, _ = types({0: 60, 1: 50, 2: 40, 3: 30}, spread=1.0)
    x = x - x.mean(dim=0)
    q = rotation(11, seed=2)
    y = (x @ q.T)[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    skew = torch.randn(11, 11, generator=torch.Generator().manual_seed(4))
    start = torch.matrix_exp(0.1 * (skew - skew.T)) @ q
    found = refine(start, x, y, n_iterations=10)
    torch.testing.assert_close(found.map_dd, q, atol=1e-4, rtol=0)  # float32
    assert found.n_pairs[-1] == len(x)
    assert found.criterion == max(found.criteria) > found.criteria[0]
    at_truth = refine(q, x, y, n_iterations=0)
    assert at_truth.map_dd is q
