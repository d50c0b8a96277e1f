"""`BinarizedFeatureExtractor`: which genes a cell expresses and which peaks are open, from counts.

The threshold, and what names and values of files may be, are decided here; `binarized_string` makes strings of it.
Source: Lee et al., "Translating the Code of Life", Methods.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from transformers import BatchFeature, FeatureExtractionMixin

from .count_matrix import CELLS_PER_BLOCK, check_counts
from .feature_sets import FeatureSets, feature_sets
from .gene_ids import GENE_ID_COLUMNS, GENE_SYMBOL_COLUMNS, GeneResolver, examples
from .paired_cells import ACCESSIBILITY, EXPRESSION, Modality, PairedCells, open_pairs
from .peaks import peak_keys

logger = logging.getLogger(__name__)

# Key of all expression beside the sets of `iter_sets`
LEVELS = "expression levels"
# Under this share of the features a file and the vocabulary could share, they are of different genomes or names.
MIN_MATCHED_FEATURES = 0.5
# log(1 + x) of a cell's whole target sum would be 9.2 or 13.8 (1e4, 1e6)
HIGHEST_LOG_LEVEL = 20.0


@dataclass
class PairingReport:
    """What an encoding saw of its cells, filled while it runs."""

    name: str = ""
    n_cells: int = 0
    n_genes: int = 0
    n_matched_genes: int = 0
    n_peaks: int = 0
    n_matched_peaks: int = 0
    n_expressed: int = 0
    n_open: int = 0
    n_empty_sources: int = 0

    def __str__(self) -> str:
        n = max(self.n_cells, 1)
        genes = f"{self.n_matched_genes:,} of {self.n_genes:,} genes"
        peaks = f"{self.n_matched_peaks:,} of {self.n_peaks:,} peaks"
        return (
            f"{self.name}: {self.n_cells:,} cells, {self.n_empty_sources:,} with nothing to read; {genes}, {peaks} in "
            f"the vocabulary; {self.n_expressed / n:,.0f} expressed genes and {self.n_open / n:,.0f} open peaks a cell"
        )


def peak_keys_of(modality: Modality) -> list[tuple[str, int, int]]:
    """`peak_keys` of the features of a modality.

    Raises  ValueError naming the file and its malformed names
    """
    try:
        return peak_keys(modality.names())
    except ValueError as error:
        raise ValueError(f"{modality.matrix.name}: {error} The order is (expression, accessibility).") from error


class BinarizedFeatureExtractor(FeatureExtractionMixin):
    """Blocks of counts into sets of the vocabulary's genes and peaks.

    genes, peaks       names, in the order of the strings
    gene_aliases       other names (Ensembl ids, symbols) of genes
    threshold          log-normalized expression at and above which a gene is expressed
    target_sum         counts a cell is normalized to before log(1 + x)
    expression_values  "counts", or "log_normalized" where they are that already
    encoding           "set": order of the matrix; "rank": by falling expression; "binned": each gene, then its bin
    n_bins, bin_width  of "binned": bins of log-normalized expression from the threshold on, the last one open
    """

    _auto_class = "AutoFeatureExtractor"

    def __init__(
        self,
        genes: Sequence[str] = (),
        peaks: Sequence[str] = (),
        gene_aliases: Mapping[str, str] | None = None,
        threshold: float = 2.0,
        target_sum: float = 10_000.0,
        expression_values: Literal["counts", "log_normalized"] = "counts",
        encoding: Literal["set", "rank", "binned"] = "set",
        n_bins: int = 8,
        bin_width: float = 0.5,
        **kwargs: Any,
    ):
        for name, value, choices in (
            ("expression_values", expression_values, ("counts", "log_normalized")),
            ("encoding", encoding, ("set", "rank", "binned")),
        ):
            if value not in choices:
                raise ValueError(f"Expected {name} to be one of {', '.join(choices)}; found {value!r}.")
        for name, value in (("threshold", threshold), ("target_sum", target_sum), ("bin_width", bin_width)):
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"Expected {name} above zero, found {value!r}.")
        super().__init__(**kwargs)
        self.genes, self.peaks, self.gene_aliases = list(genes), list(peaks), dict(gene_aliases or {})
        self.threshold, self.target_sum, self.expression_values = threshold, target_sum, expression_values
        self.encoding, self.n_bins, self.bin_width = encoding, n_bins, bin_width

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without what is only computed from the rest."""
        kept = type(self).__new__(type(self))
        kept.__dict__ = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return super(BinarizedFeatureExtractor, kept).to_dict()

    def __repr__(self) -> str:
        settings = {name: value for name, value in self.__dict__.items() if isinstance(value, str | int | float)}
        return f"{type(self).__name__}({len(self.genes):,} genes, {len(self.peaks):,} peaks, {settings})"

    def features(self, modality: str) -> list[str]:
        """Names of the genes ("expression") or peaks ("accessibility")."""
        return self.genes if modality == EXPRESSION else self.peaks

    @cached_property
    def _gene_resolver(self) -> GeneResolver:
        return GeneResolver(self.genes, self.gene_aliases)

    @cached_property
    def _position_of_peak(self) -> dict[tuple[str, int, int], int]:
        return {key: i for i, key in enumerate(peak_keys(self.peaks))}

    def __call__(self, cells: Any, **options: Any) -> BatchFeature:
        """Binary matrices of the modalities at hand, `expression` and `accessibility`: CSR (cells, features) float32.

        cells, options  as of `open_pairs`
        """
        with open_pairs(cells, **options) as pairs:
            blocks = [sets for _, sets in self.iter_sets(pairs)]
        names = list(blocks[0]) if blocks else []
        matrices = {
            name: sp.csr_matrix(sp.vstack([sets[name].matrix(len(self.features(name))) for sets in blocks]))
            for name in names
        }
        return BatchFeature(matrices)

    def iter_sets(
        self,
        pairs: PairedCells,
        cells: np.ndarray | None = None,
        *,
        with_levels: bool = False,
        min_matched_features: float = MIN_MATCHED_FEATURES,
        cells_per_block: int = CELLS_PER_BLOCK,
        report: PairingReport | None = None,
    ) -> Iterator[tuple[np.ndarray, dict[str, FeatureSets]]]:
        """(cell positions, sets of each modality) of a block of cells at a time, in order of the vocabulary.

        cells                 (cells,) boolean mask
        with_levels           adds `LEVELS`: every gene with a count, whose level may be below the threshold
        min_matched_features  least share of the features that file and vocabulary could share
        Raises                ValueError for values that are no counts, features of another genome, or a threshold that
                              leaves every cell empty
        """
        report = report if report is not None else PairingReport()
        report.name = pairs.first.name
        matched = {
            name: self._positions(modality, name, min_matched_features, report)
            for name, modality in pairs.present.items()
        }
        highest, seen = 0.0, dict.fromkeys(matched, 0)
        for rows, values in pairs.blocks(cells, cells_per_block):
            sets = {}
            for name, (position_g, sum_columns) in matched.items():
                modality, block = pairs.present[name], values[name]
                self._check_values(modality, name, rows, block)
                scale_n = self._scale(modality, rows, block) if name == EXPRESSION else None
                if sum_columns is not None:
                    block = sp.csr_matrix(block @ sum_columns)
                cut_n = self._cut(len(rows), scale_n) if name == EXPRESSION else None
                ordered = name == EXPRESSION and self.encoding != "set"
                sets[name] = feature_sets(block, position_g, cut_n=cut_n, with_levels=ordered, scale_n=scale_n)
                seen[name] += len(sets[name].features)
                if name == EXPRESSION and (with_levels or not seen[name]):
                    everything = feature_sets(block, position_g, with_levels=True, scale_n=scale_n)
                    assert everything.levels is not None
                    highest = max(highest, float(everything.levels.max(initial=0)))
                    if with_levels:
                        sets[LEVELS] = everything
            report.n_cells += len(rows)
            report.n_expressed += len(sets[EXPRESSION].features) if EXPRESSION in sets else 0
            report.n_open += len(sets[ACCESSIBILITY].features) if ACCESSIBILITY in sets else 0
            yield rows, sets
        if report.n_cells and seen.get(EXPRESSION) == 0:
            raise ValueError(
                f"{report.name}: the threshold of {self.threshold:g} leaves no expressed gene in any of "
                f"{report.n_cells:,} cells; the highest log-normalized value is {highest:.3g}. Lower the threshold, or "
                f"check that the values are what expression_values={self.expression_values!r} says."
            )
        if report.n_cells and seen.get(ACCESSIBILITY) == 0:
            raise ValueError(
                f"{pairs.present[ACCESSIBILITY].matrix.name}: no peak of the vocabulary is open in any of "
                f"{report.n_cells:,} cells. Check that the matrix, or layer=..., has the fragment counts."
            )

    def _positions(
        self, modality: Modality, name: str, least: float, report: PairingReport
    ) -> tuple[np.ndarray, sp.csr_matrix | None]:
        """(columns,) position of each column's feature or -1; where two columns mean one feature, (columns, features)
        that sums them, and the positions after that."""
        found = self._match_genes(modality) if name == EXPRESSION else self._match_peaks(modality)
        n_matched = int((found >= 0).sum())
        vocabulary = self.features(name)
        if name == EXPRESSION:
            report.n_genes, report.n_matched_genes = len(found), n_matched
        else:
            report.n_peaks, report.n_matched_peaks = len(found), n_matched
        possible = min(len(found), len(vocabulary))
        if n_matched < max(least * possible, 1):
            unknown = [feature for feature, k in zip(modality.names(), found, strict=True) if k < 0]
            what, hint = (
                ("genes", "Name the genes as the vocabulary does, or keep their Ensembl ids in var['gene_ids'].")
                if name == EXPRESSION
                else ("peaks", "Another genome build or peak calling? Count the fragments over the vocabulary's peaks.")
            )
            raise ValueError(
                f"{modality.matrix.name}: {n_matched:,} of {len(found):,} {what} ({n_matched / len(found):.1%}) are in "
                f"the vocabulary of {len(vocabulary):,}; not in it are e.g. {examples(unknown)}; it holds e.g. "
                f"{examples(vocabulary)}. {hint}"
            )
        if n_matched < possible:
            logger.warning(
                "%s: %s of %s %s are in the vocabulary of %s; the others are left out, and what the vocabulary has "
                "beyond counts as absent.",
                modality.matrix.name,
                *(f"{n_matched:,}", f"{len(found):,}", "genes" if name == EXPRESSION else "peaks"),
                f"{len(vocabulary):,}",
            )
        position_g = np.full(modality.matrix.n_genes, -1, dtype=np.int32)
        position_g[modality.columns] = found
        if len(np.unique(found[found >= 0])) == n_matched:
            return position_g, None
        known = np.flatnonzero(position_g >= 0)
        selector = sp.csr_matrix(
            (np.ones(n_matched, np.float32), (known, position_g[known])), shape=(len(position_g), len(vocabulary))
        )
        return np.arange(len(vocabulary), dtype=np.int32), selector

    def _match_genes(self, modality: Modality) -> np.ndarray:
        columns = [c for c in (*GENE_ID_COLUMNS, *GENE_SYMBOL_COLUMNS) if c in modality.matrix.var]
        matches = [self._gene_resolver.match(modality.names(column)) for column in (None, *columns)]
        return max(matches, key=lambda match: match.n_matched).index_g

    def _match_peaks(self, modality: Modality) -> np.ndarray:
        positions = (self._position_of_peak.get(key, -1) for key in peak_keys_of(modality))
        return np.fromiter(positions, dtype=np.int64, count=len(modality.columns))

    def _check_values(self, modality: Modality, name: str, rows: np.ndarray, values: sp.csr_matrix) -> None:
        check_counts(modality.matrix, rows, values, allow_normalized=True)
        data, columns = values.data, values.indices
        if data.dtype.kind in "iub" and self.expression_values == "counts":
            return
        if modality.shares_matrix:
            own = np.zeros(modality.matrix.n_genes, dtype=bool)
            own[modality.columns] = True
            inside = own[columns]
            data, columns = data[inside], columns[inside]
        levels = name == EXPRESSION and self.expression_values == "log_normalized"
        bad = data > HIGHEST_LOG_LEVEL if levels else data != np.rint(data)
        if not bad.any():
            return
        k = int(np.argmax(bad))
        where = f"{modality.matrix.name}: {modality.matrix.var.index[columns[k]]!r} has {data[k]:g}"
        if levels:
            raise ValueError(f"{where}, too high for log-normalized expression: pass expression_values='counts'?")
        if name == EXPRESSION:
            raise ValueError(
                f"{where}, no count: pass layer=... with the raw counts, or build the processor with "
                "expression_values='log_normalized' if that is what these are."
            )
        raise ValueError(
            f"{where}, neither a count nor 0 or 1: accessibility is binarized here (counts above zero are open), so "
            "pass layer=... with counts or the binary matrix, not TF-IDF or other normalized values."
        )

    def _scale(self, modality: Modality, rows: np.ndarray, values: sp.csr_matrix) -> np.ndarray | None:
        """(cells,) factor from counts to counts per target sum; None for values that are log-normalized already."""
        if self.expression_values == "log_normalized":
            return None
        is_gene = np.zeros(modality.matrix.n_genes)
        is_gene[modality.columns] = 1
        sums = values @ is_gene
        # obs["n_counts"] of a file with both modalities may count fragments too.
        totals = sums if modality.shares_matrix else modality.matrix.totals_of_sums(rows, sums)
        return np.divide(self.target_sum, totals, out=np.zeros(len(rows)), where=totals > 0)

    def _cut(self, n_cells: int, scale_n: np.ndarray | None) -> np.ndarray:
        """(cells,) least value of a matrix that is at the threshold: it is the counts that are compared, not levels."""
        if scale_n is None:
            return np.full(n_cells, self.threshold)
        # expm1(threshold) / 0 of an empty cell is above any count.
        with np.errstate(divide="ignore"):
            return np.expm1(self.threshold) / scale_n

    def bins(self, levels: np.ndarray) -> np.ndarray:
        """Bin of each level from 0: the k-th begins at threshold + k * bin_width."""
        k = np.floor((levels.astype(np.float64) - self.threshold) / self.bin_width)
        return np.clip(k, 0, self.n_bins - 1).astype(np.int32)
