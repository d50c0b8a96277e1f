import numpy as np
import ot
import pytest
import torch

from cellglot.alignment import Matchability
from cellglot.alignment.optimal_transport import cosine_cost

from .clouds import real_cells, types


def planted():
    """Types 0 and 1 in both sets, 2 in one and 3 in the other only."""
    return types({0: 60, 1: 50, 2: 30}, seed=1), types({0: 30, 1: 60, 3: 40}, seed=2)


def test_types_of_one_set_only_score_low():
    (x, types_x), (y, types_y) = planted()
    scores = Matchability.fit(x, y)
    for cells, of in ((scores.of_source(x), types_x), (scores.of_target(y), types_y)):
        alone = torch.from_numpy(of >= 2)
        assert ((cells >= 0) & (cells <= 1)).all()
        assert cells[~alone].min() > 0.6
        assert cells[alone].max() < 0.4


def test_score_is_the_mass_that_pot_sends():
    (x, _), (y, _) = planted()
    scores = Matchability.fit(x, y, epsilon=0.05, marginal_penalty=0.3)
    a, b = np.full(140, 1 / 140), np.full(130, 1 / 130)
    plan = ot.unbalanced.sinkhorn_unbalanced(a, b, cosine_cost(x, y).double().numpy(), 0.05, 0.3, stopThr=1e-10)
    # Cells of a type that the other set has more of may send more than their share.
    np.testing.assert_allclose(scores.of_source(x), np.minimum(plan.sum(axis=1) * 140, 1), atol=1e-4)
    np.testing.assert_allclose(scores.of_target(y), np.minimum(plan.sum(axis=0) * 130, 1), atol=1e-4)


def test_cells_that_were_not_drawn_are_scored_alike():
    (x, _), (y, _) = planted()
    every, some = Matchability.fit(x, y), Matchability.fit(x, y, max_cells=90, seed=1)
    assert len(some.x_nd) == len(some.y_md) == 90
    assert (every.of_source(x) - some.of_source(x)).abs().max() < 0.2
    torch.testing.assert_close(some.of_source(x)[:9], some.of_source(x[:9]))


@pytest.mark.realdata
def test_real_types_removed_from_one_half_score_low_in_the_other(real_data):
    import anndata as ad
    from sklearn.metrics import roc_auc_score

    path = real_data / "cells/zhuang_merfish_mouse_brain_1000x1122.h5ad"
    cells = real_cells(path, 30)
    order = np.random.default_rng(0).permutation(len(cells))
    labels = ad.read_h5ad(path).obs["cell_type"].to_numpy(dtype=str)[order]
    x, y, types_x, types_y = cells[:500], cells[500:], labels[:500], labels[500:]
    for removed in ("oligodendrocyte", "astrocyte", "endothelial cell", "microglial cell"):
        score = Matchability.fit(x, y[types_y != removed]).of_source(x)
        assert roc_auc_score(types_x != removed, score) > 0.9, removed
