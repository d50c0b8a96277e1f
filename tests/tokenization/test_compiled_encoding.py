"""The compiled loops give, bit for bit, what the simple encoder gives, on random and on awkward cells."""

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellglot.tokenization import block_encoding
from cellglot.tokenization.block_encoding import BlockEncoder
from cellglot.tokenization.count_matrix import CountMatrix
from cellglot.tokenization.tokenization_report import TokenizationReport

from ..conftest import make_tokenizer, synthetic_cells

COLUMNS, VOCABULARY = 13, 11


def encode_both(counts, index_g, medians_v, *, n_counts=None, **options):
    """The two encoders' blocks of one matrix, read as from a file."""
    counts = sp.csr_matrix(counts)
    obs = pd.DataFrame(index=pd.RangeIndex(counts.shape[0]).astype(str))
    if n_counts is not None:
        obs["n_counts"] = n_counts
    var = pd.DataFrame(index=pd.RangeIndex(counts.shape[1]).astype(str))
    matrix = CountMatrix("cells", obs, var, lambda start, stop: counts[start:stop], {})
    medians_v = np.asarray(medians_v, dtype=np.float64)
    token_ids = np.arange(4, 4 + len(medians_v), dtype=np.int32)
    blocks = []
    for n_cells in (1, 10**6):
        encoder = BlockEncoder(
            matrix,
            np.asarray(index_g, dtype=np.int64),
            medians_v,
            token_ids,
            **{"max_length": 2048, "special": None, "n_cells": n_cells, **options},
        )
        assert encoder.compiled == (n_cells > 1)
        # Straight from the matrix: slicing would sum duplicates and sort columns.
        blocks.append(encoder(np.arange(counts.shape[0]), counts))
    return blocks


def assert_equal_blocks(simple, compiled):
    np.testing.assert_array_equal(compiled.tokens, simple.tokens)
    np.testing.assert_array_equal(compiled.offsets, simple.offsets)
    assert compiled.tokens.dtype == simple.tokens.dtype == np.int32
    assert compiled.n_truncated == simple.n_truncated
    assert (compiled.total_counts, compiled.matched_counts) == (simple.total_counts, simple.matched_counts)


# Unsorted columns, repeated ones, explicit zeros: all that CSR allows.
stored_cells = st.lists(
    st.lists(st.tuples(st.integers(0, COLUMNS - 1), st.sampled_from([0, 1, 1, 2, 3, 5, 40, 2**24 + 1])), max_size=17),
    min_size=1,
    max_size=5,
)
# -1 leaves a column out, repeats collapse columns.
meanings = st.lists(st.integers(-1, VOCABULARY - 1), min_size=COLUMNS, max_size=COLUMNS)
# Equal medians tie; neighbours in float64 differ in the last bit only, which division may round away.
near = np.nextafter(1.1, 2)
medians = st.lists(st.sampled_from([1.0, 1.1, near, 3.7, 1e-3, 1e5]), min_size=VOCABULARY, max_size=VOCABULARY)


@settings(max_examples=150, deadline=None)
@given(
    cells=stored_cells,
    index_g=meanings,
    medians_v=medians,
    special=st.sampled_from([None, (2, 3)]),
    length=st.integers(3, 15),
    kind=st.sampled_from([np.float32, np.float64, np.int32, np.int64, np.uint16]),
    index_kind=st.sampled_from([np.int32, np.int64]),
    own_totals=st.booleans(),
)
def test_equals_the_simple_encoder(cells, index_g, medians_v, special, length, kind, index_kind, own_totals):
    indptr = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])]).astype(index_kind)
    columns = np.array([column for cell in cells for column, _ in cell], dtype=index_kind)
    values = np.array([value for cell in cells for _, value in cell]).astype(kind)
    counts = sp.csr_matrix((len(cells), COLUMNS), dtype=kind)
    # Set one by one: the constructor would narrow the indices.
    counts.data, counts.indices, counts.indptr = values, columns, indptr
    n_counts = None if own_totals else np.full(len(cells), 2.0**40)
    simple, compiled = encode_both(counts, index_g, medians_v, max_length=length, special=special, n_counts=n_counts)
    assert_equal_blocks(simple, compiled)


@pytest.mark.parametrize("n_genes", [2045, 2046, 2047, 2048, 2049, 2053])
@pytest.mark.parametrize("special", [None, (2, 3)])
def test_full_length_and_around_it(n_genes, special):
    rng = np.random.default_rng(n_genes)
    counts = rng.poisson(0.3, (3, n_genes)).astype(np.float32) + np.array([[1], [0], [0]], dtype=np.float32)
    simple, compiled = encode_both(counts, rng.permutation(n_genes), rng.lognormal(size=n_genes), special=special)
    assert_equal_blocks(simple, compiled)
    assert compiled.n_truncated == (n_genes > (2046 if special else 2048))


@pytest.mark.parametrize(
    "medians_v",
    [
        np.ones(4999),
        # Keys that agree in their first 22 bits and differ after, in an order that insertion alone would sort slowly
        1 + np.arange(4999)[::-1] * 2.0**-45,
        1 + np.random.default_rng(0).permutation(4999) * 2.0**-50,
        np.concatenate([[1e-300], 1 + np.random.default_rng(0).permutation(4998) * 2.0**-50]),
        np.random.default_rng(0).lognormal(0, 200, 4999).clip(1e-300, 1e300),
        # Values that overflow to infinity or fall to zero all tie
        np.tile([5e-324, 1.0, 1e308], 1667)[:4999],
    ],
    ids=["all equal", "descending", "equal prefixes", "an outlier", "full range", "denormal"],
)
def test_sorts_awkward_keys_as_the_stable_sort_does(medians_v):
    counts = np.random.default_rng(1).integers(0, 3, (3, 4999))
    simple, compiled = encode_both(counts, np.arange(4999), medians_v, max_length=5000)
    assert_equal_blocks(simple, compiled)


def test_fractions_are_summed_in_the_same_order():
    rng = np.random.default_rng(3)
    counts = sp.random(7, COLUMNS, density=0.8, random_state=rng, dtype=np.float32, format="csr")
    index_g = rng.integers(0, 5, COLUMNS)
    simple, compiled = encode_both(counts, index_g, rng.lognormal(size=VOCABULARY), allow_normalized=True)
    assert_equal_blocks(simple, compiled)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 0.5])
def test_values_that_are_no_counts_are_refused_alike(bad, monkeypatch):
    adata = synthetic_cells(23, 7)
    adata.X = adata.X.toarray() + 1
    adata.X[17, 3] = bad
    messages = []
    for few in (10**6, 0):
        monkeypatch.setattr(block_encoding, "FEW_CELLS", few)
        with pytest.raises(ValueError, match="cell 'cell17', gene 'ENSG00000000004'") as error:
            make_tokenizer().encode_anndata(adata, cells_per_block=5)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_threads_keep_the_order_of_cells_and_the_report(tmp_path, monkeypatch):
    adata = synthetic_cells(211, 7)
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.arange(211) % 7 > 0)[:, None])
    adata.obs["n_counts"] = adata.X.sum(axis=1).A1 + 1
    adata.write_h5ad(tmp_path / "c.h5ad", compression="gzip")
    mask = np.arange(211) % 5 != 3
    found = []
    for few in (10**6, 0):
        monkeypatch.setattr(block_encoding, "FEW_CELLS", few)
        for source in (adata, tmp_path / "c.h5ad"):
            report = TokenizationReport()
            encoded = make_tokenizer(7, "v2").encode_anndata(
                source,
                obs_columns=["donor"],
                cells=mask,
                cells_per_block=3,
                max_length=6,
                empty_cells="drop",
                report=report,
            )
            report.name = ""
            found.append((encoded[:], report))
    assert all(each == found[0] for each in found[1:])
    assert found[0][1].n_empty_cells > 0
    assert found[0][1].n_truncated_cells > 0


def test_an_abandoned_iterator_ends_its_threads_and_closes_the_file(tmp_path, monkeypatch):
    import threading

    synthetic_cells(97, 7).write_h5ad(tmp_path / "c.h5ad", compression="gzip")
    monkeypatch.setattr(block_encoding, "FEW_CELLS", 0)
    before = threading.active_count()
    batches: Any = make_tokenizer().iter_encoded(tmp_path / "c.h5ad", cells_per_block=2)
    next(batches)
    batches.close()
    assert threading.active_count() == before
    # HDF5 refuses to open a file for writing that is still open for reading.
    synthetic_cells(5, 7).write_h5ad(tmp_path / "c.h5ad")


FRESH = """
import sys
import numpy as np
from cellglot import RankValueTokenizer
tokenizer = RankValueTokenizer.from_pretrained(sys.argv[1])
tokenizer.encode_expression(np.ones((3, 7)), list(tokenizer.gene_medians))
assert "numba" not in sys.modules, "numba was loaded for three cells"

from numba.core import caching
caching.CacheImpl._locator_classes = []
from cellglot.tokenization import block_encoding, compiled_encoding
block_encoding.FEW_CELLS = 0
print(tokenizer.encode_expression(np.arange(7), list(tokenizer.gene_medians))["input_ids"][0])
assert type(compiled_encoding.encode_block._cache) is caching.NullCache
"""


@pytest.mark.slow
def test_few_cells_do_not_wait_for_numba_and_no_cache_folder_is_needed(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[8, 7, 6, 5, 4, 3]"
