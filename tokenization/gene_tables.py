"""Tables of genes: vocabularies with their medians, and other names of genes."""

import gzip
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .gene_ids import examples


def read_table(source: Any, columns: Sequence[str]) -> Any:
    """A DataFrame that has the columns, from one or from a TSV/CSV path (.gz too), names of the first as text.

    Raises  ValueError for a table that lacks a column
    """
    import pandas as pd

    if isinstance(source, str | os.PathLike):
        path = str(source)
        open_text = gzip.open if path.endswith(".gz") else open
        with open_text(path, "rt", encoding="utf-8") as file:
            separator = "\t" if "\t" in file.readline() else ","
        # A gene may be called NA: only an empty field is missing.
        # pandas' default parser may be off by the last bit of a number.
        table = pd.read_csv(path, sep=separator, keep_default_na=False, na_values=[""], float_precision="round_trip")
        source = table.assign(**{columns[0]: table[columns[0]].astype(str)}) if columns[0] in table else table
    missing = [name for name in columns if name not in source]
    if missing:
        raise ValueError(f"The table lacks column {examples(missing)}; it has {', '.join(map(str, source.columns))}.")
    return source


def read_aliases(source: Any) -> dict[str, str]:
    """Alias to gene, from a mapping, a DataFrame or a table on disk with columns alias, ensembl_id; empty for None."""
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return {str(alias): str(gene) for alias, gene in source.items()}
    table = read_table(source, ("alias", "ensembl_id"))
    return dict(zip(table["alias"].astype(str), table["ensembl_id"].astype(str), strict=True))
