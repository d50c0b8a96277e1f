"""Cells for alignment: projections of some training and held-out cells of each source, and what the sources share."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from cellglot.tokenization.pca_projection import PCAProjectionFeatureExtractor, ProjectionReport

from .cross_species_data import TRAIN, UNUSED, VALIDATION, CellSource, by_source, cell_annotations, find_sources
from .ortholog_table import SharedGenes, read_orthologs, shared_genes
from .pretrain_cross_species import CrossSpeciesPretrainConfig

# Options of a pre-training run that say what its cells are and which of them it held out
OF_THE_RUN = ("sources", "layer", "gene_ids", "split_by", "cell_type", "validation_fraction")


@dataclass
class SourceCells:
    """Cells of one source.

    train_nd, held_out_nd  (cells, d) float32 projections
    train_classes, held_out_classes, all_classes
                           (cells,) classes of these, and of all cells of the source; None where none were asked for
    """

    source: CellSource
    train_nd: torch.Tensor
    held_out_nd: torch.Tensor
    train_classes: np.ndarray | None
    held_out_classes: np.ndarray | None
    all_classes: np.ndarray | None


def run_options(config: Any) -> CrossSpeciesPretrainConfig:
    """Options of the pre-training run that the model is of, from the run.json beside it; those of `config` go first.

    Cells that were held out there are then held out here. An aligned model's run.json has them as `pretraining`.
    Raises  ValueError where no cells are given and there is no run beside the model
    """
    path = Path(config.model).parent / "run.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = record.get("pretraining") or record.get("config", {})
    if not config.sources and not run.get("sources"):
        raise ValueError(
            f"{path} is not there, which would name the cells that {config.model} was trained on: pass --sources "
            "NAME=PATH for each source."
        )
    known = {field.name for field in dataclasses.fields(CrossSpeciesPretrainConfig)}
    given = {name: getattr(config, name) for name in OF_THE_RUN if getattr(config, name)}
    return CrossSpeciesPretrainConfig(**{name: value for name, value in run.items() if name in known} | given)


def load_cells(
    config: Any, extractor: PCAProjectionFeatureExtractor, device: torch.device, *, progress: bool
) -> tuple[dict[str, SourceCells], str]:
    """(cells of each source of the extractor, fingerprint of the data): at most `config.max_cells` of training cells,
    `config.max_validation_cells` of the held-out ones, drawn at random.

    Raises  ValueError for sources that the extractor does not know or that are missing, and cells that cannot be used
    """
    options = run_options(config)
    sources, mark = find_sources(options)
    given = {source.name: source for source in sources}
    for name in given:
        extractor.projection(name)  # says which sources there are
    missing = [name for name in extractor.sources if name not in given]
    if missing:
        raise ValueError(f"No cells of source {missing[0]!r}, which the model knows: pass --sources {missing[0]}=PATH.")
    columns = by_source(options.cell_type, list(given), "cell_type")
    names = None if config.classes is None else read_classes(Path(config.classes))
    return {
        name: _load_source(given[name], columns[name], names, config, extractor, device, progress)
        for name in extractor.sources
    }, mark


def _load_source(
    source: CellSource,
    column: str | None,
    names: dict[str, str] | None,
    config: Any,
    extractor: PCAProjectionFeatureExtractor,
    device: torch.device,
    progress: bool,
) -> SourceCells:
    rng = np.random.default_rng(config.seed)
    train, held_out = (
        np.sort(rng.permutation(np.flatnonzero(source.split == part))[:most])
        for part, most in ((TRAIN, config.max_cells), (VALIDATION, config.max_validation_cells))
    )
    if len(train) < 2:
        raise ValueError(f"Source {source.name!r} has {len(train)} training cells: two are the least.")
    wanted = np.zeros(len(source.split), dtype=bool)
    wanted[train] = wanted[held_out] = True
    report = ProjectionReport()
    blocks = list(project(source, extractor, wanted, device, progress=progress, report=report))
    if report.n_empty_cells == report.n_cells:
        raise ValueError(
            f"Source {source.name!r}: none of its {report.n_cells:,} cells has counts of the model's genes. See "
            "whether these are counts of cells."
        )
    projections = torch.from_numpy(np.concatenate(blocks)).to(device)
    is_train = torch.from_numpy(source.split[wanted] == TRAIN).to(device)
    classes: Any = (None, None, None)
    if column is not None:
        labels = cell_annotations(source.parts, [column], source.options["layer"])[0][column].astype(str)
        labels = labels.replace(names or {}).to_numpy(dtype=str)
        classes = (labels[train], labels[held_out], labels)
    return SourceCells(source, projections[is_train], projections[~is_train], *classes)


def project(
    source: CellSource,
    extractor: PCAProjectionFeatureExtractor,
    wanted: np.ndarray,
    device: torch.device,
    *,
    progress: bool,
    report: ProjectionReport | None = None,
) -> Any:
    """Blocks of projections of the wanted cells of a source, in order; the report is filled meanwhile."""
    options = {**source.options, "report": report}
    blocks = extractor.iter_projections(source.parts, source.name, mask=wanted, device=device, **options)
    with tqdm(total=int(wanted.sum()), desc=f"cells of {source.name}", unit="cell", disable=not progress) as bar:
        for block in blocks:
            yield block
            bar.update(len(block))


def read_classes(path: Path) -> dict[str, str]:
    """Label -> class of a `.csv` with the columns label and class.

    Raises  ValueError without these columns
    """
    table = pd.read_csv(path, dtype=str)
    if not {"label", "class"} <= set(table):
        raise ValueError(f"{path}: expected the columns label and class, found {', '.join(map(str, table))}.")
    return dict(zip(table["label"], table["class"], strict=True))


@dataclass(frozen=True)
class SharedExpression:
    """What two sources' PCAs say of the genes that both species have.

    shared      which genes
    a_dg, b_dg  (d, shared genes) their columns of either PCA's components
    """

    shared: SharedGenes
    a_dg: torch.Tensor
    b_dg: torch.Tensor

    def coordinates(self, a_nd: torch.Tensor, b_md: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Centred expression of the shared genes of cells, up to scale, in coordinates that keep its inner products.

        Cells of d components span at most 2 d dimensions of a gene space: (cells, min(2 d, shared genes)) each.
        """
        if 2 * len(self.a_dg) >= self.a_dg.shape[1]:
            return a_nd @ self.a_dg, b_md @ self.b_dg
        triangle = torch.linalg.qr(torch.cat([self.a_dg, self.b_dg]).T, mode="r").R
        a_dr, b_dr = triangle.T.split(len(self.a_dg))
        return a_nd @ a_dr, b_md @ b_dr


def shared_expression(
    path: str, extractor: PCAProjectionFeatureExtractor, a: str, b: str, device: torch.device
) -> SharedExpression:
    """The orthologs of a table that the sources a and b were both fitted with.

    Raises  ValueError if there is none, OSError for a table that cannot be read
    """
    symbols = (extractor.gene_symbols(a), extractor.gene_symbols(b))
    table = read_orthologs(Path(path))
    genes = shared_genes(table, extractor.gene_ids(a), extractor.gene_ids(b), name=path, symbols=symbols)
    components = (
        torch.from_numpy(extractor.projection(name).components_kg[:, index]).to(device)
        for name, index in ((a, genes.index_a), (b, genes.index_b))
    )
    return SharedExpression(genes, *components)


def cell_names(source: CellSource) -> tuple[np.ndarray, np.ndarray]:
    """(names of the cells of a source that are used, mask of them)."""
    used = source.split != UNUSED
    return cell_annotations(source.parts, [], source.options["layer"])[0].index.astype(str).to_numpy()[used], used
