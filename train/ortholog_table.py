"""Tables of orthologs: which gene of one species is which of another, from the files people have."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd

from cellglot.datasets_scripts.gene_networks import MGI_CLASSES, ensembl_orthologs, mgi_orthologs
from cellglot.tokenization.gene_ids import canonical_id, examples

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".rpt": "\t"}


@dataclass(frozen=True)
class SharedGenes:
    """One-to-one orthologs that two sources have.

    index_a, index_b  (shared genes,) position of each in the genes of either source
    columns           of the table that named them
    """

    index_a: np.ndarray
    index_b: np.ndarray
    columns: tuple[str, str]


def read_orthologs(path: Path) -> pd.DataFrame:
    """Pairs of genes, one a row, as text; where the table says which pairs are one to one, only those.

    path    BioMart's export, MGI's HOM_MouseHumanSequence.rpt, the Parquet that gene_networks.py writes (a file or its
            folder), or any `.csv` or `.tsv` with a column a species; with or without header, gzip-compressed or not
    Raises  ValueError for another format, OSError for what cannot be read
    """
    suffixes = [s for s in path.suffixes if s != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if path.is_dir() or suffix == ".parquet":
        return _one_to_one(pd.read_parquet(path))
    if suffix not in SEPARATORS:
        raise ValueError(f"{path}: expected orthologs as .csv, .tsv, .txt, .rpt or .parquet, found {suffix!r}.")
    # A header is a row like others, in which no gene is found.
    try:
        table = pd.read_csv(path, sep=SEPARATORS[suffix], header=None, dtype=str)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty: expected a pair of genes a row.") from None
    header = set(table.iloc[0].dropna())
    if header & set(MGI_CLASSES):
        return _one_to_one(mgi_orthologs(path).to_pandas())
    if {"Gene name", "Mouse gene name"} <= header:
        return _one_to_one(ensembl_orthologs(path).to_pandas())
    return table.rename(columns={i: name for i, name in table.iloc[0].items() if isinstance(name, str)})


def _one_to_one(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["one_to_one"]].astype("string") if "one_to_one" in table else table.astype("string")


def shared_genes(
    table: pd.DataFrame,
    genes_a: Sequence[str],
    genes_b: Sequence[str],
    *,
    name: str,
    symbols: tuple[Sequence[str], Sequence[str]] | None = None,
) -> SharedGenes:
    """One-to-one orthologs among the genes of two sources, by the two columns that name most of them.

    table    of `read_orthologs`; a gene that stands in pairs with several others is left out
    name     of the table, for messages
    symbols  what the genes of either source are called besides, which the table may name them by
    Raises   ValueError if the sources share none
    """
    found = [_positions(*named) for named in zip((genes_a, genes_b), symbols or ((), ()), strict=True)]
    names = table.map(lambda gene: canonical_id(gene) if isinstance(gene, str) else None)
    best, columns = pd.DataFrame(columns=["a", "b"]), (0, 1)
    for first, second in permutations(range(names.shape[1]), 2):
        pairs = pd.DataFrame({"a": names.iloc[:, first], "b": names.iloc[:, second]}).dropna().drop_duplicates()
        alone = ~pairs["a"].duplicated(keep=False) & ~pairs["b"].duplicated(keep=False)
        pairs = pairs[alone & pairs["a"].isin(found[0]) & pairs["b"].isin(found[1])]
        if len(pairs) > len(best):
            best, columns = pairs, (first, second)
    if not len(best):
        rows = "; ".join(", ".join(map(str, row)) for row in table.iloc[1:3].itertuples(index=False))
        raise ValueError(
            f"{name} joins no gene of the one source (e.g. {examples(genes_a)}) to one of the other (e.g. "
            f"{examples(genes_b)}) one to one; it holds e.g. {rows}. Pass a table with identifiers of the same kinds, "
            "or align with --method adversarial, which needs none."
        )
    index_a, index_b = (
        best[side].map(positions).to_numpy(dtype=np.int64) for side, positions in zip("ab", found, strict=True)
    )
    return SharedGenes(index_a, index_b, (str(table.columns[columns[0]]), str(table.columns[columns[1]])))


def _positions(genes: Sequence[str], symbols: Sequence[str]) -> dict[str, int]:
    """Name -> position of the gene that it means: its id, or a symbol that no other gene has."""
    called = [canonical_id(symbol) for symbol in symbols]
    n_of = Counter(called)
    own = {symbol: i for i, symbol in enumerate(called) if n_of[symbol] == 1}
    return own | {canonical_id(gene): i for i, gene in enumerate(genes)}
