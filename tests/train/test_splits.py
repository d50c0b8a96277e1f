"""Splits leak nothing: every item once, groups whole, labels known before they are tested."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellglot.train.splits import Split, check_split, held_out, k_folds

LABELS = np.repeat(["B", "NK", "T"], [30, 12, 61])
GROUPS = np.array([f"donor{i % 7}" for i in range(len(LABELS))])


@given(st.integers(2, 7), st.integers(0, 100), st.booleans())
def test_folds_test_every_item_once_and_keep_groups_whole(n_folds, seed, grouped):
    folds = k_folds(LABELS, n_folds, groups=GROUPS if grouped else None, seed=seed)
    assert len(folds) == n_folds
    assert (np.sum(folds, axis=0) == 1).all()
    for test in folds:
        if grouped:
            assert not set(GROUPS[test]) & set(GROUPS[~test])
        else:
            # Stratified: each label's share within one item
            for label in np.unique(LABELS):
                assert abs((LABELS[test] == label).sum() - (label == LABELS).sum() / n_folds) <= 1


@given(st.floats(0.02, 0.9), st.integers(0, 100), st.booleans())
def test_held_out_items_are_drawn_from_those_marked(fraction, seed, grouped):
    among = np.arange(len(LABELS)) % 4 > 0
    chosen = held_out(LABELS, fraction, groups=GROUPS if grouped else None, among=among, seed=seed)
    assert chosen.any()
    assert not (chosen & ~among).any()
    rest = among & ~chosen
    assert rest.any()
    if grouped:
        assert not set(GROUPS[chosen]) & set(GROUPS[rest])
    else:
        assert set(LABELS[rest]) == set(LABELS) == set(LABELS[chosen])


def test_the_same_seed_draws_the_same_and_another_seed_others():
    among = np.ones(len(LABELS), dtype=bool)
    draws = [held_out(LABELS, 0.3, among=among, seed=seed) for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()
    assert not held_out(LABELS, 0, among=among).any()


def test_splits_that_cannot_be_say_why():
    labels = np.array(["A"] * 10 + ["rare"])
    with pytest.raises(ValueError, match=r"label 'rare' has fewer than 3 items .* --min_per_class 3"):
        k_folds(labels, 3)
    with pytest.raises(ValueError, match="7 groups cannot make 9 folds: pass --folds 7"):
        k_folds(LABELS, 9, groups=GROUPS)
    with pytest.raises(ValueError, match="All 103 cells are of one group"):
        held_out(LABELS, 0.2, groups=np.full(len(LABELS), "d"), among=np.ones(len(LABELS), dtype=bool))


def test_a_fold_without_a_class_is_refused():
    train = LABELS != "NK"
    nothing = np.zeros(len(LABELS), dtype=bool)
    with pytest.raises(ValueError, match=r"fold 3: the test part has label 'NK', of which no item is left to train on"):
        check_split(Split(train, nothing, ~train), LABELS, "fold 3")
    with pytest.raises(ValueError, match="expected two labels or more to train on, found only 'B'"):
        check_split(Split(LABELS == "B", nothing, nothing), LABELS, "cell_type")
    check_split(Split(train, nothing, train), LABELS, "fine")
