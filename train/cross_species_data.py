"""Cells of several species for pre-training: split, PCA fitted on training cells, projections of all cells on disk.

The projections lie in one memory-mapped file a source and are read a step at a time: 160,000 cells of 1,200 components
are 770 MB, which no process holds.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cellglot.tokenization.log_expression import open_cells
from cellglot.tokenization.parquet_counts import GENE_TABLE, is_parquet_corpus
from cellglot.tokenization.pca_projection import PCAProjectionFeatureExtractor

from .config import write_json
from .fingerprint import fingerprint
from .pretraining_data import COUNT_FILES, count_files
from .splits import held_out

# Cells whose projections are read at once: 20 MB at 1,200 components
ROWS_PER_READ = 4_096
UNUSED, TRAIN, VALIDATION = -1, 0, 1
NO_SOURCES = """no cells were given, and none of a brain ship with cellglot. Build the two corpora of the paper,
    python datasets_scripts/human_cortex.py --output data/human_cortex
    python datasets_scripts/mouse_brain.py --output data/mouse_brain
and pass --sources human=data/human_cortex mouse=data/mouse_brain; or pass your own count files,
    --sources human=HUMAN.h5ad mouse=MOUSE.h5ad"""


@dataclass
class CellSource:
    """Cells of one species.

    parts    count files or corpus folders, whose cells follow one another
    options  layer and gene_ids, as the extractor takes them
    split    (cells of all parts,) UNUSED, TRAIN or VALIDATION
    """

    name: str
    parts: list[Path]
    options: dict[str, Any]
    split: np.ndarray


@dataclass
class CrossSpeciesData:
    """What pre-training needs.

    rms  root mean square of the training cells' projections, one a source
    """

    description: str
    fingerprint: str
    extractor: PCAProjectionFeatureExtractor
    sources: list[CellSource]
    train: "ProjectedCells"
    validation: "ProjectedCells"
    rms: list[float]


class ProjectedCells:
    """Projections of cells of all sources as the training loop takes them.

    files     .npy of each source: (cells, components) float32
    source_n  (cells,) number of the source of each
    row_n     (cells,) its row in that source's file
    """

    def __init__(self, files: Sequence[Path], source_n: np.ndarray, row_n: np.ndarray):
        self.files, self.source_n, self.row_n = list(files), source_n.astype(np.int64), row_n.astype(np.int64)
        self._opened: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.source_n)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Examples with `projections` (components,) float32 and `source`."""
        projections, source_n = self.read(np.asarray(indices))
        return [{"projections": x, "source": s} for x, s in zip(projections, source_n, strict=True)]

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """((cells, components) float32, (cells,) source) of some cells, in memory."""
        if self._opened is None:
            self._opened = [np.load(file, mmap_mode="r", allow_pickle=False) for file in self.files]
        source_n, row_n = self.source_n[indices], self.row_n[indices]
        projections = np.empty((len(indices), self._opened[0].shape[1]), dtype=np.float32)
        for s, rows in enumerate(self._opened):
            of_source = source_n == s
            projections[of_source] = rows[row_n[of_source]]
        return projections, source_n

    def subset(self, indices: np.ndarray) -> "ProjectedCells":
        return ProjectedCells(self.files, self.source_n[indices], self.row_n[indices])

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which would travel to a data loader's process as what they hold."""
        return self.__dict__ | {"_opened": None}


@dataclass
class MaskedComponentCollator:
    """Batch of cells with entries to hide, each with the given probability.

    What is hidden depends on the cell's key alone, so it is the same for any batch, process and after a resume.
    """

    probability: float

    def __call__(self, rows: Sequence[dict[str, Any]], keys: Sequence[Sequence[int]]) -> dict[str, Any]:
        """projections, labels (cells, components) float32; masked (cells, components) bool; source (cells,) int64."""
        import torch

        projections = np.stack([row["projections"] for row in rows])
        masked = hidden_entries(keys, projections.shape[1], self.probability)
        return {
            "projections": torch.from_numpy(projections),
            "source": torch.tensor([int(row["source"]) for row in rows]),
            "masked": torch.from_numpy(masked),
            "labels": torch.from_numpy(projections),
        }


def hidden_entries(keys: Sequence[Sequence[int]], n_components: int, probability: float) -> np.ndarray:
    """(keys, components) bool, a pure function of each key."""
    return np.stack([np.random.default_rng(key).random(n_components, dtype=np.float32) < probability for key in keys])


def tokens_of_cell(model_config: Any) -> int:
    """What a cell counts for in `max_tokens`: itself, or its patches and the token of its source."""
    return 1 if model_config.token_axis == "cells" else 1 + model_config.num_patches


def prepare_data(config: Any, folder: Path, *, is_main_process: bool = True, device: Any = "cpu") -> CrossSpeciesData:
    """Projected training and validation cells under `folder`, made by the main process while others wait.

    config   a CrossSpeciesPretrainConfig
    device   that PCA and projection are computed on
    Raises   ValueError or OSError for data that cannot be used, or that changed since the run began
    """
    sources, mark = find_sources(config)
    record = folder / "data.json"
    if record.exists():
        if json.loads(record.read_text())["fingerprint"] != mark:
            raise ValueError(
                f"{folder} was made from other data or options than --sources are now; pass --overwrite, or another "
                "--output."
            )
    elif is_main_process:
        begin(folder, mark)
        try:
            rms = project(fit_extractor(config, sources, folder, device), sources, folder, device)
        except BaseException:
            shutil.rmtree(folder)
            raise
        places = {source.name: [str(part) for part in source.parts] for source in sources}
        write_json(record, {"fingerprint": mark, "sources": places, "rms": rms})
    else:
        # Not a barrier: a PCA of a large corpus outlasts any time-out of the process group.
        while not record.exists():
            time.sleep(1)
    files = [_projections(folder, source) for source in sources]
    return CrossSpeciesData(
        description=" and ".join(f"{source.name} cells of {_described(source.parts)}" for source in sources),
        fingerprint=mark,
        extractor=PCAProjectionFeatureExtractor.from_pretrained(folder / "processor"),
        sources=sources,
        train=_cells(files, sources, TRAIN),
        validation=_cells(files, sources, VALIDATION),
        rms=json.loads(record.read_text())["rms"],
    )


def find_sources(config: Any) -> tuple[list[CellSource], str]:
    """(sources with the split of their cells, fingerprint of them and of the options) of what `--sources` names."""
    parts = source_parts(config.sources)
    names = ("layer", "gene_ids", "split_by", "cell_type")
    options = {name: by_source(getattr(config, name), list(parts), name) for name in names}
    sources = [
        CellSource(
            name,
            files,
            {option: options[option][name] for option in ("layer", "gene_ids")},
            _split(files, options, name, config),
        )
        for name, files in parts.items()
    ]
    return sources, _fingerprint(parts, options, config)


def source_parts(words: Sequence[str]) -> dict[str, list[Path]]:
    """Name -> files or corpus folders, of NAME=PATH words; a name may come again with further paths.

    Raises  ValueError for a word or a path that is none
    """
    if not words:
        raise ValueError(NO_SOURCES)
    parts: dict[str, list[Path]] = {}
    for word in words:
        name, is_pair, path = word.partition("=")
        if not is_pair or not path or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"Expected --sources as NAME=PATH, e.g. human=data/human_cortex; found {word!r}.")
        parts.setdefault(name, []).extend(_parts_of(Path(path)))
    return parts


def _parts_of(path: Path) -> list[Path]:
    """A count file, the folder of a corpus or of 10x files, or the count files in a folder."""
    if not path.exists():
        raise ValueError(f"--sources {path} does not exist.")
    if path.is_dir():
        # A corpus builder writes its default config into a folder of that name.
        for folder in (path, path / "default"):
            if (folder / GENE_TABLE).exists() or any(folder.glob("*matrix.mtx*")):
                return [folder]
    files = count_files(path)
    if not files:
        raise ValueError(f"{path} holds neither a corpus with {GENE_TABLE} nor {', '.join(COUNT_FILES)} files.")
    return files


def by_source(words: Sequence[str], names: Sequence[str], option: str) -> dict[str, str | None]:
    """The value of an option for each source: of VALUE for all, or NAME=VALUE for one; None where it is not given.

    Raises  ValueError for a name that is no source
    """
    for_all = [word for word in words if "=" not in word]
    if len(for_all) > 1:
        raise ValueError(f"--{option} {' '.join(for_all)}: expected one value for all sources, or NAME=VALUE for each.")
    values: dict[str, str | None] = dict.fromkeys(names, *for_all)
    for word in words:
        name, is_pair, value = word.partition("=")
        if is_pair and name not in values:
            raise ValueError(f"--{option} {word}: no source is named {name!r}; there are {', '.join(names)}.")
        if is_pair:
            values[name] = value
    return values


def _split(parts: Sequence[Path], options: Any, name: str, config: Any) -> np.ndarray:
    """Split of a source's cells: by cell, or by whole groups of a column of obs."""
    column, layer = options["split_by"][name], options["layer"][name]
    if layer is not None and any(is_parquet_corpus(part) for part in parts):
        raise ValueError(f"--layer {layer}: {parts[0]} is a corpus, which has no layers. Name layers of files only.")
    # That of the classes is read at the end, and asked for now.
    columns = {c for c in (column, options["cell_type"][name]) if c is not None}
    obs, usable = cell_annotations(parts, sorted(columns), layer)
    groups = obs[column].astype(str).to_numpy(dtype=str) if column else None
    alike = np.full(len(usable), "")
    try:
        chosen = held_out(alike, config.validation_fraction, groups=groups, among=usable, seed=config.seed)
    except ValueError as error:
        raise ValueError(f"Source {name}: {error}") from error
    if not chosen.any() or chosen[usable].all():
        raise ValueError(
            f"Source {name}: {int(usable.sum()):,} cells cannot be split with "
            f"validation_fraction={config.validation_fraction}."
        )
    return np.where(usable, np.where(chosen, VALIDATION, TRAIN), UNUSED).astype(np.int8)


def cell_annotations(
    parts: Sequence[Path], columns: Sequence[str], layer: str | None = None
) -> tuple[pd.DataFrame, np.ndarray]:
    """Columns of obs of all cells of the parts, in order, and a mask of the cells that passed their lab's filter.

    Raises  ValueError for a column that a part lacks
    """
    tables, usable = [], []
    for part in parts:
        with open_cells(part, layer=layer) as matrix:
            missing = [column for column in columns if column not in matrix.obs]
            if missing:
                has = ", ".join(map(str, matrix.obs)) or "none"
                raise ValueError(f"{part}: obs has no column {missing[0]!r}; it has {has}.")
            tables.append(matrix.obs[list(columns)])
            usable.append(matrix.passing_cells(np.ones(matrix.n_cells, dtype=bool)))
    return pd.concat(tables), np.concatenate(usable)


def begin(folder: Path, mark: str) -> None:
    """Makes a folder for data of this fingerprint; what a killed run of the same has finished is kept."""
    begun = folder / "begun.json"
    if not begun.exists() or json.loads(begun.read_text())["fingerprint"] != mark:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(begun, {"fingerprint": mark})


def fit_extractor(
    config: Any, sources: Sequence[CellSource], folder: Path, device: Any = "cpu"
) -> PCAProjectionFeatureExtractor:
    """The PCA of each source's training cells, fitted unless `folder/processor` has it."""
    path = folder / "processor"
    if not path.exists():
        extractor = PCAProjectionFeatureExtractor.fit(
            {source.name: source.parts for source in sources},
            n_components=config.n_components,
            passes=config.pca_passes,
            seed=config.seed,
            cells={source.name: source.split == TRAIN for source in sources},
            layer={source.name: source.options["layer"] for source in sources},
            gene_ids={source.name: source.options["gene_ids"] for source in sources},
            allow_fractional=config.allow_fractional,
            device=device,
        )
        partial = folder / ".partial-processor"
        shutil.rmtree(partial, ignore_errors=True)
        extractor.save_pretrained(partial)
        partial.rename(path)
    return PCAProjectionFeatureExtractor.from_pretrained(path)


def project(
    extractor: PCAProjectionFeatureExtractor, sources: Sequence[CellSource], folder: Path, device: Any = "cpu"
) -> list[float]:
    """Writes the projections of each source's cells, in order and without the unused ones, a block at a time.

    Returns  root mean square of the training cells' projections, one a source
    """
    for source in sources:
        path = _projections(folder, source)
        if path.exists():
            continue
        partial, used = path.with_name(f".partial-{path.name}"), source.split != UNUSED
        shape = (int(used.sum()), extractor.n_components)
        rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        start = 0
        blocks = extractor.iter_projections(source.parts, source.name, mask=used, device=device, **source.options)
        with tqdm(total=len(rows), desc=f"Projections of {source.name}", unit="cell") as bar:
            for block in blocks:
                rows[start : start + len(block)] = block
                start += len(block)
                bar.update(len(block))
        assert start == len(rows), (start, len(rows))
        rows.flush()
        partial.rename(path)
    return [_rms(_projections(folder, source), source.split[source.split != UNUSED] == TRAIN) for source in sources]


def _rms(file: Path, train: np.ndarray) -> float:
    rows, total = np.load(file, mmap_mode="r", allow_pickle=False), 0.0
    for start in range(0, len(rows), ROWS_PER_READ):
        part = slice(start, start + ROWS_PER_READ)
        total += float((rows[part][train[part]].astype(np.float64) ** 2).sum())
    return float(np.sqrt(total / (train.sum() * rows.shape[1])))


def _projections(folder: Path, source: CellSource) -> Path:
    return folder / f"{source.name}.npy"


def _cells(files: Sequence[Path], sources: Sequence[CellSource], part: int) -> ProjectedCells:
    rows = [np.flatnonzero(source.split[source.split != UNUSED] == part) for source in sources]
    return ProjectedCells(files, np.repeat(np.arange(len(rows)), [len(r) for r in rows]), np.concatenate(rows))


def _fingerprint(parts: dict[str, list[Path]], options: dict[str, Any], config: Any) -> str:
    """Of the files, and of the options that decide split and projections."""
    files = [file for folder in parts.values() for part in folder for file in _files(part)]
    names = ("n_components", "pca_passes", "allow_fractional", "validation_fraction", "seed")
    facts = {name: getattr(config, name) for name in names} | {"sources": list(parts)}
    facts |= {name: options[name] for name in ("layer", "gene_ids", "split_by")}
    return fingerprint(files, (), facts)


def _described(parts: Sequence[Path]) -> str:
    """A file or corpus by its name, several by their folder's."""
    if len(parts) > 1:
        return f"{len(parts)} files of {parts[0].parent.name}"
    return parts[0].parent.name if parts[0].name == "default" else parts[0].name


def _files(part: Path) -> Iterator[Path]:
    yield from sorted(path for path in part.iterdir() if path.is_file()) if part.is_dir() else [part]
