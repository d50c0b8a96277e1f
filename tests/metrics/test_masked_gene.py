import numpy as np
import pytest

from cellglot.metrics.masked_gene import rank_binned_cross_entropy, unigram_cross_entropy

GENES = np.arange(4, 9)


def test_unigram_by_hand():
    # Training: gene 4 three times, gene 5 once; with one pseudocount each of 5 genes: 4/9, 2/9, 1/9, 1/9, 1/9.
    train, validation = [[2, 4, 5, 3], [4], [4]], [[2, 4, 8, 3], [5]]
    expected = -np.mean(np.log([4 / 9, 1 / 9, 2 / 9]))
    assert unigram_cross_entropy(train, validation, GENES) == pytest.approx(expected)


def test_rank_bins_by_hand():
    # Two bins: first halves are always gene 4, second halves gene 5. No backoff: each is certain.
    train = [[4, 5], [4, 4, 5, 5]]
    assert rank_binned_cross_entropy(train, [[4, 5]], GENES, n_bins=[2], backoff=[0]) == pytest.approx(0)
    # With all weight on the backoff it is the unigram.
    many = rank_binned_cross_entropy(train, [[5, 4]], GENES, n_bins=[2], backoff=[1e12])
    assert many == pytest.approx(unigram_cross_entropy(train, [[5, 4]], GENES))


def test_the_best_choice_on_training_cells_is_taken():
    rng = np.random.default_rng(0)
    cells = [np.sort(rng.choice(np.arange(4, 104), 50, replace=False)) for _ in range(100)]
    genes = np.arange(4, 104)
    each = [rank_binned_cross_entropy(cells[:80], cells[80:], genes, n_bins=[n], backoff=[50]) for n in (1, 20)]
    assert each[1] < each[0]
    assert rank_binned_cross_entropy(cells[:80], cells[80:], genes, n_bins=[1, 20], backoff=[50]) == each[1]


def test_order_helps_the_binned_reference_only_where_order_is_informative():
    rng = np.random.default_rng(0)
    sorted_cells = [np.sort(rng.choice(np.arange(4, 104), 50, replace=False)) for _ in range(300)]
    shuffled = [rng.permutation(cell) for cell in sorted_cells]
    genes = np.arange(4, 104)
    for cells, informative in ((sorted_cells, True), (shuffled, False)):
        unigram = unigram_cross_entropy(cells[:250], cells[250:], genes)
        binned = rank_binned_cross_entropy(cells[:250], cells[250:], genes)
        assert unigram == pytest.approx(np.log(100), abs=0.02)
        assert (binned < unigram - 1) == informative
        assert binned > unigram - 1 or informative


@pytest.mark.realdata
def test_unigram_on_genecorpus_is_the_published_figure(real_data):
    import pandas as pd

    cells = pd.read_parquet(real_data / "geneformer" / "genecorpus30m_sample_400cells.parquet")["input_ids"].tolist()
    order = np.random.default_rng(0).permutation(400)
    train, validation = ([cells[i] for i in part] for part in (order[:320], order[320:]))
    genes = np.arange(2, 25426)
    unigram = unigram_cross_entropy(train, validation, genes)
    assert unigram == pytest.approx(8.6, abs=0.05)
    assert rank_binned_cross_entropy(train, validation, genes) < unigram
