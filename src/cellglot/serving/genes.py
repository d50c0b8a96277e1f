"""What an upload calls its genes: by whichever of its names the model knows most of."""

from typing import Any

from ..tokenization.gene_ids import GeneResolver, examples

# Of the genes that cells and model could share; those that the cells lack count as not measured
LEAST_MATCHED = 0.1


def name_genes(adata: Any, resolver: GeneResolver) -> tuple[Any, str]:
    """AnnData of the same counts, each gene that the model knows by the model's name; and in words how many it knows.

    adata     genes are named by its index or by any text column of var
    resolver  of the model's genes
    Raises    ValueError if they are fewer than LEAST_MATCHED of those that could match
    """
    import anndata as ad
    import pandas as pd

    columns = [adata.var[name] for name in adata.var if not pd.api.types.is_numeric_dtype(adata.var[name])]
    matches = [resolver.match(names) for names in (adata.var_names, *columns)]
    best = max(matches, key=lambda match: match.n_matched)
    n_model = len(resolver.vocabulary)
    if best.n_matched < LEAST_MATCHED * min(adata.n_vars, n_model):
        raise ValueError(
            f"Expected genes such as {examples(resolver.vocabulary)}, {n_model:,} in all, found {adata.n_vars:,} such "
            f"as {examples(adata.var_names)}, of which the model knows {best.n_matched:,}. Name them by symbols or "
            "Ensembl ids, in the index or a column of var."
        )
    known = [resolver.vocabulary[i] if i >= 0 else name for name, i in zip(best.gene_ids, best.index_g, strict=True)]
    named = ad.AnnData(adata.X, obs=adata.obs, var=pd.DataFrame(index=pd.Index(known, dtype=object)))
    n_known = best.n_matched - best.n_collapsed
    return named, f"{n_known:,} of the {n_model:,} genes that the model knows are among theirs"
