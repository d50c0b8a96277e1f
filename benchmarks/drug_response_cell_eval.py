"""cell-eval's full profile on predicted and measured cells, as the pair of AnnData files that it takes."""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cellglot.metrics.response import Response

CONTROL = "control"


def check_cell_eval() -> None:
    """Raises SystemExit unless cell-eval is installed."""
    if importlib.util.find_spec("cell_eval") is None:
        raise SystemExit("--cell-eval needs cell-eval, which is not installed: pip install cell-eval")


def write_pair(responses: Mapping[Any, Response], gene_ids: list[str], folder: Path) -> tuple[Path, Path]:
    """Writes real.h5ad and predicted.h5ad: cells of every condition, and the same controls in both.

    Returns  their paths; obs["condition"] names conditions, "control" the controls
    """
    import anndata as ad

    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "real.h5ad", folder / "predicted.h5ad"
    controls = np.unique(np.concatenate([response.control for response in responses.values()]), axis=0)
    for path, side in zip(paths, ("true", "predicted"), strict=True):
        cells = {str(name): getattr(response, side) for name, response in responses.items()} | {CONTROL: controls}
        names = np.repeat(list(cells), [len(values) for values in cells.values()])
        # Models may give expression below 0, which log(1 + counts) is not.
        adata = ad.AnnData(np.clip(np.concatenate(list(cells.values())), 0, None).astype(np.float32))
        adata.obs["condition"] = names
        adata.var_names = gene_ids
        adata.write_h5ad(path)
    return paths


def cell_eval_figures(responses: Mapping[Any, Response], gene_ids: list[str], folder: Path) -> dict[str, float]:
    """Mean over conditions of every figure of cell-eval's full profile; those that are not defined are left out."""
    real, predicted = write_pair(responses, gene_ids, folder)
    evaluator: Any = importlib.import_module("cell_eval").MetricsEvaluator(
        adata_pred=str(predicted),
        adata_real=str(real),
        control_pert=CONTROL,
        pert_col="condition",
        num_threads=1,
        outdir=str(folder / "cell-eval"),
    )
    results, _ = evaluator.compute(profile="full")
    table = results.to_pandas().drop(columns=["perturbation"], errors="ignore")
    means = table.apply(lambda column: np.nanmean(column.astype(float)) if column.notna().any() else np.nan)
    return {name: float(value) for name, value in means.items() if np.isfinite(value)}
