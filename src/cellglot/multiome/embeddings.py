"""Embeddings of genes and peaks to begin training with: what goes together in the training cells lies together.

A set head scores a feature by its embedding's product with what it makes of the embeddings of the cell's features.
Random embeddings have to be turned towards each other first, which takes most of the steps that small data allows;
principal components of genes and peaks together hold the links between the modalities from the first step on.
"""

from typing import Any

import numpy as np
import scipy.sparse as sp


def principal_embeddings(present_nf: sp.csr_matrix, width: int, seed: int = 0) -> np.ndarray:
    """(f, width) float32 loadings of the features, each component times its singular value; root mean square
    1 / sqrt(width), as that of random embeddings. Components that the cells do not have are 0.

    present_nf  CSR (cells, f) of ones, never made dense: centring is implicit
    """
    from sklearn.decomposition import PCA

    n_components = min(width, min(present_nf.shape) - 1)
    pca = PCA(n_components, svd_solver="arpack", random_state=seed).fit(present_nf)
    embeddings = np.zeros((present_nf.shape[1], width), dtype=np.float32)
    embeddings[:, :n_components] = (pca.components_ * pca.singular_values_[:, None]).T
    return embeddings / (np.sqrt(np.mean(np.square(embeddings))) * np.sqrt(width))


def begin_with_principal_embeddings(model: Any, present_nf: sp.csr_matrix, seed: int = 0) -> None:
    """Sets the embeddings of a multiome T5's genes and peaks, in place; those of other tokens stay.

    model       a `MultiomeT5ForFeaturePrediction` or other multiome T5 with a token for each feature
    present_nf  (cells, genes + peaks) CSR of ones: training cells
    Raises      ValueError for other features than the model's
    """
    import torch

    config = model.config
    n_features = config.num_genes + config.num_peaks
    if present_nf.shape[1] != n_features:
        raise ValueError(
            f"Expected columns of the model's {config.num_genes:,} genes and {config.num_peaks:,} peaks, found "
            f"{present_nf.shape[1]:,}."
        )
    weight = model.get_input_embeddings().weight
    first = config.first_gene_token_id
    embeddings = torch.from_numpy(principal_embeddings(present_nf, config.d_model, seed))
    with torch.no_grad():
        weight[first : first + n_features] = embeddings.to(weight)
