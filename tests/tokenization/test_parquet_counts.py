"""Parquet corpora read in ranges of cells, held against the reader that loads a split whole."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from cellglot.datasets_scripts.ragged_counts import ragged_table, read_ragged
from cellglot.tokenization.parquet_counts import GENE_TABLE, is_parquet_corpus, parquet_counts

from ..conftest import synthetic_cells

N, G, GROUP = 83, 31, 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two files of row groups of ten cells, the last ones smaller; some cells without counts."""
    folder, adata = tmp_path_factory.mktemp("corpus"), synthetic_cells(N, G, density=0.2)
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.arange(N) % 7 > 0)[:, None])
    symbols = [f"Gene{i}" for i in range(G)]
    pd.DataFrame({"gene_id": adata.var_names, "gene_symbol": symbols}).to_parquet(folder / GENE_TABLE)
    for i, part in enumerate((adata[:37], adata[37:])):
        table = ragged_table(sp.csr_matrix(part.X), part.obs)
        pq.write_table(table, folder / f"brain-train-0000{i}-of-00002.parquet", row_group_size=GROUP)
    return folder


def test_every_range_is_that_of_the_whole(corpus):
    matrix, whole = parquet_counts(corpus), read_ragged(corpus, "train")
    expected = whole.X.toarray()
    for start, stop in [(0, N), (0, 1), (9, 11), (10, 20), (36, 38), (30, 71), (82, 83), (5, 6), (40, 40)]:
        found = matrix.read(start, stop)
        assert found.shape == (stop - start, G)
        np.testing.assert_array_equal(found.toarray(), expected[start:stop])


def test_annotations_are_those_of_the_whole(corpus):
    matrix, whole = parquet_counts(corpus), read_ragged(corpus, "train")
    assert (matrix.n_cells, matrix.n_genes) == (N, G)
    pd.testing.assert_frame_equal(matrix.obs, whole.obs, check_names=False)
    assert matrix.gene_names() == list(whole.var_names)
    assert matrix.gene_names("gene_symbol") == list(whole.var["gene_symbol"])


def test_one_file_is_a_corpus_beside_its_genes(corpus):
    first, second = sorted(corpus.glob("brain-*.parquet"))
    assert is_parquet_corpus(corpus)
    assert is_parquet_corpus(second)
    assert not is_parquet_corpus(corpus.parent)
    assert [parquet_counts(path).n_cells for path in (first, second)] == [37, N - 37]
    np.testing.assert_array_equal(
        parquet_counts(second).read(0, 5).toarray(), parquet_counts(corpus).read(37, 42).toarray()
    )


def test_other_tables_are_refused(corpus, tmp_path):
    (tmp_path / GENE_TABLE).write_bytes((corpus / GENE_TABLE).read_bytes())
    with pytest.raises(ValueError, match="expected Parquet files with columns gene_index and count"):
        parquet_counts(tmp_path)
    pd.DataFrame({"input_ids": [[1, 2]]}).to_parquet(tmp_path / "tokens.parquet")
    with pytest.raises(ValueError, match="expected Parquet files with columns gene_index and count"):
        parquet_counts(tmp_path)
