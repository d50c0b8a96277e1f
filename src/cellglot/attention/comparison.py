"""Whether heads attend to some genes more than to others, and to which ranks: tables in, tables out.

A set of genes may be attended because of what it is, or because of where and how often it stands in the cells. Heads
prefer some ranks; and attention is skewed, so that a mean over few cells is mostly below one over many, and fewer cells
hold transcription factors. For such reasons alone, networks with random weights of a wide spread attend "significantly"
less to transcription factors in about half of their heads. So each comparison is made twice: of the attention itself,
and matched, of what is left of it after the gene's ranks (`attention - expected`) among genes that about as many cells
hold.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..tokenization.gene_ids import examples

# Groups of genes by the number of cells that hold them
N_STRATA = 20
# Fewer genes than this on a side and the normal approximation of the rank-sum test says little
MIN_GENES = 5


def compare_gene_sets(table: Any, set_genes: Iterable[str], background: Iterable[str] | None = None) -> Any:
    """Per head, attention to the genes of a set against other genes.

    table       as of `attention_to_genes`
    set_genes   names as in the table (`resolve_genes` finds them)
    background  all other genes of the table if absent
    Returns     pandas DataFrame, one row a head: layer, head, n_set, n_background, median_set, median_background,
                mean_set, mean_background; auc (chance that a gene of the set is attended more than one of the
                background), p (two-sided rank-sum test over genes), fdr (Benjamini-Hochberg over heads), direction
                ("more" or "less" attended); auc_matched, p_matched, fdr_matched: the same after the genes' ranks, among
                genes held by about as many cells
    Raises      ValueError if a side has fewer than 5 genes in the table, or a gene stands on both
    """
    import pandas as pd
    from scipy import stats

    values, residuals, n_cells = (_by_head(table, column) for column in ("attention", "residual", "n_cells"))
    in_set, in_background = _sides(values.columns, set_genes, background)
    result = values.index.to_frame(index=False)
    result["n_set"], result["n_background"] = int(in_set.sum()), int(in_background.sum())
    ours, others = values.loc[:, in_set].to_numpy(), values.loc[:, in_background].to_numpy()
    for name, statistic in (("median", np.median), ("mean", np.mean)):
        result[f"{name}_set"], result[f"{name}_background"] = statistic(ours, axis=1), statistic(others, axis=1)
    compared = in_set | in_background
    percentiles = residuals.copy()
    percentiles.loc[:, compared] = _percentiles_within_strata(
        residuals.loc[:, compared].to_numpy(), n_cells.loc[:, compared].to_numpy()[0]
    )
    for suffix, frame in (("", values), ("_matched", percentiles)):
        test: Any = stats.mannwhitneyu(
            frame.loc[:, in_set].to_numpy(), frame.loc[:, in_background].to_numpy(), axis=1, method="asymptotic"
        )
        result[f"auc{suffix}"] = test.statistic / (in_set.sum() * in_background.sum())
        # Where all genes are attended alike nothing differs; the test has no variance then.
        result[f"p{suffix}"] = np.nan_to_num(test.pvalue, nan=1.0)
        result[f"fdr{suffix}"] = stats.false_discovery_control(result[f"p{suffix}"])
    result["direction"] = pd.Series(np.where(result["auc"] >= 0.5, "more", "less"), index=result.index)
    return result


def summarize_heads(comparison: Any, *, alpha: float = 0.05) -> dict[str, float]:
    """What the heads of a comparison say together.

    alpha    false discovery rate below which a head counts
    Returns  n_heads; share_more and share_less: shares of heads that attend to the set significantly more or less (the
             paper: 0.20 more); share_more_matched, share_less_matched: matched by rank and number of cells; auc_early
             and auc_late: mean over the first and last half of the layers; p_early_late (two-sided rank-sum test over
             heads; the paper: transcription factors are attended more in early layers)
    """
    from scipy import stats

    summary: dict[str, float] = {"n_heads": len(comparison)}
    for suffix in ("", "_matched"):
        significant = comparison[f"fdr{suffix}"] < alpha
        more = comparison[f"auc{suffix}"] > 0.5
        summary[f"share_more{suffix}"] = float((significant & more).mean())
        summary[f"share_less{suffix}"] = float((significant & ~more).mean())
    layers = comparison["layer"].max() + 1
    early = comparison.loc[comparison["layer"] < layers // 2, "auc"]
    late = comparison.loc[comparison["layer"] >= layers - layers // 2, "auc"]
    enough = len(early) > 0
    summary["auc_early"] = float(early.mean()) if enough else np.nan
    summary["auc_late"] = float(late.mean()) if enough else np.nan
    summary["p_early_late"] = float(stats.mannwhitneyu(early, late).pvalue) if enough else np.nan
    return summary


def rank_diversity(by_rank: Any) -> Any:
    """How many ranks the heads of each layer survey, and how far they differ.

    by_rank  as of `attention_by_rank`
    Returns  pandas DataFrame, one row a layer. With p_h the attention of head h over the ranges of ranks, made to sum
             to 1: breadth, mean over heads of exp(entropy(p_h)) / ranges (1: all ranks alike);
             divergence, Jensen-Shannon divergence of the heads' p_h / log(heads) (0: all heads survey the same ranks,
             1: each its own); mean_rank, mean over heads of the attended rank
    """
    import pandas as pd

    middle = (by_rank["first_rank"] + by_rank["last_rank"]) / 2
    rows = []
    for layer, part in by_rank.assign(middle=middle).groupby("layer", sort=True):
        attention = part.pivot(index="head", columns="middle", values="attention")
        p_hb = attention.to_numpy() / attention.to_numpy().sum(axis=1, keepdims=True)
        heads, ranges = p_hb.shape
        own, mixed = _entropy(p_hb), _entropy(p_hb.mean(axis=0, keepdims=True))[0]
        rows.append(
            {
                "layer": layer,
                "breadth": float(np.exp(own).mean() / ranges),
                "divergence": float(max(mixed - own.mean(), 0.0) / np.log(heads)) if heads > 1 else 0.0,
                "mean_rank": float((p_hb @ attention.columns.to_numpy(dtype=float)).mean()),
            }
        )
    return pd.DataFrame(rows)


def _percentiles_within_strata(values_hg: np.ndarray, n_cells_g: np.ndarray) -> np.ndarray:
    """(h, g) place of each value among those of the genes that about as many cells hold, from 0 to 1."""
    from scipy import stats

    edges = np.unique(np.quantile(n_cells_g, np.linspace(0, 1, N_STRATA + 1)[1:-1]))
    strata = np.searchsorted(edges, n_cells_g)
    percentiles = np.empty_like(values_hg)
    for stratum in np.unique(strata):
        inside = strata == stratum
        percentiles[:, inside] = (stats.rankdata(values_hg[:, inside], axis=1) - 0.5) / inside.sum()
    return percentiles


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)


def _by_head(table: Any, column: str) -> Any:
    """(heads, genes) frame of a column; "residual" is attention less what the gene's ranks would give it."""
    missing = [name for name in ("layer", "head", "gene", "attention", "expected", "n_cells") if name not in table]
    if missing:
        raise ValueError(f"Expected a table of attention_to_genes; this one lacks {', '.join(missing)}.")
    if column == "residual":
        table = table.assign(residual=table["attention"] - table["expected"])
    return table.pivot(index=["layer", "head"], columns="gene", values=column)


def _sides(genes: Any, set_genes: Iterable[str], background: Iterable[str] | None) -> tuple[np.ndarray, np.ndarray]:
    wanted = set(set_genes)
    in_set = np.asarray(genes.isin(list(wanted)))
    if background is None:
        in_background = ~in_set
    else:
        others = set(background)
        both = sorted(wanted & others)
        if both:
            raise ValueError(f"{len(both):,} genes are in the set and in the background, e.g. {examples(both)}.")
        in_background = np.asarray(genes.isin(list(others)))
    for name, side in (("set", in_set), ("background", in_background)):
        if side.sum() < MIN_GENES:
            raise ValueError(
                f"{int(side.sum())} genes of the {name} are in the cells ({int(in_set.sum()):,} of {len(wanted):,} of "
                f"the set, of {len(genes):,} genes in all): too few for a rank-sum test, which needs {MIN_GENES} on "
                f"each side. The cells' genes are named e.g. {examples(genes)}; resolve_genes(...) finds such names."
            )
    return in_set, in_background
