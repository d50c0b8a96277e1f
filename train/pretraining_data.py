"""Cells for pre-training: split, vocabulary with medians from the training cells, tokens on disk.

Three kinds of source: the embedded PBMC corpus, a folder of count files, or token ids in Parquet.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from cellglot.datasets_scripts.pbmc import PBMC
from cellglot.datasets_scripts.ragged_counts import read_ragged
from cellglot.tokenization.count_matrix import open_counts
from cellglot.tokenization.gene_ids import GENE_SYMBOL_COLUMNS, is_ensembl_id, is_named
from cellglot.tokenization.medians import vocabulary_from_corpus
from cellglot.tokenization.rank_value import (
    SPECIAL_TOKENS,
    NoCellsError,
    RankValueTokenizer,
    TokenizationReport,
    read_aliases,
)

from .config import write_atomically
from .fingerprint import fingerprint
from .on_the_fly import OnTheFlyCells, measure_lengths

COUNT_FILES = (".h5ad", ".loom", ".h5")


@dataclass
class CellSource:
    """Counts of some cells, and which of them train and which validate ((cells,) boolean masks)."""

    source: Any
    train: np.ndarray
    validation: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class PretrainingData:
    """What pre-training needs. `sources` is empty where only tokens are at hand."""

    description: str
    fingerprint: str
    tokenizer: RankValueTokenizer
    train: datasets.Dataset | OnTheFlyCells
    validation: datasets.Dataset
    sources: list[CellSource]


def prepare_data(config: Any, folder: Path, *, is_main_process: bool = True) -> PretrainingData:
    """Tokenized training and validation cells under `folder`, made by the main process while others wait.

    config   a PretrainConfig
    Raises   ValueError or OSError for data that cannot be used, or that changed since the run began
    """
    record = folder / "data.json"
    sources, description, fingerprint = find_sources(config)
    if record.exists():
        found = json.loads(record.read_text())
        if found["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} was made from other data or options than {description} is now; "
                "pass --overwrite, or another --output."
            )
    elif is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            if sources:
                _tokenize(config, sources, folder)
            else:
                _split_tokens(config, folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        write_atomically(record, json.dumps({"fingerprint": fingerprint, "source": description}, indent=2))
    else:
        # Not a barrier: tokenizing a large corpus outlasts any time-out of the process group.
        while not record.exists():
            time.sleep(1)
    tokenizer = RankValueTokenizer.from_pretrained(folder / "tokenizer")
    train = _load_on_the_fly(config, sources, tokenizer, folder) if config.on_the_fly else _load(folder, "train")
    return PretrainingData(description, fingerprint, tokenizer, train, _load(folder, "validation"), sources)


def find_sources(config: Any) -> tuple[list[CellSource], str, str]:
    """(sources with their split, description, fingerprint) of what `config.data` names."""
    if config.data is None:
        _refuse_options(config, "the embedded PBMC corpus", "split_by", "layer", "gene_ids", "validation_fraction")
        folder = PBMC().prepare()
        cells = {split: read_ragged(folder, split) for split in ("train", "validation")}
        sources = [
            CellSource(adata, np.full(adata.n_obs, split == "train"), np.full(adata.n_obs, split == "validation"))
            for split, adata in cells.items()
        ]
        files = sorted(folder.glob("*.parquet"))
        return sources, "700 PBMCs of Zheng et al. 2017 (scanpy)", _fingerprint(files, config)
    path = Path(config.data)
    if not path.exists():
        raise ValueError(f"--data {path} does not exist.")
    if token_files(path):
        _refuse_options(config, "token ids", "split_by", "layer", "gene_ids", "cell_type", "on_the_fly")
        if config.vocabulary is None:
            raise ValueError(
                f"{path} holds token ids: pass the vocabulary they are of, --vocabulary TABLE or TOKENIZER."
            )
        return [], path.name, _fingerprint(token_files(path), config)
    files = count_files(path)
    if not files:
        raise ValueError(f"{path} holds neither {', '.join(COUNT_FILES)} with counts nor .parquet with input_ids.")
    return split_files(files, config), f"{len(files)} file(s) of {path.name}", _fingerprint(files, config)


def _refuse_options(config: Any, what: str, *names: str) -> None:
    """Raises ValueError for options that this kind of data would ignore."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    given = [name for name in names if getattr(config, name) != defaults[name]]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be set for {what}: they are for folders of count files.")


def token_files(path: Path) -> list[Path]:
    """Parquet files with a column input_ids."""
    import pyarrow.parquet as pq

    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    return [file for file in files if file.suffix == ".parquet" and "input_ids" in pq.read_schema(file).names]


def count_files(path: Path) -> list[Path]:
    """The file itself, or all files with counts below a folder, in order of name."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in COUNT_FILES)


def split_files(files: Sequence[Path], config: Any) -> list[CellSource]:
    """Training and validation cells of count files: by cell, or by whole groups of `config.split_by`.

    Raises  ValueError if that column or the one with cell types is missing, or there are too few groups to hold one out
    """
    options = {"layer": config.layer, "gene_ids": config.gene_ids}
    groups, passing = [], []
    for file in files:
        with open_counts(file, layer=config.layer) as matrix:
            for column in (config.split_by, config.cell_type):
                if column is not None and column not in matrix.obs:
                    raise ValueError(f"{file}: obs has no column {column!r}; it has {', '.join(map(str, matrix.obs))}.")
            passing.append(matrix.passing_cells(np.ones(matrix.n_cells, dtype=bool)))
            if config.split_by is not None:
                groups.append(matrix.obs[config.split_by].astype(str).to_numpy(dtype=str))
    usable = np.concatenate(passing)
    if config.split_by is None:
        index = np.full(len(usable), -1)
        index[usable] = np.arange(usable.sum())
        sizes = np.ones(usable.sum(), dtype=np.int64)
    else:
        index = np.unique(np.concatenate(groups), return_inverse=True)[1]
        sizes = np.bincount(index[usable], minlength=int(index.max()) + 1)
    order = np.random.default_rng(config.seed).permutation(len(sizes))
    n_held_out = int(np.searchsorted(np.cumsum(sizes[order]), config.validation_fraction * sizes.sum())) + 1
    if n_held_out >= len(sizes):
        what = f"groups of {config.split_by!r}" if config.split_by else "cells"
        raise ValueError(f"{len(sizes)} {what} cannot be split with validation_fraction={config.validation_fraction}.")
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[order[:n_held_out]] = True
    held_out = chosen[index] & usable
    ends = np.cumsum([len(part) for part in passing])[:-1]
    parts = zip(files, np.split(usable & ~held_out, ends), np.split(held_out, ends), strict=True)
    return [CellSource(file, train, validation, options) for file, train, validation in parts]


def _tokenize(config: Any, sources: list[CellSource], folder: Path) -> None:
    """Writes tokenizer, and tokens of each source and split, with obs columns that the report uses."""
    if config.vocabulary is None:
        table = vocabulary_from_corpus(
            [s.source for s in sources],
            special_tokens=SPECIAL_TOKENS[config.layout],
            layer=config.layer,
            gene_ids=config.gene_ids,
            aliases=read_aliases(config.aliases),
            cells=[s.train for s in sources],
        )
        options = {"layout": config.layout, "max_length": config.max_length}
        aliases = read_aliases(config.aliases)
        tokenizer = RankValueTokenizer.from_vocabulary(table, aliases=aliases, **options)
        # With the files' own symbols, people can name genes by them ever after.
        aliases = {**corpus_symbols(config, sources, tokenizer), **aliases}
        tokenizer = RankValueTokenizer.from_vocabulary(table, aliases=aliases, **options)
    else:
        tokenizer = load_vocabulary(config)
    for i, source in enumerate(sources):
        for split in ("train", "validation"):
            mask = getattr(source, split)
            if mask.any():
                report = TokenizationReport()
                # A file may have no usable cell in one of the splits; that of all files is checked in `_load`.
                if split == "train" and config.on_the_fly:
                    report = measure_lengths(
                        tokenizer, source.source, mask, folder / f"train-{i:05d}.npy", **source.options
                    )
                    print(f"{split}: {report}")
                    continue
                with contextlib.suppress(NoCellsError):
                    tokenizer.encode_anndata(
                        source.source,
                        cells=mask,
                        empty_cells="drop",
                        cache_file=folder / f"{split}-{i:05d}.arrow",
                        report=report,
                        **source.options,
                    )
                print(f"{split}: {report}")
    tokenizer.save_pretrained(folder / "tokenizer")


def corpus_symbols(config: Any, sources: list[CellSource], tokenizer: RankValueTokenizer) -> dict[str, str]:
    """Symbol -> gene of the vocabulary, as the files name their genes; without symbols that several genes bear."""
    genes = tokenizer.resolver.vocabulary
    found: dict[str, set[str]] = {}
    for source in sources:
        with open_counts(source.source, layer=config.layer) as matrix:
            index_g = tokenizer.match_genes(matrix, config.gene_ids).index_g
            columns = [matrix.var.index, *(matrix.var[name] for name in GENE_SYMBOL_COLUMNS if name in matrix.var)]
            for column in columns:
                for name, g in zip(map(str, column), index_g, strict=True):
                    # An Ensembl id is resolved as it is, or is another gene's.
                    if g >= 0 and is_named(name) and not is_ensembl_id(name):
                        found.setdefault(name, set()).add(genes[g])
    known = set(genes)
    return {name: min(targets) for name, targets in found.items() if len(targets) == 1 and name not in known}


def _split_tokens(config: Any, folder: Path) -> None:
    """Splits token rows by cell into Arrow files."""
    tokenizer = load_vocabulary(config)
    tokens = datasets.concatenate_datasets(
        [datasets.Dataset.from_parquet(str(file)) for file in token_files(Path(config.data))]  # type: ignore[misc]
    )
    parts, highest = [np.empty(0, np.int64)], 0
    batch: Any
    for batch in tokens.with_format("arrow").iter(batch_size=10_000):
        parts.append(pc.call_function("list_value_length", [batch["input_ids"]]).to_numpy())
        ids = pc.call_function("list_flatten", [batch["input_ids"]])
        highest = max(highest, pc.call_function("max", [ids]).as_py() or 0)
    lengths = np.concatenate(parts)
    tokens = tokens.select_columns(["input_ids"]).add_column("length", lengths)  # type: ignore[call-arg]
    tokens = tokens.select(np.flatnonzero(lengths))
    if lengths.max(initial=0) > tokenizer.model_max_length:
        raise ValueError(
            f"{config.data} has cells of up to {lengths.max():,} tokens, the tokenizer's limit is "
            f"{tokenizer.model_max_length:,}: raise max_length, or encode the cells anew."
        )
    if highest >= len(tokenizer):
        raise ValueError(
            f"{config.data} has token id {highest:,}, but the vocabulary has {len(tokenizer):,} tokens: it is another "
            "one's."
        )
    split = tokens.train_test_split(test_size=config.validation_fraction, seed=config.seed)
    for name, part in (("train", split["train"]), ("validation", split["test"])):
        part.flatten_indices(cache_file_name=str(folder / f"{name}-00000.arrow"))
    tokenizer.save_pretrained(folder / "tokenizer")


def load_vocabulary(config: Any) -> RankValueTokenizer:
    """The tokenizer that `--vocabulary` names: a tokenizer folder, or a table with `--layout` and `--aliases`."""
    if os.path.isdir(config.vocabulary):
        tokenizer = RankValueTokenizer.from_pretrained(config.vocabulary)
        if config.aliases or config.max_length or tokenizer.layout != config.layout:
            raise ValueError(
                f"{config.vocabulary} is a tokenizer with layout {tokenizer.layout} and its own aliases and length: "
                f"pass --layout {tokenizer.layout} and neither --aliases nor --max_length."
            )
        return tokenizer
    return RankValueTokenizer.from_vocabulary(
        config.vocabulary, layout=config.layout, aliases=config.aliases, max_length=config.max_length
    )


def _load_on_the_fly(
    config: Any, sources: list[CellSource], tokenizer: RankValueTokenizer, folder: Path
) -> OnTheFlyCells:
    files = sorted(folder.glob("train-*.npy"))
    chosen = [sources[int(file.stem.removeprefix("train-"))] for file in files]
    cells = OnTheFlyCells(tokenizer, [(s.source, s.options) for s in chosen], files, config.batch_size)
    if not len(cells):
        raise ValueError("No train cell has a gene of the vocabulary.")
    return cells


def _load(folder: Path, split: str) -> datasets.Dataset:
    files = sorted(folder.glob(f"{split}-*.arrow"))
    if not files:
        raise ValueError(f"No {split} cell has a gene of the vocabulary.")
    parts = [datasets.Dataset.from_file(str(file)) for file in files]
    return datasets.concatenate_datasets(parts).with_format("numpy", columns=["input_ids"], output_all_columns=True)


def _fingerprint(files: Sequence[Path], config: Any) -> str:
    """Of the files, and of the options that decide split and tokens."""
    names = ("layout", "max_length", "layer", "gene_ids", "split_by", "validation_fraction")
    facts = {name: getattr(config, name) for name in names} | {"seed": config.seed if config.data else 0}
    if config.on_the_fly:
        facts["on_the_fly"] = True
    return fingerprint(files, (config.vocabulary, config.aliases), facts)
