"""The rotation between two halves of real cells: recovered by the adversary alone from a start some way off, and by the
whole method from the principal axes."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from cellglot.alignment import AdversarialOptions, adversarial_alignment
from cellglot.alignment.adversarial import (
    Discriminator,
    adversarial_rotation,
    nearest_rotation,
    principal_axes_rotation,
    random_rotation,
)
from cellglot.alignment.procrustes import refine

from .clouds import real_cells, rotation, types

# For some thousand cells on a CPU: steps are larger than the paper's, and fewer.
QUICK = AdversarialOptions(
    learning_rate=5e-3, batch_size=256, epochs=3, epoch_steps=150, hidden_size=64, orthogonality=0.02,
    criterion_cells=1500,
)  # fmt: skip
PBMC = "cells/kang2018_pbmc_12261x1287.h5ad"


@pytest.fixture(scope="module")
def halves(real_data):
    """Two halves of real PBMCs, one of them turned by a known rotation."""
    cells = real_cells(real_data / PBMC, 8)
    x, other = cells.tensor_split(2)
    q = rotation(8, seed=7)
    return x, other @ q.T, q


def matched_cosine(w, x, q):
    """Mean cosine of cells under W and under the known rotation."""
    return float(cosine_similarity(x @ w.T, x @ q.T).mean())


@pytest.mark.realdata
def test_recovers_a_known_rotation_between_two_halves_of_real_cells(halves):
    x, y, q = halves
    skew = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    start = torch.matrix_exp(0.35 * (skew - skew.T)) @ q
    assert matched_cosine(start, x, q) < 0.6
    by_neighbours = refine(start, x[:1500], y[:1500], n_iterations=10)
    assert matched_cosine(by_neighbours.map_dd, x, q) < 0.8
    found = adversarial_rotation(x, y, start, QUICK, progress=False)
    assert matched_cosine(found.rotation_dd, x, q) > 0.98
    # It is what the criterion and the adversary see as well.
    assert found.criterion > max(by_neighbours.criterion, found.criteria[0])
    assert found.losses[-1] > found.losses[0]


@pytest.mark.realdata
def test_from_principal_axes_the_whole_method_recovers_it_among_restarts(halves):
    x, y, q = halves
    options = replace(QUICK, epochs=1, criterion_cells=1000)
    few = x[:3000], y[:3000]
    found = [
        adversarial_alignment(*few, options, restarts=[restart], refinements=3, progress=False) for restart in (0, 1)
    ]
    best = max(found, key=lambda alignment: alignment.criterion)
    assert matched_cosine(best.forward_dd, x, q) >= 0.9
    assert matched_cosine(best.forward_dd, x, q) == max(matched_cosine(a.forward_dd, x, q) for a in found)


def test_axes_lie_on_axes_and_point_where_the_cells_are_skewed():
    x, _ = types({0: 90, 1: 50, 2: 20})
    x = x - x.mean(dim=0)
    q = rotation(11, seed=3)
    torch.testing.assert_close(principal_axes_rotation(x, x @ q.T), q, atol=1e-3, rtol=0)  # float32 eigenvectors
    turned = principal_axes_rotation(x, x @ q.T, seed=1)
    torch.testing.assert_close(turned @ turned.T, torch.eye(11), atol=1e-4, rtol=0)
    assert (turned - q).norm() > 1


def test_paper_s_defaults():
    options = AdversarialOptions()
    assert (options.learning_rate, options.batch_size) == (3e-5, 1024)
    layers = list(Discriminator(17, options))
    assert isinstance(layers[0], torch.nn.Dropout)
    assert [layer.out_features for layer in layers if isinstance(layer, torch.nn.Linear)] == [2048, 2048, 1]


def small():
    x, _ = types({0: 40, 1: 30, 2: 20})
    x = x - x.mean(dim=0)
    return x, x @ rotation(11, seed=3).T


TINY = AdversarialOptions(
    learning_rate=1e-2, batch_size=32, epochs=2, epoch_steps=7, hidden_size=8, criterion_cells=50
)  # fmt: skip


def test_same_seed_same_rotation_and_the_callers_random_numbers_are_left_alone():
    x, y = small()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = adversarial_rotation(x, y, random_rotation(x, 0), TINY, seed=1, progress=False)
    assert torch.rand(1) == expected
    again = adversarial_rotation(x, y, random_rotation(x, 0), TINY, seed=1, progress=False)
    other = adversarial_rotation(x, y, random_rotation(x, 0), TINY, seed=2, progress=False)
    assert torch.equal(first.rotation_dd, again.rotation_dd)
    assert first.losses == again.losses != other.losses


def test_result_is_orthogonal_and_does_not_depend_on_units():
    x, y = small()
    start = principal_axes_rotation(x, y, seed=3)
    found = adversarial_rotation(x, y, start, TINY, progress=False)
    torch.testing.assert_close(found.rotation_dd @ found.rotation_dd.T, torch.eye(11), atol=1e-5, rtol=0)
    scaled = adversarial_rotation(64 * x, y / 8, start, TINY, progress=False)
    torch.testing.assert_close(scaled.rotation_dd, found.rotation_dd, atol=1e-3, rtol=0)


def test_orthogonality_update_brings_w_back(monkeypatch):
    x, y = small()
    ended = {}
    for b in (0.0, 0.1):
        options = AdversarialOptions(
            learning_rate=3e-2, batch_size=32, epochs=1, epoch_steps=30, hidden_size=8, orthogonality=b
        )  # fmt: skip
        seen = []
        monkeypatch.setattr(
            "cellglot.alignment.adversarial.nearest_rotation",
            lambda w, seen=seen: seen.append(w) or nearest_rotation(w),
        )
        adversarial_rotation(x, y, rotation(11), options, progress=False)
        ended[b] = float((seen[0] @ seen[0].T - torch.eye(11)).norm())
    assert ended[0.1] < ended[0.0] / 2


def test_discriminator_that_cannot_tell_has_a_loss_of_log_two():
    x, _ = small()
    found = adversarial_rotation(
        x, x, torch.eye(11), AdversarialOptions(epochs=1, epoch_steps=3, batch_size=64), progress=False
    )
    assert found.losses[0] == pytest.approx(math.log(2), abs=0.05)
    assert found.criterion == pytest.approx(1)


@pytest.mark.gpu
def test_gpu_finds_what_the_cpu_finds():
    x, y = (cloud.cuda() for cloud in small())
    options = AdversarialOptions(learning_rate=1e-3, batch_size=64, epochs=3, epoch_steps=50, hidden_size=64)
    found = adversarial_alignment(x, y, options, restarts=[0], progress=False)
    assert found.forward_dd.is_cuda
    torch.testing.assert_close(found.forward_dd.cpu(), rotation(11, seed=3), atol=0.05, rtol=0)
