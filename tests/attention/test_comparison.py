"""Comparisons against SciPy one head at a time, and the question they must answer: the genes, or their ranks?"""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cellglot.attention import compare_gene_sets, rank_diversity, read_gene_sets, resolve_genes, summarize_heads
from cellglot.attention.collection import AttentionStatistics

from ..conftest import ensembl, make_tokenizer
from ..modeling.test_geneformer import tiny_config

N_GENES = 60
SET = ensembl(20)


def table_of(attention_by_head, expected: Any = 1.0, layers=2, genes=N_GENES, n_cells: Any = 1):
    """attention_to_genes of heads given as arrays over genes."""
    heads = len(attention_by_head) // layers
    frames = []
    for i, values in enumerate(attention_by_head):
        columns = {"gene": ensembl(genes), "attention": values, "expected": expected, "n_cells": n_cells}
        frames.append(pd.DataFrame({"layer": i // heads, "head": i % heads, **columns}))
    return pd.concat(frames, ignore_index=True)


def test_statistics_equal_scipy_head_by_head():
    rng = np.random.default_rng(0)
    # Rounded, so that ties occur
    attention = rng.gamma(2, size=(6, N_GENES)).round(1)
    expected = rng.random(N_GENES)
    result = compare_gene_sets(table_of(attention, expected), SET, ensembl(30, start=25))
    for i, row in enumerate(result.itertuples()):
        assert (row.layer, row.head) == (i // 3, i % 3)
        assert (row.n_set, row.n_background) == (20, 30)
        for suffix, values in (("", attention[i]), ("_matched", attention[i] - expected)):
            ours, others = values[:20], values[24:54]
            pairs = (ours[:, None] > others) + 0.5 * (ours[:, None] == others)
            assert getattr(row, f"auc{suffix}") == pytest.approx(pairs.mean())
            p = stats.mannwhitneyu(ours, others, method="asymptotic").pvalue
            assert getattr(row, f"p{suffix}") == pytest.approx(p)
        assert row.median_set == np.median(attention[i][:20])
        assert row.mean_background == pytest.approx(attention[i][24:54].mean())
        assert row.direction == ("more" if row.auc >= 0.5 else "less")
    np.testing.assert_allclose(result["fdr"], stats.false_discovery_control(result["p"]))
    everything = compare_gene_sets(table_of(attention, expected), SET)
    assert (everything["n_background"] == N_GENES - 20).all()


def test_order_of_rows_and_genes_does_not_matter():
    table = table_of(np.random.default_rng(1).random((4, N_GENES)))
    shuffled = table.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(compare_gene_sets(shuffled, SET[::-1]), compare_gene_sets(table, SET))


def test_summary_counts_directions_and_layers():
    more, less = np.r_[np.arange(20) + 100.0, np.arange(40)], np.r_[np.zeros(20), np.ones(40)]
    none = np.ones(N_GENES)
    # Layers 0 and 1 attend more, layers 2 and 3 less or not.
    summary = summarize_heads(
        compare_gene_sets(table_of([more, more, more, none, none, less, none, less], layers=4), SET)
    )
    assert summary["n_heads"] == 8
    assert (summary["share_more"], summary["share_less"]) == (3 / 8, 2 / 8)
    assert (summary["auc_early"], summary["auc_late"]) == ((1 + 1 + 1 + 0.5) / 4, (0.5 + 0 + 0.5 + 0) / 4)
    assert summary["p_early_late"] < 0.05
    one_layer = summarize_heads(compare_gene_sets(table_of([more, less], layers=1), SET))
    assert np.isnan(one_layer["p_early_late"])


def collected(attention_of, rng, n_cells=40):
    """Statistics of one layer and two heads in which SET always stands in the top half of the ranks."""
    config = tiny_config(num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
    statistics = AttentionStatistics.zeros(ensembl(N_GENES), config)
    for _ in range(n_cells):
        top = rng.permutation(30)  # the 20 of SET and 10 others
        genes = np.r_[top, 30 + rng.permutation(30)]
        statistics.add(0, genes, np.stack([attention_of(genes, rng), attention_of(genes, rng)]))
        statistics.add_cell(genes)
    return statistics.by_gene()


def steps(ranks):
    return np.where(ranks < 32, 1.5, 0.5)


def falls_steeply(ranks):
    return 3 * np.exp(-ranks / 10)


@pytest.mark.parametrize("preference", [steps, falls_steeply])
def test_an_effect_of_rank_alone_disappears_when_matched(preference):
    def by_rank(genes, rng):
        return preference(np.arange(N_GENES)) + 0.1 * rng.standard_normal(N_GENES)

    raw, matched = [], []
    for seed in range(20):
        result = compare_gene_sets(collected(by_rank, np.random.default_rng(seed)), SET)
        raw.append(result["p"].max())
        matched += result["p_matched"].tolist()
    assert max(raw) < 0.01
    # 40 tests at 0.05: more than 6 false positives in less than 1% of such experiments
    assert np.sum(np.array(matched) < 0.05) <= 6


def test_an_effect_of_the_genes_stays_when_matched():
    def by_gene(genes, rng):
        return np.where(genes < 20, 1.5, 0.5) + 0.1 * rng.standard_normal(N_GENES)

    result = compare_gene_sets(collected(by_gene, np.random.default_rng(0)), SET)
    assert (result["fdr_matched"] < 1e-6).all()
    assert (result["auc_matched"] > 0.9).all()


def test_an_effect_of_how_many_cells_hold_a_gene_disappears_when_matched():
    """Skewed attention: the mean over one cell is mostly below the mean over twenty."""
    rng = np.random.default_rng(0)
    n_cells = np.r_[np.full(200, 1), np.full(50, 20), np.full(100, 1), np.full(250, 20)]
    heads = [[rng.lognormal(sigma=1.5, size=n).mean() for n in n_cells] for _ in range(6)]
    result = compare_gene_sets(table_of(heads, n_cells=n_cells, genes=600), ensembl(250))
    assert (result["fdr"] < 1e-3).all()
    assert (result["fdr_matched"] > 0.05).all()


def test_false_discoveries_are_rare_without_any_effect():
    attention = np.random.default_rng(2).standard_normal((144, N_GENES))
    summary = summarize_heads(compare_gene_sets(table_of(attention, layers=12), SET))
    assert summary["share_more"] + summary["share_less"] <= 0.02


@pytest.mark.parametrize(
    ("wanted", "background", "message"),
    [
        (["TP53", "GATA1"], None, r"0 genes of the set are in the cells \(0 of 2 of the set, of 60 genes in all\)"),
        ([], None, "0 genes of the set"),
        (SET[:4], None, "4 genes of the set .* too few for a rank-sum test, which needs 5 on each side"),
        (ensembl(N_GENES), None, "0 genes of the background"),
        (ensembl(N_GENES - 3), None, "3 genes of the background"),
        (SET, ["GATA1"], "0 genes of the background"),
        (SET, SET[:2] + ensembl(9, start=40), "2 genes are in the set and in the background, e.g. 'ENSG00000000001'"),
    ],
)
def test_sets_that_cannot_be_compared(wanted, background, message):
    with pytest.raises(ValueError, match=message):
        compare_gene_sets(table_of(np.ones((2, N_GENES))), wanted, background)


def test_another_table_is_refused():
    with pytest.raises(ValueError, match="lacks layer, head, attention, expected, n_cells"):
        compare_gene_sets(pd.DataFrame({"gene": SET}), SET)


# ---- ranks


def ranks_table(p_lhb):
    layers, heads, bins = np.shape(p_lhb)
    index = pd.MultiIndex.from_product([range(layers), range(heads), range(bins)], names=["layer", "head", "bin"])
    frame = pd.DataFrame({"attention": np.ravel(p_lhb)}, index=index).reset_index()
    return frame.assign(first_rank=frame["bin"] * 10 + 1, last_rank=frame["bin"] * 10 + 10)


def test_rank_diversity_of_known_heads():
    even, first, last = [2.0, 2, 2, 2], [1.0, 0, 0, 0], [0.0, 0, 0, 3]
    diversity = rank_diversity(ranks_table([[even, even], [first, last], [first, first]]))
    np.testing.assert_allclose(diversity["breadth"], [1, 1 / 4, 1 / 4])
    np.testing.assert_allclose(diversity["divergence"], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(diversity["mean_rank"], [20.5, 20.5, 5.5])
    assert rank_diversity(ranks_table([[even]]))["divergence"].tolist() == [0]


# ---- gene sets


def test_lists_and_tables_of_genes(tmp_path):
    (tmp_path / "tfs.txt").write_text("# transcription factors\nTP53\n\nGATA1\r\nTP53\n")
    assert read_gene_sets(tmp_path / "tfs.txt") == {"tfs": ["TP53", "GATA1"]}
    (tmp_path / "n1.tsv").write_text("label\tgene_id\ncentral\tB\nother\tA\ncentral\tC\ncentral\tB\n")
    assert read_gene_sets(tmp_path / "n1.tsv") == {"central": ["B", "C"], "other": ["A"]}
    (tmp_path / "n1.csv").write_bytes(b"\xef\xbb\xbfgene_id,label\nA,x\n")
    assert read_gene_sets(tmp_path / "n1.csv") == {"x": ["A"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no genes"),
        (b"# nothing\n\n", "holds no genes"),
        (b"gene\tclass\nA\tx\n", "expected columns gene_id and label, found gene, class"),
        (b"gene_id\tlabel\n", "has a header, but no genes"),
        (b"gene_id\tlabel\nA\tx\nB\n", "entry 3: expected 2 fields with a gene and a label, found 'B'"),
        (b"gene_id\tlabel\n\tx\n", "entry 2: expected"),
        (b"\x89PNG\r\n\x1a\n", "is no text"),
    ],
)
def test_bad_gene_set_files(content, message, tmp_path):
    (tmp_path / "set.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_gene_sets(tmp_path / "set.tsv")


def test_genes_resolve_by_alias_and_version_once_each():
    tokenizer = make_tokenizer(7, aliases={"TP53": ensembl(7)[2]})
    genes, unknown = resolve_genes(["tp53", "ENSG00000000001.7", "NOPE", ensembl(7)[2]], tokenizer)
    assert genes == [ensembl(7)[2], ensembl(7)[0]]
    assert unknown == ["NOPE"]
    with pytest.raises(ValueError, match=r"None of 1 genes \(e\.g\. 'NOPE'\) .*'ENSG00000000003'\.$"):
        resolve_genes(["NOPE"], tokenizer)
    with pytest.raises(ValueError, match="no aliases, so it resolves no symbols"):
        resolve_genes(["TP53"], make_tokenizer(7))


@pytest.mark.realdata
def test_published_lists_resolve(real_data):
    from cellglot import RankValueTokenizer

    folder = real_data / "geneformer"
    tokenizer = RankValueTokenizer.from_vocabulary(
        folder / "vocabulary_v1.tsv.gz", "v1", aliases=folder / "gene_aliases_v1.tsv.gz"
    )
    (factors,) = read_gene_sets(real_data / "gene_lists" / "tf_lambert2018.txt").values()
    assert (len(factors), len(resolve_genes(factors, tokenizer)[1])) == (1639, 31)
    network = read_gene_sets(real_data / "gene_labels" / "n1_network.tsv")
    assert {label: len(names) for label, names in network.items()} == {"n1_central": 100, "n1_peripheral": 195}
    assert all(len(resolve_genes(names, tokenizer)[1]) == 0 for names in network.values())
