"""Cells for gene-graph models: their expression over the model's genes on disk, and what is known of them."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm.auto import tqdm

from cellglot.gene_graph import GeneNames, gene_names, iter_expression
from cellglot.gene_graph.expression import expression_report
from cellglot.modeling.gene_graph import GeneGraphConfig
from cellglot.tokenization.count_matrix import open_counts

from .config import write_json
from .expression_rows import ExpressionExamples, ExpressionRows, write_expression
from .finetuning_data import as_strings, find_cells
from .fingerprint import fingerprint


@dataclass
class ExpressionCells:
    """Cells with what is known of them.

    rows      expression of all cells on disk
    index     (cells,) row of each
    obs       one row a cell, index: its name; columns of labels and groups as strings, "" where missing
    held_out  (cells,) True for the part of the embedded PBMCs that is kept for tests; None for other data
    """

    rows: ExpressionRows
    index: np.ndarray
    obs: pd.DataFrame
    held_out: np.ndarray | None
    description: str
    fingerprint: str

    def select(self, cells: np.ndarray) -> "ExpressionCells":
        """The marked cells only."""
        held_out = None if self.held_out is None else self.held_out[cells]
        return ExpressionCells(
            self.rows, self.index[cells], self.obs[cells], held_out, self.description, self.fingerprint
        )

    def examples(self, cells: np.ndarray, labels: np.ndarray | None = None) -> ExpressionExamples:
        """The marked cells for training, and their class numbers (cells,) if they have any."""
        return ExpressionExamples(self.rows, self.index[cells], None if labels is None else labels[cells])

    def expression(self, cells: np.ndarray) -> sp.csr_matrix:
        """(marked cells, genes) in memory."""
        return self.rows.read(self.index[cells])


def common_genes(data: str | None, gene_ids: str | None = None, layer: str | None = None) -> GeneNames:
    """The genes that all files of `data` have (in a layer of the counts), in the order of the first.

    Raises  ValueError for files without a common gene
    """
    sources, _, description, _ = find_cells(data)
    first, *others = [gene_names(source, gene_ids, layer=layer) for source in sources]
    shared = set(first.ids).intersection(*(names.ids for names in others))
    if not shared:
        raise ValueError(
            f"The files of {description} have no gene in common (e.g. {first.ids[0]!r}): pass --gene_ids, a column of "
            "var that names genes alike in all of them."
        )
    return first.select(np.flatnonzero([gene in shared for gene in first.ids]))


def load_expression(
    data: str | None,
    folder: Path,
    model_config: GeneGraphConfig,
    *,
    columns: Sequence[str],
    layer: str | None = None,
    gene_ids: str | None = None,
    aliases: str | None = None,
    is_main_process: bool = True,
) -> ExpressionCells:
    """Cells over the model's genes under `folder`, written by the main process while others wait.

    data     a count file, a folder of them, or None for the embedded PBMCs
    columns  of obs that must be there
    Left out are cells that failed their lab's filter, cells without a count in the model's genes, and cells that
    another file holds too.
    Raises   ValueError or OSError for data that cannot be used, or that changed since the run began
    """
    sources, files, description, held_out = find_cells(data)
    frames, passing = [], []
    for i, source in enumerate(sources):
        with open_counts(source, layer=layer) as matrix:
            missing = [name for name in columns if name not in matrix.obs]
            if missing:
                has = ", ".join(map(str, matrix.obs)) or "none"
                raise ValueError(f"{matrix.name}: obs has no column {missing[0]!r}; it has {has}.")
            found = matrix.passing_cells(np.ones(matrix.n_cells, dtype=bool))
            assert found is not None
            passing.append(found)
            frame = matrix.obs[list(columns)].apply(as_strings)
            frame.index = frame.index.astype(str)
        frames.append(frame.assign(_source=i)[found])
    options = {"layer": layer, "gene_ids": gene_ids, "aliases": aliases}
    facts = {**options, "genes": model_config.gene_ids, "target_sum": model_config.target_sum}
    mark = fingerprint(files, [aliases], facts)
    record = folder / "data.json"
    if record.exists():
        if json.loads(record.read_text())["fingerprint"] != mark:
            raise ValueError(
                f"{folder} was made from other data or options than {description} is now; pass --overwrite, or another "
                "--output."
            )
    elif is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        write_expression(_blocks(sources, model_config, passing, options), folder)
        write_json(record, {"fingerprint": mark, "source": description})
    else:
        # Not a barrier: reading a large corpus outlasts any time-out of the process group.
        while not record.exists():
            time.sleep(1)
    rows = ExpressionRows(folder, model_config.n_genes)
    obs = pd.concat(frames)
    source = obs.pop("_source").to_numpy()
    held = None if held_out is None else held_out[source]
    cells = ExpressionCells(rows, np.arange(len(rows)), obs, held, description, mark)
    copies = _copies(cells, source)
    if copies.any() and is_main_process:
        print(f"{copies.sum():,} cells are in another file already, with the same name and genes, and are left out")
    return cells.select((np.diff(rows.starts) > 0) & ~copies)


def _blocks(sources: Any, model_config: Any, passing: list[np.ndarray], options: Any) -> Iterator[sp.csr_matrix]:
    with tqdm(total=int(sum(cells.sum() for cells in passing)), desc="expression", unit="cell") as bar:
        for source, cells in zip(sources, passing, strict=True):
            bar.write(str(expression_report(source, model_config, cells=cells, **options)))
            for rows, block in iter_expression(source, model_config, cells=cells, **options):
                yield block
                bar.update(len(rows))


def _copies(cells: ExpressionCells, source: np.ndarray) -> np.ndarray:
    """Marks cells that another file holds too, by name and expression: split apart, a test would be of known cells."""
    names = cells.obs.index
    seen: dict[tuple[str, bytes], int] = {}
    copies = np.zeros(len(names), dtype=bool)
    for i in np.flatnonzero(names.duplicated(keep=False)).tolist() if len(np.unique(source)) > 1 else ():
        # Different cells may well bear one name: barcodes come back in every experiment.
        row = cells.rows.read(cells.index[i : i + 1])
        # A file's order of genes is that of the row's indices.
        row.sort_indices()
        copies[i] = seen.setdefault((str(names[i]), row.indices.tobytes() + row.data.tobytes()), i) != i
    return copies
