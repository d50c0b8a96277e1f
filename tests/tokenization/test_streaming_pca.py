"""Principal components in streaming passes, held against scikit-learn's of the dense matrix in float64."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA

from cellglot.tokenization.streaming_pca import ExpressionMoments, principal_components

N, G = 211, 89


def expression(n=N, g=G, seed=0) -> sp.csr_matrix:
    """Sparse cells of a few types, far from centred."""
    rng = np.random.default_rng(seed)
    types = rng.gamma(0.4, 2, size=(5, g)).astype(np.float32)
    return sp.csr_matrix(np.log1p(rng.poisson(types[rng.integers(5, size=n)])).astype(np.float32))


def blocks(matrix, size=50):
    return lambda: (matrix[start : start + size] for start in range(0, matrix.shape[0], size))


def mean(matrix):
    return np.asarray(matrix.mean(axis=0, dtype=np.float64)).ravel()


def captured(matrix, components):
    """Variance of the cells along each component."""
    return (matrix.toarray().astype(np.float64) @ components.T.astype(np.float64)).var(axis=0, ddof=1)


@pytest.mark.parametrize(("n", "g"), [(N, G), (G, N)])
def test_components_equal_scikit_learns_where_a_block_spans_all(n, g):
    x = expression(n, g)
    k = 61
    oracle: Any = PCA(k, svd_solver="full").fit(x.toarray().astype(np.float64))
    found = principal_components(blocks(x), mean(x), k)
    # Float32 sums of a few hundred cells
    np.testing.assert_allclose(found.explained_variance_k, oracle.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(found.components_kg @ found.components_kg.T, np.eye(k), atol=1e-5)
    # Cosines of the angles between the two subspaces
    cosines = np.linalg.svd(found.components_kg @ oracle.components_.T)[1]
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    # The leading ones stand apart, so that each is determined but for its sign, which is fixed.
    signs = np.sign(oracle.components_[np.arange(k), np.abs(oracle.components_).argmax(axis=1)])
    np.testing.assert_allclose(found.components_kg[:4], (signs[:, None] * oracle.components_)[:4], atol=1e-3)


def test_more_passes_come_nearer_and_never_claim_more_than_they_capture():
    x = expression(701, 503)
    exact = PCA(20, svd_solver="full").fit(x.toarray().astype(np.float64)).explained_variance_
    shares = []
    for passes in (1, 2, 3):
        found = principal_components(blocks(x), mean(x), 20, passes=passes, oversampling=10)
        variance = captured(x, found.components_kg)
        assert (found.explained_variance_k <= variance * (1 + 1e-5)).all()
        assert (found.explained_variance_k <= exact * (1 + 1e-5)).all()
        shares.append(variance.sum() / exact.sum())
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.99


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("file", "k"), [("zhuang_merfish_mouse_brain_1000x1122", 150), ("zeisel2015_mouse_cortex_500x3529", 100)]
)
def test_default_passes_capture_what_the_exact_components_do_on_real_cells(real_data, file, k):
    import anndata as ad

    adata: Any = ad.read_h5ad(real_data / "cells" / f"{file}.h5ad")
    counts = adata.X.toarray()
    x = sp.csr_matrix(np.log1p(counts * (1e4 / counts.sum(axis=1, keepdims=True))))
    exact = PCA(k, svd_solver="full").fit(x.toarray().astype(np.float64)).explained_variance_
    found = principal_components(blocks(x, 256), mean(x), k)
    assert captured(x, found.components_kg).sum() > 0.999 * exact.sum()


def test_blocks_do_not_matter():
    x = expression()
    one, many = (principal_components(blocks(x, size), mean(x), 11, oversampling=5) for size in (N, 7))
    np.testing.assert_allclose(one.explained_variance_k, many.explained_variance_k, rtol=1e-5)
    np.testing.assert_allclose(one.components_kg, many.components_kg, atol=1e-3)


def test_same_seed_same_components():
    x = expression()
    first, second = (principal_components(blocks(x), mean(x), 7, oversampling=3, passes=1, seed=5) for _ in range(2))
    other = principal_components(blocks(x), mean(x), 7, oversampling=3, passes=1, seed=6)
    np.testing.assert_array_equal(first.components_kg, second.components_kg)
    assert not np.array_equal(first.components_kg, other.components_kg)


def test_a_large_mean_does_not_drown_small_components():
    x = expression(173, 67)
    shifted = sp.csr_matrix(x.toarray() + np.float32(100))
    exact = PCA(60, svd_solver="full").fit(shifted.toarray().astype(np.float64)).explained_variance_
    found = principal_components(blocks(shifted), mean(shifted), 60)
    # Values near 100 are themselves given to 8e-6 only.
    np.testing.assert_allclose(found.explained_variance_k, exact, rtol=1e-3)


def test_cells_that_vary_in_few_directions_give_few_components():
    rng = np.random.default_rng(0)
    x = sp.csr_matrix((rng.random((97, 3)) @ rng.random((3, 41))).astype(np.float32))
    found = principal_components(blocks(x), mean(x), 17)
    assert found.components_kg.shape == (3, 41)
    np.testing.assert_allclose(found.components_kg @ found.components_kg.T, np.eye(3), atol=1e-5)


def test_moments_equal_those_of_the_dense_matrix():
    x = expression()
    moments = ExpressionMoments(G)
    for block in blocks(x)():
        moments.update(block)
    dense = x.toarray().astype(np.float64)
    np.testing.assert_allclose(moments.mean_g, dense.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance_g, dense.var(axis=0, ddof=1), rtol=1e-9)
    np.testing.assert_array_equal(moments.max_g, dense.max(axis=0))
    np.testing.assert_array_equal(moments.n_detected_g, (dense > 0).sum(axis=0))


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    x = expression()
    cpu, gpu = (principal_components(blocks(x), mean(x), 11, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cpu.explained_variance_k, gpu.explained_variance_k, rtol=1e-4)


@pytest.mark.parametrize(("passes", "k", "n"), [(0, 3, 20), (1, 0, 20), (1, 3, 1)])
def test_what_cannot_be_found_is_refused(passes, k, n):
    x = expression(n)
    with pytest.raises(ValueError, match="Expected at least"):
        principal_components(blocks(x), mean(x), k, passes=passes)
