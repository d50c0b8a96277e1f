"""Which controls belong to which profile, what splits hold out, and that data survive a round trip through AnnData."""

import numpy as np
import pytest

from cellglot.drug_response.data import ResponseData, concatenate
from cellglot.drug_response.reading import read_responses
from cellglot.drug_response.splits import hold_out_drugs, hold_out_type_and_donor

from .responses import SMILES, responses


def test_controls_of_a_profile_are_of_its_line_and_plate_or_of_its_line_where_the_plate_has_none():
    data = responses()
    for row in np.flatnonzero(~data.is_control):
        found = data.pairs.candidates(int(row))
        same = (data.cell_line == data.cell_line[row]) & (data.obs["plate"] == data.obs["plate"].iloc[row])
        np.testing.assert_array_equal(found, np.flatnonzero(data.is_control & same))
    fewer = data.select(~(data.is_control & (data.obs["plate"] == "P").to_numpy()))
    row = np.flatnonzero(~fewer.is_control & (fewer.obs["plate"] == "P").to_numpy())[0]
    of_line = fewer.is_control & (fewer.cell_line == fewer.cell_line[row])
    np.testing.assert_array_equal(fewer.pairs.candidates(int(row)), np.flatnonzero(of_line))


def test_a_line_without_controls_is_refused_by_name():
    data = responses()
    without = data.select(~data.is_control | (data.cell_line == "MCF7"))
    row = int(np.flatnonzero(~without.is_control & (without.cell_line == "A549"))[0])
    with pytest.raises(ValueError, match="'A549' has no controls; there are some of 'MCF7'"):
        without.pairs.candidates(row)
    with pytest.raises(ValueError, match="'A549' has no controls; no line has any"):
        without.select(~without.is_control).pairs.candidates(0)


def test_held_out_drugs_are_in_no_training_profile_and_all_controls_are():
    data = responses()
    split = hold_out_drugs(data, 2, seed=1)
    assert split.held_out == sorted(np.random.default_rng(1).permutation(sorted(SMILES))[:2])
    assert not set(data.drug[split.train]) & set(split.held_out)
    assert set(data.drug[split.test]) == set(split.held_out)
    assert split.train[data.is_control].all()
    assert not (split.train & split.test).any()
    with pytest.raises(ValueError, match="has 5 drugs: expected to hold out 1 to 4, found 5"):
        hold_out_drugs(data, 5)


def test_a_held_out_type_and_donor_are_both_unseen_under_treatment():
    data = responses()
    split = hold_out_type_and_donor(data, "A549", "Q", column="plate")
    treated = data.obs[split.train & ~data.is_control]
    assert set(treated["cell_line"]) == {"MCF7"}
    assert set(treated["plate"]) == {"P"}
    tested = data.obs[split.test]
    assert set(tested["cell_line"]) == {"A549"}
    assert set(tested["plate"]) == {"Q"}
    assert not tested["is_control"].any()
    with pytest.raises(ValueError, match="no cell type 'HeLa'; it has 'A549', 'MCF7'"):
        hold_out_type_and_donor(data, "HeLa", "Q", column="plate")


def test_data_come_back_from_anndata():
    data = responses()
    found = read_responses(data.to_anndata())
    np.testing.assert_array_equal(found.expression, data.expression)
    for name in ("drug", "cell_line", "dose", "is_control"):
        np.testing.assert_array_equal(getattr(found, name), getattr(data, name))
    assert dict(found.smiles) == SMILES
    assert found.gene_ids == data.gene_ids


def test_parts_of_other_genes_or_shapes_do_not_become_one():
    data = responses()
    other = ResponseData(data.expression, data.obs, data.genes[::-1])
    with pytest.raises(ValueError, match="different genes"):
        concatenate([data, other])
    with pytest.raises(ValueError, match="expected expression of 72 profiles x 13 genes, found 72 x 12"):
        ResponseData(data.expression[:, 1:], data.obs, data.genes)
    with pytest.raises(ValueError, match="obs lacks dose"):
        ResponseData(data.expression, data.obs.drop(columns="dose"), data.genes)
