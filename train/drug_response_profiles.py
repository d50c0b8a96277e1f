"""Profiles for pre-training: read block by block from any number of files, kept on disk, split, scaling fitted.

A million L1000 profiles of 978 genes are 4 GB; no process holds them. They are written once, aligned to the genes that
all files have, in one memory-mapped file, and scaled when they are read.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cellglot.drug_response.data import ResponseData
from cellglot.drug_response.reading import iter_responses
from cellglot.hub import reading
from cellglot.tokenization.expression_features import ExpressionFeatureExtractor
from cellglot.tokenization.gene_identifiers import gene_identifiers, gene_positions
from cellglot.tokenization.gene_ids import examples

from .config import write_json
from .drug_response_data import MaskedProfiles
from .fingerprint import fingerprint

PROFILES_PER_BLOCK = 4_096
EXPRESSION, TABLE, GENES, RECORD = "expression.f32", "profiles.parquet", "genes.json", "data.json"


class StoredProfiles:
    """(n, g) float32 in a file, opened when first read: rows of it by position, as of an array."""

    def __init__(self, path: Path, n_genes: int):
        self.path, self.n_genes = path, n_genes
        self._rows: np.ndarray | None = None

    def __len__(self) -> int:
        return self.path.stat().st_size // (4 * self.n_genes)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if self._rows is None:
            self._rows = np.memmap(self.path, dtype=np.float32, mode="r").reshape(-1, self.n_genes)
        return np.asarray(self._rows[rows])

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which would travel to a data loader's process as what it holds."""
        return self.__dict__ | {"_rows": None}


@dataclass
class PretrainingProfiles:
    """What pre-training needs.

    obs          (n,) drug, cell_line, dose (uM) and is_control of the stored profiles
    train        (n,) bool; the others validate
    """

    extractor: ExpressionFeatureExtractor
    expression: StoredProfiles
    obs: pd.DataFrame
    train: np.ndarray
    description: str
    fingerprint: str

    def examples(self, rows: np.ndarray, tasks: Sequence[str], mask_ratio: float) -> MaskedProfiles:
        """Examples of the loop: the marked profiles, with the labels of the tasks."""
        positions = np.flatnonzero(rows)
        obs = self.obs.iloc[positions]
        control = obs["is_control"].to_numpy()
        dose = np.full(len(obs), np.nan, dtype=np.float32)
        dose[~control] = np.log10(np.maximum(obs["dose"].to_numpy()[~control], 1e-9))
        drug = np.where(control, -100, _numbers(obs["drug"], self.extractor.drugs))
        labels = {"cell_line": _numbers(obs["cell_line"], self.extractor.cell_lines), "drug": drug, "dose": dose}
        wanted = {task: values for task, values in labels.items() if task in tasks}
        return MaskedProfiles(self.expression, wanted, mask_ratio, rows=positions, extractor=self.extractor)


def _numbers(names: pd.Series, known: Sequence[str]) -> np.ndarray:
    """(n,) int64 position of each name among those known, -100 for others."""
    number = {name: i for i, name in enumerate(known)}
    return names.astype(str).map(number).fillna(-100).to_numpy(dtype=np.int64)


def prepare_profiles(config: Any, folder: Path, *, is_main_process: bool = True) -> PretrainingProfiles:
    """Stored profiles under `folder`, made by the main process while others wait for it.

    config   a DrugResponsePretrainConfig
    Raises   ValueError or OSError for data that cannot be used, or that changed since the run began
    """
    paths = [Path(path) for path in config.data]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
    names = ("layout", "layer", "counts", "scaling", "model", "validation_fraction", "split_by", "seed")
    files = [file for path in paths for file in (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])]
    mark = fingerprint(files, (), {name: getattr(config, name) for name in names})
    record = folder / RECORD
    if is_main_process and not record.exists():
        try:
            _store(config, paths, folder, mark)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    while not record.exists():
        # Not a barrier: reading a large corpus outlasts any time-out of the process group.
        time.sleep(1)
    found = json.loads(record.read_text())
    if found["fingerprint"] != mark:
        raise ValueError(
            f"{folder} was made from other data or options than --data {' '.join(config.data)} now has. Pass "
            "--overwrite, or another --output."
        )
    extractor = ExpressionFeatureExtractor.from_pretrained(folder / "processor")
    obs = pd.read_parquet(folder / TABLE)
    return PretrainingProfiles(
        extractor,
        StoredProfiles(folder / EXPRESSION, extractor.n_genes),
        obs,
        obs.pop("train").to_numpy(dtype=bool),
        ", ".join(path.name for path in paths),
        mark,
    )


def _store(config: Any, paths: Sequence[Path], folder: Path, mark: str) -> None:
    """Writes expression, table and extractor, the record last."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"layout": config.layout, "layer": config.layer, "counts": config.counts}
    start = None
    if config.model is not None:
        with reading(config.model):
            start = ExpressionFeatureExtractor.from_pretrained(config.model)
    genes, smiles, tables, target_sums = _genes_of_all(paths, options, start), {}, [], set()
    partial = folder / f".partial-{EXPRESSION}"
    with open(partial, "wb") as file, tqdm(desc="Profiles", unit="profile") as bar:
        for path in paths:
            for block in iter_responses(path, genes=_named(genes), profiles_per_block=PROFILES_PER_BLOCK, **options):
                np.ascontiguousarray(block.expression, dtype=np.float32).tofile(file)
                obs = block.obs[["drug", "cell_line", "dose", "is_control"]].reset_index(drop=True)
                tables.append(obs.assign(group=_groups(block, config.split_by)))
                smiles |= dict(block.smiles)
                target_sums.add(block.target_sum)
                bar.update(len(block))
    obs = pd.concat(tables, ignore_index=True)
    if len(obs) < 2:
        raise ValueError(f"Expected profiles to train on in {examples(map(str, paths))}, found {len(obs)}.")
    if len(target_sums) > 1 or (start is not None and start.target_sum not in target_sums):
        raise ValueError(
            "Some of --data are counts, and some (or what --model was trained on) are not: train on one kind."
        )
    partial.replace(folder / EXPRESSION)
    obs["train"] = _training_rows(obs["group"].to_numpy(dtype=str), config)
    obs.drop(columns="group").to_parquet(folder / TABLE)
    stored = StoredProfiles(folder / EXPRESSION, len(genes))
    extractor = _fitted(config, start, stored, obs, genes, smiles, target_sums.pop())
    shutil.rmtree(folder / "processor", ignore_errors=True)
    extractor.save_pretrained(folder / "processor")
    write_json(folder / RECORD, {"fingerprint": mark, "n_profiles": len(obs), "n_genes": len(genes)})


def _genes_of_all(
    paths: Sequence[Path], options: dict[str, Any], start: ExpressionFeatureExtractor | None
) -> pd.DataFrame:
    """Identifiers of the genes that all files have, or of the model that is gone on with.

    Raises  ValueError if there is none
    """
    wanted = None if start is None else pd.DataFrame(start.genes)
    for path in paths:
        found = next(iter(iter_responses(path, **options))).genes
        if wanted is None:
            wanted = found
            continue
        places, kind = gene_positions(gene_identifiers(wanted), gene_identifiers(found))
        if start is not None and (places < 0).any():
            raise ValueError(
                f"{path} lacks {int((places < 0).sum()):,} of the {len(places):,} genes of the model to go on with: "
                f"it has e.g. {examples(found.index)}, and the model e.g. {examples(start.gene_ids)}."
            )
        if not kind:
            raise ValueError(
                f"{path} has no gene in common with the files before it: e.g. {examples(found.index)} and "
                f"{examples(wanted.index)}."
            )
        wanted = wanted[places >= 0]
    assert wanted is not None
    return wanted


def _named(genes: pd.DataFrame) -> list[str]:
    """(g,) identifiers of the kind that names all genes."""
    for names in gene_identifiers(genes).values():
        if all(names):
            return names
    raise ValueError("Expected one kind of identifier that all genes have.")


def _groups(block: ResponseData, column: str | None) -> np.ndarray:
    """(n,) what may not be split between training and validation; "" where profiles are held out one by one."""
    if column is None:
        return np.full(len(block), "")
    if column not in block.obs:
        raise ValueError(f"{block.name}: obs has no column {column!r} to split by.")
    return block.obs[column].astype(str).to_numpy()


def _training_rows(groups: np.ndarray, config: Any) -> np.ndarray:
    """(n,) bool: all but a share of the profiles, or of the groups."""
    rng = np.random.default_rng(config.seed)
    if config.split_by is None:
        held_out = rng.permutation(len(groups)) < max(round(config.validation_fraction * len(groups)), 1)
        return ~held_out
    names = np.unique(groups)
    if len(names) < 2:
        raise ValueError(f"--split_by {config.split_by} has one value only, {names[0]!r}: nothing can be held out.")
    n = min(max(round(config.validation_fraction * len(names)), 1), len(names) - 1)
    return ~np.isin(groups, rng.permutation(names)[:n])


def _fitted(
    config: Any,
    start: ExpressionFeatureExtractor | None,
    stored: StoredProfiles,
    obs: pd.DataFrame,
    genes: pd.DataFrame,
    smiles: dict[str, str],
    target_sum: float | None,
) -> ExpressionFeatureExtractor:
    """The extractor: scaling of the model that is gone on with, else of the training profiles; drugs of these."""
    train = obs["train"].to_numpy()

    def blocks() -> Iterator[ResponseData]:
        for first in range(0, len(obs), PROFILES_PER_BLOCK):
            rows = np.arange(first, min(first + PROFILES_PER_BLOCK, len(obs)))
            rows = rows[train[rows]]
            yield ResponseData(stored[rows], obs.iloc[rows], genes, target_sum=target_sum)

    # Also lines that have controls only: there are profiles to tell them by.
    lines = sorted(set(obs["cell_line"][train].astype(str)))
    fitted = ExpressionFeatureExtractor.fit(blocks(), scaling=config.scaling, cell_lines=lines)
    fitted.smiles = {drug: smiles[drug] for drug in fitted.drugs if drug in smiles}
    if start is not None:
        fitted.genes, fitted.scaling, fitted.mean, fitted.spread = start.genes, start.scaling, start.mean, start.spread
    return fitted
