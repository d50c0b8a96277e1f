"""Genes under each of their identifiers: Entrez ids, Ensembl ids, symbols.

L1000 files name genes by Entrez id, single-cell files by Ensembl id or symbol, and none says which.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .gene_ids import GENE_ID_COLUMNS, GENE_SYMBOL_COLUMNS, canonical_id, is_ensembl_id, is_named

KINDS = ("entrez_id", "ensembl_id", "gene_symbol")
# Columns of gene tables that may hold identifiers; what kind of, their values say.
COLUMNS = (
    *("entrez_id", "pr_gene_id", "pr_gene_symbol"),
    *GENE_ID_COLUMNS,
    *GENE_SYMBOL_COLUMNS,
)
_ENTREZ = re.compile(r"^\d+(\.0)?$")


def identifier_kind(names: Sequence[str]) -> str:
    """What most of the names are: "entrez_id", "ensembl_id" or "gene_symbol"."""

    def kind(name: str) -> str:
        if _ENTREZ.match(name.strip()):
            return "entrez_id"
        return "ensembl_id" if is_ensembl_id(name) else "gene_symbol"

    found = Counter(kind(name) for name in names if is_named(name))
    return found.most_common(1)[0][0] if found else "gene_symbol"


def gene_identifiers(table: Any) -> dict[str, list[str]]:
    """Kind -> (genes,) identifiers of that kind, "" where a gene has none; the kinds that a gene table has.

    table  pandas DataFrame such as the `var` of an AnnData: its index and its known columns are looked at
    """
    candidates = [[str(name) for name in table[column]] for column in COLUMNS if column in table]
    candidates.append([str(name) for name in table.index])
    found: dict[str, list[str]] = {}
    for names in candidates:
        kind = identifier_kind(names)
        # An index of numbers 0, 1, 2, ... names nothing.
        if kind in found or names == [str(i) for i in range(len(names))]:
            continue
        clean = {"entrez_id": _entrez, "ensembl_id": canonical_id, "gene_symbol": str.strip}[kind]
        found[kind] = [clean(name) if is_named(name) else "" for name in names]
    return {kind: found[kind] for kind in KINDS if kind in found}


def _entrez(name: str) -> str:
    return name.strip().removesuffix(".0")


def gene_positions(wanted: Mapping[str, Sequence[str]], found: Mapping[str, Sequence[str]]) -> tuple[np.ndarray, str]:
    """Where each wanted gene stands in a matrix, by the identifiers that match most of them.

    wanted, found  as of `gene_identifiers`
    Returns        (genes wanted,) int64 first position among those found, -1 for a gene that is not there; and the kind
                   of identifier, "" if none matches
    """
    best, best_kind = np.full(len(next(iter(wanted.values()), ())), -1, dtype=np.int64), ""
    for kind in KINDS:
        if kind not in wanted or kind not in found:
            continue
        fold = str.upper if kind == "gene_symbol" else str
        places = {fold(name): i for i, name in reversed(list(enumerate(found[kind]))) if name}
        positions = np.array([places.get(fold(name), -1) if name else -1 for name in wanted[kind]], dtype=np.int64)
        if (positions >= 0).sum() > (best >= 0).sum():
            best, best_kind = positions, kind
    return best, best_kind
