"""What enters when responses are learnt: controls, never the treated profile; masks that are a function of the key."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from cellglot import ExpressionFeatureExtractor
from cellglot.train.drug_response_data import MaskedProfiles, ResponsePairs
from cellglot.train.drug_response_profiles import StoredProfiles

from ..drug_response.responses import GENES, responses


def batch_of(pairs, examples, epoch=0):
    return pairs.collate([pairs[i] for i in examples], [(0, epoch, i) for i in examples])


def pairs_of(data, training_input: Any = "control"):
    return ResponsePairs(data, ExpressionFeatureExtractor.fit(data), training_input)


def test_control_cells_never_leak_the_target():
    data = responses()
    pairs = pairs_of(data)
    scaled = pairs.expression
    for epoch in range(3):
        batch = batch_of(pairs, range(len(pairs)), epoch)
        np.testing.assert_array_equal(batch["labels"].numpy(), scaled[~data.is_control])
        for row, entered in zip(np.flatnonzero(~data.is_control), batch["expression"].numpy(), strict=True):
            (source,) = np.flatnonzero((scaled == entered).all(1))
            assert data.is_control[source]
            assert data.cell_line[source] == data.cell_line[row]
            assert data.obs["plate"].iloc[source] == data.obs["plate"].iloc[row]


def test_what_enters_does_not_change_when_the_targets_do():
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data)
    before = batch_of(ResponsePairs(data, extractor), range(7))
    treated = ~data.is_control
    data.expression[treated] = np.random.default_rng(1).normal(size=data.expression[treated].shape)
    after = batch_of(ResponsePairs(data, extractor), range(7))
    assert not torch.equal(before.pop("labels"), after.pop("labels"))
    for name, values in before.items():
        assert torch.equal(values, after[name]), name


def test_the_authors_variant_gives_the_treated_profile_itself():
    batch = batch_of(pairs_of(responses(), "self"), range(11))
    assert torch.equal(batch["expression"], batch["labels"])


def test_controls_are_drawn_anew_each_epoch_and_the_same_in_any_batch():
    pairs = pairs_of(responses())
    whole = batch_of(pairs, range(len(pairs)))["expression"]
    assert not torch.equal(whole, batch_of(pairs, range(len(pairs)), epoch=1)["expression"])
    assert torch.equal(batch_of(pairs, [5, 2])["expression"], whole[[5, 2]])


def test_conditions_are_those_of_the_treated_profile():
    data = responses()
    batch, pairs = batch_of(pairs_of(data), [3, 40]), pairs_of(data)
    rows = pairs.rows[[3, 40]]
    drugs = sorted(set(data.drug[~data.is_control]))
    assert [drugs[i] for i in batch["drug"]] == data.drug[rows].tolist()
    np.testing.assert_allclose(batch["dose"], np.log10(data.dose[rows]), rtol=1e-6)


def test_a_line_without_controls_and_data_without_treatment_are_refused():
    data = responses()
    without = data.select(~data.is_control | (data.cell_line == "MCF7"))
    with pytest.raises(ValueError, match="'A549' has no controls"):
        pairs_of(without)
    assert len(pairs_of(without, "self")) == 60
    with pytest.raises(ValueError, match="found controls only"):
        pairs_of(data.select(data.is_control))


def test_hidden_genes_are_a_function_of_the_key_and_of_the_ratio():
    x = np.random.default_rng(0).normal(size=(11, GENES)).astype(np.float32)
    labels = {"drug": np.arange(11), "dose": np.full(11, np.nan, dtype=np.float32)}
    for ratio, n in ((0.15, 2), (0.8, 10)):
        profiles = MaskedProfiles(x, labels, ratio)
        whole = batch_of(profiles, range(11))
        assert whole["masked"].sum(1).tolist() == [n] * 11
        part = batch_of(profiles, [4, 1])
        for name, values in part.items():
            assert torch.equal(torch.nan_to_num(values), torch.nan_to_num(whole[name][[4, 1]])), name
        assert torch.equal(whole["labels"], torch.from_numpy(x))
        assert not torch.equal(whole["masked"], batch_of(profiles, range(11), epoch=1)["masked"])


def test_stored_profiles_are_read_by_row_and_do_not_travel(tmp_path):
    x = np.random.default_rng(0).normal(size=(23, GENES)).astype(np.float32)
    x.tofile(tmp_path / "expression.f32")
    stored = StoredProfiles(tmp_path / "expression.f32", GENES)
    assert len(stored) == 23
    np.testing.assert_array_equal(stored[np.array([7, 3])], x[[7, 3]])
    assert len(pickle.dumps(stored)) < 1000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(stored))[np.array([7, 3])], x[[7, 3]])
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data)
    profiles = MaskedProfiles(stored, {}, 0.5, rows=np.array([2, 11, 5]), extractor=extractor)
    np.testing.assert_allclose(batch_of(profiles, [1, 2])["expression"], extractor.scale(x[[11, 5]]), rtol=1e-6)
