"""Products of split cells equal plain ones, wherever the genes are split."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellglot.tokenization import split_products
from cellglot.tokenization.split_products import GeneSplit, linear

N, G, K = 101, 67, 13


def cells(density: float) -> sp.csr_matrix:
    """Genes that few to many cells express."""
    rng = np.random.default_rng(0)
    detected = rng.random((N, G)) < rng.random(G) ** 3 * density
    return sp.csr_matrix((detected * rng.random((N, G))).astype(np.float32))


@pytest.fixture(params=[0.0, 0.05, 0.2, 1.0], autouse=True)
def dense_share(request, monkeypatch):
    """From all columns dense (but genes of no cell) to all sparse; small blocks, with a rest."""
    monkeypatch.setattr(split_products, "DENSE_SHARE", request.param)
    monkeypatch.setattr(split_products, "CELLS_PER_PRODUCT", 20)
    monkeypatch.setattr(split_products, "GENES_PER_PRODUCT", 11)
    return request.param


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_products_equal_plain_ones(density):
    x, weight_kg = cells(density), torch.randn(K, G, generator=torch.Generator().manual_seed(0))
    split = GeneSplit(x)
    weight, sums = split.weight(weight_kg), split.weight(torch.zeros(K, G))
    products = []
    for block in split.blocks(x):
        products.append(split.product(block, weight))
        split.add_transposed_product(products[-1], block, sums)
    assert [len(product) for product in products] == [20, 20, 20, 20, 20, 1]
    expected = torch.from_numpy(x.toarray()) @ weight_kg.T
    torch.testing.assert_close(torch.cat(products), expected)
    torch.testing.assert_close(split.joined(sums), expected.T @ torch.from_numpy(x.toarray()))
    torch.testing.assert_close(split.joined(weight), weight_kg)


def test_the_share_decides(dense_share):
    x = cells(1.0)
    split = GeneSplit(x)
    expected = np.flatnonzero((x.toarray() > 0).mean(axis=0) > dense_share)
    np.testing.assert_array_equal(split.often, expected)
    assert sorted([*split.often, *split.rarely]) == list(range(G))


def test_what_is_dense_is_bounded_by_the_block():
    split = GeneSplit(cells(1.0))
    assert all(block.often_no.numel() <= 20 * G for block in split.blocks(cells(1.0)))


def test_linear_equals_the_plain_product():
    x, weight = torch.randn(N, G), torch.randn(K, G)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    assert linear(x[:0], weight).shape == (0, K)


@pytest.mark.gpu
def test_a_gpu_multiplies_the_same():
    x, weight_kg = cells(0.5), torch.randn(K, G)
    split = GeneSplit(x, "cuda")
    weight = split.weight(weight_kg.to("cuda"))
    found = torch.cat([split.product(block, weight) for block in split.blocks(x)])
    torch.testing.assert_close(found.cpu(), torch.from_numpy(x.toarray()) @ weight_kg.T, rtol=1e-4, atol=1e-4)
