"""Labelled cells and genes for fine-tuning: tokens on disk, labels from obs columns or from a table of genes."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from cellglot.datasets_scripts.pbmc import PBMC
from cellglot.datasets_scripts.ragged_counts import read_ragged
from cellglot.tokenization.count_matrix import open_counts
from cellglot.tokenization.rank_value import TokenizationReport

from .config import write_atomically
from .fingerprint import fingerprint
from .pretraining_data import COUNT_FILES, count_files
from .splits import UNLABELLED


@dataclass
class CellTable:
    """Tokenized cells with what is known of them.

    tokens    datasets.Dataset, input_ids in NumPy format, and length
    obs       one row a cell, index: its name; columns of labels and groups as strings, "" where missing
    source    (cells,) which of `sources` a cell is of
    position  (cells,) its row there
    held_out  (cells,) True for cells that the model's pre-training has not seen either; None where nobody knows
    """

    tokens: Any
    obs: pd.DataFrame
    sources: list[Any]
    source: np.ndarray
    position: np.ndarray
    held_out: np.ndarray | None
    description: str
    fingerprint: str

    def select(self, cells: np.ndarray) -> "CellTable":
        """The marked cells only."""
        index = np.flatnonzero(cells)
        held_out = None if self.held_out is None else self.held_out[index]
        return CellTable(
            self.tokens.select(index),
            self.obs.iloc[index],
            self.sources,
            self.source[index],
            self.position[index],
            held_out,
            self.description,
            self.fingerprint,
        )


def load_cells(
    data: str | None,
    folder: Path,
    tokenizer: Any,
    *,
    columns: Sequence[str],
    max_length: int,
    layer: str | None = None,
    gene_ids: str | None = None,
    is_main_process: bool = True,
) -> CellTable:
    """Tokenized cells under `folder`, made by the main process while others wait; empty cells are left out.

    data        a count file, a folder of them, or None for the embedded PBMCs
    columns     of obs that must be there
    max_length  tokens of a cell at the most
    Raises      ValueError or OSError for data that cannot be used, or that changed since the run began
    """
    sources, files, description, held_out = find_cells(data)
    frames = []
    for i, source in enumerate(sources):
        with open_counts(source, layer=layer) as matrix:
            missing = [name for name in columns if name not in matrix.obs]
            if missing:
                raise ValueError(
                    f"{matrix.name}: obs has no column {missing[0]!r}; it has "
                    f"{', '.join(map(str, matrix.obs)) or 'none'}."
                )
            passing = matrix.passing_cells(np.ones(matrix.n_cells, dtype=bool))
            frame = matrix.obs[list(columns)].apply(as_strings)
            frame.index = frame.index.astype(str)
        frames.append(frame.assign(_source=i, _position=np.arange(len(frame)))[passing])
    facts = {"max_length": max_length, "layer": layer, "gene_ids": gene_ids, "medians": tokenizer.gene_medians}
    name = fingerprint(files, (), facts)
    record = folder / "data.json"
    if record.exists():
        if json.loads(record.read_text())["fingerprint"] != name:
            raise ValueError(
                f"{folder} was made from other data or options than {description} is now; pass --overwrite, or another "
                "--output."
            )
    elif is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        for i, source in enumerate(sources):
            report = TokenizationReport()
            tokenizer.encode_anndata(
                source,
                layer=layer,
                gene_ids=gene_ids,
                max_length=max_length,
                cache_file=folder / f"cells-{i:05d}.arrow",
                report=report,
            )
            print(report)
        write_atomically(record, json.dumps({"fingerprint": name, "source": description}, indent=2))
    else:
        # Not a barrier: tokenizing a large corpus outlasts any time-out of the process group.
        while not record.exists():
            time.sleep(1)
    parts = [datasets.Dataset.from_file(str(folder / f"cells-{i:05d}.arrow")) for i in range(len(sources))]
    tokens = datasets.concatenate_datasets(parts).with_format("numpy", columns=["input_ids"], output_all_columns=True)
    obs = pd.concat(frames)
    source, position = obs.pop("_source").to_numpy(), obs.pop("_position").to_numpy()
    table = CellTable(
        tokens, obs, sources, source, position, None if held_out is None else held_out[source], description, name
    )
    kept = (np.asarray(tokens["length"]) > 0) & ~_copies(table)
    return table.select(kept)


@dataclass
class LabelledGeneList:
    """Genes with a label: token of each in the vocabulary, its class name, its name in the table."""

    tokens: np.ndarray
    labels: np.ndarray
    names: np.ndarray


def read_gene_labels(path: str, tokenizer: Any) -> LabelledGeneList:
    """Genes of a table with columns gene_id (or its first column) and label (or its second), as tokens.

    Genes outside the vocabulary, and genes with two different labels, are left out and counted on the screen.
    Raises  ValueError for a table without two columns, no gene in the vocabulary, or fewer than two labels
    """
    with open(path, encoding="utf-8") as file:
        separator = "\t" if "\t" in file.readline() else ","
    table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    if table.shape[1] < 2:
        raise ValueError(f"{path}: expected columns gene_id and label, found {', '.join(table.columns)}.")
    gene = table["gene_id"] if "gene_id" in table else table.iloc[:, 0]
    label = table["label"] if "label" in table else table.iloc[:, 1]
    match = tokenizer.resolver.match([str(name) for name in gene])
    known = match.index_g >= 0
    if not known.any():
        raise ValueError(f"{path}: {tokenizer.resolver.explain_no_match(match)}")
    frame = pd.DataFrame(
        {
            "token": tokenizer.gene_token_ids[match.index_g[known]],
            "label": label[known].str.strip(),
            "name": gene[known],
        }
    ).drop_duplicates(["token", "label"])
    n_blank = int((frame["label"] == UNLABELLED).sum())
    frame = frame[frame["label"] != UNLABELLED]
    ambiguous = frame["token"].duplicated(keep=False)
    frame = frame[~ambiguous]
    left_out = [
        f"{n:,} {why}"
        for n, why in (
            (int((~known).sum()), "not in the vocabulary"),
            (int(ambiguous.sum()), "rows with two labels"),
            (n_blank, "without a label"),
        )
        if n
    ]
    print(
        f"{Path(path).name}: {len(frame):,} labelled genes" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    )
    if frame["label"].nunique() < 2:
        raise ValueError(f"{path}: expected two labels or more, found {sorted(frame['label'].unique())}.")
    return LabelledGeneList(*(frame[column].to_numpy() for column in ("token", "label", "name")))


def find_cells(data: str | None) -> tuple[list[Any], list[Path], str, np.ndarray | None]:
    """(sources, files to fingerprint, description, whether each source is held out or None).

    data    a count file, a folder of them, or None for the embedded PBMCs
    Raises  ValueError for a path without count files
    """
    if data is None:
        folder = PBMC().prepare()
        sources = [read_ragged(folder, split) for split in ("train", "validation")]
        files = sorted(folder.glob("*.parquet"))
        return sources, files, "700 PBMCs of Zheng et al. 2017 (scanpy)", np.array([False, True])
    path = Path(data)
    if not path.exists():
        raise ValueError(f"--data {path} does not exist.")
    files = count_files(path)
    if not files:
        raise ValueError(f"{path} holds no {', '.join(COUNT_FILES)} with counts.")
    return list(files), files, path.name if path.is_file() else f"{len(files)} file(s) of {path.name}", None


def as_strings(column: Any) -> Any:
    """A column as strings, "" where missing."""
    return column.astype(object).where(column.notna(), UNLABELLED).astype(str)


def _copies(table: CellTable) -> np.ndarray:
    """Marks cells that another file holds too, by name and tokens: split apart, a test would be of known cells."""
    names = table.obs.index
    repeated = np.flatnonzero(names.duplicated(keep=False))
    seen: set[tuple[str, bytes]] = set()
    copies = np.zeros(len(names), dtype=bool)
    for i, ids in zip(repeated.tolist(), table.tokens.select(repeated)["input_ids"], strict=True):
        # Different cells may well bear one name: barcodes come back in every experiment.
        key = (str(names[i]), np.asarray(ids).tobytes())
        copies[i] = key in seen
        seen.add(key)
    if copies.any():
        print(f"{copies.sum():,} cells are in another file already, with the same name and genes, and are left out")
    return copies
