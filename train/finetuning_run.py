"""One split: train, test, measure beside baselines, write the model directory. What is done is not done again."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from cellglot.metrics.baselines import BASELINES, baseline_scores
from cellglot.metrics.classification import classification_metrics

from .batches import EpochPlan
from .checkpoint import remove_partial
from .classifier import load_classifier, plain_model
from .config import write_atomically
from .finetuning_data import UNLABELLED
from .finetuning_tasks import Task
from .loop import check_same_options, mean_loss, train
from .splits import Split


@dataclass
class SplitResult:
    """What came of one split.

    predictions  one row a tested item: item, name, n_cells (genes), probabilities LABEL:CLASS
    metrics      label -> "this model" and baselines -> figures of `classification_metrics`
    facts        numbers of items, steps, seconds
    """

    name: str
    folder: Path
    predictions: pd.DataFrame
    metrics: dict[str, dict[str, Any]]
    facts: dict[str, Any]


def train_and_test(
    config: Any, task: Task, tokenizer: Any, split: Split, accelerator: Any, *, name: str = ""
) -> SplitResult:
    """Trains on one part, tests on another. On a resumed run, a split that was finished is read from disk."""
    folder = Path(config.output)
    record, table = folder / "result.json", folder / "test_predictions.csv"
    if config.resume and record.exists():
        content = json.loads(record.read_text())
        check_same_options(record, content["config"], config)
        return SplitResult(name, folder, pd.read_csv(table), content["metrics"], content["facts"])
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder / "checkpoints")
    accelerator.wait_for_everyone()
    model, result = train_classifier(config, task, tokenizer, split, accelerator)
    predictions = predict(model, task, tokenizer, split.test, accelerator, max_tokens=config.max_tokens)
    predictions = predictions.assign(name=task.items[predictions["item"]]) if len(predictions) else predictions
    facts = {
        "n_train": int(split.train.sum()),
        "n_validation": int(split.validation.sum()),
        "n_test": int(split.test.sum()),
        "steps": result.step,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 1),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        **{key: round(value, 6) for key, value in result.metrics.items()},
    }
    metrics: dict[str, dict[str, Any]] = {}
    if accelerator.is_main_process:
        metrics = measure(task, predictions, config.seed)
        if config.baselines and len(predictions):
            _add_baselines(metrics, task, tokenizer, split, predictions, config)
        from .finetuning_report import write_split

        write_split(model, tokenizer, task, config, SplitResult(name, folder, predictions, metrics, facts))
        partial = table.with_suffix(".tmp")
        predictions.to_csv(partial, index=False)
        partial.replace(table)
        write_atomically(
            record,
            json.dumps({"metrics": metrics, "facts": facts, "config": dataclasses.asdict(config)}, indent=2) + "\n",
        )
    accelerator.free_memory()
    return SplitResult(name, folder, predictions, metrics, facts)


def train_classifier(config: Any, task: Task, tokenizer: Any, split: Split, accelerator: Any) -> tuple[Any, Any]:
    """(trained plain model, TrainingResult)"""
    examples, lengths = task.examples(split.train)
    collate = task.collator(tokenizer.pad_token_id, split.train, config.class_weights)
    validation, validation_lengths = task.examples(split.validation)

    def validate(model: torch.nn.Module) -> dict[str, float]:
        loss = mean_loss(model, validation, validation_lengths, collate, accelerator, max_tokens=config.max_tokens)
        return {"validation_loss": loss}

    facts = {
        "n_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "n_train": int(split.train.sum()),
        "n_validation": int(split.validation.sum()),
        "n_test": int(split.test.sum()),
    }
    model = load_classifier(config, task)
    result = train(
        model,
        examples,
        lengths,
        collate,
        config,
        accelerator,
        validate=validate if split.validation.any() else None,
        facts=facts,
    )
    return plain_model(accelerator.unwrap_model(model), config, task).to(accelerator.device).eval(), result


@torch.no_grad()
def predict(
    model: Any, task: Task, tokenizer: Any, items: np.ndarray, accelerator: Any, *, max_tokens: int
) -> pd.DataFrame:
    """Probabilities of the marked items (see `Task.join`), each process predicting its share. None marked: empty."""
    if not items.any():
        return pd.DataFrame()
    examples, lengths = task.examples(items)
    collate = task.collator(tokenizer.pad_token_id, None, "none")
    plan = EpochPlan(
        lengths, batch_size=256, max_tokens=max_tokens, n_processes=accelerator.num_processes, shuffle=False
    )
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for i in tqdm(range(len(plan)), desc="predict", unit="batch", disable=not accelerator.is_main_process):
        for micro in plan.step(i)[accelerator.process_index]:
            if micro.counts:
                index = list(micro.examples)
                batch = {k: v.to(accelerator.device) for k, v in collate(examples[index], [()] * len(index)).items()}
                with accelerator.autocast():
                    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                found.append(task.predicted(batch, logits, np.array(index)))
    if accelerator.num_processes > 1:
        found = gather_object(found)
    keys, scores = (np.concatenate(part) for part in zip(*found, strict=True))
    return task.join(items, keys, scores)


def measure(task: Task, predictions: pd.DataFrame, seed: int) -> dict[str, dict[str, Any]]:
    """label -> {"this model": figures}, over the predicted items whose label is known."""
    out: dict[str, dict[str, Any]] = {}
    for label, classes in task.classes.items() if len(predictions) else ():
        truth = task.labels(label)[predictions["item"]]
        known = truth != UNLABELLED
        scores = predictions[[f"{label}:{name}" for name in classes]].to_numpy()
        out[label] = {"this model": classification_metrics(truth[known], scores[known], classes, seed=seed)}
    return out


def _add_baselines(
    metrics: dict[str, dict[str, Any]], task: Task, tokenizer: Any, split: Split, predictions: pd.DataFrame, config: Any
) -> None:
    """Adds to `metrics` what baselines make of the same split, over the same items."""
    train = split.train | split.validation
    test = np.zeros_like(split.test)
    test[predictions["item"]] = True
    options = {"layer": config.layer, "gene_ids": config.gene_ids}
    features = task.baseline_features(tokenizer, train, test, options)
    for label, classes in task.classes.items():
        names = task.labels(label)
        known_train, known_test = (names[mask] != UNLABELLED for mask in (train, test))
        for name in tqdm(BASELINES, desc=f"baselines for {label}", leave=False):
            if features is None and name != "majority":
                continue
            x_train, x_test = (
                features if features is not None else (np.zeros((train.sum(), 1)), np.zeros((test.sum(), 1)))
            )
            scores = baseline_scores(
                name,
                x_train[known_train],
                names[train][known_train],
                x_test[known_test],
                classes,
                seed=config.seed,
            )
            metrics[label][name] = classification_metrics(names[test][known_test], scores, classes, seed=config.seed)
