"""What a cross-species run is worth: masked entries and expression beside the simplest guesses, UMAP, figures, card."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cellglot.figures import plot_umap, save_figure, umap_coordinates
from cellglot.tokenization.gene_ids import GeneResolver
from cellglot.tokenization.log_expression import LogExpression, open_cells
from cellglot.tokenization.pca_projection import PCAProjectionFeatureExtractor

from .config import write_json
from .cross_species_card import cross_species_card
from .cross_species_data import (
    UNUSED,
    CellSource,
    CrossSpeciesData,
    ProjectedCells,
    by_source,
    cell_annotations,
    hidden_entries,
    tokens_of_cell,
)
from .cross_species_reconstruction import (
    REFERENCE_CELLS,
    gene_space_errors,
    linear_map,
    masked_entry_errors,
    nearest_mean,
    reconstructions,
)
from .figures import plot_loss_curve
from .loop import TrainingResult
from .metrics_log import read_metrics
from .model_directory import write_model_directory

# Cells of each source in the UMAP, and held-out cells whose expression is compared, at the most
UMAP_CELLS = 2_000
EXPRESSION_CELLS = 500
# Labels of their own colour; rarer ones are shown together.
UMAP_LABELS = 19
# Column of obs with the class, unless one is named
DEFAULT_CLASS = "cell_type"
# Draw of masks that the errors are of, the first of the validation's
MASK_SEED = 1_000_003


def write_report(
    model: Any,
    data: CrossSpeciesData,
    validation: ProjectedCells,
    config: Any,
    result: TrainingResult,
    output: Path,
) -> dict[str, Any]:
    """Measures, draws, prints, and writes `model/` and `report.json`; returns the report."""
    report: dict[str, Any] = {
        "validation_loss": result.metrics["validation_loss"],
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "n_parameters": model.num_parameters(),
        "n_components": data.extractor.n_components,
        "token_axis": model.config.token_axis,
        "n_train_cells": _cells_of_source(data, data.train),
        "n_validation_cells": _cells_of_source(data, data.validation),
        "masked": [],
        "expression": [],
    }
    # First without figures, which may fail on odd data: a trained model is never lost to its report.
    card = cross_species_card(report, data, config, [])
    write_model_directory(model, data.extractor, output / "model", card=card, report=report, files={})
    figures: dict[str, Path] = {}
    if config.report:
        at_once = min(config.batch_size, max(config.max_tokens // tokens_of_cell(model.config), 1))
        measured = measure(model, data, validation, config, cells_per_pass=at_once)
        report |= measured
        references = {name: measured[key] for name, key in _REFERENCES.items()}
        figures["loss_curve.png"] = output / "loss_curve.png"
        log = read_metrics(output / "metrics.jsonl")
        ax = plot_loss_curve(log, references, ylabel="squared error of an entry, masked or not")
        # It falls by orders of magnitude.
        ax.set_yscale("log")
        save_figure(ax, figures["loss_curve.png"])
        for name, ax in embedding_figures(model, data, config, cells_per_pass=at_once):
            figures[name] = output / name
            save_figure(ax, figures[name])
    card = cross_species_card(report, data, config, [*figures])
    write_model_directory(model, data.extractor, output / "model", card=card, report=report, files=figures)
    write_json(output / "report.json", report)
    print(format_report(report, output))
    return report


_REFERENCES = {"copied, masked at the mean": "copy_loss", "copied, masked by the linear map": "linear_loss"}


def _cells_of_source(data: CrossSpeciesData, cells: ProjectedCells) -> dict[str, int]:
    return {source.name: int((cells.source_n == s).sum()) for s, source in enumerate(data.sources)}


def measure(
    model: Any, data: CrossSpeciesData, validation: ProjectedCells, config: Any, *, cells_per_pass: int
) -> dict[str, Any]:
    """Errors on held-out cells, each source by itself: of masked entries, and of expression through the inverse.

    Returns  copy_loss, linear_loss (in the unit of the validation loss), masked, expression (rows of tables)
    """
    cells_nk, source_n = validation.read(np.arange(len(validation)))
    keys = [(MASK_SEED, 0, i) for i in range(len(cells_nk))]
    masked_nk = hidden_entries(keys, cells_nk.shape[1], config.mask_probability)
    ours_nk = reconstructions(model, cells_nk, source_n, masked_nk, cells_per_pass=cells_per_pass)
    linear_nk, masked_rows, expression_rows = np.zeros_like(cells_nk), [], []
    for s, source in enumerate(data.sources):
        of_source = np.flatnonzero(source_n == s)
        cells, masked, ours = cells_nk[of_source], masked_nk[of_source], ours_nk[of_source]
        if not masked.any():
            continue
        reference = _reference_cells(data.train, s)
        shown = np.where(masked, 0, cells)
        linear_nk[of_source] = shown @ linear_map(reference, config.mask_probability)
        guesses = {
            "mean": np.zeros_like(cells),
            "linear map": linear_nk[of_source],
            "nearest cells": nearest_mean(cells, masked, reference),
            "this model": ours,
        }
        table = masked_entry_errors(cells, masked, guesses)
        masked_rows += table.assign(source=source.name, n_cells=len(cells)).to_dict("records")
        in_genes = {
            "projection, nothing masked": cells,
            "masked entries at the mean": shown,
            "masked entries by the model": np.where(masked, ours, cells),
            "all entries by the model": ours,
        }
        table = expression_errors(data, s, validation.row_n[of_source], in_genes)
        expression_rows += table.assign(source=source.name).to_dict("records")
    hidden = np.where(masked_nk, cells_nk, 0)
    return {
        "copy_loss": float(np.mean(hidden**2, dtype=np.float64)),
        "linear_loss": float(np.mean((hidden - np.where(masked_nk, linear_nk, 0)) ** 2, dtype=np.float64)),
        "masked": masked_rows,
        "expression": expression_rows,
    }


def _reference_cells(train: ProjectedCells, source: int) -> np.ndarray:
    """(cells, components) of at most REFERENCE_CELLS training cells of a source."""
    of_source = np.flatnonzero(train.source_n == source)
    chosen = np.random.default_rng(0).permutation(of_source)[:REFERENCE_CELLS]
    return train.read(np.sort(chosen))[0]


def expression_errors(
    data: CrossSpeciesData, s: int, row_n: np.ndarray, guesses: dict[str, np.ndarray]
) -> pd.DataFrame:
    """Log-normalized expression of held-out cells of a source against reconstructions of their projections.

    row_n    (cells,) their rows among the projections of the source, in random order
    guesses  name -> (cells, components)
    """
    source, extractor = data.sources[s], data.extractor
    chosen = np.argsort(row_n[:EXPRESSION_CELLS])
    cells = np.zeros(len(source.split), dtype=bool)
    cells[np.flatnonzero(source.split != UNUSED)[row_n[chosen]]] = True
    return gene_space_errors(
        expression_blocks(extractor, source, cells),
        {name: guess[chosen] for name, guess in guesses.items()},
        lambda projections: extractor.inverse(projections, source.name),
        mean_g=extractor.inverse(np.zeros((1, extractor.n_components), dtype=np.float32), source.name)[0],
    )


def expression_blocks(
    extractor: PCAProjectionFeatureExtractor, source: CellSource, cells: np.ndarray
) -> Iterator[np.ndarray]:
    """(cells of a block, genes) log-normalized expression of the marked cells of a source, as it is projected."""
    resolver = GeneResolver(extractor.gene_ids(source.name))
    transform = LogExpression(resolver, extractor.target_sum, extractor.allow_fractional)
    start = 0
    for part in source.parts:
        with open_cells(part, layer=source.options["layer"]) as matrix:
            here = cells[start : start + matrix.n_cells]
            start += matrix.n_cells
            match = transform.match(matrix, source.options["gene_ids"])
            for _, expression in transform.blocks(matrix, match, here):
                yield expression.toarray()


def embedding_figures(
    model: Any, data: CrossSpeciesData, config: Any, *, cells_per_pass: int
) -> Iterator[tuple[str, Any]]:
    """(file name, axes) of the UMAP of some cells of every source, by source and, where it is known, by class."""
    rng = np.random.default_rng(0)
    joined = _joined(data.train, data.validation)
    chosen = [rng.permutation(np.flatnonzero(joined.source_n == s))[:UMAP_CELLS] for s in range(len(data.sources))]
    # Mixed: with attention across cells, each is embedded among cells of all sources.
    cells = joined.subset(rng.permutation(np.concatenate(chosen)))
    coordinates = umap_coordinates(embeddings(model, cells, cells_per_pass=cells_per_pass))
    names = np.array([source.name for source in data.sources])[cells.source_n]
    yield "umap_source.png", plot_umap(coordinates, names.tolist())
    classes = cell_classes(data, config, cells)
    if classes is not None:
        yield "umap_class.png", plot_umap(coordinates, classes.tolist())


@torch.no_grad()
def embeddings(model: Any, cells: ProjectedCells, *, cells_per_pass: int) -> np.ndarray:
    """(cells, width) in their order; `cells_per_pass` of them see each other where attention runs across cells."""
    device = next(model.parameters()).device
    model.eval()
    parts = []
    for start in range(0, len(cells), cells_per_pass):
        projections, source_n = cells.read(np.arange(start, min(start + cells_per_pass, len(cells))))
        output = model.model(torch.from_numpy(projections).to(device), torch.from_numpy(source_n).to(device))
        parts.append(output.embeddings.float().cpu().numpy())
    return np.concatenate(parts)


def cell_classes(data: CrossSpeciesData, config: Any, cells: ProjectedCells) -> np.ndarray | None:
    """(cells,) "source: class" of each, rare ones as "other"; None unless every source has a column of classes."""
    columns = by_source(config.cell_type, [source.name for source in data.sources], "cell_type")
    labels = np.empty(len(cells), dtype=object)
    for s, source in enumerate(data.sources):
        column = columns[source.name] or DEFAULT_CLASS
        try:
            obs, _ = cell_annotations(source.parts, [column], source.options["layer"])
        except ValueError:
            if columns[source.name]:
                raise
            return None
        used = obs[column].astype(str).to_numpy(dtype=str)[source.split != UNUSED]
        of_source = cells.source_n == s
        labels[of_source] = [f"{source.name}: {label}" for label in used[cells.row_n[of_source]]]
    frequent = pd.Series(labels).value_counts().index[:UMAP_LABELS]
    return np.where(np.isin(labels, frequent), labels, "other")


def _joined(a: ProjectedCells, b: ProjectedCells) -> ProjectedCells:
    return ProjectedCells(a.files, np.concatenate([a.source_n, b.source_n]), np.concatenate([a.row_n, b.row_n]))


def format_report(report: dict[str, Any], output: Path) -> str:
    """The report as people read it in a terminal."""
    lines = [
        "",
        f"{report['n_parameters'] / 1e6:.2f}M parameters, {report['steps']:,} steps, {report['seconds']:.0f} s",
        "",
        f"squared error of an entry of held-out cells, masked or not: {report['validation_loss']:.4g}",
    ]
    if report["masked"]:
        lines += [f"  copied, masked entries at the mean: {report['copy_loss']:.4g}, by the linear map: "]
        lines[-1] += f"{report['linear_loss']:.4g}"
        head = "masked entries of held-out cells"
        lines += ["", f"{head:<44}explained  95% interval      components better than by the mean"]
        for row in report["masked"]:
            lines.append(
                f"  {row['source'] + ', ' + row['guess']:<42}{row['explained']:z9.3f}  [{row['low']:z6.3f}, "
                f"{row['high']:z6.3f}]  {row['components']:.0%}"
            )
        lines += ["", f"{'expression of held-out cells':<44}explained"]
        for row in report["expression"]:
            lines.append(f"  {row['source'] + ', ' + row['guess']:<42}{row['explained']:z9.3f}")
    figures = ", ".join(path.name for path in sorted(output.glob("*.png")))
    tail = [f"figures: {figures} in {output}"] if figures else []
    return "\n".join([*lines, "", f"model: {output / 'model'}", *tail])
