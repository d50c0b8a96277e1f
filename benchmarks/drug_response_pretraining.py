"""Table 1's form: what pre-training learns of L1000 profiles that it has not seen, beside the simplest guesses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from drug_response_data import Task
from drug_response_models import condition_labels, pretrained

from cellglot.drug_response.data import ResponseData
from cellglot.tokenization.expression_features import ExpressionFeatureExtractor

TASKS = ("mask", "cell_line", "drug", "dose")
EPOCHS = 40
VALIDATION_SHARE = 0.1
# The paper's; encoders to fine-tune are of the first.
MASK_RATIOS = (0.15, 0.8)
# Shrinkage of the covariance of genes to its diagonal
SHRINKAGE = 0.1
Encoder = tuple[dict[str, torch.Tensor], ExpressionFeatureExtractor]


def pretraining(
    task: Task, seed: int, ratios: Sequence[float] = MASK_RATIOS
) -> tuple[dict[str, dict[str, float]], dict[str, Encoder]]:
    """(row -> figure -> value, encoders "subset" and "whole" to fine-tune)."""
    subset, whole = task.unlabelled["subset"], task.unlabelled["whole"]
    rng = np.random.default_rng(seed)
    held_out = [rng.random(len(part)) < VALIDATION_SHARE for part in subset]
    extra = [np.zeros(len(part), dtype=bool) for part in whole[len(subset) :]]
    extractor = ExpressionFeatureExtractor.fit(task.train, scaling="center", drug_encoder="fingerprint")
    extractor.drugs = sorted({drug for part in subset for drug in part.drugs})
    extractor.cell_lines = sorted({str(line) for part in subset for line in part.cell_line})
    known = [part.select(~out) for part, out in zip(subset, held_out, strict=True)]
    tested = [part.select(out) for part, out in zip(subset, held_out, strict=True)]
    rows: dict[str, dict[str, float]] = {}
    encoders: dict[str, Encoder] = {}

    def add(name: str, ratio: float, tasks: Sequence[str], parts: Any, out: Any, start: Any = None) -> Any:
        settings = {"mask_ratio": ratio, "tasks": tasks, "start": start, "epochs": EPOCHS, "seed": seed}
        model, seconds = pretrained(parts, out, extractor, **settings)
        rows[name] = {**figures(model, tested, extractor, ratio, seed), "seconds_per_epoch": seconds}
        return model.model.state_dict()

    for ratio in ratios:
        percent = f"{ratio:.0%}"
        rows |= guesses(known, tested, extractor, ratio, seed)
        one_task = add(f"one task, {percent}, subset", ratio, ("mask",), subset, held_out)
        four_tasks = add(f"four tasks, {percent}, subset", ratio, TASKS, subset, held_out, one_task)
        of_all = add(f"one task, {percent}, whole", ratio, ("mask",), whole, [*held_out, *extra])
        if ratio == MASK_RATIOS[0]:
            encoders = {"subset": (four_tasks, extractor), "whole": (of_all, extractor)}
    return rows, encoders


def masks(n: int, n_genes: int, ratio: float, seed: int) -> np.ndarray:
    """(n, g) bool, the same for every row of the table."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((n, n_genes)), axis=1) < max(round(ratio * n_genes), 1)


def figures(
    model: Any, tested: Sequence[ResponseData], extractor: ExpressionFeatureExtractor, ratio: float, seed: int
) -> dict[str, float]:
    """mask_rmse on the scale of the data (log2), and of four tasks cell_line_accuracy, drug_accuracy, dose_rmse."""
    expression = np.concatenate([extractor(part)["expression"] for part in tested])
    hidden = masks(len(expression), expression.shape[1], ratio, seed)
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(expression), masked=torch.from_numpy(hidden))
    error = (output.reconstructions.numpy() - expression) * np.array(extractor.spread, dtype=np.float32)
    found = {"mask_rmse": float(np.sqrt(np.mean(error[hidden] ** 2)))}
    labels = joined_labels(tested, extractor)
    for name, logits in (("cell_line", output.cell_line_logits), ("drug", output.drug_logits)):
        if logits is not None:
            asked = labels[name] >= 0
            found[f"{name}_accuracy"] = float((logits.numpy().argmax(axis=1) == labels[name])[asked].mean())
    if output.doses is not None:
        asked = np.isfinite(labels["dose"])
        found["dose_rmse"] = float(np.sqrt(np.mean((output.doses.numpy() - labels["dose"])[asked] ** 2)))
    return found


def joined_labels(parts: Sequence[ResponseData], extractor: ExpressionFeatureExtractor) -> dict[str, np.ndarray]:
    labels = [condition_labels(part, extractor) for part in parts]
    return {name: np.concatenate([one[name] for one in labels]) for name in labels[0]}


def guesses(
    known: Sequence[ResponseData],
    tested: Sequence[ResponseData],
    extractor: ExpressionFeatureExtractor,
    ratio: float,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Rows of the simplest: mean of the training profiles, most frequent line and drug, mean dose.

    And the hidden genes' mean given the visible ones, of a Gaussian with the training profiles' shrunk covariance.
    """
    train, test = (np.concatenate([extractor(part)["expression"] for part in parts]) for parts in (known, tested))
    spread = np.array(extractor.spread, dtype=np.float32)
    mean = train.mean(axis=0)
    covariance = np.cov(train, rowvar=False)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.diag(np.diag(covariance))
    hidden = masks(len(test), test.shape[1], ratio, seed)
    by_mean, by_gaussian = [], []
    for profile, out in zip(test - mean, hidden, strict=True):
        guess = covariance[np.ix_(out, ~out)] @ np.linalg.solve(covariance[np.ix_(~out, ~out)], profile[~out])
        by_mean.append((profile[out] * spread[out]) ** 2)
        by_gaussian.append(((guess - profile[out]) * spread[out]) ** 2)
    before, after = joined_labels(known, extractor), joined_labels(tested, extractor)
    simplest = {"mask_rmse": float(np.sqrt(np.mean(np.concatenate(by_mean))))}
    for name in ("cell_line", "drug"):
        asked, most = after[name] >= 0, np.bincount(before[name][before[name] >= 0]).argmax()
        simplest[f"{name}_accuracy"] = float((after[name][asked] == most).mean())
    asked = np.isfinite(after["dose"])
    simplest["dose_rmse"] = float(np.sqrt(np.mean((after["dose"][asked] - np.nanmean(before["dose"])) ** 2)))
    percent = f"{ratio:.0%}"
    gaussian = {"mask_rmse": float(np.sqrt(np.mean(np.concatenate(by_gaussian))))}
    return {f"mean, most frequent, {percent}": simplest, f"Gaussian, {percent}": gaussian}
