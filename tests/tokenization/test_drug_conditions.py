"""Doses in micromolar whatever their unit; fingerprints that are the molecule's and stay the same."""

import sys

import numpy as np
import pytest

from cellglot.tokenization.drug_conditions import micromolar, morgan_fingerprints

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
FINGERPRINT_OF_ASPIRIN = [0, 1, 2, 5, 7, 8, 10, 11, 13, 16, 17, 22, 23, 33, 36, 39, 47, 50, 55, 57, 60, 61]


@pytest.mark.parametrize(("unit", "factor"), [("nM", 1e-3), ("uM", 1), ("µM", 1), ("μM", 1), ("mM", 1e3), ("M", 1e6)])
def test_doses_come_out_in_micromolar(unit, factor):
    np.testing.assert_allclose(micromolar([0, 0.5, 10], unit), np.array([0, 0.5, 10]) * factor)
    np.testing.assert_allclose(micromolar(2, unit), [2 * factor])


@pytest.mark.parametrize(
    ("dose", "unit", "message"),
    [
        (1.0, None, "with a unit, .* found no unit. Pass dose_unit"),
        (1.0, "ng/ml", "found unit 'ng/ml'"),
        ([1.0, -666], "uM", "found 1 that are negative or no numbers .*-666 is how LINCS writes a missing dose"),
        ([1.0, -2.0], "nM", r"doses of 0 nM or more, .*\(e.g. -2\). Correct them, or leave their profiles out.$"),
        (float("nan"), "uM", "found 1 that are negative or no numbers"),
    ],
)
def test_doses_that_mean_nothing_are_refused(dose, unit, message):
    with pytest.raises(ValueError, match=message):
        micromolar(dose, unit)


def test_fingerprints_are_stable():
    # Set bits as RDKit 2026.9 gave them; a change would silently spoil every saved model.
    bits = morgan_fingerprints([ASPIRIN], 64)[0]
    assert np.flatnonzero(bits).tolist() == FINGERPRINT_OF_ASPIRIN


def test_fingerprints_are_of_the_molecule_not_of_its_spelling():
    same = morgan_fingerprints([ASPIRIN, "O=C(C)Oc1c(cccc1)C(O)=O", "CCO"], 512)
    np.testing.assert_array_equal(same[0], same[1])
    assert same.shape == (3, 512)
    assert (same[0] != same[2]).any()
    assert set(np.unique(same)) == {0.0, 1.0}


@pytest.mark.parametrize("text", ["C1CC", "not a molecule", "", None])
def test_a_smiles_that_is_none_is_refused_without_noise(text, capfd):
    with pytest.raises(ValueError, match="is no SMILES that RDKit can read"):
        morgan_fingerprints(["CCO", text], 64)
    assert capfd.readouterr().err == ""


def test_without_rdkit_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ImportError, match=r"cellglot\[drug\]"):
        morgan_fingerprints(["CCO"], 64)
