"""Statistics of perturbation effects over cells: tables of `perturb_cells` in, one row for each perturbed gene out.

They treat cells as independent, as the original does. Cells of one donor are not: read p-values as a ranking, and
confirm across donors.

Source: Theodoris et al., Nature 2023, Methods, "In silico perturbation"; the original's five modes of statistics.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, norm, ranksums, wilcoxon

from ..tokenization.gene_ids import examples
from .targets import CELL, JOINER

# Two components of a mixture in one dimension need a few values each.
MIN_GENES = 4


def shifts_to_states(
    effects: pd.DataFrame, states: Sequence[str] | None = None, *, significance: float = 0.05
) -> pd.DataFrame:
    """Which genes bring cells closer to a state, a row for each state and gene.

    states   those to test; by default all that shifts were measured to, without the start state where it is known
             (`effects.attrs["start"]`, set by `perturb_cells` and `read_perturbations`)
    Returns  DataFrame, states in that order, significant genes first, then by falling shift, with columns
             state, gene
             n_cells         cells in which the gene was perturbed
             shift           mean of cos(perturbed cell, state) - cos(cell, state); above 0 is closer to the state
             standard_error  of that mean; NaN for one cell
             p_value         Wilcoxon rank-sum test of the gene's shifts against the shifts of all genes pooled
             fdr             Benjamini-Hochberg adjusted, within the state
             significant     fdr below `significance`
    Raises   ValueError if shifts are missing, or there is only one gene and so nothing to compare with

    The original compares with a random sample of 100,000 of the pool where that is larger; this, with all of it.
    """
    columns = [str(name) for name in effects if str(name).startswith("shift_to_")]
    if not columns:
        raise ValueError(
            "The effects hold no shifts to states; perturb_cells measures them with states=CellStates(...)."
        )
    if states is None:
        start = f"shift_to_{effects.attrs.get('start')}"
        columns = [column for column in columns if column != start] or columns
    else:
        columns = [f"shift_to_{state}" for state in states]
    effects = _on_cells(effects, columns)
    if effects["gene"].nunique() < 2:
        raise ValueError(
            f"Only {examples(effects['gene'].unique())} was perturbed; a gene's shifts are tested against those of "
            "other genes. Perturb more genes, or take `mean_effects`."
        )
    tables = []
    for column in columns:
        pool = np.sort(effects[column].to_numpy())
        shifts = effects.groupby("gene", sort=False)[column]
        table = shifts.agg(n_cells="count", shift="mean", standard_error="sem").reset_index()
        table.insert(0, "state", column.removeprefix("shift_to_"))
        p_values = {gene: rank_sum_p(pool, values.to_numpy()) for gene, values in shifts}
        table["p_value"] = table["gene"].map(p_values)
        table["fdr"] = false_discovery_control(table["p_value"])
        table["significant"] = table["fdr"] < significance
        tables.append(table.sort_values(["significant", "shift", "fdr"], ascending=[False, False, True]))
    return pd.concat(tables, ignore_index=True)


def versus_null(
    effects: pd.DataFrame, null: pd.DataFrame, value: str = "cosine_similarity", *, significance: float = 0.05
) -> pd.DataFrame:
    """Which genes act differently in these cells than in a null set of cells.

    null     effects of the same perturbation of other cells, e.g. random ones
    value    column to compare: the similarity, or a shift to a state that was measured in both
    Returns  DataFrame of the genes of `effects`, significant ones first, then from those that act more strongly in
             these cells to those that act more strongly in the null, with columns
             gene, n_cells, n_null_cells
             mean, null_mean  of `value`; NaN where no null cell has the gene
             difference       mean - null_mean. Stronger in these cells is below 0 for the similarity, which falls
                              the more, the more a cell changes; above 0 for a shift
             p_value          Wilcoxon rank-sum test; 1 where no null cell has the gene
             fdr, significant Benjamini-Hochberg adjusted, and below `significance`
             value            what was compared
    """
    effects, null = _on_cells(effects, [value]), _on_cells(null, [value])
    of_null = {gene: values.to_numpy() for gene, values in null.groupby("gene")[value]}
    nothing = np.empty(0)
    rows = []
    for gene, values in effects.groupby("gene", sort=False)[value]:
        ours, theirs = values.to_numpy(), of_null.get(gene, nothing)
        rows.append(
            {
                "gene": gene,
                "n_cells": len(ours),
                "n_null_cells": len(theirs),
                "mean": ours.mean(),
                "null_mean": theirs.mean() if len(theirs) else np.nan,
                "p_value": float(ranksums(ours, theirs).pvalue) if len(theirs) else 1.0,
            }
        )
    table = pd.DataFrame(rows)
    if not table["n_null_cells"].any():
        raise ValueError(
            f"No gene of the effects (e.g. {examples(table['gene'])}) was perturbed in the null cells "
            f"(e.g. {examples(null['gene'].unique())})."
        )
    table.insert(5, "difference", table["mean"] - table["null_mean"])
    table["fdr"] = false_discovery_control(table["p_value"])
    table["significant"] = table["fdr"] < significance
    table["value"] = value
    falls_with_effect = value == "cosine_similarity"
    table = table.sort_values(["significant", "difference", "fdr"], ascending=[False, falls_with_effect, True])
    return table.reset_index(drop=True)


def impact_mixture(effects: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Which genes have an impact: a mixture of two Gaussians over the genes' mean cosine similarities.

    The impact component is the one with the lower mean similarity, i.e. the larger effect. (The original takes the
    first that the fit returns, which may be either.) A value beyond a component's mean, on the side away from the
    other, belongs to that component even where the wider one's tail is denser, as in the original.

    Returns  DataFrame, genes with impact first, then by rising similarity, with columns
             gene, n_cells
             cosine_similarity   mean over cells
             standard_error      of that mean; NaN for one cell
             impact              whether that mean belongs to the impact component
             impact_probability  of the component, by the mixture, given that mean
             impact_share        share of the gene's cells whose similarity belongs to the impact component
    Raises   ValueError for fewer than four genes, or equal means
    Needs the extra `train` (scikit-learn).
    """
    from sklearn.mixture import GaussianMixture

    effects = _on_cells(effects, ["cosine_similarity"])
    similarity = effects.groupby("gene", sort=False)["cosine_similarity"]
    table = similarity.agg(n_cells="count", cosine_similarity="mean", standard_error="sem").reset_index()
    means = table["cosine_similarity"].to_numpy()
    if len(means) < MIN_GENES or np.ptp(means) == 0:
        raise ValueError(
            f"A mixture of two components needs at least {MIN_GENES} genes with different effects, found {len(means)} "
            f"{'gene' if len(means) == 1 else 'genes'}{' with equal ones' if len(means) >= MIN_GENES else ''}."
        )
    centre, spread = means.mean(), means.std()

    def standardized(values: np.ndarray) -> np.ndarray:
        # The fit adds 1e-6 to variances, so as not to collapse: as much as real effects of 0.001 vary.
        return (values[:, None] - centre) / spread

    mixture = GaussianMixture(n_components=2, random_state=seed).fit(standardized(means))
    mean_of_component = np.asarray(mixture.means_)[:, 0]
    impact, rest = np.argsort(mean_of_component)

    def has_impact(values: np.ndarray) -> np.ndarray:
        z = standardized(values)
        likelier = mixture.predict(z) == impact
        beyond = np.where(z[:, 0] < mean_of_component[impact], True, likelier)
        return np.where(z[:, 0] > mean_of_component[rest], False, beyond)

    table["impact"] = has_impact(means)
    table["impact_probability"] = mixture.predict_proba(standardized(means))[:, impact]
    every = effects["cosine_similarity"].to_numpy()
    share = pd.Series(has_impact(every), index=effects.index).groupby(effects["gene"], sort=False).mean()
    table["impact_share"] = table["gene"].map(share)
    table = table.sort_values(["impact", "cosine_similarity"], ascending=[False, True])
    return table.reset_index(drop=True)


def mean_effects(effects: pd.DataFrame | str | Path) -> pd.DataFrame:
    """Effects of each perturbed gene (on each affected gene), summed up over cells.

    effects  or the folder of a finished run, whose effects on genes are then read a piece at a time
    Returns  DataFrame, effects on cells first, then by rising similarity, with columns
             gene, and affected where effects on genes were measured
             n_cells, mean, sd  of the cosine similarity; sd is of the population (divides by n), as in the original
             shift_to_<state>   mean shift, where shifts were measured
             Where shifts alone were (method="gradient" with states), mean and sd are NaN, and rows are by rising shift
             to the goal.
    """
    if isinstance(effects, str | Path):
        from .streamed_means import mean_effects_of_folder

        return mean_effects_of_folder(Path(effects))
    by = ["gene", "affected"] if "affected" in effects else ["gene"]
    shifts = [str(name) for name in effects if str(name).startswith("shift_to_")]
    only_shifts = bool(shifts) and "cosine_similarity" in effects and bool(effects["cosine_similarity"].isna().all())
    measured, first = (shifts[0], shifts[0]) if only_shifts else ("cosine_similarity", "mean")
    _check(effects, [measured])
    groups = effects.astype(dict.fromkeys(["cosine_similarity", *shifts], np.float64)).groupby(by, sort=False)
    similarity, n_cells = groups["cosine_similarity"], groups[measured].count()
    table = pd.concat(
        [n_cells, similarity.mean(), similarity.std(ddof=0), *(groups[name].mean() for name in shifts)],
        axis="columns",
        keys=["n_cells", "mean", "sd", *shifts],
    ).reset_index()
    if "affected" in table:
        table = table.assign(on_gene=table["affected"] != CELL).sort_values(["on_gene", first], kind="stable")
        return table.drop(columns="on_gene").reset_index(drop=True)
    return table.sort_values(first, kind="stable").reset_index(drop=True)


def combination_effects(
    pairs: pd.DataFrame, singles: pd.DataFrame, anchor: str, *, significance: float = 0.05
) -> pd.DataFrame:
    """Whether an anchor gene and another do more together than the sum of what each does.

    pairs    effects of perturbing both, from `perturb_cells(..., anchor=anchor)`
    singles  effects of perturbing either alone, in the same cells and with the same kind
    anchor   the anchor's name as in column `gene`
    Returns  DataFrame by rising `pair_minus_additive` (more than the sum first), with columns
             gene                 the anchor's partner
             n_cells              cells in which both single effects are known
             anchor_similarity, gene_similarity, pair_similarity  mean cosine similarities
             additive_similarity  1 - ((1 - anchor) + (1 - gene)): what the pair's would be if effects added up
             pair_minus_additive  below 0: more than the sum
             p_value              Wilcoxon signed-rank test of the difference over cells
             fdr, significant     Benjamini-Hochberg adjusted, and below `significance`
    Raises   ValueError if no cell has all three
    """
    pairs, singles = (_on_cells(frame, ["cosine_similarity"]) for frame in (pairs, singles))
    is_pair = pairs["gene"].str.startswith(anchor + JOINER)
    pairs = pairs.loc[is_pair, ["cell", "gene", "cosine_similarity"]].rename(columns={"cosine_similarity": "pair"})
    pairs["gene"] = pairs["gene"].str[len(anchor + JOINER) :]
    alone = singles[["cell", "gene", "cosine_similarity"]]
    joined = pairs.merge(alone.rename(columns={"cosine_similarity": "single"}), on=["cell", "gene"])
    of_anchor = alone.loc[alone["gene"] == anchor, ["cell", "cosine_similarity"]]
    joined = joined.merge(of_anchor.rename(columns={"cosine_similarity": "anchor"}), on="cell")
    if joined.empty:
        raise ValueError(
            f"No cell has effects of {anchor!r} alone, of another gene alone and of both ({is_pair.sum():,} pairs with "
            f"{anchor!r}, {len(of_anchor):,} cells with it alone). Perturb the same cells with genes='all' or a list "
            "that has the anchor, and with anchor=..."
        )
    joined["additive"] = joined["anchor"] + joined["single"] - 1
    joined["difference"] = joined["pair"] - joined["additive"]
    by_gene = joined.groupby("gene", sort=False)
    table = by_gene.agg(
        n_cells=("pair", "count"),
        anchor_similarity=("anchor", "mean"),
        gene_similarity=("single", "mean"),
        additive_similarity=("additive", "mean"),
        pair_similarity=("pair", "mean"),
        pair_minus_additive=("difference", "mean"),
    ).reset_index()
    table["p_value"] = [_signed_rank_p(by_gene["difference"].get_group(gene).to_numpy()) for gene in table["gene"]]
    table["fdr"] = false_discovery_control(table["p_value"])
    table["significant"] = table["fdr"] < significance
    return table.sort_values("pair_minus_additive").reset_index(drop=True)


def rank_sum_p(pool_sorted: np.ndarray, values: np.ndarray) -> float:
    """Two-sided p-value of `scipy.stats.ranksums(pool, values)`, without ranking the pool again for every gene.

    pool_sorted  (pool,) ascending
    """
    n, m = len(pool_sorted), len(values)
    own = np.sort(values)
    # Average rank of each value in pool and values together
    below = np.searchsorted(pool_sorted, own, "left") + np.searchsorted(own, own, "left")
    up_to = np.searchsorted(pool_sorted, own, "right") + np.searchsorted(own, own, "right")
    rank_sum = ((below + up_to + 1) / 2).sum()
    z = (rank_sum - m * (n + m + 1) / 2) / np.sqrt(n * m * (n + m + 1) / 12)
    return float(2 * norm.sf(abs(z)))


def _signed_rank_p(differences: np.ndarray) -> float:
    return 1.0 if not differences.any() else float(wilcoxon(differences).pvalue)


def _on_cells(effects: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The effects on cells, where effects on genes were measured too, checked and in double precision."""
    effects = effects[effects["affected"] == CELL] if "affected" in effects else effects
    _check(effects, columns)
    # float32 means of many cells drift.
    return effects.astype(dict.fromkeys(columns, np.float64))


def _check(effects: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in ("gene", *columns) if name not in effects]
    if missing:
        raise ValueError(f"The effects lack column {examples(missing)}; they have {examples(effects.columns, 9)}.")
    if effects.empty:
        raise ValueError("There are no effects: the table is empty.")
    for name in columns:
        if (n := int(effects[name].isna().sum())) > 0:
            raise ValueError(
                f"{n:,} of {len(effects):,} values of {name!r} are missing; drop those rows, or find out why."
            )
