"""Cells of one species as cells of another: projection, aligner, encoder and decoder, and back to genes.

Source: Pang & Tegnér, ICML 2020 Workshop on Computational Biology, section 2.2.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .cell_stream import evaluating
from .embedding_files import replaced_when_complete
from .tokenization.count_matrix import CountMatrix, InputError
from .tokenization.gene_ids import examples
from .tokenization.log_expression import open_cells

# Cells that are translated together at the most: the batch of the paper (section 2.1)
CELLS_PER_BLOCK = 1024


def translate_cells(
    adata_or_path: Any,
    model: Any,
    feature_extractor: Any,
    *,
    source: str,
    target: str,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    cells_per_block: int = CELLS_PER_BLOCK,
    layer: str | None = None,
    gene_ids: str | None = None,
    progress: bool = True,
) -> Any:
    """Cells of `source` as expression of the genes of `target`, computed block by block.

    adata_or_path      raw counts: an AnnData, the path of an `.h5ad`, `.loom`, 10x `.h5` or 10x `.mtx` folder, or of a
                       Parquet corpus
    model              a CrossSpeciesForTranslation with an aligner from source to target; runs where its weights are
    feature_extractor  the PCAProjectionFeatureExtractor that the model was trained with
    source, target     what the cells are and what they are to become, e.g. "mouse" and "human"
    output             `.h5ad` file to stream to, so that memory stays bounded by the block: 25,000 genes are 100 kB a
                       cell. It is written aside and renamed when complete
    overwrite          replaces an output that is there already
    cells_per_block    cells that are translated together at the most. With token_axis="cells" they attend to each
                       other, so that a cell's translation depends on its block. Blocks follow the order of the cells
                       and are of equal size, the last less a few: the same cells in the same order give the same
    layer, gene_ids    layer with raw counts, and column of var with gene identifiers, where not X and the known one
                       that matches most
    Returns            an AnnData, or the path with `output`. X: (cells, genes of the target) float32 log-normalized
                       expression, of which a linear inverse makes some values slightly negative; obs as in the input;
                       var_names the target's gene ids, var["gene_symbol"] their symbols; uns["translation"] says how
    Raises             ValueError for a source, target or pair that the model does not know, a model and an extractor
                       that do not belong together, and cells without counts; FileExistsError for an output that is
                       there
    """
    _check_belong_together(model, feature_extractor)
    model.check_pair(source, target)
    output = None if output is None else _new_h5ad(Path(output), overwrite)
    with open_cells(adata_or_path, layer=layer) as matrix, evaluating(model) as device:
        size = equal_block_size(matrix.n_cells, cells_per_block)
        projections = feature_extractor.iter_projections(
            without_empty_cells(matrix), source, gene_ids=gene_ids, device=device
        )

        def translated_blocks() -> Iterator[np.ndarray]:
            with tqdm(total=matrix.n_cells, desc="translate", unit="cell", disable=not progress) as bar:
                for block in regrouped(projections, size):
                    translated = model.translate(torch.from_numpy(block).to(device), source=source, target=target)
                    yield feature_extractor.inverse(translated, target)
                    bar.update(len(block))

        annotations = _annotations(matrix, feature_extractor.gene_ids(target), feature_extractor.gene_symbols(target))
        annotations.uns["translation"] = {
            "source": source,
            "target": target,
            "expression": "log-normalized, translated by a cross-species model",
            "model": str(model.config._name_or_path),
            "token_axis": model.config.token_axis,
            "cells_per_block": size,
        }
        if output is not None:
            with replaced_when_complete(output) as partial:
                _write_h5ad(annotations, translated_blocks(), partial)
            return output
        annotations.X = _stacked(translated_blocks(), annotations.shape)
        return annotations


def equal_block_size(n_cells: int, most: int) -> int:
    """Cells of each block but the last, of as few blocks as there can be: a last block of one cell would see no other.

    Raises  ValueError unless `most` is positive
    """
    if most < 1:
        raise ValueError(f"Expected cells_per_block of 1 or more, found {most}.")
    n_blocks = max(-(-n_cells // most), 1)
    return max(-(-n_cells // n_blocks), 1)


def regrouped(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The rows of blocks of any size, in blocks of `size`; the last may be smaller."""
    waiting: list[np.ndarray] = []
    n_waiting = 0
    for block in blocks:
        waiting.append(block)
        n_waiting += len(block)
        if n_waiting >= size:
            rows = np.concatenate(waiting)
            n_full = len(rows) // size * size
            for start in range(0, n_full, size):
                yield rows[start : start + size]
            waiting, n_waiting = [rows[n_full:]], len(rows) - n_full
    if n_waiting:
        yield np.concatenate(waiting)


def without_empty_cells(matrix: CountMatrix) -> CountMatrix:
    """The same matrix, which raises InputError where a cell without any count is read: nothing is to be translated."""
    read = matrix.read

    def checked(start: int, stop: int) -> Any:
        block = read(start, stop)
        empty = np.flatnonzero(np.asarray(block.sum(axis=1)).ravel() == 0)
        if len(empty):
            names = [str(name) for name in matrix.obs.index[start + empty]]
            raise InputError(
                f"{matrix.name}: {len(empty):,} of the cells {start:,} to {stop - 1:,} have no counts "
                f"(e.g. {examples(names)}). Filter them out before: sc.pp.filter_cells(adata, min_counts=1)."
            )
        return block

    return dataclasses.replace(matrix, read=checked)


def _check_belong_together(model: Any, feature_extractor: Any) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "cross_species" or not hasattr(model, "translate"):
        raise ValueError(
            f"Expected a CrossSpeciesForTranslation, found {type(model).__name__}. "
            "CrossSpeciesForTranslation.from_pretrained(path) loads one; train/align.py makes one."
        )
    if not hasattr(feature_extractor, "iter_projections"):
        raise ValueError(
            f"Expected a PCAProjectionFeatureExtractor, found {type(feature_extractor).__name__}. Load the one beside "
            "the model with PCAProjectionFeatureExtractor.from_pretrained(path)."
        )
    found = (list(feature_extractor.sources), feature_extractor.n_components)
    if found != (list(model.config.sources), model.config.n_components):
        raise ValueError(
            f"The model knows the sources {', '.join(model.config.sources)} by {model.config.n_components:,} "
            f"components, the feature extractor {', '.join(found[0])} by {found[1]:,}: they do not belong together. "
            "Load both from the same directory."
        )


def _new_h5ad(output: Path, overwrite: bool) -> Path:
    if output.suffix != ".h5ad":
        raise ValueError(f"Expected an output ending in .h5ad, found {str(output)!r}.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists: choose another name, or pass overwrite=True.")
    return output


def _annotations(matrix: CountMatrix, gene_ids: list[str], gene_symbols: list[str]) -> Any:
    """AnnData (cells, genes of the target) without X."""
    import anndata as ad
    import pandas as pd

    return ad.AnnData(obs=matrix.obs.copy(), var=pd.DataFrame({"gene_symbol": gene_symbols}, index=pd.Index(gene_ids)))


def _stacked(blocks: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Blocks of rows in one float32 array, which is allocated once."""
    x, start = np.empty(shape, dtype=np.float32), 0
    for block in blocks:
        x[start : start + len(block)] = block
        start += len(block)
    return x


def _write_h5ad(annotations: Any, blocks: Iterable[np.ndarray], path: Path) -> None:
    """Writes annotations, and then X one block after another."""
    import h5py

    annotations.write_h5ad(path)
    n_cells, n_genes = annotations.shape
    with h5py.File(path, "r+") as file:
        chunks = (max(min(n_cells, 64), 1), max(n_genes, 1))
        x = file.create_dataset("X", (n_cells, n_genes), np.float32, maxshape=(None, None), chunks=chunks)
        # Marks of AnnData's on-disk format
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        start = 0
        for block in blocks:
            x[start : start + len(block)] = block
            start += len(block)
