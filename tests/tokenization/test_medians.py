"""Streaming medians against NumPy, exact and sketched, in one pass or merged."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellglot.tokenization.medians import NonzeroMedians, vocabulary_from_corpus
from cellglot.tokenization.rank_value import SPECIAL_TOKENS, RankValueTokenizer

from ..conftest import ensembl, synthetic_cells


def numpy_medians(counts):
    values = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 10_000
    return {g: np.median(v[v > 0]) for g, v in zip(ensembl(counts.shape[1]), values.T, strict=True) if (v > 0).any()}


def accumulate(blocks, **options):
    total = NonzeroMedians(**options)
    for block in blocks:
        total.update(sp.csr_matrix(block), total.positions(ensembl(block.shape[1])), block.sum(axis=1))
    return total


counts = st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=2, max_size=12).map(np.array)


@settings(max_examples=50, deadline=None)
@given(counts=counts)
def test_exact_equals_numpy(counts):
    total = accumulate(np.array_split(counts, 2))
    assert total.medians() == numpy_medians(counts)
    assert total.relative_error == 0.0


@settings(max_examples=50, deadline=None)
@given(counts=counts, error=st.sampled_from([0.001, 0.01, 0.1]))
def test_sketch_stays_within_its_stated_error(counts, error):
    total = accumulate(np.array_split(counts, 2), max_exact_values=3, sketch_error=error)
    expected = numpy_medians(counts)
    assert total.medians().keys() == expected.keys()
    if total.relative_error:
        assert total.relative_error == error
    for gene, median in total.medians().items():
        assert median == pytest.approx(expected[gene], rel=error * (1 + 1e-9))


@pytest.mark.parametrize("limit", [10**6, 10])
def test_saved_is_loaded_and_goes_on(tmp_path, limit):
    rng = np.random.default_rng(1)
    blocks = [rng.poisson(1.0, size=(41, 7)), rng.poisson(2.0, size=(31, 11))]
    accumulate(blocks[:1], max_exact_values=limit).save(tmp_path / "part")
    loaded = NonzeroMedians.load(tmp_path / "part")
    loaded.merge(accumulate(blocks[1:], max_exact_values=limit))
    whole = accumulate(blocks, max_exact_values=limit)
    assert loaded.medians() == whole.medians()
    assert (loaded.relative_error, loaded.n_cells) == (whole.relative_error, 72)


@pytest.mark.parametrize("limits", [(10**6, 10**6), (10, 10**6), (10**6, 10), (10, 10)])
def test_merging_equals_one_pass(limits):
    rng = np.random.default_rng(0)
    blocks = [rng.poisson(1.0, size=(40, 7)), rng.poisson(2.0, size=(30, 11))]  # the second file has more genes
    parts = [accumulate([b], max_exact_values=m) for b, m in zip(blocks, limits, strict=True)]
    parts[0].merge(parts[1])
    whole = accumulate(blocks, max_exact_values=min(limits))
    if limits == (10, 10) or limits == (10**6, 10**6):
        assert parts[0].medians() == whole.medians()
    exact = accumulate(blocks).medians()
    for gene, median in parts[0].medians().items():
        assert median == pytest.approx(exact[gene], rel=parts[0].relative_error + 1e-12)


def test_sketches_of_different_error_do_not_merge():
    with pytest.raises(ValueError, match="cannot be merged"):
        NonzeroMedians(sketch_error=0.01).merge(NonzeroMedians())


def test_vocabulary_of_marked_cells_of_several_files(tmp_path):
    first, second = synthetic_cells(40, 7), synthetic_cells(30, 11, seed=1)
    second.write_h5ad(tmp_path / "b.h5ad")
    mask = np.arange(40) < 20
    table = vocabulary_from_corpus(
        [first, tmp_path / "b.h5ad"], special_tokens=SPECIAL_TOKENS["v2"], cells=[mask, None], progress=False
    )
    assert table["token"].tolist()[:4] == list(SPECIAL_TOKENS["v2"])
    assert table["token"].tolist()[4:] == sorted(table["token"].tolist()[4:])
    wide = np.hstack([first.X.toarray()[mask], np.zeros((20, 4))])
    expected = numpy_medians(np.vstack([wide, second.X.toarray()]))
    medians = dict(zip(table["token"][4:], table["nonzero_median"][4:], strict=True))
    assert medians == pytest.approx(expected, rel=1e-15)
    assert len(RankValueTokenizer.from_vocabulary(table, "v2")) == len(expected) + 4


def test_versions_and_aliases_are_one_gene():
    adata = synthetic_cells(20, 3)
    renamed = adata.copy()
    renamed.var_names = ["ensg00000000001.7", "SYMBOL2", "ENSG00000000003"]
    options = {"special_tokens": SPECIAL_TOKENS["v1"], "aliases": {"SYMBOL2": "ENSG00000000002"}, "progress": False}
    assert vocabulary_from_corpus([renamed], **options).equals(vocabulary_from_corpus([adata], **options))


def test_columns_without_a_name_are_no_gene():
    adata = synthetic_cells(20, 5)
    adata.var["ensembl_id"] = [*ensembl(3), "", "nan"]
    table = vocabulary_from_corpus([adata], special_tokens=SPECIAL_TOKENS["v1"], progress=False)
    assert table["token"].tolist() == [*SPECIAL_TOKENS["v1"], *ensembl(3)]


def test_cells_that_failed_a_filter_do_not_count():
    adata = synthetic_cells(40, 7)
    kept = np.arange(40) % 3 > 0
    expected = vocabulary_from_corpus([adata[kept].copy()], special_tokens=SPECIAL_TOKENS["v1"], progress=False)
    adata.obs["filter_pass"] = kept.astype(int)
    assert vocabulary_from_corpus([adata], special_tokens=SPECIAL_TOKENS["v1"], progress=False).equals(expected)


def test_nothing_to_learn_from():
    adata = synthetic_cells(4, 3)
    adata.X = sp.csr_matrix(adata.X.shape)
    with pytest.raises(ValueError, match="No counts above zero in 4 cells"):
        vocabulary_from_corpus([adata], special_tokens=SPECIAL_TOKENS["v1"], progress=False)


@pytest.mark.realdata
def test_sketch_on_real_cells(real_data):
    import anndata as ad

    cells: Any = ad.read_h5ad(real_data / "golden" / "scmixology150_input.h5ad")
    exact, sketch = NonzeroMedians(), NonzeroMedians(max_exact_values=1000)
    for total in (exact, sketch):
        total.update(cells.X, total.positions(cells.var["ensembl_id"]), cells.obs["n_counts"].to_numpy())
    a, b = exact.medians(), sketch.medians()
    assert a.keys() == b.keys()
    worst = max(abs(b[g] / a[g] - 1) for g in a)
    assert 0 < worst <= sketch.relative_error
