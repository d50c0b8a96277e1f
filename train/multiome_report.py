"""What a multiome model is worth: its predictions of held-out cells beside the frequency of each feature.

The threshold from which on a feature is predicted is chosen on every other held-out cell, of model and baseline alike,
and the figures are of the rest.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import logit
from tqdm.auto import tqdm

from cellglot.figures import save_figure
from cellglot.tokenization.binarized_string import TASKS

from .config import write_json
from .figures import plot_loss_curve
from .loop import TrainingResult
from .metrics_log import read_metrics
from .model_directory import write_model_directory
from .multiome_card import FIGURES, multiome_card
from .multiome_data import MultiomeData, feature_means, rows_of_task

# (cells x features) of a modality that are dense at once: 64 MiB of float32
SCORES_AT_ONCE = 2**24
CELLS_AT_ONCE = 64
# Logits are counted in bins of 0.002: probabilities from 1e-7 on are told apart.
HIGHEST_LOGIT, BINS = 16.0, 16_000


class ScoreHistogram:
    """Logits of (cell, feature) pairs, of all and of those where the feature is there, counted in bins."""

    def __init__(self) -> None:
        self.present, self.every = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)

    def add(self, logits: np.ndarray, present: np.ndarray) -> None:
        """Counts pairs: logits and bool of the same shape."""
        bins = ((np.clip(logits, -HIGHEST_LOGIT, HIGHEST_LOGIT) / HIGHEST_LOGIT + 1) / 2 * BINS).astype(np.int64)
        bins = np.minimum(bins, BINS - 1)
        self.every += np.bincount(bins.ravel(), minlength=BINS)
        self.present += np.bincount(bins[present], minlength=BINS)

    def curve(self) -> dict[str, np.ndarray]:
        """precision, recall and f1 where all features from a bin on are predicted, the highest bin first."""
        hits, predicted = np.cumsum(self.present[::-1]), np.cumsum(self.every[::-1])
        n_present = max(self.present.sum(), 1)
        return {
            "precision": hits / np.maximum(predicted, 1),
            "recall": hits / n_present,
            "f1": 2 * hits / np.maximum(predicted + n_present, 1),
        }

    def average_precision(self) -> float:
        """Of all pairs pooled; ties of a bin are one step."""
        curve = self.curve()
        return float((np.diff(curve["recall"], prepend=0) * curve["precision"]).sum())

    def best_step(self) -> int:
        """Where F1 is highest: the middle of the bins that lie between the last pair that is predicted and the next.

        At the last pair itself, others like it would be missed by the least difference.
        """
        best = int(np.argmax(self.curve()["f1"]))
        following = np.flatnonzero(self.every[::-1][best + 1 :])
        return best + int(following[0]) // 2 if len(following) else best


def probability_of_step(step: int) -> float:
    """The least probability that is predicted at a step of a curve."""
    logit = ((BINS - 1 - step) / BINS * 2 - 1) * HIGHEST_LOGIT
    return float(1 / (1 + np.exp(-logit)))


def write_report(
    model: Any, data: MultiomeData, validation: Any, config: Any, result: TrainingResult, output: Path
) -> dict[str, Any]:
    """Measures, draws, prints, and writes `model/` and `report.json`; returns the report."""
    model.eval()
    report: dict[str, Any] = {
        "head": config.head,
        "n_tasks": len(config.tasks),
        "validation_loss": result.metrics["validation_loss"],
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "n_parameters": model.num_parameters(),
        "n_train_rows": len(data.train),
        "n_validation_rows": len(data.validation),
        "n_genes": len(data.processor.feature_extractor.genes),
        "n_peaks": len(data.processor.feature_extractor.peaks),
        "predictions": [],
    }

    def write_model(figures: dict[str, Path]) -> None:
        card = multiome_card(report, data, config, [*figures])
        write_model_directory(model, data.processor, output / "model", card=card, report=report, files=figures)

    # First without predictions, which may fail on odd data: a trained model is never lost to its report.
    write_model({})
    if config.report:
        measure = set_head_figures if config.head == "set" else generation_figures
        for task in config.tasks:
            report["predictions"] += measure(model, data, validation, task, config)
        figure = output / "loss_curve.png"
        save_figure(plot_loss_curve(read_metrics(output / "metrics.jsonl"), ylabel="loss a label"), figure)
        write_model({figure.name: figure})
    write_json(output / "report.json", report)
    print(format_report(report, output))
    return report


def set_head_figures(model: Any, data: MultiomeData, validation: Any, task: str, config: Any) -> list[dict[str, Any]]:
    """Rows of the report for a task, of the frequency baseline and of this model, whose threshold is set."""
    rows = rows_of_task(validation, data.processor, task)
    frequencies, mean_values = feature_means(data.train, data.processor, task)
    histograms = {name: (ScoreHistogram(), ScoreHistogram()) for name in ("frequency", "this model")}
    squares, n_entries = dict.fromkeys(histograms, 0.0), 0
    baseline = logit(np.clip(frequencies, 1e-6, 1 - 1e-6))
    for block, is_measured, present, measured in blocks(rows, data.processor, task):
        collate = data.processor.collator(config.max_source_length)
        batch = collate(block, [(0, n) for n in range(len(block))])
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            found = model(**inputs)
        logits, values = found.logits.float().cpu().numpy(), found.values.float().cpu().numpy()
        for chosen, k in ((~is_measured, 0), (is_measured, 1)):
            histograms["this model"][k].add(logits[chosen], present[chosen])
            histograms["frequency"][k].add(np.broadcast_to(baseline, present.shape)[chosen], present[chosen])
        n_entries += int(is_measured.sum()) * len(baseline)
        for name, guess in (("this model", values), ("frequency", mean_values)):
            squares[name] += float(((guess - measured)[is_measured] ** 2).sum(dtype=np.float64))
    figures = []
    for name, (choosing, measuring) in histograms.items():
        step = choosing.best_step()
        if name == "this model":
            setattr(model.config, f"{task}_threshold", probability_of_step(step))
        figures.append(
            {
                "task": task,
                "guess": name,
                "n_cells": n_entries // len(baseline),
                "average_precision": measuring.average_precision(),
                **{figure: float(values[step]) for figure, values in measuring.curve().items()},
                "rmse": float(np.sqrt(squares[name] / max(n_entries, 1))),
            }
        )
    return figures


def generation_figures(model: Any, data: MultiomeData, validation: Any, task: str, config: Any) -> list[dict[str, Any]]:
    """Rows of the report for a task, of the frequency baseline and of what greedy decoding writes."""
    rows = rows_of_task(validation, data.processor, task)
    modality, processor = TASKS[task][1], data.processor
    frequencies, _ = feature_means(data.train, data.processor, task)
    baseline = logit(np.clip(frequencies, 1e-6, 1 - 1e-6))
    choosing, measuring = ScoreHistogram(), ScoreHistogram()
    # Of the (cell, feature) pairs of the cells that are written out
    counts, n_cells = np.zeros(3, np.int64), 0
    options: dict[str, Any] = {}
    if not processor.has_feature_tokens and (config.encoding != "binned" or task == "gex2atac"):
        options["prefix_allowed_tokens_fn"] = processor.allowed_tokens(task)
    collate = processor.collator(config.max_source_length)
    for block, is_measured, present, _ in blocks(rows, data.processor, task):
        scores = np.broadcast_to(baseline, present.shape)
        choosing.add(scores[~is_measured], present[~is_measured])
        chosen = np.flatnonzero(is_measured)[: max(config.generated_cells - n_cells, 0)]
        if not len(chosen):
            continue
        measuring.add(scores[chosen], present[chosen])
        batch = collate([block[i] for i in chosen], [(0, int(i)) for i in chosen])
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        written = processor.decode_matrix(model.generate(**inputs, **options), modality, unknown="ignore")
        counts += [int(written.multiply(present[chosen]).sum()), written.nnz, int(present[chosen].sum())]
        n_cells += len(chosen)
    step = choosing.best_step()
    of_frequency = {figure: float(values[step]) for figure, values in measuring.curve().items()}
    hits, n_written, n_present = counts.tolist()
    of_model = {
        "precision": hits / max(n_written, 1),
        "recall": hits / max(n_present, 1),
        "f1": 2 * hits / max(n_written + n_present, 1),
    }
    return [
        {"task": task, "guess": name, "n_cells": n_cells, **figures}
        for name, figures in (("frequency", of_frequency), ("this model", of_model))
    ]


def blocks(
    rows: Any, processor: Any, task: str
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray, np.ndarray, np.ndarray]]:
    """Some cells; (cells,) whether figures are of them, which is every other; (cells, features) present, values.

    present  bool
    values   float32 measured values, or zeros where the rows have none
    """
    modality = TASKS[task][1]
    n_features = len(processor.feature_extractor.features(modality))
    size = int(np.clip(SCORES_AT_ONCE // n_features, 1, CELLS_AT_ONCE))
    for start in tqdm(range(0, len(rows), size), desc=f"held-out cells, {task}", unit="block"):
        numbers = np.arange(start, min(start + size, len(rows)))
        block = [rows[int(n)] for n in numbers]
        present = processor.decode_matrix([row["labels"] for row in block], modality).toarray() > 0
        values = np.zeros(present.shape, dtype=np.float32)
        if "values" in block[0]:
            for n, row in enumerate(block):
                values[n, row["value_features"]] = row["values"]
        yield block, numbers % 2 == 0, present, values


def format_report(report: dict[str, Any], output: Path) -> str:
    """The report as people read it in a terminal."""
    lines = [
        "",
        f"{report['n_parameters'] / 1e6:.2f}M parameters, {report['steps']:,} steps, {report['seconds']:.0f} s",
    ]
    lines.append(f"validation loss {report['validation_loss']:.4f}")
    for row in report["predictions"]:
        figures = "  ".join(f"{key} {row[key]:.3f}" for key in FIGURES if key in row)
        lines.append(f"{row['task']}, {row['n_cells']:,} cells, {row['guess']:>10}: {figures}")
    return "\n".join([*lines, f"Model, card and figures: {output / 'model'}"])
