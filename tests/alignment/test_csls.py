import pytest
import torch
from torch.nn.functional import cosine_similarity

from cellglot.alignment import csls
from cellglot.alignment.csls import csls_nearest, mean_matched_cosine, mean_neighbour_cosine, mutual_pairs

from .clouds import rotation


def clouds():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(23, 5, generator=generator).double(), torch.randn(31, 5, generator=generator).double() + 0.5


def loop_scores(x, y, k):
    """CSLS of every pair, as the paper writes it."""
    cosines = torch.tensor([[float(cosine_similarity(a, b, dim=0)) for b in y] for a in x], dtype=torch.float64)
    r_target = [sum(sorted(row, reverse=True)[:k]) / k for row in cosines.tolist()]
    r_source = [sum(sorted(row, reverse=True)[:k]) / k for row in cosines.T.tolist()]
    scores = [[2 * cosines[i, j] - r_target[i] - r_source[j] for j in range(len(y))] for i in range(len(x))]
    return torch.tensor(scores), torch.tensor(r_target, dtype=torch.float64), cosines


@pytest.mark.parametrize("rows_per_block", [7, 2048])
def test_equals_a_plain_loop(rows_per_block, monkeypatch):
    monkeypatch.setattr(csls, "ROWS_PER_BLOCK", rows_per_block)
    x, y = clouds()
    scores, r_target, cosines = loop_scores(x, y, 3)
    torch.testing.assert_close(mean_neighbour_cosine(x, y, 3), r_target)
    of_x, of_y = csls_nearest(x, y, 3)
    assert of_x.tolist() == scores.argmax(dim=1).tolist()
    assert of_y.tolist() == scores.argmax(dim=0).tolist()
    rows, columns = mutual_pairs(x, y, 3)
    pairs = {(i, int(scores[i].argmax())) for i in range(len(x)) if int(scores[:, scores[i].argmax()].argmax()) == i}
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == pairs
    assert mean_matched_cosine(x, y, 3) == pytest.approx(float(cosines[torch.arange(len(x)), of_x].mean()))


def test_a_hub_that_is_near_to_all_is_no_longer_everyone_s_neighbour():
    spokes = torch.eye(6)
    hub = torch.ones(1, 6)
    # Each x is its own spoke with much of the hub in it.
    x, y = spokes + 0.9, torch.cat([spokes + 0.15, hub])
    by_cosine = (torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T).argmax(dim=1)
    assert (by_cosine == 6).all()
    assert csls_nearest(x, y, 2)[0].tolist() == list(range(6))


def test_same_cells_in_another_order_find_themselves_and_the_criterion_is_one():
    x, _ = clouds()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    rows, columns = mutual_pairs(x, x[order])
    assert len(rows) == len(x)
    assert (order[columns] == rows).all()
    assert mean_matched_cosine(x, x[order]) == pytest.approx(1)
    # It is lower for the very same cells turned away.
    assert mean_matched_cosine(x @ rotation(5).double().T, x[order]) < 0.99


def test_fewer_cells_than_neighbours():
    x, y = clouds()
    torch.testing.assert_close(mean_neighbour_cosine(x, y[:4], 10), mean_neighbour_cosine(x, y[:4], 4))
