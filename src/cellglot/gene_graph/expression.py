"""Log-normalized expression over a model's genes, from count files of any genes in any order."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from ..tokenization.count_matrix import CELLS_PER_BLOCK, CountMatrix, check_counts, open_counts
from ..tokenization.gene_ids import GeneMatch, examples
from .genes import GeneNames


@dataclass(frozen=True)
class ExpressionReport:
    """How the genes of cells fit those of a model."""

    name: str
    n_cells: int
    # Of the model, found among the cells' genes; the others are read as 0
    n_genes: int
    n_matched: int
    missing: tuple[str, ...]
    # Of the cells, that the model does not know: they count for the cells' totals only
    n_unseen: int
    unseen: tuple[str, ...]
    # Columns that name a gene which another column names: their counts are summed
    n_collapsed: int

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.n_cells:,} cells; {self.n_matched:,} of the model's {self.n_genes:,} genes found"]
        if self.missing:
            parts.append(f"{self.n_genes - self.n_matched:,} missing, read as 0 (e.g. {examples(self.missing)})")
        if self.n_unseen:
            parts.append(f"{self.n_unseen:,} unknown to the model, left out (e.g. {examples(self.unseen)})")
        if self.n_collapsed:
            parts.append(f"{self.n_collapsed:,} columns summed into another")
        return "; ".join(parts)


def read_expression(
    source: Any,
    model: Any,
    *,
    layer: str | None = None,
    gene_ids: str | None = None,
    cells: np.ndarray | None = None,
    aliases: Any = None,
) -> tuple[sp.csr_matrix, Any, ExpressionReport]:
    """(cells, genes of the model) log(1 + counts per target_sum) as float32 CSR, the cells' obs, and a report.

    source    AnnData with raw counts, or the path of a count file
    model     a gene-graph model or its configuration, for gene_ids and target_sum
    layer     None for X, "raw" for `raw`, else the name of the layer with the counts
    gene_ids  column of `var` with gene ids; by default the first that usually holds them, else the index
    cells     (cells of the source,) boolean mask
    aliases   further names of the model's genes: mapping, or table with columns alias and ensembl_id
    Raises    ValueError for cells without any of the model's genes, values that are no raw counts, a model without
              gene_ids or target_sum, `cells` that is no such mask
    """
    with open_counts(source, layer=layer) as matrix:
        parts = list(iter_expression(matrix, model, gene_ids=gene_ids, cells=cells, aliases=aliases))
        expression = [block for _, block in parts]
        report = expression_report(matrix, model, gene_ids=gene_ids, cells=cells, aliases=aliases)
        obs = matrix.obs if cells is None else matrix.obs[cells]
    if not expression:
        expression = [sp.csr_matrix(np.empty((0, report.n_genes), np.float32))]
    return sp.csr_matrix(sp.vstack(expression)), obs, report


def iter_expression(
    source: Any,
    model: Any,
    *,
    layer: str | None = None,
    gene_ids: str | None = None,
    cells: np.ndarray | None = None,
    aliases: Any = None,
    cells_per_block: int = CELLS_PER_BLOCK,
) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
    """(positions of the cells, their expression as of `read_expression`) in blocks, in file order."""
    config = getattr(model, "config", model)
    if config.target_sum is None:
        raise ValueError(
            "The model reads expression in units of its own (target_sum=None), not log-normalized counts: pass it the "
            "expression as it was trained with."
        )
    with open_counts(source, layer=layer) as matrix:
        matrix.passing_cells(cells)  # raises for what is no mask
        match = _match(matrix, config, gene_ids, aliases)
        known = np.flatnonzero(match.index_g >= 0)
        shape = (matrix.n_genes, config.n_genes)
        selector = sp.csr_matrix((np.ones(len(known)), (known, match.index_g[known])), shape=shape)
        for rows, counts in matrix.blocks(cells, cells_per_block):
            check_counts(matrix, rows, counts)
            totals = np.maximum(matrix.cell_totals(rows, counts), 1)
            block = (sp.diags_array(config.target_sum / totals) @ (counts @ selector)).log1p()
            yield rows, sp.csr_matrix(block, dtype=np.float32)


def expression_report(
    source: Any,
    model: Any,
    *,
    layer: str | None = None,
    gene_ids: str | None = None,
    cells: np.ndarray | None = None,
    aliases: Any = None,
) -> ExpressionReport:
    """How the genes of cells fit those of a model, without reading any counts. Arguments as of `read_expression`."""
    config = getattr(model, "config", model)
    with open_counts(source, layer=layer) as matrix:
        matrix.passing_cells(cells)  # raises for what is no mask
        match = _match(matrix, config, gene_ids, aliases)
        found = np.zeros(config.n_genes, dtype=bool)
        found[match.index_g[match.index_g >= 0]] = True
        unseen = match.gene_ids[match.index_g < 0]
        return ExpressionReport(
            matrix.name,
            n_cells=matrix.n_cells if cells is None else int(np.sum(cells)),
            n_genes=config.n_genes,
            n_matched=int(found.sum()),
            missing=tuple(config.gene_ids[i] for i in np.flatnonzero(~found)[:3]),
            n_unseen=len(unseen),
            unseen=tuple(unseen[:3]),
            n_collapsed=match.n_collapsed,
        )


def _match(matrix: CountMatrix, config: Any, gene_ids: str | None, aliases: Any) -> GeneMatch:
    genes = GeneNames.of_config(config)
    match = genes.resolver(aliases).match(matrix.gene_names(gene_ids))
    if match.n_matched == 0:
        raise ValueError(
            f"{matrix.name}: none of its {matrix.n_genes:,} genes (e.g. {examples(match.gene_ids)}) is among the "
            f"model's {len(genes):,} (e.g. {examples(genes.ids)}). Pass the column of `var` with such ids as "
            "gene_ids=, or aliases=, a table of alias and ensembl_id."
        )
    return match
