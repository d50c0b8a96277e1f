"""Paired cells for training: split, processor fitted on training cells, encoded cells of both tasks on disk."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from tqdm.auto import tqdm

from cellglot.tokenization.binarized_string import TASKS, BinarizedStringProcessor
from cellglot.tokenization.paired_cells import ACCESSIBILITY, EXPRESSION, open_pairs

from .config import write_json
from .fingerprint import fingerprint
from .splits import held_out

PARTS = ("train", "validation")
NO_CELLS = """no cells were given, and none with both modalities ship with cellglot. Build the corpus of the benchmark,
    python datasets_scripts/bmmc_multiome.py --output data/bmmc
and pass --cells data/bmmc; or pass your own file with both modalities (.h5ad with var["feature_types"], .h5mu), or two
of the same cells, --cells RNA.h5ad ATAC.h5ad"""


@dataclass
class CellPart:
    """Training or validation cells: the split of a corpus, and a mask of its cells or None for all."""

    split: str | None
    mask: np.ndarray | None


@dataclass
class MultiomeData:
    """What training needs. A row of `train` and `validation` is a cell with a task (`iter_encoded`)."""

    description: str
    fingerprint: str
    processor: BinarizedStringProcessor
    train: datasets.Dataset
    validation: datasets.Dataset


def prepare_data(config: Any, folder: Path, *, is_main_process: bool = True) -> MultiomeData:
    """Encoded training and validation cells under `folder`, made by the main process while others wait.

    config   a MultiomePretrainConfig
    Raises   ValueError or OSError for data that cannot be used, or that changed since the run began
    """
    cells = cells_of(config.cells)
    mark = _fingerprint(config)
    record = folder / "data.json"
    if record.exists():
        if json.loads(record.read_text())["fingerprint"] != mark:
            raise ValueError(
                f"{folder} was made from other data or options than --cells are now; pass --overwrite, or another "
                "--output."
            )
    elif is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            encode(config, cells, split_cells(config, cells), folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        write_json(record, {"fingerprint": mark, "cells": config.cells})
    else:
        # Not a barrier: encoding a large corpus outlasts any time-out of the process group.
        while not record.exists():
            time.sleep(1)
    loaded = {
        part: datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(folder / f"{part}-{task}.arrow")) for task in config.tasks]
        ).with_format("numpy")
        for part in PARTS
    }
    return MultiomeData(
        description=" and ".join(Path(path).name for path in config.cells),
        fingerprint=mark,
        processor=BinarizedStringProcessor.from_pretrained(folder / "processor"),
        **loaded,
    )


def cells_of(paths: Sequence[str]) -> Any:
    """What `--cells` names, as `open_pairs` takes it.

    Raises  ValueError for none, more than two, or a path that is not there
    """
    if not paths:
        raise ValueError(NO_CELLS)
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise ValueError(f"--cells {missing[0]} does not exist.")
    if len(paths) > 2:
        raise ValueError(
            f"--cells: expected one path, or that of expression and that of accessibility; {len(paths)} given."
        )
    return paths[0] if len(paths) == 1 else tuple(paths)


def split_cells(config: Any, cells: Any) -> dict[str, CellPart]:
    """Training and validation cells: a corpus's own splits, else held out by cell or by group of `config.split_by`.

    Raises  ValueError for a column that is missing, or cells that cannot be split
    """
    with open_pairs(cells, layer=config.layer) as pairs:
        splits = pairs.splits
    if "validation" in splits:
        if config.split_by is not None:
            raise ValueError(f"{cells} has its own validation split: leave out --split_by.")
        return {part: CellPart(part, None) for part in PARTS}
    # A corpus without one is split within its training cells, and its test cells take no part.
    split = "train" if splits else None
    with open_pairs(cells, layer=config.layer, split=split) as pairs:
        groups, n = None, pairs.n_cells
        if config.split_by is not None:
            if config.split_by not in pairs.obs:
                raise ValueError(
                    f"{pairs.first.name}: obs has no column {config.split_by!r}; it has "
                    f"{', '.join(map(str, pairs.obs)) or 'none'}."
                )
            groups = pairs.obs[config.split_by].astype(str).to_numpy(dtype=str)
    everything = np.ones(n, dtype=bool)
    chosen = held_out(np.full(n, ""), config.validation_fraction, groups=groups, among=everything, seed=config.seed)
    return {"train": CellPart(split, ~chosen), "validation": CellPart(split, chosen)}


def encode(config: Any, cells: Any, parts: dict[str, CellPart], folder: Path) -> None:
    """Writes the processor, and an Arrow file for each part and task."""
    processor = BinarizedStringProcessor.from_cells(
        cells,
        train=parts["train"].mask,
        split=parts["train"].split,
        layer=config.layer,
        min_cells=config.min_cells,
        gene_names=config.gene_names,
        vocabulary=config.vocabulary,
        encoding=config.encoding,
        threshold=config.threshold,
        expression_values=config.expression_values,
        subword_size=config.subword_size,
    )
    for name, part in parts.items():
        for task in config.tasks:
            batches = processor.iter_encoded(
                cells,
                task,
                layer=config.layer,
                split=part.split,
                cells_mask=part.mask,
                with_labels=True,
                with_values=config.head == "set",
            )
            first = next(batches)
            partial = folder / f".partial-{name}.arrow"
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
                writer.write_batch(first)
                for batch in batches:
                    writer.write_batch(batch)
            os.rename(partial, folder / f"{name}-{task}.arrow")
    processor.save_pretrained(folder / "processor")


def rows_of_task(rows: datasets.Dataset, processor: BinarizedStringProcessor, task: str) -> datasets.Dataset:
    """The rows of one task."""
    return rows.select(np.flatnonzero(task_token_ids(rows) == processor.task_token_id(task)))


def feature_means(
    rows: datasets.Dataset, processor: BinarizedStringProcessor, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """(features,) share of the cells of a task that have each of its target features, and mean value over all of them.

    Zeros where the rows have none of the task, or no values
    """
    rows, modality = rows_of_task(rows, processor, task), TASKS[task][1]
    n_features = len(processor.feature_extractor.features(modality))
    counts, sums = np.zeros(n_features), np.zeros(n_features)
    for start in tqdm(range(0, len(rows), 1_000), desc=f"means, {task}", unit="k cells", disable=len(rows) < 1_000):
        part: Any = rows[start : start + 1_000]
        counts += np.asarray(processor.decode_matrix(part["labels"], modality).sum(axis=0)).ravel()
        if "values" in part:
            sums += np.bincount(np.concatenate(part["value_features"]), np.concatenate(part["values"]), n_features)
    return counts / max(len(rows), 1), sums / max(len(rows), 1)


def present_features(
    rows: datasets.Dataset, processor: BinarizedStringProcessor, task: str, *, max_cells: int, seed: int
) -> sp.csr_matrix:
    """(cells, genes + peaks) CSR of ones: what the cells of a task have, of a random sample where there are more."""
    rows = rows_of_task(rows, processor, task)
    if len(rows) > max_cells:
        rows = rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:max_cells]))
    source, target = TASKS[task]
    parts = []
    for start in range(0, len(rows), 1_000):
        part: Any = rows[start : start + 1_000]
        matrices = {source: processor.decode_matrix(part["input_ids"], source)}
        matrices[target] = processor.decode_matrix(part["labels"], target)
        parts.append(sp.hstack([matrices[EXPRESSION], matrices[ACCESSIBILITY]]))
    return sp.csr_matrix(sp.vstack(parts))


def task_token_ids(rows: datasets.Dataset) -> np.ndarray:
    """(rows,) task token of each."""
    batches: Any = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    first = [pc.call_function("list_element", [batch["input_ids"], pa.scalar(0)]).to_numpy() for batch in batches]
    return np.concatenate([np.empty(0, np.int64), *first])


def list_lengths(rows: datasets.Dataset, column: str) -> np.ndarray:
    """(rows,) length of each list of a column."""
    batches: Any = rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.call_function("list_value_length", [batch[column]]).to_numpy() for batch in batches])


def _fingerprint(config: Any) -> str:
    """Of the files, and of the options that decide split and tokens."""
    paths = [Path(path) for path in config.cells]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.parquet")))]
    names = ("tasks", "head", "layer", "gene_names", "split_by", "validation_fraction", "seed", "min_cells")
    names += ("vocabulary", "subword_size", "encoding", "threshold", "expression_values")
    return fingerprint(files, (), {name: getattr(config, name) for name in names})
