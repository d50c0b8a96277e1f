"""What a drug response model is worth beside the simplest guesses: tables, figures, model directory."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellglot.figures import save_figure

from .config import write_json
from .drug_response_card import generation_card, pretraining_card
from .drug_response_data import MaskedProfiles
from .figures import plot_loss_curve
from .loop import TrainingResult
from .metrics_log import read_metrics
from .model_directory import write_model_directory

# Training profiles that the linear guess is fitted on, and held-out ones that it is made for, at the most
REFERENCE_PROFILES, GUESSED_PROFILES = 2_000, 100
# Share of the mean variance that is added to each gene's: fewer profiles than genes have a singular covariance.
RIDGE = 0.1
# Draw of masks that the errors are of
MASK_SEED = 1_000_003


def write_pretraining_report(
    model: Any, data: Any, validation: MaskedProfiles, config: Any, result: TrainingResult, output: Path
) -> dict[str, Any]:
    """Measures, draws, prints, and writes `model/` and `report.json`; returns the report."""
    report: dict[str, Any] = {
        "validation_loss": result.metrics["validation_loss"],
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "n_parameters": model.num_parameters(),
        "tasks": list(config.tasks),
        "n_genes": model.config.n_genes,
        "n_train": int(data.train.sum()),
        "n_validation": len(validation),
        "figures": [],
    }
    # First without figures, which may fail on odd data: a trained model is never lost to its report.
    card = pretraining_card(report, data.description, data.fingerprint, config, [])
    write_model_directory(model, data.extractor, output / "model", card=card, report=report, files={})
    pictures: dict[str, Path] = {}
    if config.report:
        train = data.examples(data.train, config.tasks, config.mask_ratio)
        report["figures"] = task_figures(model, train, validation, profiles_per_pass=min(config.batch_size, 64))
        pictures["loss_curve.png"] = output / "loss_curve.png"
        ax = plot_loss_curve(read_metrics(output / "metrics.jsonl"), ylabel="sum of the tasks' losses")
        save_figure(ax, pictures["loss_curve.png"])
        card = pretraining_card(report, data.description, data.fingerprint, config, [*pictures])
        write_model_directory(model, data.extractor, output / "model", card=card, report=report, files=pictures)
    write_json(output / "report.json", report)
    print(f"\n{report['n_parameters'] / 1e6:.2f}M parameters, {report['steps']:,} steps, {report['seconds']:.0f} s")
    for row in report["figures"]:
        print(f"  {row['figure']:<44}{row['guess']:<18}{row['value']:.4f}")
    print(f"\nmodel: {output / 'model'}")
    return report


@torch.no_grad()
def task_figures(
    model: Any, train: MaskedProfiles, validation: MaskedProfiles, *, profiles_per_pass: int
) -> list[dict[str, Any]]:
    """Table 1 of the paper on held-out profiles: figure, guess ("this model" or a simple one), value.

    Errors of hidden genes are on the scale of the data; those of doses of log10(uM).
    """
    device = next(model.parameters()).device
    model.eval()
    tasks, predicted, truth, masks = model.config.tasks, {}, {}, []
    for start in range(0, len(validation), profiles_per_pass):
        indices = range(start, min(start + profiles_per_pass, len(validation)))
        batch = validation.collate(validation.__getitems__(indices), [(MASK_SEED, 0, i) for i in indices])
        outputs = model(batch["expression"].to(device), batch["masked"].to(device))
        masks.append(batch["masked"].numpy())
        fields = {"cell_line": "cell_line_logits", "drug": "drug_logits", "dose": "doses", "mask": "reconstructions"}
        for task in tasks:
            predicted.setdefault(task, []).append(getattr(outputs, fields[task]).float().cpu().numpy())
            truth.setdefault(task, []).append(batch["expression" if task == "mask" else task].numpy())
    found = {task: (np.concatenate(predicted[task]), np.concatenate(truth[task])) for task in tasks}
    rows: list[dict[str, Any]] = []

    def add(figure: str, guess: str, value: float) -> None:
        rows.append({"figure": figure, "guess": guess, "value": float(value)})

    if "mask" in found:
        (ours, true), masked = found["mask"], np.concatenate(masks)
        spread = train.extractor.unit()
        scaled = train.read(np.sort(np.random.default_rng(0).permutation(len(train))[:REFERENCE_PROFILES]))
        some = slice(0, GUESSED_PROFILES)
        linear = linear_guess(scaled, true[some], masked[some])
        # All on the same profiles, so that they can be compared
        for guess, values in (("this model", ours[some]), ("mean", scaled.mean(0)), ("linear", linear)):
            errors = ((values - true[some]) * spread)[masked[some]]
            add("RMSE of hidden genes", guess, np.sqrt(np.mean(errors**2)))
    for task, name in (("cell_line", "accuracy of cell lines"), ("drug", "accuracy of drugs")):
        if task in found:
            logits, labels = found[task]
            known, usual = labels != -100, np.bincount(train.labels[task][train.labels[task] != -100]).argmax()
            if known.any():
                add(name, "this model", np.mean(logits.argmax(1)[known] == labels[known]))
                add(name, "most frequent", np.mean(usual == labels[known]))
    if "dose" in found:
        doses, labels = found["dose"]
        known = np.isfinite(labels)
        if known.any():
            add("RMSE of doses, log10(uM)", "this model", np.sqrt(np.mean((doses - labels)[known] ** 2)))
            mean = np.nanmean(train.labels["dose"])
            add("RMSE of doses, log10(uM)", "mean", np.sqrt(np.mean((mean - labels[known]) ** 2)))
    return rows


def linear_guess(reference_ng: np.ndarray, true_ng: np.ndarray, masked_ng: np.ndarray) -> np.ndarray:
    """(n, g) profiles whose hidden genes are their expectation given the visible ones, under a normal distribution.

    reference_ng  training profiles that mean and covariance are of; a ridge is added
    """
    mean = reference_ng.mean(0, dtype=np.float64)
    covariance = np.cov(reference_ng, rowvar=False) if len(reference_ng) > 1 else np.eye(len(mean))
    covariance = covariance + RIDGE * covariance.trace() / len(mean) * np.eye(len(mean))
    out = true_ng.astype(np.float64)
    for row, hidden in zip(out, masked_ng, strict=True):
        shown = ~hidden
        weights = np.linalg.solve(covariance[np.ix_(shown, shown)], row[shown] - mean[shown])
        row[hidden] = mean[hidden] + covariance[np.ix_(hidden, shown)] @ weights
    return out


def write_finetuning_report(
    model: Any,
    extractor: Any,
    report: dict[str, Any],
    config: Any,
    output: Path,
    *,
    description: str,
) -> None:
    """Draws, prints, and writes `model/` and `report.json`.

    report  with `figures`: rows of predictor and its mean figures on the test conditions, none where none were held out
    """
    picture = output / "loss_curve.png"
    ax = plot_loss_curve(read_metrics(output / "metrics.jsonl"), ylabel="mean squared error, scaled")
    save_figure(ax, picture)
    card = generation_card(report, description, config, model.config, [picture.name])
    write_model_directory(model, extractor, output / "model", card=card, report=report, files={picture.name: picture})
    write_json(output / "report.json", report)
    print(f"\n{report['n_parameters'] / 1e6:.2f}M parameters, {report['steps']:,} steps, {report['seconds']:.0f} s")
    if report["figures"]:
        print(f"\n{'on ' + str(report['n_conditions']) + ' conditions held out':<44}Pearson     delta       MSE")
        for row in report["figures"]:
            print(f"  {row['predictor']:<40}{row['mean']:9.4f} {row['delta']:9.4f} {row['mse']:9.4f}")
    print(f"\nmodel: {output / 'model'}")
