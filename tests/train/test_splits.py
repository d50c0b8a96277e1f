"""Splits leak nothing: every item once, groups whole, labels known before they are tested."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellglot.train.splits import UNLABELLED, Split, check_split, held_out, joint_labels, k_folds

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
    # As near the fraction as labels (at least one item each, on both sides) and groups (a seventh each) allow
    assert abs(chosen.sum() / among.sum() - fraction) < (1 / 7 if grouped else 0.05)
    rest = among & ~chosen
    assert rest.any()
    if grouped:
        assert not set(GROUPS[chosen]) & set(GROUPS[rest])
    else:
        assert set(LABELS[rest]) == set(LABELS) == set(LABELS[chosen])


def test_one_large_group_is_not_held_out_for_a_small_part():
    groups = np.repeat(["large", "b", "c", "d", "e"], [900, 50, 50, 60, 40])
    labels = np.array(["x", "y"])[np.arange(len(groups)) % 2]
    sizes = {
        int(held_out(labels, 0.1, groups=groups, among=np.ones(len(groups), dtype=bool), seed=s).sum())
        for s in range(8)
    }
    assert max(sizes) <= 165
    assert len(sizes) > 1


def test_groups_that_hold_all_of_a_label_stay_in_training():
    groups = np.repeat(["a", "b", "c", "d"], 25)
    labels = np.where(groups == "b", "only in b", np.where(np.arange(100) % 2, "x", "y"))
    for seed in range(8):
        chosen = held_out(labels, 0.25, groups=groups, among=np.ones(100, dtype=bool), seed=seed)
        assert "b" not in set(groups[chosen])


def test_several_labels_are_stratified_together_where_there_are_enough():
    a, b = np.array(list("xxxxyyyy")), np.array(list("ppqqpppp"))
    joined = joint_labels([a, b], least=2)
    assert len(set(joined)) == 3
    assert joint_labels([a, np.array(list("ppqrpppp"))], least=2)[2] == UNLABELLED
    # What has no stratum of its own is drawn like the rest, and is no error.
    folds = k_folds(joint_labels([a, np.array(list("ppqrpppp"))], least=2), 2)
    assert (np.sum(folds, axis=0) == 1).all()


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
    with pytest.raises(ValueError, match="no item of the test part has a label"):
        check_split(Split(train, nothing, ~train), np.where(train, LABELS, UNLABELLED), "state")
    with pytest.raises(ValueError, match="none is left to train on"):
        held_out(LABELS, 0.1, among=nothing)
