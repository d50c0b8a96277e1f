"""The simplest predictions: each against what its first sentence says, and the reference figures on real wells."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge as PlainRidge

from cellglot.drug_response.baselines import (
    Additive,
    ControlCells,
    ControlMean,
    NearestConditions,
    PairedTreatedMean,
    RandomConditions,
    Ridge,
    TreatedMean,
    baselines,
    geometric_median,
    paired_changes,
)
from cellglot.drug_response.data import ResponseData
from cellglot.drug_response.evaluation import predicted_responses, training_scores, treated_centroid
from cellglot.drug_response.reading import read_responses
from cellglot.drug_response.splits import hold_out_drugs
from cellglot.metrics.differential_genes import differential_scores
from cellglot.metrics.response import mean_figures, response_table

from ..conftest import REAL_DATA

GENES = 17
SMILES = {"ethanol": "CCO", "propanol": "CCCO", "butanol": "CCCCO", "benzene": "c1ccccc1", "toluene": "Cc1ccccc1"}
SMILES |= {"xylene": "Cc1ccccc1C", "aniline": "Nc1ccccc1"}


def wells(drugs=tuple(SMILES), lines=("A", "B"), replicates=2, n_controls=3, seed=0):
    """Wells of each drug in each line: line + plate + effect of the drug + noise; plates P and Q have own controls."""
    rng = np.random.default_rng(seed)
    effect = {drug: rng.normal(size=GENES) for drug in drugs}
    base = {line: 8 + rng.normal(size=GENES) for line in lines}
    plate = {"P": rng.normal(size=GENES), "Q": rng.normal(size=GENES)}
    rows, values = [], []
    for line in lines:
        for name, offset in plate.items():
            for _ in range(n_controls):
                rows.append(("DMSO", line, 0.0, True, name))
                values.append(base[line] + offset + 0.1 * rng.normal(size=GENES))
        for drug in drugs:
            for replicate in range(replicates):
                name = "PQ"[replicate % 2]
                rows.append((drug, line, 10.0, False, name))
                values.append(base[line] + plate[name] + effect[drug] + 0.1 * rng.normal(size=GENES))
    obs = pd.DataFrame(rows, columns=["drug", "cell_line", "dose", "is_control", "plate"])
    genes = pd.DataFrame(index=[f"G{i}" for i in range(GENES)])
    expression = np.array(values, dtype=np.float32)
    return ResponseData(expression, obs, genes, SMILES, ("cell_line", "plate"), "wells"), effect


def asked(drugs, line, dose=10.0):
    return pd.DataFrame({"drug": list(drugs), "cell_line": line, "dose": dose})


def test_means_are_of_the_cell_line_and_of_all_where_it_is_new():
    data, _ = wells()
    controls = np.zeros((2, GENES), np.float32)
    for baseline, wanted in ((ControlMean(), data.is_control), (TreatedMean(), ~data.is_control)):
        fitted = baseline.fit(data)
        for line, rows in (("A", wanted & (data.cell_line == "A")), ("new", wanted)):
            found = fitted.predict(controls, asked(["ethanol", "new"], line))
            np.testing.assert_allclose(found, np.repeat(data.expression[rows].mean(axis=0)[None], 2, axis=0), rtol=1e-5)
    with pytest.raises(ValueError, match="found 0 of 28 to be controls"):
        ControlMean().fit(data.select(~data.is_control))


def test_the_mean_of_a_plate_is_of_the_wells_that_a_control_belongs_to():
    data, _ = wells()
    fitted = PairedTreatedMean().fit(data)
    on_plate = (data.cell_line == "B") & (data.obs["plate"].to_numpy() == "Q")
    controls = data.expression[on_plate & data.is_control]
    found = fitted.predict(np.concatenate([controls, controls[:1] + 1]), asked(["new"] * 4, "B"))
    mean = data.expression[on_plate & ~data.is_control].mean(axis=0)
    np.testing.assert_allclose(found[:3], np.repeat(mean[None], 3, axis=0), rtol=1e-5)
    # A control that was not seen has no plate.
    of_line = data.expression[(data.cell_line == "B") & ~data.is_control].mean(axis=0)
    np.testing.assert_allclose(found[3], of_line, rtol=1e-5)


def test_the_geometric_median_has_the_least_sum_of_distances():
    points = np.random.default_rng(0).normal(size=(31, 3))
    points[0] += 100
    median = geometric_median(points)

    def total(centre):
        return np.linalg.norm(points - centre, axis=1).sum()

    for step in np.vstack([np.eye(3), -np.eye(3)]):
        assert total(median) <= total(median + 0.01 * step)
    # One point far away moves the mean, and it hardly.
    rest = points[1:].mean(axis=0)
    assert 10 * np.linalg.norm(median - rest) < np.linalg.norm(points.mean(axis=0) - rest)


def test_control_cells_stay_and_are_copies():
    data, _ = wells()
    controls = data.expression[data.is_control]
    found = ControlCells().fit(data).predict(controls, asked(["ethanol"] * len(controls), "A"))
    np.testing.assert_array_equal(found, controls)
    assert not np.shares_memory(found, controls)


def test_changes_are_from_the_mean_of_the_plate_s_controls():
    data, _ = wells()
    rows, changes = paired_changes(data)
    i = 5
    alike = data.is_control & (data.cell_line == data.cell_line[rows[i]])
    alike &= data.obs["plate"].to_numpy() == data.obs["plate"].iloc[rows[i]]
    np.testing.assert_allclose(
        changes[i], data.expression[rows[i]] - data.expression[alike].mean(axis=0, dtype=np.float64), atol=1e-6
    )


def test_additive_carries_a_drug_s_effect_to_another_line():
    data, effect = wells(lines=("A", "B", "C"))
    train = data.select((data.cell_line != "C") | data.is_control)
    controls = data.expression[data.is_control & (data.cell_line == "C")]
    fitted = Additive().fit(train)
    found = fitted.predict(controls, asked(["benzene"] * len(controls), "C"))
    # Noise of three controls and two wells in each of two lines
    np.testing.assert_allclose(found - controls, np.repeat(effect["benzene"][None], len(found), axis=0), atol=0.25)
    new = fitted.predict(controls[:1], asked(["new"], "C")) - controls[:1]
    np.testing.assert_allclose(new[0], np.mean(list(fitted.effects.values()), axis=0), atol=1e-5)


def test_random_profiles_are_of_five_conditions_and_differ_by_condition():
    data, _ = wells()
    fitted = RandomConditions(seed=1).fit(data)
    controls = np.zeros((40, GENES), np.float32)
    found = fitted.predict(controls, asked(["ethanol"] * 20 + ["benzene"] * 20, "A"))
    keys = {
        row.tobytes(): (drug, line) for row, drug, line in zip(data.expression, data.drug, data.cell_line, strict=True)
    }
    for part in (found[:20], found[20:]):
        conditions = [keys[row.tobytes()] for row in part]
        assert len(set(conditions)) == 5
        # Two wells of each, taken equally often
        assert len({row.tobytes() for row in part}) == 10
    assert {row.tobytes() for row in found[:20]} != {row.tobytes() for row in found[20:]}
    np.testing.assert_array_equal(
        found, RandomConditions(seed=1).fit(data).predict(controls, asked(["ethanol"] * 20 + ["benzene"] * 20, "A"))
    )


def test_nearest_conditions_are_of_the_most_similar_drugs_and_lines():
    data, _ = wells()
    train = data.select(data.drug != "toluene")
    fitted = NearestConditions(n_neighbours=3).fit(train)
    near = fitted.neighbours("toluene", "A")
    assert near[0] == ("xylene", "A")
    everything = NearestConditions().fit(data)
    assert everything.neighbours("ethanol", "A")[0] == ("ethanol", "A")
    # A drug without a structure is as near to all; the line then decides.
    assert {line for _, line in everything.neighbours("new", "B")} == {"B"}
    found = fitted.predict(np.zeros((6, GENES), np.float32), asked(["toluene"] * 6, "A"))
    allowed = {row.tobytes() for d, c in near for row in train.expression[(train.drug == d) & (train.cell_line == c)]}
    assert {row.tobytes() for row in found} == allowed


def test_ridge_is_scikit_learn_s_on_mean_changes():
    data, effect = wells(replicates=4)
    fitted = Ridge().fit(data)
    rows, changes = paired_changes(data)
    table = pd.DataFrame(changes).groupby([data.drug[rows], data.cell_line[rows]]).mean()
    features = fitted._features(asked([drug for drug, _ in table.index], [line for _, line in table.index]))
    plain = PlainRidge(alpha=float(fitted.model.alpha_ or 0)).fit(features, table.to_numpy())
    controls = data.expression[:2]
    conditions = asked(["toluene", "ethanol"], "A")
    expected = controls + plain.predict(fitted._features(conditions))
    np.testing.assert_allclose(fitted.predict(controls, conditions), expected, rtol=1e-4)
    # It has learnt the drugs' effects.
    assert pearsonr(fitted.predict(controls, conditions)[0] - controls[0], effect["toluene"]).statistic > 0.8
    with pytest.raises(ValueError, match=r"1 of 2 drugs have no SMILES \(e.g. 'interferon'\)"):
        fitted.predict(controls, asked(["interferon", "ethanol"], "A"))


def test_no_baseline_sees_what_it_is_tested_on():
    """Other treated profiles in the test part change no prediction."""
    data, _ = wells()
    split = hold_out_drugs(data, 2)
    spoilt = data.expression.copy()
    spoilt[split.test] = 99.0
    changed = ResponseData(spoilt, data.obs, data.genes, data.smiles, data.pair_by, data.name)
    for seen, other in zip(baselines(), baselines(), strict=True):
        predictions = [
            predicted_responses(baseline.fit(d.select(split.train)), d, split)
            for baseline, d in ((seen, data), (other, changed))
        ]
        for name, response in predictions[0].items():
            np.testing.assert_array_equal(response.predicted, predictions[1][name].predicted)
            assert (predictions[1][name].true == 99).all()


def test_every_control_of_a_condition_s_plates_is_given_it_once():
    data, _ = wells(n_controls=5)
    split = hold_out_drugs(data, 2)
    found = predicted_responses(ControlCells().fit(data.select(split.train)), data, split)
    assert len(found) == 4  # two drugs in two lines
    for (drug, line), response in found.items():
        of_condition = (data.drug == drug) & (data.cell_line == line)
        np.testing.assert_array_equal(response.true, data.expression[of_condition])
        controls = data.expression[data.is_control & (data.cell_line == line)]
        np.testing.assert_array_equal(response.control, controls)
        assert sorted(map(bytes, response.predicted)) == sorted(map(bytes, controls))  # both plates' five
    by_drug = predicted_responses(ControlCells().fit(data.select(split.train)), data, split, by=["drug"])
    assert {len(response.predicted) for response in by_drug.values()} == {20}
    fewer = predicted_responses(ControlCells().fit(data.select(split.train)), data, split, max_controls=3)
    assert {len(np.unique(response.predicted, axis=0)) for response in fewer.values()} == {6}
    assert {len(response.control) for response in fewer.values()} == {10}


def test_training_figures_see_training_profiles_and_do_not_mix_lines():
    data, _ = wells()
    train = data.select(hold_out_drugs(data, 2).train)
    treated = train.select(~train.is_control)
    np.testing.assert_allclose(treated_centroid(train), treated.expression.mean(axis=0), rtol=1e-5)
    expected = []
    for line in "AB":
        of_line = train.cell_line == line
        expected.append(
            differential_scores(
                train.expression[of_line & ~train.is_control], train.expression[of_line & train.is_control]
            )
        )
    np.testing.assert_allclose(training_scores(train), np.mean(expected, axis=0))


@pytest.mark.realdata
def test_the_reference_figures_of_70_unseen_drugs_come_out():
    """Specification: control mean 0.925; treated mean 0.932, delta 0.320."""
    data = read_responses(REAL_DATA / "drug" / "l1000_level3_HT115_681x978.h5ad")
    split = hold_out_drugs(data, 70)
    train = data.select(split.train)
    figures = {
        baseline.name: mean_figures(
            response_table(
                predicted_responses(baseline.fit(train), data, split, by=["drug"]), centroid_g=treated_centroid(train)
            )
        )
        for baseline in (ControlMean(), TreatedMean())
    }
    assert figures["control mean"]["mean"] == pytest.approx(0.925, abs=5e-4)
    assert figures["control mean"]["delta"] == 0
    assert figures["treated mean"]["mean"] == pytest.approx(0.932, abs=5e-4)
    assert figures["treated mean"]["delta"] == pytest.approx(0.320, abs=5e-4)
    assert figures["treated mean"]["delta_centroid"] == pytest.approx(0, abs=1e-3)
    assert figures["treated mean"]["centroid_accuracy"] == pytest.approx(0.5)
    assert figures["treated mean"]["n_conditions"] == 70
