"""What an autoencoder of expression is worth: its error on held-out cells beside the mean and principal components."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from tqdm.auto import tqdm

from cellglot.figures import save_figure
from cellglot.gene_graph import GeneGraph

from .config import write_json
from .figures import plot_loss_curve
from .gene_graph_card import autoencoder_card
from .gene_graph_data import ExpressionCells
from .loop import TrainingResult
from .metrics_log import read_metrics
from .model_directory import write_model_directory

# Training cells that principal components are fitted on at the most, and cells of a dense block
PCA_CELLS = 5_000
CELLS_AT_ONCE = 512


def write_report(
    model: Any,
    cells: ExpressionCells,
    graph: GeneGraph | None,
    train: np.ndarray,
    validation: np.ndarray,
    config: Any,
    result: TrainingResult,
    output: Path,
) -> dict[str, Any]:
    """Measures, draws, prints, and writes `model/` and `report.json`; returns the report.

    train, validation  (cells,) masks
    """
    report: dict[str, Any] = {
        "validation_loss": result.metrics["validation_loss"],
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "n_parameters": model.num_parameters(),
        "n_genes": model.config.n_genes,
        "n_edges": model.config.n_edges,
        "graph": None if graph is None else str(graph.report),
        "n_train_cells": int(train.sum()),
        "n_validation_cells": int(validation.sum()),
        "references": {},
    }
    figures: dict[str, Path] = {}
    if config.report:
        report["references"] = reference_errors(cells, train, validation, model.config.hidden_sizes[-1], config.seed)
        figures["loss_curve.png"] = output / "loss_curve.png"
        log = read_metrics(output / "metrics.jsonl")
        ax = plot_loss_curve(log, report["references"], ylabel="squared error of a gene's log expression")
        save_figure(ax, figures["loss_curve.png"])
    card = autoencoder_card(report, model.config, cells, config, [*figures])
    write_model_directory(model, None, output / "model", card=card, report=report, files=figures)
    write_json(output / "report.json", report)
    print(format_report(report, output))
    return report


def reference_errors(
    cells: ExpressionCells, train: np.ndarray, validation: np.ndarray, n_components: int, seed: int
) -> dict[str, float]:
    """Mean squared errors on the validation cells of the training mean and of principal components.

    n_components  at the most; as many as the autoencoder's narrowest layer has units
    """
    from sklearn.decomposition import PCA

    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(train))[:PCA_CELLS]
    reference = cells.rows.read(cells.index[drawn])
    k = min(n_components, min(reference.shape) - 1)
    fitted = PCA(k, svd_solver="arpack", random_state=seed).fit(reference) if k > 0 else None
    mean_g = np.asarray(reference.mean(axis=0)).ravel()
    totals = np.zeros(2)
    index = np.flatnonzero(validation)
    for start in tqdm(range(0, len(index), CELLS_AT_ONCE), desc="references", leave=False):
        block: sp.csr_matrix = cells.rows.read(cells.index[index[start : start + CELLS_AT_ONCE]])
        dense = block.toarray().astype(np.float64)
        guess = mean_g if fitted is None else fitted.inverse_transform(fitted.transform(dense))
        totals += ((dense - mean_g) ** 2).sum(), ((dense - guess) ** 2).sum()
    mean, components = totals / (len(index) * len(mean_g))
    return {"mean of the training cells": float(mean), f"{k} principal components": float(components)}


def format_report(report: dict[str, Any], output: Path) -> str:
    """The report as people read it in a terminal."""
    lines = [
        "",
        f"{report['n_parameters'] / 1e6:.2f}M parameters, {report['steps']:,} steps, {report['seconds']:.0f} s",
        f"squared error on {report['n_validation_cells']:,} held-out cells: {report['validation_loss']:.4g}",
        *(f"  {name}: {error:.4g}" for name, error in report["references"].items()),
        f"model: {output / 'model'}",
    ]
    return "\n".join(lines)
