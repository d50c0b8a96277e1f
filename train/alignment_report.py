"""What an alignment is worth on held-out cells beside other methods and none; matchability; the model directory."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cellglot.alignment import Alignment, Matchability
from cellglot.alignment.csls import mean_matched_cosine
from cellglot.figures import save_figure
from cellglot.metrics.label_transfer import label_transfer
from cellglot.metrics.wasserstein import resampled_wasserstein

from .alignment_card import alignment_card
from .alignment_data import SourceCells, cell_names, project, run_options
from .config import write_json, write_run_record
from .figures import plot_criteria
from .model_directory import write_model_directory

NOT_ALIGNED = "none"
N_RESAMPLES = 10
MATCHABILITY_FILE = "matchability.parquet"


def write_report(
    model: Any,
    extractor: Any,
    cells: Mapping[str, SourceCells],
    found: Mapping[tuple[str, str], Mapping[str, Alignment]],
    seconds: Mapping[tuple[str, str], Mapping[str, float]],
    config: Any,
    fingerprint: str,
    output: Path,
) -> None:
    """Measures, prints, and writes `model/`, `matchability.parquet`, `report.json` and `run.json` into a new folder."""
    rows = [
        {"source": source, "target": target, **row}
        for (source, target), alignments in found.items()
        for row in measure(cells[source], cells[target], alignments, seconds[source, target], config)
    ]
    scores = pd.concat(
        [
            matchability_of_all(extractor, cells[source], cells[target], alignments[config.method[0]], config)
            for (source, target), alignments in found.items()
        ]
    )
    report = {
        "method": config.method[0],
        "methods": rows,
        "facts": {
            f"{source} -> {target}": {name: a.facts for name, a in alignments.items()}
            for (source, target), alignments in found.items()
        },
        "matchability": matchability_by_class(scores),
        "n_components": extractor.n_components,
        "n_cells": {name: {"train": len(c.train_nd), "held_out": len(c.held_out_nd)} for name, c in cells.items()},
        "data": fingerprint,
    }
    output.mkdir(parents=True)
    scores.to_parquet(output / MATCHABILITY_FILE, index=False)
    criteria = {
        f"{source} -> {target}": alignments[config.method[0]].facts["criteria"]
        for (source, target), alignments in found.items()
        if config.method[0] == "adversarial"
    }
    figures: dict[str, Path] = {}
    if criteria:
        # The other methods are computed, not trained.
        figures["criterion.png"] = output / "criterion.png"
        save_figure(plot_criteria(criteria), figures["criterion.png"])
    card = alignment_card(report, config, [*figures])
    write_model_directory(model, extractor, output / "model", card=card, report=report, files=figures)
    write_json(output / "report.json", report)
    write_run_record(output / "run.json", config, data=fingerprint, pretraining=asdict(run_options(config)))
    print(format_methods(rows))


def measure(
    source: SourceCells,
    target: SourceCells,
    alignments: Mapping[str, Alignment],
    seconds: Mapping[str, float],
    config: Any,
) -> list[dict[str, Any]]:
    """A row a method, after one for the components as they come: figures of the held-out cells.

    criterion       mean cosine of CSLS-matched cells
    wasserstein     order 2, of mapped source cells to target cells, in units of the target's root mean square length
    f1_to_target    macro F1 of classes carried from the source's training cells to target cells; likewise f1_to_source
    matchability    mean of source cells and of target cells
    """
    x, y = source.held_out_nd, target.held_out_nd
    length = float(y.square().sum(dim=1).mean().sqrt())
    rows = []
    spread = (target.train_nd.square().mean() / source.train_nd.square().mean()).sqrt()
    identity = torch.eye(x.shape[1], device=x.device) * spread
    maps = {NOT_ALIGNED: identity, **{name: a.forward_dd for name, a in alignments.items()}}
    for name, w in maps.items():
        mapped, mapped_train = x @ w.T, source.train_nd @ w.T
        distances = resampled_wasserstein(
            (mapped / length).cpu().numpy(), (y / length).cpu().numpy(), n_resamples=N_RESAMPLES, seed=config.seed
        )
        scores = Matchability.fit(mapped_train, target.train_nd, seed=config.seed)
        row: dict[str, Any] = {
            "method": name,
            "criterion": mean_matched_cosine(mapped, y, config.neighbours),
            "wasserstein": float(distances.mean()),
            "wasserstein_sd": float(distances.std(ddof=1)),
            "matchability_source": float(scores.of_source(mapped).mean()),
            "matchability_target": float(scores.of_target(y).mean()),
            "seconds": seconds.get(name, 0.0),
        }
        if source.held_out_classes is not None and target.held_out_classes is not None:
            sides = {
                "f1_to_target": (mapped_train, source.train_classes, y, target.held_out_classes),
                "f1_to_source": (target.train_nd, target.train_classes, mapped, source.held_out_classes),
            }
            for key, (reference, labels, query, truth) in sides.items():
                row[key] = _macro_f1(reference, labels, query, truth, config.seed)
        rows.append(row)
    return rows


def _macro_f1(
    reference: torch.Tensor, labels: np.ndarray | None, query: torch.Tensor, truth: np.ndarray, seed: int
) -> float:
    """Not a number where the sources share no class."""
    assert labels is not None
    if not len(np.intersect1d(labels, truth)):
        return float("nan")
    figures = label_transfer(reference.cpu().numpy(), labels, query.cpu().numpy(), truth, seed=seed)
    return figures["macro_f1"]


def matchability_of_all(
    extractor: Any, source: SourceCells, target: SourceCells, alignment: Alignment, config: Any
) -> pd.DataFrame:
    """Score of every used cell of both sources, a block at a time: source, target, cell, score, class.

    source and target are the cell's own source and the one it is matched with.
    """
    scores = Matchability.fit(source.train_nd @ alignment.forward_dd.T, target.train_nd, seed=config.seed)
    tables = []
    sides = [
        (source, target, lambda x: scores.of_source(x @ alignment.forward_dd.T)),
        (target, source, scores.of_target),
    ]
    for own, other, score in sides:
        names, used = cell_names(own.source)
        blocks = project(own.source, extractor, used, own.train_nd.device, progress=True)
        found = [score(torch.from_numpy(block).to(own.train_nd.device)).float().cpu().numpy() for block in blocks]
        facts = {"source": own.source.name, "target": other.source.name, "cell": names}
        classes = None if own.all_classes is None else own.all_classes[used]
        tables.append(pd.DataFrame({**facts, "score": np.concatenate(found), "class": classes}))
    return pd.concat(tables)


def matchability_by_class(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Cells, median and lower quartile of each class of each source, the least matchable class first."""
    keys = ["source", "target", "class"]
    grouped = scores.fillna({"class": "all"}).groupby(keys, sort=False)["score"]
    table = grouped.agg(n="size", median="median", lower_quartile=lambda s: s.quantile(0.25)).reset_index()
    return table.sort_values(["source", "median"]).to_dict("records")  # type: ignore[return-value]


def format_methods(rows: list[dict[str, Any]]) -> str:
    """The table of methods as Markdown."""
    with_classes = any("f1_to_target" in row for row in rows)
    head = ["map", "method", "criterion", "Wasserstein", "matchability", "s"]
    head += ["F1 to target", "F1 to source"] if with_classes else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        figures = [
            f"{row['source']} -> {row['target']}",
            row["method"],
            f"{row['criterion']:.3f}",
            f"{row['wasserstein']:.3f} ± {row['wasserstein_sd']:.3f}",
            f"{row['matchability_source']:.2f} / {row['matchability_target']:.2f}",
            f"{row['seconds']:.1f}",
        ]
        figures += [f"{row[key]:.3f}" for key in ("f1_to_target", "f1_to_source") if with_classes]
        lines.append("| " + " | ".join(figures) + " |")
    return "\n".join(lines)
