"""Each method on clouds whose rotation and genes are known: both ways, and what it says when it cannot."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from cellglot.alignment import (
    AdversarialOptions,
    adversarial_alignment,
    gene_alignment,
    ortholog_alignment,
    transport_alignment,
)

from .clouds import rotation, types

D, G = 11, 29


@pytest.fixture(scope="module")
def planted():
    """Two draws of the same types; the second is turned and scaled. Both express the same genes."""
    x, y = (types({0: 60, 1: 45, 2: 30, 3: 20}, seed=seed)[0] for seed in (1, 2))
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    genes = torch.linalg.qr(torch.randn(G, D, generator=torch.Generator().manual_seed(0)))[0].T
    q = rotation(D, seed=5)
    return {"x": x, "y": 4 * y @ q.T, "x_ng": x @ genes, "y_mg": y @ genes, "genes": genes, "q": q}


def check(found, planted, least=0.9):
    x, y, q = planted["x"], planted["y"], planted["q"]
    mapped = x @ found.forward_dd.T
    assert cosine_similarity(mapped, x @ q.T).mean() > least
    assert cosine_similarity(y @ found.backward_dd.T, y @ q).mean() > least
    assert 0 < found.criterion <= 1


def check_similarity(found, planted):
    """A rotation times a scale, as wide as the target, with its inverse."""
    torch.testing.assert_close(found.forward_dd @ found.backward_dd, torch.eye(D), atol=1e-4, rtol=0)
    spread = (planted["x"] @ found.forward_dd.T).square().mean() / planted["y"].square().mean()
    assert 0.9 < spread < 1.1


def test_ortholog_pairs(planted):
    found = ortholog_alignment(planted["x"], planted["y"], planted["x_ng"], planted["y_mg"])
    check(found, planted)
    check_similarity(found, planted)
    assert 20 < found.facts["pairs"] <= len(planted["x"])


def test_gene_pairs_are_exact_where_both_species_express_alike(planted):
    found = gene_alignment(planted["x"], planted["y"], planted["genes"], planted["q"] @ planted["genes"])
    check(found, planted, least=0.999)
    check_similarity(found, planted)


@pytest.mark.parametrize("kind", ["unbalanced", "fused"])
@pytest.mark.parametrize("linear_map", ["rotation", "least_squares"])
def test_transport(planted, kind, linear_map):
    clouds = [planted[name] for name in ("x", "y", "x_ng", "y_mg")]
    found = transport_alignment(*clouds, kind=kind, linear_map=linear_map)
    check(found, planted, least=0.8)
    if linear_map == "rotation":
        check_similarity(found, planted)
    assert 0 < found.facts["mass"] <= 1 + 1e-6


def test_gromov_takes_no_genes_and_the_others_ask_for_them():
    x, y = (types({0: 60, 1: 30, 2: 12}, seed=seed)[0] for seed in (1, 2))
    x, y, q = x - x.mean(dim=0), y - y.mean(dim=0), rotation(D, seed=5)
    found = transport_alignment(x, y @ q.T, kind="gromov")
    check(found, {"x": x, "y": y @ q.T, "q": q})
    with pytest.raises(ValueError, match="needs a cost"):
        transport_alignment(x, y, kind="fused")


OPTIONS = AdversarialOptions(learning_rate=2e-3, batch_size=64, epochs=2, epoch_steps=20, hidden_size=16)


def test_adversarial(planted):
    found = adversarial_alignment(planted["x"], planted["y"], OPTIONS, restarts=range(2), progress=False)
    check(found, planted)
    check_similarity(found, planted)


def test_restarts_may_be_shared_out(planted):
    x, y = planted["x"], planted["y"]
    options = {"start": "random", "progress": False, "refinements": 1}
    together = adversarial_alignment(x, y, OPTIONS, restarts=range(3), **options)
    apart = [adversarial_alignment(x, y, OPTIONS, restarts=range(rank, 3, 2), **options) for rank in range(2)]
    best = max(apart, key=lambda a: a.criterion)
    assert torch.equal(best.forward_dd, together.forward_dd)
    assert best.facts == together.facts


def test_adversarial_starts_from_a_given_map_of_any_scale(planted):
    none = AdversarialOptions(epochs=0)
    start = 10 * planted["q"]
    found = adversarial_alignment(
        planted["x"], planted["y"], none, start=start, restarts=[0], refinements=0, progress=False
    )
    check(found, planted, least=0.999)
    check_similarity(found, planted)


@pytest.mark.parametrize("method", ["adversarial", "orthologs", "genes", "transport"])
def test_clouds_that_cannot_be_aligned_are_refused(planted, method):
    def align(x, y):
        if method == "adversarial":
            return adversarial_alignment(x, y, OPTIONS, progress=False)
        if method == "genes":
            return gene_alignment(x, y, planted["genes"], planted["genes"])
        fit = ortholog_alignment if method == "orthologs" else transport_alignment
        return fit(x, y, planted["x_ng"][: len(x)], planted["y_mg"][: len(y)])

    x, y = planted["x"], planted["y"]
    for clouds, message in (
        ((x[:, 1:], y), r"as many components on either side.*found \(155, 10\) and \(155, 11\)"),
        ((x, y[:0]), r"found \(155, 11\) and \(0, 11\)"),
        ((x, y * torch.nan), "Some target cells hold NaN"),
        ((x * 0, y), "All 155 source cells are zero"),
    ):
        with pytest.raises(ValueError, match=message):
            align(*clouds)
    with pytest.raises(ValueError, match="one restart at least"):
        adversarial_alignment(x, y, OPTIONS, restarts=[], progress=False)
