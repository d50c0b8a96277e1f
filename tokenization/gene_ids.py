"""Gene identifiers, resolved in one place.

Labs name genes in many ways: Ensembl ids with or without a version, symbols, retired ids, any letter case. Every reader
and tokenizer of cellglot asks `GeneResolver` which vocabulary gene a name means, and nothing else decides that.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# An Ensembl stable id (gene, transcript or protein of any species), maybe followed by a version: ENSG00000141510.18
_ENSEMBL = re.compile(r"^(ENS[A-Z]*\d{11})(\.\d+)?$", re.IGNORECASE)
_MOUSE_GENE = re.compile(r"^ENSMUSG\d{11}", re.IGNORECASE)
_HUMAN_GENE = re.compile(r"^ENSG\d{11}", re.IGNORECASE)

# Columns of `var` that hold gene identifiers in the files people share, in order of trust; the index is tried last.
GENE_ID_COLUMNS = ("ensembl_id", "gene_ids", "gene_id", "feature_id", "Accession")

# Columns of `var` that hold symbols
GENE_SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "gene_name", "feature_name", "symbol")


def canonical_id(name: str) -> str:
    """An Ensembl id in upper case and without version; any other name, such as the clone `RP11-206L10.9`, as it is."""
    name = name.strip()
    match = _ENSEMBL.match(name)
    return match[1].upper() if match else name


def is_ensembl_id(name: str) -> bool:
    """Whether a name is an Ensembl stable id of any species, with version or not."""
    return _ENSEMBL.match(name.strip()) is not None


def is_named(name: str) -> bool:
    """Whether a gene has a name at all; tables have empty fields where a symbol has no identifier."""
    return name.strip() not in ("", "nan", "None")


def examples(names: Iterable[str], n: int = 3) -> str:
    """At most `n` names, quoted, for an error message."""
    return ", ".join(repr(str(name)) for name, _ in zip(names, range(n), strict=False))


@dataclass(frozen=True)
class GeneMatch:
    """Which vocabulary gene each column of a count matrix means.

    index_g   (genes of the file,) int64: position in the vocabulary, or -1 where the name is unknown
    gene_ids  (genes of the file,) the names that were resolved
    """

    index_g: np.ndarray
    gene_ids: np.ndarray

    @property
    def n_matched(self) -> int:
        return int((self.index_g >= 0).sum())

    @property
    def n_collapsed(self) -> int:
        """Columns whose gene another column already names: their counts are summed."""
        matched = self.index_g[self.index_g >= 0]
        return len(matched) - len(np.unique(matched))


class GeneResolver:
    """Resolves gene names to positions in a vocabulary.

    vocabulary  the vocabulary's gene names; their order gives the positions
    aliases     other names (symbols, retired ids) of vocabulary genes. Targets outside the vocabulary are ignored.

    A name is tried as it is, then without Ensembl version and in upper case; aliases before the vocabulary. Where upper
    case makes two aliases of different genes equal, only the exact spelling counts.
    """

    def __init__(self, vocabulary: Sequence[str], aliases: Mapping[str, str] | None = None):
        self.vocabulary = list(vocabulary)
        position = {gene: i for i, gene in enumerate(self.vocabulary)}
        exact = dict(position)
        folded: dict[str, int] = {}
        ambiguous: set[str] = set()

        def add(table: Iterable[tuple[str, int]]) -> None:
            for name, target in table:
                key = name.upper()
                if folded.setdefault(key, target) != target:
                    ambiguous.add(key)

        add(position.items())
        known = {name: position[target] for name, target in (aliases or {}).items() if target in position}
        exact.update(known)
        for name, target in known.items():
            # A vocabulary gene keeps its own upper-case spelling even if some alias shares it.
            key = name.upper()
            if key in folded and folded[key] != target and key not in position:
                ambiguous.add(key)
            folded.setdefault(key, target)
        for key in ambiguous:
            folded.pop(key, None)
        self._exact, self._folded = exact, folded

    def match(self, gene_ids: Iterable[str]) -> GeneMatch:
        """The vocabulary position of each name, in order."""
        names = np.asarray([str(gene) for gene in gene_ids], dtype=object)
        index = np.fromiter((self._position(name) for name in names), dtype=np.int64, count=len(names))
        return GeneMatch(index, names)

    def _position(self, name: str) -> int:
        for spelling in (name, canonical_id(name)):
            if spelling in self._exact:
                return self._exact[spelling]
        return self._folded.get(canonical_id(name).upper(), -1)

    def explain_no_match(self, match: GeneMatch) -> str:
        """Why few or no names matched, with three examples of each side and what to do."""
        n = len(match.gene_ids)
        n_mouse = sum(bool(_MOUSE_GENE.match(name)) for name in match.gene_ids)
        if n_mouse > n / 2 and any(_HUMAN_GENE.match(gene) for gene in self.vocabulary[:10]):
            return (
                f"{n_mouse:,} of {n:,} gene ids are mouse genes (e.g. {examples(match.gene_ids)}), but the vocabulary "
                f"is human (e.g. {examples(self.vocabulary)}). Map the cells to human one-to-one orthologs first."
            )
        unmatched = match.gene_ids[match.index_g < 0]
        return (
            f"{match.n_matched:,} of {n:,} gene ids are in the vocabulary; not in it are e.g. {examples(unmatched)}; "
            f"it holds e.g. {examples(self.vocabulary)}. Pass the column of `var` that holds such ids as gene_ids=..., "
            "or a table of aliases when the tokenizer is built."
        )
