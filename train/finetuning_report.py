"""What a fine-tuning run leaves to read: metrics, predictions, figures, and a card that says what it is worth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cellglot.figures import save_figure
from cellglot.metrics.classification import confusion_table

from .config import write_atomically, write_json
from .figures import plot_confusion, plot_loss_curve, plot_roc
from .finetuning_run import SplitResult, measure
from .finetuning_tasks import Task
from .metrics_log import read_metrics
from .model_directory import write_model_directory
from .splits import UNLABELLED

SUMMARIZED = ("accuracy", "macro_f1", "macro_auroc")


def write_split(model: Any, tokenizer: Any, task: Task, config: Any, result: SplitResult) -> None:
    """Figures and `model/` of one split."""
    figures = draw(task, [result], result.folder)
    log = read_metrics(result.folder / "metrics.jsonl")
    if any("loss" in line for line in log):
        figures["loss_curve.png"] = result.folder / "loss_curve.png"
        ax = plot_loss_curve(log)
        ax.set(title="Fine-tuning", ylabel="cross-entropy (nats)")
        save_figure(ax, figures["loss_curve.png"])
    report = {"metrics": result.metrics, **result.facts}
    card = task.card(config, result, [*figures])
    write_model_directory(model, tokenizer, result.folder / "model", card=card, report=report, files=figures)


def write_card(task: Task, config: Any, result: SplitResult) -> None:
    """Writes the card and the figures of a split's model anew, after baselines were added to them."""
    folder = result.folder / "model"
    pictures = sorted(path.name for path in folder.glob("*.png"))
    write_atomically(folder / "README.md", task.card(config, result, pictures))
    write_json(folder / "metrics.json", {"metrics": result.metrics, **result.facts})


def report_run(results: Sequence[SplitResult], task: Task, config: Any, output: Path) -> dict[str, Any]:
    """Writes `metrics.json`, `predictions.csv` and the figures over all folds; prints the table."""
    report: dict[str, Any] = {
        "labels": {name: list(classes) for name, classes in task.classes.items()},
        "summary": summary(results),
        "splits": [{"name": r.folder.name, **r.facts, "metrics": r.metrics} for r in results],
    }
    predictions = predictions_table(results, task)
    if len(predictions):
        partial = output / "predictions.csv.tmp"
        predictions.to_csv(partial, index=False)
        partial.replace(output / "predictions.csv")
    if len(results) > 1:
        draw(task, results, output)
        # Every item is tested once: the pooled figures have no spread, but an interval over items.
        pooled = pd.concat([r.predictions for r in results])
        report["pooled"] = measure(task, pooled, config.seed)
    write_json(output / "metrics.json", report)
    print(format_report(report, results, output))
    return report


def summary(results: Sequence[SplitResult]) -> dict[str, dict[str, dict[str, Any]]]:
    """label -> model or baseline -> mean and standard deviation over the splits of accuracy, macro F1, macro AUROC.

    Also n: items with that label over all splits. An AUROC is that of the splits in which it is defined.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for label in results[0].metrics:
        out[label] = {}
        for model in results[0].metrics[label]:
            figures = [r.metrics[label][model] for r in results]
            row: dict[str, Any] = {"n": sum(f["n"] for f in figures)}
            for key in SUMMARIZED:
                # As read back from JSON, what is undefined is None.
                values = np.array([np.nan if f[key] is None else f[key] for f in figures])
                values = values[~np.isnan(values)]
                row[key] = float(values.mean()) if len(values) else None
                row[f"{key}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else None
            out[label][model] = row
    return out


def predictions_table(results: Sequence[SplitResult], task: Task) -> pd.DataFrame:
    """One row a tested item: name, fold; for each label the truth, the prediction, and all probabilities."""
    tables = []
    for i, result in enumerate(results):
        if not len(result.predictions):
            continue
        table = pd.DataFrame({"name": result.predictions["name"], "fold": i})
        if "n_cells" in result.predictions:
            table["n_cells"] = result.predictions["n_cells"]
        for label, classes in task.classes.items():
            scores = result.predictions[[f"{label}:{name}" for name in classes]]
            table[label] = task.labels(label)[result.predictions["item"]]
            table[f"{label}_predicted"] = np.asarray(classes)[scores.to_numpy().argmax(axis=1)]
            table[f"{label}_score"] = scores.max(axis=1)
            table = pd.concat([table, scores], axis=1)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def draw(task: Task, results: Sequence[SplitResult], folder: Path) -> dict[str, Path]:
    """Confusion matrix and ROC curves of each label, over all the splits given; name -> file."""
    figures: dict[str, Path] = {}
    if not any(len(r.predictions) for r in results):
        return figures
    for label, classes in task.classes.items():
        suffix = f"_{_file_name(label)}" if len(task.classes) > 1 else ""
        truths, scores = [], []
        for result in results:
            truth = task.labels(label)[result.predictions["item"]]
            known = truth != UNLABELLED
            truths.append(truth[known])
            scores.append(result.predictions[[f"{label}:{name}" for name in classes]].to_numpy()[known])
        predicted = np.asarray(classes)[np.concatenate(scores).argmax(axis=1)]
        table = confusion_table(np.concatenate(truths), predicted, classes)
        for name, ax in (
            (f"confusion_matrix{suffix}.png", plot_confusion(table, title=label)),
            (f"roc{suffix}.png", plot_roc(truths, scores, classes, title=label)),
        ):
            figures[name] = folder / name
            save_figure(ax, figures[name])
    return figures


def format_report(report: dict[str, Any], results: Sequence[SplitResult], output: Path) -> str:
    """The report as people read it in a terminal."""
    facts = report["splits"][0]
    several = len(results) > 1
    lines = ["", f"{facts['n_parameters'] / 1e6:.2f}M parameters, {sum(s['steps'] for s in report['splits']):,} steps"]
    for label, models in report["summary"].items():
        n = models["this model"]["n"]
        what = "genes" if task_is_of_genes(results) else "cells"
        head = f"{label}, mean and sd over {len(results)} folds" if several else f"{label} of {n:,} held-out {what}"
        lines += ["", f"{head:<46}accuracy         macro F1         AUROC"]
        for model, row in models.items():
            cells = []
            for key in SUMMARIZED:
                spread = f" ± {row[f'{key}_sd']:.3f}" if several and row[f"{key}_sd"] is not None else ""
                cells.append(("-" if row[key] is None else f"{row[key]:.3f}{spread}").ljust(17))
            lines.append(f"  {model:<44}" + "".join(cells).rstrip())
    lines += ["", f"model: {'one in each ' + str(output / 'fold-*') if several else output / 'model'}"]
    figures = ", ".join(path.name for path in sorted(output.glob("*.png")))
    return "\n".join([*lines, *([f"figures: {figures} in {output}"] if figures else [])])


def task_is_of_genes(results: Sequence[SplitResult]) -> bool:
    """Whether the tested items are genes."""
    return "n_cells" in results[0].predictions


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in label)
