"""`ExpressionFeatureExtractor`: profiles over a model's genes, on the model's scale, and the conditions of a response.

Genes are matched by Entrez id, Ensembl id or symbol, whichever matches most; what is missing is filled and counted.
Counts become log(1 + counts of `target_sum` a cell); values that are logarithmic already (L1000) stay. Then each gene
may be centred at its mean over the training profiles and divided by a spread.

Axis letters: n profiles, g genes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from .count_matrix import CELLS_PER_BLOCK, CountMatrix
from .drug_conditions import micromolar, morgan_fingerprints
from .gene_identifiers import KINDS, gene_identifiers, gene_positions, identifier_kind
from .gene_ids import GeneResolver, examples
from .log_expression import LogExpression, open_cells

logger = logging.getLogger(__name__)

SCALINGS = ("none", "center", "standardize")
# Logarithmic expression never gets there; counts do.
LARGEST_LOG = 30.0
# Standard deviations below this share of their mean are taken for it: a gene that does not vary says nothing.
LEAST_SPREAD = 0.05


@dataclass
class ExpressionReport:
    """What an extractor saw of the genes it was given; filled while it runs.

    identifier  kind of identifier they were matched by
    n_genes     of the file; n_matched and n_missing are of the model's
    filled_with what missing genes were set to
    """

    identifier: str = ""
    n_genes: int = 0
    n_matched: int = 0
    n_missing: int = 0
    missing: tuple[str, ...] = ()
    filled_with: str = ""


class ExpressionFeatureExtractor(FeatureExtractionMixin):
    """Aligns and scales profiles for a drug response model. Build it with `landmark`, `from_genes` or `fit`.

    genes           kind ("entrez_id", "ensembl_id", "gene_symbol") -> (g,) identifiers, "" for unknown ones
    target_sum      counts a cell is scaled to before log(1 + x); None for values that are logarithmic already
    scaling         "none"; "center": minus the mean, over one spread for all genes; "standardize": over each gene's own
    mean, spread    (g,) of the training profiles; mean also fills missing genes
    drugs, smiles   names of the drugs known by id, and drug -> structure
    cell_lines      names of the lines known by id
    drug_encoder    "id" or "fingerprint": what `conditions` gives
    """

    model_input_names = ["expression"]
    _auto_class = "AutoFeatureExtractor"

    def __init__(
        self,
        genes: Mapping[str, Sequence[str]] | None = None,
        *,
        target_sum: float | None = None,
        scaling: str = "none",
        mean: Sequence[float] | None = None,
        spread: Sequence[float] | None = None,
        drugs: Sequence[str] = (),
        cell_lines: Sequence[str] = (),
        smiles: Mapping[str, str] | None = None,
        drug_encoder: str = "id",
        fingerprint_size: int = 1024,
        **kwargs: Any,
    ):
        kwargs.pop("feature_extractor_type", None)
        super().__init__(**kwargs)
        if scaling not in SCALINGS:
            raise ValueError(f"Expected scaling among {', '.join(SCALINGS)}, found {scaling!r}.")
        if scaling != "none" and (mean is None or spread is None):
            raise ValueError(f"scaling={scaling!r} needs the mean and spread of training profiles: use fit(...).")
        if drug_encoder not in ("id", "fingerprint"):
            raise ValueError(f'Expected drug_encoder "id" or "fingerprint", found {drug_encoder!r}.')
        self.genes = {kind: list(names) for kind, names in (genes or {}).items()}
        self.target_sum, self.scaling = target_sum, scaling
        # Plain numbers, since all of an extractor is JSON
        self.mean = None if mean is None else [float(value) for value in mean]
        self.spread = None if spread is None else [float(value) for value in spread]
        self.drugs, self.cell_lines = [str(name) for name in drugs], [str(name) for name in cell_lines]
        self.smiles = dict(smiles or {})
        self.drug_encoder, self.fingerprint_size = drug_encoder, fingerprint_size
        self._fingerprints: dict[str, np.ndarray] = {}

    # ---- building

    @classmethod
    def from_genes(cls, genes: Any, **settings: Any) -> "ExpressionFeatureExtractor":
        """For these genes, in this order.

        genes   pandas DataFrame with columns of identifiers (`var` of an AnnData), kind -> identifiers, or identifiers
                of one kind
        Raises  ValueError for no genes, or the same one twice
        """
        if hasattr(genes, "columns"):
            found = gene_identifiers(genes)
        elif isinstance(genes, Mapping):
            found = {kind: [str(name) for name in names] for kind, names in genes.items()}
        else:
            names = [str(name) for name in genes]
            found = {identifier_kind(names): names}
        unknown = set(found) - set(KINDS)
        if unknown or not found or not len(next(iter(found.values()))):
            raise ValueError(f"Expected genes by {', '.join(KINDS)}; found {', '.join(sorted(unknown)) or 'none'}.")
        names = next(iter(found.values()))
        twice = [name for i, name in enumerate(names) if name and name in names[:i]]
        if twice:
            raise ValueError(f"Expected each gene once; {len(twice):,} stand there again (e.g. {examples(twice)}).")
        return cls(found, **settings)

    @classmethod
    def landmark(cls, table: Any, **settings: Any) -> "ExpressionFeatureExtractor":
        """For the landmark genes of a table: `genes.parquet` of datasets_scripts/lincs_l1000.py, or a CSV or TSV with a
        column of Entrez ids (gene_id), symbols (gene_symbol) or Ensembl ids (ensembl_id).

        table  pandas DataFrame or path; rows with is_landmark (or pr_is_lm, pr_is_lmark) not true are left out
        """
        import pandas as pd

        if isinstance(table, str | Path):
            path = Path(table)
            separator = "\t" if ".tsv" in path.name or ".txt" in path.name else ","
            table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, sep=separator, dtype=str)
        for flag in ("is_landmark", "pr_is_lm", "pr_is_lmark"):
            if flag in table:
                table = table[table[flag].astype(str).str.lower().isin(("true", "1"))]
        return cls.from_genes(table.reset_index(drop=True), **settings)

    @classmethod
    def fit(
        cls,
        data: Any,
        rows: np.ndarray | None = None,
        *,
        scaling: str = "center",
        **settings: Any,
    ) -> "ExpressionFeatureExtractor":
        """For the genes and drugs of responses and the cell lines that were treated, scaled by the training profiles.

        data        a ResponseData, or its blocks (as `iter_responses` gives them), read once
        rows        (n,) bool of the training profiles; of a ResponseData only. Mean and spread are over the TREATED
                    ones, where there are any: 0 is then the mean of the treated
        settings    drug_encoder, fingerprint_size; drugs and cell_lines in place of those of the data
        Raises      ValueError if there is no training profile
        """
        if rows is not None and not hasattr(data, "expression"):
            raise ValueError("rows mark profiles of a ResponseData; of blocks, leave out what is not to be fitted on.")
        blocks = [data if rows is None else data.select(rows)] if hasattr(data, "expression") else data
        total: dict[bool, list[Any]] = {True: [0, 0.0, 0.0], False: [0, 0.0, 0.0]}
        genes, drugs, lines, untreated, smiles, target_sum = None, set(), set(), set(), {}, None
        for block in blocks:
            target_sum = block.target_sum
            genes = block.genes if genes is None else genes
            drugs |= set(block.drugs)
            lines |= set(block.cell_line[~block.is_control])
            untreated |= set(block.cell_line)
            smiles |= dict(block.smiles)
            for control in (False, True):
                values = block.expression[block.is_control == control].astype(np.float64)
                sums = total[control]
                total[control] = [sums[0] + len(values), sums[1] + values.sum(0), sums[2] + (values**2).sum(0)]
        n, first, second = total[False] if total[False][0] else total[True]
        if genes is None or not n:
            raise ValueError("Expected training profiles to fit the scaling on, found none.")
        mean = first / n
        spread = np.sqrt(np.maximum(second / n - mean**2, 0))
        overall = float(np.sqrt(np.mean(spread**2))) or 1.0
        spread = np.maximum(spread, LEAST_SPREAD * overall) if scaling == "standardize" else np.full_like(mean, overall)
        return cls.from_genes(
            genes,
            scaling=scaling,
            mean=mean.astype(np.float32),
            spread=spread.astype(np.float32),
            target_sum=target_sum,
            smiles=smiles,
            **{"drugs": sorted(drugs), "cell_lines": sorted(lines or untreated), **settings},
        )

    # ---- expression

    @property
    def n_genes(self) -> int:
        return len(next(iter(self.genes.values()), []))

    @property
    def gene_ids(self) -> list[str]:
        """(g,) symbols, or Ensembl or Entrez ids where symbols are not known."""
        kind = next((kind for kind in ("gene_symbol", "ensembl_id", "entrez_id") if kind in self.genes), None)
        return [] if kind is None else list(self.genes[kind])

    def __call__(
        self,
        cells: Any,
        *,
        gene_ids: Sequence[str] | None = None,
        layer: str | None = None,
        return_tensors: str | None = "np",
        report: ExpressionReport | None = None,
    ) -> BatchFeature:
        """Scaled expression over the model's genes.

        cells           AnnData, path (`.h5ad`, `.loom`, ...), Parquet corpus of counts, ResponseData (also what
                        `read_responses` makes of `.gctx`, `.gct` and LINCS rows), or (n, g) array
        gene_ids        (genes of an array,) identifiers; None: the columns are the model's genes. In place of those in
                        `var` for others
        return_tensors  "np" or "pt"
        report          filled with what was matched
        Returns         expression (n, g) float32
        Raises          ValueError if no gene matches, or values are counts where they should not be, or the other way
        """
        blocks = list(self.iter_expression(cells, gene_ids=gene_ids, layer=layer, report=report))
        found = np.concatenate(blocks) if blocks else np.empty((0, self.n_genes), dtype=np.float32)
        return BatchFeature({"expression": found}, tensor_type=return_tensors)

    def iter_expression(
        self,
        cells: Any,
        *,
        gene_ids: Sequence[str] | None = None,
        layer: str | None = None,
        report: ExpressionReport | None = None,
        profiles_per_block: int = CELLS_PER_BLOCK,
    ) -> Iterator[np.ndarray]:
        """(profiles of a block, g) float32 scaled expression in order; as `__call__`, memory bounded by the block."""
        report = report if report is not None else ExpressionReport()
        if hasattr(cells, "expression") and hasattr(cells, "is_control"):
            if cells.target_sum != self.target_sum:
                raise ValueError(
                    f"{cells.name}: expected {_transform(self.target_sum)}, as the model was trained on, found "
                    f"{_transform(cells.target_sum)}. Read the data with counts={self.target_sum is not None}."
                )
            places = self._places(gene_identifiers(cells.genes), len(cells.genes), report, cells.name)
            for start in range(0, len(cells), profiles_per_block):
                yield self._scaled(cells.expression[start : start + profiles_per_block], places)
            return
        of_model = False
        if isinstance(cells, np.ndarray) or hasattr(cells, "detach"):
            values = np.atleast_2d(cells if isinstance(cells, np.ndarray) else cells.detach().cpu().numpy())
            if gene_ids is None and values.shape[1] != self.n_genes:
                raise ValueError(
                    f"Expected an array (profiles, {self.n_genes:,} genes), found {values.shape}. Name its columns "
                    "with gene_ids=."
                )
            cells, of_model = values, gene_ids is None
        is_array, named = isinstance(cells, np.ndarray), gene_ids if gene_ids is None else [*map(str, gene_ids)]
        if of_model:
            named = self.gene_ids
        with open_cells(cells, layer=layer, gene_ids=named if is_array else None) as matrix:
            if named is not None and len(named) != matrix.n_genes:
                raise ValueError(f"{matrix.name} has {matrix.n_genes:,} genes, but gene_ids names {len(named):,}.")
            # By all identifiers that are known of them, where the columns are the model's genes
            found = {identifier_kind(named): named} if named is not None else gene_identifiers(matrix.var)
            places = self._places(self.genes if of_model else found, matrix.n_genes, report, matrix.name)
            for values in expression_blocks(matrix, self.target_sum, profiles_per_block):
                if self.target_sum is None and len(values.data) and values.data.max() > LARGEST_LOG:
                    raise ValueError(
                        f"{matrix.name}: expected logarithmic expression, as the model was trained on, found "
                        f"{values.data.max():g}. Pass log2 values of L1000, or log(1 + counts per 10,000)."
                    )
                yield self._scaled(values, places)

    def scale(self, values: np.ndarray, gene_ids: Sequence[str] | None = None) -> np.ndarray:
        """(n, g) float32 scaled expression of values that are on the data's logarithmic scale already.

        values    (n, genes) as a ResponseData or `inverse` has them: of counts, log(1 + x), and not counts
        gene_ids  (genes,) identifiers of the columns; None: the model's genes
        Raises    ValueError as `__call__`
        """
        names = self.gene_ids if gene_ids is None else [str(name) for name in gene_ids]
        if values.ndim != 2 or values.shape[1] != len(names):
            raise ValueError(f"Expected expression (profiles, {len(names):,} genes), found {values.shape}.")
        if gene_ids is None:
            return self._scaled(values, np.arange(self.n_genes))
        return self._scaled(values, self._places({identifier_kind(names): names}, len(names), ExpressionReport()))

    def inverse(self, expression: Any) -> np.ndarray:
        """(n, g) float32 on the scale of the data: scaling and centring undone.

        expression  (n, g) NumPy array or torch tensor, as `__call__` gives it or a model predicts it
        """
        values = expression.detach().float().cpu().numpy() if hasattr(expression, "detach") else np.asarray(expression)
        if values.ndim != 2 or values.shape[1] != self.n_genes:
            raise ValueError(f"Expected expression (profiles, {self.n_genes:,} genes), found {values.shape}.")
        mean, spread = self._mean_and_spread()
        return (values * spread + mean).astype(np.float32)

    def unit(self) -> np.ndarray:
        """(g,) float32: what a difference of 1 in scaled expression is on the scale of the data."""
        return self._mean_and_spread()[1]

    def _mean_and_spread(self) -> tuple[np.ndarray, np.ndarray]:
        if self.scaling == "none":
            return np.zeros(self.n_genes, dtype=np.float32), np.ones(self.n_genes, dtype=np.float32)
        return np.array(self.mean, dtype=np.float32), np.array(self.spread, dtype=np.float32)

    def _scaled(self, values: Any, places: np.ndarray) -> np.ndarray:
        """(n, g) float32 of values (n, genes of the file), dense or CSR; missing genes at their training mean."""
        mean, spread = self._mean_and_spread()
        known = places >= 0
        picked = values[:, places[known]]
        fill = mean if self.mean is None else np.array(self.mean, dtype=np.float32)
        out = np.repeat(fill[None], values.shape[0], axis=0)
        out[:, known] = picked.toarray() if hasattr(picked, "toarray") else picked
        return (out - mean) / spread

    def _places(
        self, found: Mapping[str, Sequence[str]], n_genes: int, report: ExpressionReport, name: str = "data"
    ) -> np.ndarray:
        places, kind = gene_positions(self.genes, found)
        if not kind:
            ours = "; ".join(f"{kind} e.g. {examples(filter(None, names))}" for kind, names in self.genes.items())
            theirs = "; ".join(f"{kind} e.g. {examples(filter(None, names))}" for kind, names in found.items())
            raise ValueError(
                f"{name}: none of its {n_genes:,} genes is among the {self.n_genes:,} of the model. Expected {ours}; "
                f"found {theirs or 'no names'}. Pass identifiers of these kinds as gene_ids=, or map other species to "
                "human one-to-one orthologs first."
            )
        missing = [gene for gene, place in zip(self.gene_ids, places, strict=True) if place < 0]
        report.identifier, report.n_genes = kind, n_genes
        report.n_matched, report.n_missing = int((places >= 0).sum()), len(missing)
        report.missing = tuple(missing)
        if missing:
            report.filled_with = "0" if self.mean is None else "mean of the training profiles"
            logger.warning(
                "%s lacks %s of the model's %s genes (e.g. %s); they are set to %s.",
                *(name, f"{len(missing):,}", f"{self.n_genes:,}", examples(missing)),
                "0" if self.mean is None else "their mean over the training profiles",
            )
        return places

    # ---- conditions

    def conditions(
        self,
        drug: Sequence[str],
        cell_line: Sequence[str],
        dose: Any,
        dose_unit: str | None = None,
        *,
        smiles: Mapping[str, str] | None = None,
    ) -> dict[str, np.ndarray]:
        """What a DrugResponseForConditionalGeneration is told beside expression.

        drug, cell_line  (n,) names. A line that is not known gets a number of its own kind: it is predicted from its
                         controls alone
        dose, dose_unit  (n,) or one number, and its unit: "nM", "uM", "mM"; there is no default
        smiles           structures of drugs that the extractor does not know, with drug_encoder="fingerprint"
        Returns          cell_line (n,) int64, dose (n,) float32 log10 of micromolar, and drug (n,) int64 or fingerprint
                         (n, bits) float32
        Raises           ValueError for an unknown drug, a SMILES that cannot be read, and a dose without unit, negative
                         or 0 (a control)
        """
        drugs, lines = [str(name) for name in drug], [str(name) for name in cell_line]
        doses = np.broadcast_to(micromolar(dose, dose_unit), len(drugs))
        if (doses == 0).any():
            raise ValueError(
                f"{int((doses == 0).sum()):,} of {len(doses):,} doses are 0: these are controls. Ask for "
                "doses above 0 only."
            )
        number = {name: i for i, name in enumerate(self.cell_lines)}
        unknown = sorted(set(lines) - set(number))
        if unknown:
            logger.warning(
                "Cell lines that were not trained on are predicted from controls alone: %s.", examples(unknown)
            )
        found = {
            "cell_line": np.array([number.get(name, len(self.cell_lines)) for name in lines], dtype=np.int64),
            "dose": np.log10(doses).astype(np.float32),
        }
        if self.drug_encoder == "id":
            return found | {"drug": self._drug_ids(drugs)}
        return found | {"fingerprint": self._drug_fingerprints(drugs, smiles or {})}

    def _drug_ids(self, drugs: list[str]) -> np.ndarray:
        number = {name: i for i, name in enumerate(self.drugs)}
        unknown = sorted(set(drugs) - set(number))
        if unknown:
            raise ValueError(
                f'{len(unknown):,} drugs are unknown (e.g. {examples(unknown)}): with drug_encoder="id" a model knows '
                f"the {len(number):,} drugs it was trained with (e.g. {examples(self.drugs)}). A model with "
                'drug_encoder="fingerprint" can do any drug whose SMILES is given.'
            )
        return np.array([number[name] for name in drugs], dtype=np.int64)

    def _drug_fingerprints(self, drugs: list[str], smiles: Mapping[str, str]) -> np.ndarray:
        structures = {**self.smiles, **smiles}
        unknown = sorted({name for name in drugs if not structures.get(name)})
        if unknown:
            raise ValueError(
                f"No structure is known of {len(unknown):,} drugs (e.g. {examples(unknown)}). Pass their SMILES: "
                "smiles={name: SMILES}."
            )
        wanted = sorted({structures[name] for name in drugs} - set(self._fingerprints))
        if wanted:
            found = morgan_fingerprints(wanted, self.fingerprint_size)
            self._fingerprints |= dict(zip(wanted, found, strict=True))
        if not drugs:
            return np.zeros((0, self.fingerprint_size), dtype=np.float32)
        return np.stack([self._fingerprints[structures[name]] for name in drugs])

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds: everything."""
        kept = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return kept | {"feature_extractor_type": type(self).__name__}


def _transform(target_sum: float | None) -> str:
    return "values as they are" if target_sum is None else f"log(1 + counts per {target_sum:,.0f})"


def expression_blocks(matrix: CountMatrix, target_sum: float | None, size: int = CELLS_PER_BLOCK) -> Iterator[Any]:
    """(profiles of a block, genes) CSR float32 over all genes of a matrix, in order.

    target_sum  of log(1 + counts of it a cell); None: values as they are
    Raises      ValueError where counts are none
    """
    if target_sum is None:
        for _, values in matrix.blocks(cells_per_block=size):
            yield values.astype(np.float32)
        return
    # Genes by number, since a cell is scaled by its counts of all of them.
    numbers = [str(i) for i in range(matrix.n_genes)]
    transform = LogExpression(GeneResolver(numbers), target_sum)
    for _, values in transform.blocks(matrix, transform.resolver.match(numbers), cells_per_block=size):
        yield values
