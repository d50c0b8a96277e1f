"""Statistics against SciPy gene by gene, and on data whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, ranksums

from cellglot.perturbation.statistics import (
    combination_effects,
    impact_mixture,
    mean_effects,
    rank_sum_p,
    shifts_to_states,
    versus_null,
)


def effects_of(genes: dict[str, tuple[int, float]], seed: int = 0, column: str = "shift_to_goal") -> pd.DataFrame:
    """Effects of genes in n cells each, around a mean."""
    rng = np.random.default_rng(seed)
    tables = [
        pd.DataFrame({"cell": range(n), "gene": gene, column: rng.normal(mean, 0.01, n).astype(np.float32)})
        for gene, (n, mean) in genes.items()
    ]
    return pd.concat(tables).sort_values("cell", kind="stable").reset_index(drop=True)


GENES = {"up": (40, 0.05), "down": (37, -0.05), **{f"none{i}": (31 + i, 0.0) for i in range(9)}, "rare": (1, 0.03)}


@settings(max_examples=100, deadline=None)
@given(pool=st.lists(st.integers(0, 9), min_size=1, max_size=40), values=st.lists(st.integers(0, 9), min_size=1))
def test_rank_sums_with_ties_equal_scipys(pool, values):
    expected = ranksums(pool, values).pvalue
    assert rank_sum_p(np.sort(pool), np.array(values)) == pytest.approx(expected, rel=1e-9)


def test_shifts_of_each_gene_against_the_pool():
    effects = effects_of(GENES)
    effects["shift_to_other"] = -effects["shift_to_goal"]
    table = shifts_to_states(effects)
    assert list(table["state"].unique()) == ["goal", "other"]
    goal = table[table["state"] == "goal"].set_index("gene")
    assert list(goal.index[:2]) == ["up", "down"]
    assert goal.index[goal["significant"]].tolist() == ["up", "down"]
    pool = effects["shift_to_goal"].astype(float)
    for gene, row in goal.iterrows():
        values = pool[effects["gene"] == gene]
        assert row["p_value"] == pytest.approx(ranksums(pool, values).pvalue)
        assert row["shift"] == pytest.approx(values.mean())
        assert row["n_cells"] == len(values)
    np.testing.assert_allclose(goal["fdr"], false_discovery_control(goal["p_value"]))
    assert goal["standard_error"].isna().to_dict()["rare"]
    other = shifts_to_states(effects, ["other"])
    assert other["gene"].tolist()[:2] == ["down", "up"]
    # Where it is known which state cells start from, shifts to it are no result unless asked for.
    effects.attrs["start"] = "other"
    assert list(shifts_to_states(effects)["state"].unique()) == ["goal"]
    assert list(shifts_to_states(effects, ["other"])["state"].unique()) == ["other"]
    assert list(shifts_to_states(effects.drop(columns="shift_to_goal"))["state"].unique()) == ["other"]


def test_effects_on_genes_are_no_part_of_statistics_of_cells():
    effects = effects_of(GENES).assign(affected="cell")
    on_genes = effects.assign(affected="gene", shift_to_goal=np.float32(-7))
    pd.testing.assert_frame_equal(shifts_to_states(pd.concat([effects, on_genes])), shifts_to_states(effects))


def test_genes_that_act_differently_in_a_null_set_of_cells():
    effects = effects_of({"a": (30, 0.9), "b": (30, 0.9), "only": (5, 0.9)}, column="cosine_similarity")
    null = effects_of({"a": (25, 0.9), "b": (25, 0.8), "null": (9, 0.9)}, seed=1, column="cosine_similarity")
    table = versus_null(effects, null).set_index("gene")
    assert table.index[table["significant"]].tolist() == ["b"]
    assert table["difference"].to_dict()["b"] == pytest.approx(0.1, abs=0.01)
    assert table[["n_cells", "n_null_cells"]].T.to_dict("list")["b"] == [30, 25]
    assert table["p_value"].to_dict()["only"] == 1
    assert table["null_mean"].isna().to_dict()["only"]
    with pytest.raises(ValueError, match=r"No gene of the effects \(e.g. 'a', 'b', 'only'\) was perturbed in the null"):
        versus_null(effects, null[null["gene"] == "null"])


@pytest.mark.parametrize(("value", "strongest", "weakest"), [("cosine_similarity", 0.8, 1.0), ("shift_to_T", 1.0, 0.8)])
def test_genes_that_act_more_strongly_than_in_the_null_come_first(value, strongest, weakest):
    means = {"equal": 0.9, "more": strongest, "less": weakest}
    effects = effects_of({gene: (30, mean) for gene, mean in means.items()}, column=value)
    null = effects_of(dict.fromkeys(means, (30, 0.9)), seed=1, column=value)
    table = versus_null(effects, null, value)
    assert table["gene"].tolist() == ["more", "less", "equal"]
    assert table["significant"].tolist() == [True, True, False]
    np.testing.assert_allclose(table["difference"][:2], [strongest - 0.9, weakest - 0.9], atol=0.01)
    assert set(table["value"]) == {value}


@pytest.mark.parametrize("seed", range(6))
def test_small_effects_are_told_from_smaller_ones(seed):
    # As of deletions in a cell of many genes: 1 - similarity of 1e-4 on the whole, and ten times that for some.
    rng = np.random.default_rng(seed)
    effect = np.concatenate([rng.normal(1e-4, 2e-5, 195), rng.normal(1e-3, 1e-4, 5)])
    of_cells = effect + rng.normal(0, 1e-5, (20, 200))
    genes = [f"g{i}" for i in range(200)]
    table = impact_mixture(pd.DataFrame({"gene": genes * 20, "cosine_similarity": 1 - of_cells.ravel()}))
    assert sorted(table.loc[table["impact"], "gene"]) == genes[195:]
    assert (table.loc[table["impact"], "impact_share"] == 1).all()
    assert (table.loc[~table["impact"], "impact_share"] == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_impact_component_is_the_one_of_larger_effects(seed):
    genes = {**{f"hit{i}": (20, 0.7) for i in range(3)}, **{f"none{i}": (20, 0.98) for i in range(30)}}
    table = impact_mixture(effects_of(genes, column="cosine_similarity"), seed=seed)
    assert sorted(table.loc[table["impact"], "gene"]) == ["hit0", "hit1", "hit2"]
    assert (table.loc[table["impact"], "impact_probability"] > 0.99).all()
    assert (table.loc[table["impact"], "impact_share"] == 1).all()
    assert (table.loc[~table["impact"], "impact_share"] == 0).all()
    assert table["impact"].tolist() == [True] * 3 + [False] * 30


def test_a_mixture_needs_genes_that_differ():
    few = effects_of({"a": (3, 0.9), "b": (3, 0.8)}, column="cosine_similarity")
    with pytest.raises(ValueError, match="at least 4 genes with different effects, found 2 genes"):
        impact_mixture(few)
    equal = pd.DataFrame({"gene": list("abcd"), "cosine_similarity": 0.5})
    with pytest.raises(ValueError, match="found 4 genes with equal ones"):
        impact_mixture(equal)


def test_means_over_cells():
    effects = pd.DataFrame(
        {
            "gene": ["a", "a", "a", "b"],
            "affected": ["cell", "x", "cell", "cell"],
            "cosine_similarity": np.array([0.5, 0.1, 0.7, 0.2], dtype=np.float32),
            "shift_to_goal": np.array([1, np.nan, 3, 5], dtype=np.float32),
        }
    )
    table = mean_effects(effects)
    assert table[["gene", "affected", "n_cells"]].to_numpy().tolist() == [
        ["b", "cell", 1],
        ["a", "cell", 2],
        ["a", "x", 1],
    ]
    np.testing.assert_allclose(table["mean"], [0.2, 0.6, 0.1], atol=1e-6)
    np.testing.assert_allclose(table["sd"], [0, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(table["shift_to_goal"], [5, 2, np.nan])


def test_pairs_that_do_more_than_the_sum():
    rng = np.random.default_rng(0)
    n = 25
    noise = rng.normal(0, 0.001, (2, n))
    singles = pd.concat(
        pd.DataFrame({"cell": range(n), "gene": gene, "cosine_similarity": value})
        for gene, value in (("A", 0.9), ("synergy", 0.95), ("additive", 0.8))
    )
    pairs = pd.concat(
        pd.DataFrame({"cell": range(n), "gene": f"A+{gene}", "cosine_similarity": value + noise[i]})
        for i, (gene, value) in enumerate((("synergy", 0.6), ("additive", 0.7)))
    )
    table = combination_effects(pairs, singles, "A").set_index("gene")
    assert table.index.tolist() == ["synergy", "additive"]
    assert table["significant"].tolist() == [True, False]
    np.testing.assert_allclose(table["additive_similarity"], [0.85, 0.7], atol=1e-9)
    np.testing.assert_allclose(table["pair_minus_additive"], [-0.25, 0], atol=1e-3)
    assert set(table["n_cells"]) == {n}
    with pytest.raises(ValueError, match="No cell has effects of 'A' alone"):
        combination_effects(pairs, singles[singles["gene"] != "A"], "A")


def test_tables_that_lack_something():
    effects = effects_of(GENES)
    with pytest.raises(ValueError, match="hold no shifts to states; perturb_cells measures them"):
        shifts_to_states(effects.rename(columns={"shift_to_goal": "x"}))
    with pytest.raises(ValueError, match="lack column 'shift_to_end'"):
        shifts_to_states(effects, ["end"])
    with pytest.raises(ValueError, match="Only 'up' was perturbed"):
        shifts_to_states(effects[effects["gene"] == "up"])
    with pytest.raises(ValueError, match="lack column 'cosine_similarity'"):
        impact_mixture(effects)
    with pytest.raises(ValueError, match="the table is empty"):
        shifts_to_states(effects.iloc[:0])
    effects.loc[3, "shift_to_goal"] = np.nan
    with pytest.raises(ValueError, match="1 of 393 values of 'shift_to_goal' are missing"):
        shifts_to_states(effects)
