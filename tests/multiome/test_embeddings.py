"""Embeddings to begin with: principal components of genes and peaks together."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from cellglot.modeling.multiome import MultiomeT5Config, MultiomeT5ForFeaturePrediction
from cellglot.multiome import begin_with_principal_embeddings, principal_embeddings

GENES, PEAKS, WIDTH = 7, 23, 8


@pytest.fixture
def present() -> sp.csr_matrix:
    """Cells of two kinds: half of the genes go with half of the peaks."""
    rng = np.random.default_rng(0)
    kind = rng.integers(2, size=(101, 1))
    own = np.concatenate([np.arange(GENES) % 2, np.arange(PEAKS) % 2])[None] == kind
    return sp.csr_matrix((rng.random(own.shape) < np.where(own, 0.8, 0.1)).astype(np.float32))


def test_products_of_embeddings_are_covariances(present):
    """Of all components together; their root mean square is that of random embeddings."""
    embeddings = principal_embeddings(present, GENES + PEAKS)
    covariance = np.cov(present.toarray().T)
    products = embeddings @ embeddings.T
    assert np.corrcoef(products.ravel(), covariance.ravel())[0, 1] > 0.999
    assert np.sqrt(np.mean(embeddings**2)) == pytest.approx((GENES + PEAKS) ** -0.5)


def test_fewer_cells_than_components_leave_zeros(present):
    embeddings = principal_embeddings(present[:5], WIDTH)
    assert (embeddings[:, :4] != 0).any(axis=0).all()
    assert (embeddings[:, 4:] == 0).all()


def test_a_model_begins_with_them_and_keeps_its_other_tokens(present):
    sizes: Any = {
        "d_model": WIDTH,
        "d_kv": 4,
        "num_heads": 2,
        "num_layers": 1,
        "d_ff": 8,
        "vocab_size": 5 + GENES + PEAKS,
    }
    fields: Any = {"first_gene_token_id": 5, "num_genes": GENES, "num_peaks": PEAKS}
    model = MultiomeT5ForFeaturePrediction(MultiomeT5Config(**sizes, **fields))
    weight = model.get_parameter("shared.weight").data
    before = weight.clone()
    begin_with_principal_embeddings(model, present)
    assert (weight[:5] == before[:5]).all()
    np.testing.assert_allclose(weight[5:].numpy(), principal_embeddings(present, WIDTH), rtol=1e-5)
    genes, peaks = weight[5 : 5 + GENES], weight[5 + GENES :]
    together = (genes @ peaks.T)[::2]
    assert together[:, ::2].min() > together[:, 1::2].max()
    with pytest.raises(ValueError, match="7 genes and 23 peaks, found 29"):
        begin_with_principal_embeddings(model, sp.csr_matrix(present[:, 1:]))
