"""SAUCIE: its terms against loops that follow the paper and the released code, what they do, and its checks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close

from cellglot import SaucieConfig, SaucieModel
from cellglot.modeling.baselines.modeling_saucie import (
    KERNEL_WIDTHS,
    assign_clusters,
    batch_discrepancy,
    corrected_reconstruction_loss,
    information_dimension,
    within_cluster_distance,
)
from cellglot.train.loop import LoopConfig
from cellglot.train.loop import train as train_in_loop
from cellglot.train.metrics_log import read_metrics

from .test_cross_species import COMPONENTS, tiny_batch


def tiny_saucie(**options) -> Any:
    torch.manual_seed(0)
    return SaucieModel(SaucieConfig(**{"n_components": COMPONENTS, "layer_sizes": [23, 13, 7, 2], **options})).eval()


def kernel(a, b, scale=1.0):
    """Mean of Gaussian kernels of two vectors; `scale` divides their squared distance."""
    distance = float(((a - b) ** 2).sum()) / scale
    return sum(math.exp(-distance / (2 * width)) for width in KERNEL_WIDTHS) / len(KERNEL_WIDTHS)


def test_information_dimension_is_the_entropy_of_the_neurons_use():
    codes = torch.rand(11, 5, generator=torch.Generator().manual_seed(0))
    use = codes.numpy().astype(float).sum(axis=0)
    use /= use.sum()
    assert float(information_dimension(codes)) == pytest.approx(-(use * np.log(use)).sum(), rel=1e-5)
    one, all_alike = torch.eye(5)[:1].expand(11, 5), torch.ones(11, 5)
    assert float(information_dimension(one)) == pytest.approx(0, abs=1e-5)
    assert float(information_dimension(all_alike)) == pytest.approx(math.log(5), rel=1e-5)


def test_within_cluster_distance_is_the_loop_over_pairs_of_cells():
    generator = torch.Generator().manual_seed(0)
    codes, x = torch.rand(7, 5, generator=generator), torch.randn(7, 3, generator=generator)
    pairs = [(a, b) for a in range(7) for b in range(7)]
    shared = np.array([kernel(codes[a], codes[b]) for a, b in pairs])
    shared = (shared - shared.min()) / (shared.max() - shared.min())
    distances = np.array([math.sqrt(float(((x[a] - x[b]) ** 2).sum()) + 1e-3) for a, b in pairs])
    assert float(within_cluster_distance(codes, x)) == pytest.approx(float((shared * distances).mean()), rel=1e-3)


def test_within_cluster_distance_falls_when_codes_follow_the_cells():
    x = torch.cat([torch.zeros(5, 3), torch.ones(5, 3)])
    alike, shuffled = torch.eye(2)[[0] * 5 + [1] * 5], torch.eye(2)[[0, 1] * 5]
    # sqrt(0 + 1e-3) is left of each pair of the same cluster, of which there are as many as not
    assert float(within_cluster_distance(alike, x)) == pytest.approx(0.5 * math.sqrt(1e-3), rel=1e-3)
    assert within_cluster_distance(shuffled, x) > 10 * within_cluster_distance(alike, x)


def test_batch_discrepancy_is_the_loop_over_pairs_of_cells():
    x = torch.randn(13, 2, generator=torch.Generator().manual_seed(0))
    batch = torch.tensor([0] * 5 + [1] * 4 + [2] * 4)
    scale = max(float(((a - b) ** 2).sum()) for a in x for b in x)

    def mean(first, second):
        return float(np.mean([kernel(a, b, scale) for a in x[batch == first] for b in x[batch == second]]))

    expected = sum(mean(0, 0) + mean(other, other) - 2 * mean(0, other) for other in (1, 2))
    assert float(batch_discrepancy(x, batch)) == pytest.approx(expected, rel=1e-3)
    # The same cells in both batches differ in nothing; batches apart do.
    same, halves = torch.cat([x, x]), torch.arange(2).repeat_interleave(13)
    assert float(batch_discrepancy(same, halves)) == pytest.approx(0, abs=1e-6)
    assert batch_discrepancy(same + 9 * halves[:, None], halves) > 0.1
    # Without the reference batch there is nothing to compare with.
    assert float(batch_discrepancy(x, torch.ones(13).long())) == 0


def test_corrected_batches_are_free_to_move_and_to_stretch():
    x = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    batch = torch.tensor([0] * 5 + [1] * 6)
    moved = torch.where(batch[:, None] == 1, 3 * x + 7, x)
    assert float(corrected_reconstruction_loss(moved, x, batch)) == pytest.approx(0, abs=1e-5)
    off = x + (batch == 0)[:, None]
    assert float(corrected_reconstruction_loss(off, x, batch)) == pytest.approx(1, rel=1e-5)
    # The shape of a corrected batch counts a hundredth.
    mirrored = torch.where(batch[:, None] == 1, -x, x)
    assert float(corrected_reconstruction_loss(mirrored, x, batch)) == pytest.approx(0.01 * 4, rel=1e-3)


def test_loss_is_the_weighted_sum_of_its_terms():
    projections, source, _ = tiny_batch()
    with torch.no_grad():
        output = tiny_saucie(lambda_b=0.3, lambda_c=0.5, lambda_d=0.7)(projections, source)
        expected = (
            output.reconstruction_loss
            + 0.3 * output.batch_discrepancy
            + 0.5 * output.information_dimension
            + 0.7 * output.within_cluster_distance
        )
        assert_close(output.loss, expected)
        plain = tiny_saucie(lambda_c=0, lambda_d=0)(projections)
        assert_close(plain.loss, (plain.reconstructions - projections).square().mean())
    assert plain.information_dimension is None
    assert plain.batch_discrepancy is None


def test_layers_are_those_released():
    """model.py of KrishnaswamyLab/SAUCIE: leaky ReLU 0.2, rectified codes when clustering, linear embedding."""
    model = tiny_saucie()
    projections, _, _ = tiny_batch()
    leaky = torch.nn.functional.leaky_relu
    linear = [m for m in [*model.encoder, *model.decoder, model.output] if isinstance(m, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [23, 13, 7, 2, 7, 13, 23, COMPONENTS]
    with torch.no_grad():
        output = model(projections)
        x = projections
        for layer in linear[:3]:
            x = leaky(layer(x), 0.2)
        assert_close(output.embeddings, linear[3](x))
        x = linear[3](x)
        for layer in linear[4:6]:
            x = leaky(layer(x), 0.2)
        codes = torch.relu(linear[6](x))
        assert_close(output.codes, codes)
        assert_close(output.reconstructions, linear[7](codes))
    # Without any penalty, the second layer is a sigmoid and the codes are not rectified.
    plain = tiny_saucie(lambda_c=0, lambda_d=0)
    assert [type(m).__name__ for m in plain.encoder[1::2]] == ["LeakyReLU", "Sigmoid", "LeakyReLU"]
    assert [type(m).__name__ for m in plain.decoder[1::2]] == ["LeakyReLU"] * 3


def three_clusters(n_cells=300):
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(n_cells) % 3
    centres = 3 * torch.randn(3, COMPONENTS, generator=generator)
    return centres[cluster] + 0.3 * torch.randn(n_cells, COMPONENTS, generator=generator), cluster


def train(model, projections, source=None, *, steps, batch_size=100):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        batch = torch.randperm(len(projections))[:batch_size]
        loss = model(projections[batch], None if source is None else source[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_trained_saucie_reconstructs_and_its_clusters_are_pure():
    projections, cluster = three_clusters()
    model = train(tiny_saucie(), projections, steps=300)
    with torch.no_grad():
        output = model(projections)
        untrained = tiny_saucie()(projections)
    assert output.reconstruction_loss < 0.1 * projections.square().mean()
    assert output.information_dimension < untrained.information_dimension
    found = assign_clusters(output.codes, min_cells=5)
    assert (found >= 0).float().mean() > 0.8
    pure = [cluster[found == c].bincount().max() for c in found[found >= 0].unique()]
    assert sum(pure) > 0.95 * (found >= 0).sum()


def test_training_with_batch_correction_mixes_batches():
    projections, _ = three_clusters()
    batch = (torch.arange(len(projections)) // 3) % 2
    shifted = projections + 2.0 * batch[:, None]
    discrepancies = []
    for weight in (0.0, 10.0):
        model = train(tiny_saucie(lambda_b=weight, lambda_c=0, lambda_d=0), shifted, batch, steps=200)
        with torch.no_grad():
            discrepancies.append(float(batch_discrepancy(model(shifted, batch).embeddings, batch)))
    assert discrepancies[1] < 0.2 * discrepancies[0]


def test_the_common_loop_trains_it(tmp_path):
    projections, cluster = three_clusters(60)
    cells = [{"projections": x, "source": of % 2} for x, of in zip(projections, cluster, strict=True)]

    def collate(rows, keys):
        return {name: torch.stack([row[name] for row in rows]) for name in ("projections", "source")}

    options: dict[str, Any] = {"batch_size": 20, "max_steps": 60, "warmup_steps": 0, "learning_rate": 3e-3}
    config = LoopConfig(output=str(tmp_path), log_every=1, **options)
    train_in_loop(tiny_saucie(lambda_b=0.1), cells, np.ones(len(cells)), collate, config, Accelerator(cpu=True))
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]


def test_cells_with_equal_codes_share_a_cluster_unless_it_is_small():
    codes = torch.tensor([[0.0, 1.0], [0.0, 9.0], [2.0, 3.0], [0.0, 1e-9], [0.0, 5.0]])
    # Neurons of the first, second and last cell are on alike; 1e-9 is less than a millionth of 9.
    assert assign_clusters(codes, min_cells=0).tolist() == [1, 1, 2, 0, 1]
    assert assign_clusters(codes, min_cells=1).tolist() == [0, 0, -1, -1, 0]
    assert assign_clusters(codes[:0]).tolist() == []


def test_awkward_batches_have_a_finite_loss_and_gradient():
    projections, source, _ = tiny_batch()
    for x, of in ((projections[:0], source[:0]), (projections[:1], source[:1]), (0 * projections, 0 * source)):
        model = tiny_saucie(lambda_b=0.1)
        loss = model(x, of).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_keeps_the_loss():
    projections, source, _ = tiny_batch()
    model = tiny_saucie(lambda_b=0.1)
    with torch.no_grad():
        expected = float(model(projections, source).loss)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(projections, source).loss
        half = model.to(torch.bfloat16)(projections, source).loss
    # bfloat16 has 8 bits: some tenths of a percent a product
    assert float(mixed) == pytest.approx(expected, rel=0.03)
    assert float(half) == pytest.approx(expected, rel=0.03)


def test_what_does_not_fit_is_refused():
    projections, _, _ = tiny_batch()
    with pytest.raises(ValueError, match=r"Expected projections \(cells, 37\), found \(11, 36\)"):
        tiny_saucie()(projections[:, 1:])
    with pytest.raises(ValueError, match=r"pass source \(11,\); found none"):
        tiny_saucie(lambda_b=0.1)(projections)
    for options, message in (
        ({"layer_sizes": [2]}, "two layers or more"),
        ({"lambda_c": -1}, "penalties of 0 or more"),
        ({"lambda_c": 0}, "lambda_d is about the clusters"),
        ({"lambda_e": 1}, "did you mean 'lambda_"),
    ):
        with pytest.raises(Exception, match=message):
            tiny_saucie(**options)
