"""Rank-value tokens against a hand-worked cell, a ten-line oracle and the properties of the encoding."""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorWithPadding

import cellglot  # noqa: F401 (registers the tokenizer)
from cellglot.tokenization.rank_encoding import rank_value_tokens
from cellglot.tokenization.rank_value import RankValueTokenizer, TokenizationReport

from ..conftest import ensembl, make_tokenizer, synthetic_cells, vocabulary_table

GENES = ensembl(7)


def oracle(counts, n_counts, medians, *, layout="v1", max_length=2048):
    """Rank-value encoding from the paper's words, one gene at a time."""
    first_gene = 2 if layout == "v1" else 4
    ranked = []
    for gene, x in enumerate(counts):
        if x > 0:
            ranked.append((-(float(x) / float(n_counts) * 10_000 / float(medians[gene])), first_gene + gene))
    tokens = [token for _, token in sorted(ranked)]
    if layout == "v1":
        return tokens[:max_length]
    return [2, *tokens[: max_length - 2], 3] if tokens else []


def test_hand_worked_cell():
    # 10 counts in all. Per 10,000 and divided by the median:
    # g1 2000/1 = 2000, g3 5000/4 = 1250, g4 3000/2 = 1500; genes 2 and 5 to 7 are absent. Ids start at 2.
    tokenizer = make_tokenizer(7, medians=np.array([1.0, 1, 4, 2, 1, 1, 1]))
    encoded = tokenizer.encode_expression([2, 0, 5, 3, 0, 0, 0], GENES)
    assert encoded == {"input_ids": [[2, 5, 4]], "length": [3]}


def test_ties_keep_the_order_of_token_ids():
    assert make_tokenizer().encode_expression([1, 1, 0, 1, 1, 1, 1], GENES[::-1])["input_ids"] == [[2, 3, 4, 5, 7, 8]]


def test_given_totals_replace_the_sum_but_not_the_ranks():
    tokenizer = make_tokenizer(7, medians=np.arange(1.0, 8))
    counts = [[4, 1, 0, 0, 3, 2, 1]]
    assert tokenizer.encode_expression(counts, GENES, n_counts=50) == tokenizer.encode_expression(counts, GENES)


cells = st.lists(st.lists(st.integers(0, 6), min_size=7, max_size=7), min_size=1, max_size=5)
medians = st.lists(st.sampled_from([0.5, 1.0, 1.1, 2.0, 3.7]), min_size=7, max_size=7)


@settings(max_examples=60, deadline=None)
@given(counts=cells, medians=medians, layout=st.sampled_from(["v1", "v2"]), length=st.integers(3, 9))
def test_equals_oracle_in_every_container(counts, medians, layout, length):
    tokenizer = make_tokenizer(7, layout, np.array(medians))
    expected = [oracle(c, sum(c), medians, layout=layout, max_length=length) for c in counts]
    for container in (np.array, sp.csr_matrix, sp.csc_matrix, sp.coo_matrix):
        for dtype in (np.int32, np.float32, np.float64, np.uint16):
            encoded = tokenizer.encode_expression(container(np.array(counts, dtype=dtype)), GENES, max_length=length)
            assert encoded == {"input_ids": expected, "length": [len(e) for e in expected]}


@settings(max_examples=20, deadline=None)
@given(counts=cells, order=st.permutations(range(7)))
def test_order_of_columns_does_not_matter(counts, order):
    tokenizer = make_tokenizer(7, medians=np.arange(1.0, 8))
    shuffled = np.array(counts)[:, order]
    assert tokenizer.encode_expression(shuffled, [GENES[i] for i in order]) == tokenizer.encode_expression(
        counts, GENES
    )


def test_single_cell_function_equals_tokenizer():
    tokenizer = make_tokenizer(7, medians=np.arange(1.0, 8))
    counts = np.array([3, 0, 2, 2, 9, 0, 1])
    ids = rank_value_tokens(counts, counts.sum(), np.arange(1.0, 8), np.arange(2, 9), max_genes=4)
    assert ids.tolist() == tokenizer.encode_expression(counts, GENES, max_length=4)["input_ids"][0]


def test_full_length_and_one_gene_more():
    tokenizer = make_tokenizer(2049)
    counts = np.ones((2, 2049), dtype=int)
    counts[0, 7] = 0
    report = TokenizationReport()
    encoded = tokenizer.encode_expression(counts, ensembl(2049), report=report)
    assert encoded["length"] == [2048, 2048]
    assert report.n_truncated_cells == 1
    wrapped = make_tokenizer(4095, "v2").encode_expression(np.ones((1, 4095), dtype=int), ensembl(4095))["input_ids"][0]
    assert (len(wrapped), wrapped[0], wrapped[-1]) == (4096, 2, 3)


def test_columns_of_one_gene_are_summed():
    tokenizer = make_tokenizer(3, aliases={"OLD": GENES[0]})
    encoded = tokenizer.encode_expression([[1, 3, 3]], ["OLD", GENES[1], GENES[0] + ".4"])
    assert encoded["input_ids"] == [[2, 3]]  # 1 + 3 = 4 counts of gene 1 against 3 of gene 2


def test_inputs_are_left_unchanged():
    adata = synthetic_cells(11, 7)
    before = adata.copy()
    make_tokenizer().encode_anndata(adata, obs_columns=["cell_type"])
    assert (adata.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)


def test_explicit_zeros_are_no_detections():
    counts = sp.csr_matrix((np.array([0.0, 2.0]), np.array([0, 1]), np.array([0, 2])), shape=(1, 7))
    assert make_tokenizer().encode_expression(counts, GENES)["input_ids"] == [[3]]


def test_empty_cells_are_kept_dropped_or_refused():
    adata = synthetic_cells(5, 7)
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.arange(5) != 2)[:, None])
    for layout in ("v1", "v2"):
        tokenizer = make_tokenizer(7, layout)
        report = TokenizationReport()
        kept = tokenizer.encode_anndata(adata, report=report)
        assert kept["length"][2] == 0
        assert kept["input_ids"][2] == []
        assert report.n_empty_cells == 1
        assert len(tokenizer.encode_anndata(adata, empty_cells="drop")) == 4
        with pytest.raises(ValueError, match=r"1 cells of this block .*'cell2'"):
            tokenizer.encode_anndata(adata, empty_cells="error")


def test_blocks_do_not_change_the_result(tmp_path):
    adata = synthetic_cells(23, 7)
    tokenizer = make_tokenizer()
    whole = tokenizer.encode_anndata(adata, obs_columns=["cell_type"])
    blocks = tokenizer.encode_anndata(
        adata, obs_columns=["cell_type"], cells_per_block=4, cache_file=tmp_path / "t.arrow"
    )
    assert whole[:] == blocks[:]
    assert [p.name for p in tmp_path.iterdir()] == ["t.arrow"]


def test_filter_pass_and_mask_select_cells():
    adata = synthetic_cells(6, 7)
    adata.obs["filter_pass"] = [1, 0, 1, 1, 0, 1]
    mask = np.array([True, True, True, False, False, True])
    encoded = make_tokenizer().encode_anndata(adata, cells=mask, obs_columns=["donor"])
    assert encoded["donor"][:] == adata.obs["donor"].iloc[[0, 2, 5]].tolist()


def test_obs_columns_keep_their_types_and_missing_values():
    adata = synthetic_cells(4, 7)
    adata.obs["age"] = [1.5, np.nan, 3.0, 4.0]
    adata.obs["kind"] = pd.Categorical(["a", None, "b", "a"])
    # One cell a block, so that some blocks hold missing values only.
    encoded = make_tokenizer().encode_anndata(adata, obs_columns=["age", "kind"], cells_per_block=1)
    assert encoded["age"][:] == [1.5, None, 3.0, 4.0]
    assert encoded["kind"][:] == ["a", None, "b", "a"]


def test_interrupted_write_leaves_nothing(tmp_path):
    adata = synthetic_cells(9, 7)
    adata.X = adata.X.toarray()
    adata.X[8, 0] = 0.5
    with pytest.raises(ValueError, match="not an integer"):
        make_tokenizer().encode_anndata(adata, cells_per_block=4, cache_file=tmp_path / "t.arrow")
    assert list(tmp_path.iterdir()) == []


# ---- bad input: what was expected, what was found, how to mend it


def bad(change, match, **options):
    adata = synthetic_cells(6, 7)
    adata.X = adata.X.toarray() + 1
    changed = change(adata)
    adata = adata if changed is None else changed
    with pytest.raises(ValueError, match=match):
        make_tokenizer().encode_anndata(adata, **options)


def test_no_gene_matches():
    def change(adata):
        adata.var_names = [f"SYM{i}" for i in range(7)]

    bad(change, "0 of 7 gene ids .* 'SYM0', 'SYM1', 'SYM2'; it holds e.g. 'ENSG00000000001'")


def test_most_counts_match_nothing():
    def change(adata):
        adata.var_names = [*GENES[:2], *[f"SYM{i}" for i in range(5)]]

    bad(change, r"only \d\d\.\d% of counts .* at least 50%.* min_matched_counts=")


def test_wrong_species():
    def change(adata):
        adata.var_names = [f"ENSMUSG{i:011d}" for i in range(7)]

    bad(change, "7 of 7 gene ids are mouse genes")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "cell 'cell3', gene 'ENSG00000000002' has -1; counts cannot be negative"),
        (np.nan, "has nan; counts must be finite"),
        (np.inf, "has inf; counts must be finite"),
        (0.5, "has 0.5, not an integer: .* No layer or `raw` here holds counts"),
    ],
)
@pytest.mark.parametrize("dense", [True, False])
def test_values_that_are_no_counts(value, message, dense):
    def change(adata):
        adata.X[3, 1] = value
        if not dense:
            adata.X = sp.csr_matrix(adata.X)

    bad(change, message)


def test_negative_integers():
    with pytest.raises(ValueError, match="negative"):
        make_tokenizer().encode_expression(np.array([[1, -2, 0, 0, 0, 0, 0]]), GENES)


def test_normalized_data_names_where_the_counts_are():
    def change(adata):
        adata.layers["counts"] = adata.X.copy()
        adata.X = np.log1p(adata.X)

    bad(change, r"looks normalized .* Raw counts seem to be in counts: pass layer='counts'")


def test_normalized_data_is_encoded_on_request():
    adata = synthetic_cells(6, 7)
    expected = make_tokenizer().encode_anndata(adata)["input_ids"][:]
    adata.X = adata.X * np.float32(0.5)
    adata.obs["n_counts"] = 1.0
    assert make_tokenizer().encode_anndata(adata, allow_normalized=True)["input_ids"][:] == expected


def test_n_counts_smaller_than_the_sum_or_zero():
    def change(adata):
        adata.obs["n_counts"] = 1e6
        adata.obs.loc["cell4", "n_counts"] = 3.0

    bad(change, r"obs\['n_counts'\] of cell 'cell4' is 3, smaller than the sum")

    def zero(adata):
        adata.obs["n_counts"] = 0

    bad(zero, r"is 0, smaller")

    def missing(adata):
        adata.obs["n_counts"] = np.nan

    bad(missing, r"is nan, smaller")


def test_duplicate_cell_names():
    def change(adata):
        adata.obs_names = ["a", "b", "a", "b", "c", "d"]

    bad(change, "2 cell names occur more than once, e.g. 'a', 'b'")
    adata = synthetic_cells(2, 7)
    adata.obs_names = ["a", "a"]
    assert len(make_tokenizer().encode_anndata(adata, allow_duplicate_names=True)) == 2


def test_missing_columns_layers_and_lengths():
    bad(lambda a: None, "obs has no column 'sex'; it has cell_type, donor", obs_columns=["sex"])
    bad(lambda a: None, "var has no column 'symbol'", gene_ids="symbol")
    bad(lambda a: None, "no layer 'counts'; it has X", layer="counts")
    bad(lambda a: None, "Expected max_length between 1 and the tokenizer's 2,048, found 4,000", max_length=4000)
    bad(lambda a: a[:0], "no cells")
    bad(lambda a: None, "Expected obs_columns as a list of names", obs_columns="donor")
    bad(lambda a: a.obs.insert(0, "length", 7), "other than 'input_ids' and 'length'", obs_columns=["length"])
    bad(lambda a: a.obs.insert(0, "n_counts", "many"), r"obs\['n_counts'\] holds object, not numbers .*'many'")
    bad(lambda a: a.obs.insert(0, "mix", [1, "x"] * 3), r"obs\['mix'\] mixes types", obs_columns=["mix"])
    bad(lambda a: None, "boolean mask of its 6 cells, found int64 of shape", cells=np.array([1, 2]))


def test_counts_and_names_of_different_number():
    with pytest.raises(ValueError, match="3 columns but gene_ids has 7"):
        make_tokenizer().encode_expression([[1, 2, 3]], GENES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="nonzero_median"), "lacks column 'nonzero_median'; it has token, token_id"),
        (lambda t: t.iloc[1:], "starts with <pad>, <mask>; this one starts with '<mask>'"),
        (lambda t: t.assign(token_id=t.token_id * 2), "Expected token ids 0 to 8"),
        (lambda t: t.assign(nonzero_median=t.nonzero_median.fillna(1).replace(1.0, 0)), "7 genes have no positive"),
        (lambda t: t.assign(token=[*t.token[:-1], t.token.iloc[-2]]), "no token twice"),
    ],
)
def test_bad_vocabularies(change, message):
    with pytest.raises(ValueError, match=message):
        RankValueTokenizer.from_vocabulary(change(vocabulary_table(GENES, np.ones(7))))


# ---- as a transformers tokenizer


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_saves_loads_pads_and_decodes(layout, tmp_path):
    tokenizer = make_tokenizer(7, layout, np.arange(1, 8) / 3, aliases={"TP53": GENES[4]})
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is RankValueTokenizer
    assert loaded.layout == layout
    assert loaded.gene_medians == tokenizer.gene_medians
    assert loaded.model_max_length == {"v1": 2048, "v2": 4096}[layout]
    encoded = loaded.encode_expression([[1, 0, 2, 0, 9, 0, 0], [0, 3, 0, 0, 0, 0, 0]], [*GENES[:4], "tp53", *GENES[5:]])
    assert encoded == tokenizer.encode_expression([[1, 0, 2, 0, 9, 0, 0], [0, 3, 0, 0, 0, 0, 0]], GENES)
    batch = DataCollatorWithPadding(loaded)([{"input_ids": ids} for ids in encoded["input_ids"]])
    assert batch["attention_mask"].sum(1).tolist() == encoded["length"]
    names = loaded.decode(encoded["input_ids"][1], skip_special_tokens=True)
    assert names == GENES[1]
    assert loaded(names)["input_ids"] == encoded["input_ids"][1]


def test_a_loaded_tokenizer_outlives_its_folder(tmp_path):
    import shutil

    make_tokenizer().save_pretrained(tmp_path / "t")
    loaded = RankValueTokenizer.from_pretrained(tmp_path / "t")
    shutil.rmtree(tmp_path / "t")
    assert loaded.encode_expression([1, 0, 0, 0, 0, 0, 0], GENES)["input_ids"] == [[2]]


def test_a_folder_without_medians_is_refused(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "gene_medians.json").unlink()
    with pytest.raises(OSError, match=r"no gene_medians\.json"):
        RankValueTokenizer.from_pretrained(tmp_path)


# ---- against the original


@pytest.mark.realdata
@pytest.mark.parametrize(("layout", "identical"), [("v1", 146), ("v2", 140)])
def test_tokens_equal_original_up_to_ties(real_data, layout, identical):
    folder = real_data / "geneformer"
    tokenizer = RankValueTokenizer.from_vocabulary(
        folder / f"vocabulary_{layout}.tsv.gz", layout, aliases=folder / f"gene_aliases_{layout}.tsv.gz"
    )
    source = real_data / "golden" / "scmixology150_input.h5ad"
    ours = tokenizer.encode_anndata(source, obs_columns=["cell_type"])
    theirs = pd.read_parquet(real_data / "golden" / f"official_{layout}_tokens_scmixology150.parquet")
    assert ours["length"][:] == theirs["length"].tolist()
    assert ours["cell_type"][:] == theirs["cell_type"].tolist()

    # Values in float64 of every gene of every cell, to tell ties from errors.
    adata: Any = ad.read_h5ad(source)
    match = tokenizer.resolver.match(adata.var["ensembl_id"])
    medians = np.array(list(tokenizer.gene_medians.values()))
    first_gene = int(tokenizer.gene_token_ids[0])
    n_identical = 0
    for n, (mine, original) in enumerate(zip(ours["input_ids"], theirs["input_ids"], strict=True)):
        counts = np.zeros(len(medians))
        row = np.asarray(adata.X[n].todense(), dtype=np.float64).ravel()
        np.add.at(counts, match.index_g[match.index_g >= 0], row[match.index_g >= 0])
        values = counts / adata.obs["n_counts"].iloc[n] * 10_000 / medians
        mine, original = np.array(mine), np.array(original)
        n_identical += bool((mine == original).all())
        genes = mine >= first_gene
        assert (genes == (original >= first_gene)).all()
        # The same value at every rank, to the precision of the float32 that the original mixes in.
        np.testing.assert_allclose(values[mine[genes] - first_gene], values[original[genes] - first_gene], rtol=1e-6)
        assert len(set(mine)) == len(mine)
    assert n_identical == identical


@pytest.mark.realdata
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_versioned_ids_give_the_same_tokens(real_data, layout):
    folder = real_data / "geneformer"
    tokenizer = RankValueTokenizer.from_vocabulary(
        folder / f"vocabulary_{layout}.tsv.gz", layout, aliases=folder / f"gene_aliases_{layout}.tsv.gz"
    )
    adata = ad.read_h5ad(real_data / "golden" / "scmixology150_input.h5ad")[:5].copy()
    expected = tokenizer.encode_anndata(adata)["input_ids"][:]
    adata.var["ensembl_id"] = [f"{g.lower()}.{i % 9}" if i % 2 else g for i, g in enumerate(adata.var["ensembl_id"])]
    assert tokenizer.encode_anndata(adata)["input_ids"][:] == expected
