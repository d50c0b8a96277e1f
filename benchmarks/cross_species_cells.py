"""Real human and mouse brain cells of `cross_species.py`: files, classes, taxonomies, splits, shared genes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from cellglot.train.ortholog_table import read_orthologs, shared_genes
from cellglot.train.splits import held_out

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CELLGLOT_DATA", ROOT.parent / "shared" / "data"))
HUMAN = "cells/darmanis2015_human_cortex_267x22088.h5ad"
MOUSE = {
    "merfish": "cells/zhuang_merfish_mouse_brain_1000x1122.h5ad",
    "zeisel200": "cells/zeisel2015_mouse_cortex_3005x200.h5ad",
}
ORTHOLOGS = "graph/orthologs_ensembl105_human2mouse.csv.gz"

# Cell type of a file -> the class that both species are compared by. What is not named is a class of its own, without
# counterpart in the other species: oligodendrocyte precursors, pericytes, ependymal cells, neuroblasts, ...
CLASSES = {
    "glutamatergic neuron": "neuron",
    "GABAergic neuron": "neuron",
    "glycinergic neuron": "neuron",
    "dopaminergic neuron": "neuron",
    "cholinergic neuron": "neuron",
    "pyramidal CA1": "neuron",
    "pyramidal SS": "neuron",
    "interneurons": "neuron",
    "Bergmann glial cell": "astrocyte",
    "astrocytes_ependymal": "astrocyte",
    "oligodendrocytes": "oligodendrocyte",
    "endothelial cell": "endothelial",
    "endothelial-mural": "endothelial",
    "microglial cell": "microglia",
}
# Our two levels for hierarchical cluster accuracy: lineage, then class with what belongs beside it. (The paper's are of
# tissues and of cell types, and are not published.)
TAXONOMY_2 = {
    "oligodendrocyte precursor cell": "oligodendrocyte",
    "neuroblast (sensu Vertebrata)": "neuron",
    "pericyte": "vascular",
    "vascular leptomeningeal cell": "vascular",
    "endothelial": "vascular",
}
TAXONOMY_1 = {
    "neuron": "neuronal",
    "astrocyte": "glial",
    "oligodendrocyte": "glial",
    "vascular": "vascular and immune",
    "microglia": "vascular and immune",
}
# A type needs that many cells to be a category: with MERFISH, these are 15 as in the paper.
CATEGORY_CELLS = 12
TEST_FRACTION = 0.3
TARGET_SUM = 1e4


@dataclass(frozen=True)
class Species:
    """Cells of one species.

    adata         counts, gene symbols as names
    expression    (n, g) CSR float32, log(1 + counts per 10,000)
    type_n        (n,) cell type of the file
    class_n       (n,) class after `CLASSES`
    shared_g      columns of the one-to-one orthologs that both species have, in the order of the other's
    """

    name: str
    adata: Any
    expression: sp.csr_matrix
    type_n: np.ndarray
    class_n: np.ndarray
    shared_g: np.ndarray

    @property
    def genes(self) -> list[str]:
        return [str(name) for name in self.adata.var_names]

    def shared_expression(self) -> np.ndarray:
        """(n, shared genes) float32"""
        return self.expression[:, self.shared_g].toarray()


def read_pair(mouse: str) -> dict[str, Species]:
    """The human cells and one of the mouse sets, as "human" and "mouse", with their shared genes."""
    cells = {name: _counts(DATA / file) for name, file in (("human", HUMAN), ("mouse", MOUSE[mouse]))}
    genes = [[str(gene) for gene in adata.var_names] for adata in cells.values()]
    shared = shared_genes(read_orthologs(DATA / ORTHOLOGS), *genes, name=ORTHOLOGS)
    columns = (shared.index_a, shared.index_b)
    return {name: _species(name, adata, found) for (name, adata), found in zip(cells.items(), columns, strict=True)}


def _counts(path: Path) -> Any:
    adata = ad.read_h5ad(path)
    # Names alone, so that genes are symbols in both species, as in the table of orthologs
    adata.var = adata.var[[]]
    return adata


def _species(name: str, adata: Any, shared_g: np.ndarray) -> Species:
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    totals = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    expression = sp.csr_matrix(sp.diags_array((TARGET_SUM / totals).astype(np.float32)) @ counts)
    expression.data = np.log1p(expression.data)
    types = adata.obs["cell_type"].astype(str).to_numpy(dtype=str)
    classes = np.array([CLASSES.get(found, found) for found in types])
    return Species(name, adata, expression, types, classes, shared_g)


def training_cells(species: Species, seed: int) -> np.ndarray:
    """(n,) mask of the cells that anything may be fitted on: all but a share of each class; types of one cell train."""
    names, code, n_of = np.unique(species.class_n, return_inverse=True, return_counts=True)
    among = n_of[code] > 1
    return ~held_out(names[code], TEST_FRACTION, among=among, seed=seed)


def categories(pair: dict[str, Species]) -> dict[str, tuple[str, str]]:
    """Category ("mouse: astrocyte", a type with enough cells) -> its label on level 1 and on level 2."""
    found = {}
    for name, species in pair.items():
        types, n_of = np.unique(species.type_n, return_counts=True)
        for cell_type in types[n_of >= CATEGORY_CELLS]:
            cell_class = CLASSES.get(str(cell_type), str(cell_type))
            level_2 = TAXONOMY_2.get(cell_class, cell_class)
            found[f"{name}: {cell_type}"] = (TAXONOMY_1[level_2], level_2)
    return found
