"""The genes of a model by name, as a network or other cells may call them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tokenization.count_matrix import open_counts
from ..tokenization.gene_ids import GENE_SYMBOL_COLUMNS, GeneResolver, canonical_id, is_named
from ..tokenization.gene_tables import read_aliases


@dataclass(frozen=True)
class GeneNames:
    """Genes in a fixed order.

    ids      (genes,) different names, Ensembl ids where there are any
    symbols  (genes,) their symbols, "" where a gene has none; or None
    """

    ids: tuple[str, ...]
    symbols: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, genes: np.ndarray) -> "GeneNames":
        """The genes at these positions."""
        symbols = None if self.symbols is None else tuple(self.symbols[i] for i in genes)
        return GeneNames(tuple(self.ids[i] for i in genes), symbols)

    def resolver(self, aliases: Any = None) -> GeneResolver:
        """Finds these genes by id, by a symbol that is theirs alone, or by an alias.

        aliases  mapping or table (columns alias, ensembl_id) of further names; ids and symbols come before them
        """
        names = read_aliases(aliases)
        if self.symbols is not None:
            times = Counter(self.symbols)
            names |= {s: i for s, i in zip(self.symbols, self.ids, strict=True) if is_named(s) and times[s] == 1}
        ids = set(self.ids)
        return GeneResolver(self.ids, {name: gene for name, gene in names.items() if name not in ids})

    def labels(self) -> list[str]:
        """What to call the genes in a figure: the symbol, else the id."""
        if self.symbols is None:
            return list(self.ids)
        return [symbol if is_named(symbol) else gene for symbol, gene in zip(self.symbols, self.ids, strict=True)]

    def config_options(self) -> dict[str, Any]:
        """Fields of `GeneGraphConfig` that say that a model has these genes."""
        symbols = None if self.symbols is None else list(self.symbols)
        return {"n_genes": len(self), "gene_ids": list(self.ids), "gene_symbols": symbols}

    @classmethod
    def of_config(cls, config: Any) -> "GeneNames":
        """The genes that a model was made for.

        Raises  ValueError for a configuration without gene_ids
        """
        if config.gene_ids is None:
            raise ValueError(
                "The model's configuration has no gene_ids, so cells cannot be aligned with its inputs. Make it with "
                "GeneGraphConfig(gene_ids=..., ...)."
            )
        return cls(tuple(config.gene_ids), None if config.gene_symbols is None else tuple(config.gene_symbols))


def gene_names(source: Any, column: str | None = None, *, layer: str | None = None) -> GeneNames:
    """The genes of cells, each once, in their order there.

    source  AnnData, or the path of a count file (`open_counts`)
    column  of `var` with the ids; by default the first that usually holds them, else the index
    layer   with the counts, as of `read_expression`: `raw` may have other genes than X
    """
    with open_counts(source, layer=layer) as matrix:
        ids = [canonical_id(name) for name in matrix.gene_names(column)]
        named = next((name for name in GENE_SYMBOL_COLUMNS if name in matrix.var), None)
        symbols = [str(name) for name in (matrix.var.index if named is None else matrix.var[named])]
    # Where a gene has no symbol, files repeat its id.
    symbols = [s if is_named(s) and canonical_id(s) != gene else "" for s, gene in zip(symbols, ids, strict=True)]
    return GeneNames(tuple(ids), tuple(symbols) if any(symbols) else None).select(_first_of_each(ids))


def _first_of_each(names: Iterable[str]) -> np.ndarray:
    """Positions of the names that are named and did not occur before."""
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if is_named(name):
            seen.setdefault(name, i)
    return np.fromiter(seen.values(), dtype=np.int64, count=len(seen))
