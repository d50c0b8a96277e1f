import numpy as np
import torch

from cellglot.tokenization.gene_masking import MaskedGeneCollator, mask_genes

from ..conftest import make_tokenizer

GENES = np.arange(4, 104, dtype=np.int32)  # a V2 vocabulary of 100 genes
CELL = np.concatenate([[2], np.random.default_rng(0).permutation(GENES)[:97], [3]])


def draws(n=400, **options):
    for seed in range(n):
        yield mask_genes(CELL, np.random.default_rng(seed), gene_token_ids=GENES, mask_token_id=1, **options)


def test_special_tokens_are_neither_masked_nor_drawn():
    for ids, labels in draws(200, probability=0.9):
        assert (ids[[0, -1]] == [2, 3]).all()
        assert (labels[[0, -1]] == -100).all()
        assert set(ids[1:-1]) <= {1, *GENES}
    assert any((labels[[0, -1]] != -100).any() for _, labels in draws(20, include_special_tokens=True))


def test_shares_are_15_80_10_10():
    selected = np.concatenate([labels != -100 for _, labels in draws()])
    ids = np.concatenate([ids for ids, _ in draws()])[selected]
    original = np.tile(CELL, 400)[selected]
    genes = 400 * 97
    assert abs(selected.sum() / genes - 0.15) < 4 * np.sqrt(0.15 * 0.85 / genes)
    masked, kept = (ids == 1).mean(), (ids == original).mean()
    error = 4 * np.sqrt(0.25 / selected.sum())
    assert abs(masked - 0.8) < error
    # A random gene is the same one in 1 of 100 draws.
    assert abs(kept - 0.101) < error


def test_labels_are_the_original_genes_and_unselected_ones_stay():
    for ids, labels in draws(20):
        selected = labels != -100
        assert (labels[selected] == CELL[selected]).all()
        assert (ids[~selected] == CELL[~selected]).all()


def test_masks_depend_on_the_key_only_not_on_the_batch():
    tokenizer = make_tokenizer(101)
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.permutation(tokenizer.gene_token_ids)[:n]} for n in (7, 31, 13)]
    keys = [(0, 5, i) for i in range(3)]
    collate = MaskedGeneCollator(tokenizer)
    batch = collate(rows, keys)
    assert batch["cu_seqlens"].tolist() == [0, 7, 38, 51]
    assert batch["max_seqlen"] == 31
    for i, (start, stop) in enumerate([(0, 7), (7, 38), (38, 51)]):
        alone = collate(rows[i : i + 1], keys[i : i + 1])
        for name in ("input_ids", "position_ids", "labels"):
            assert torch.equal(batch[name][:, start:stop], alone[name])
    other_epoch = collate(rows, [(0, 6, i) for i in range(3)])
    assert not torch.equal(batch["labels"], other_epoch["labels"])
