"""One split: train, test, measure beside baselines, write the model directory. What is done is not done again."""

import dataclasses
import hashlib
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
from .config import write_json
from .finetuning_tasks import MAX_BASELINE_CELLS, Task
from .loop import RunError, check_same_options, mean_loss, train
from .splits import UNLABELLED, Split
from .step_batches import on_device


@dataclass
class SplitResult:
    """What came of one split.

    predictions  one row a tested item: item, name, n_cells (genes), probabilities LABEL:CLASS; on the main process
    metrics      label -> "this model" and baselines -> figures of `classification_metrics`
    facts        numbers of items, steps, seconds
    """

    folder: Path
    predictions: pd.DataFrame
    metrics: dict[str, dict[str, Any]]
    facts: dict[str, Any]

    def save(self, config: Any) -> None:
        """Writes `result.json`; from then on the split counts as done."""
        record = {"metrics": self.metrics, "facts": self.facts, "config": dataclasses.asdict(config)}
        write_json(self.folder / "result.json", record)


def train_and_test(config: Any, task: Task, tokenizer: Any, split: Split, accelerator: Any) -> SplitResult:
    """Trains on one part, tests on another, writes the model. A split that was done is read from disk on a resumed run.

    Raises  RunError if what is there is of other options, items or labels
    """
    from .finetuning_report import write_split

    folder = Path(config.output)
    record, table = folder / "result.json", folder / "test_predictions.csv"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder / "checkpoints")
        _claim(folder, task, split, config)
    accelerator.wait_for_everyone()
    if config.resume and record.exists():
        content = json.loads(record.read_text())
        check_same_options(record, content["config"], config)
        # A name may look like a number, or like a missing value.
        known = {"dtype": {"name": str}, "keep_default_na": False, "na_values": {"n_cells": [""]}}
        predictions = pd.read_csv(table, **known) if table.exists() else pd.DataFrame()  # type: ignore[arg-type]
        return SplitResult(folder, predictions, content["metrics"], content["facts"])
    model, result = train_classifier(config, task, tokenizer, split, accelerator)
    predictions = predict(model, task, tokenizer, split.test, accelerator, max_tokens=config.max_tokens)
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
    out = SplitResult(folder, predictions, {}, facts)
    if accelerator.is_main_process:
        out.metrics = measure(task, predictions, config.seed)
        write_split(model, tokenizer, task, config, out)
        if len(predictions):
            partial = table.with_suffix(".tmp")
            predictions.to_csv(partial, index=False)
            partial.replace(table)
        out.save(config)
    accelerator.free_memory()
    return out


def _claim(folder: Path, task: Task, split: Split, config: Any) -> None:
    """Writes which items and labels this split is of, or compares them with those of the run that is resumed."""
    digest = hashlib.sha256("\n".join(task.items).encode())
    for name in task.classes:
        digest.update("\n".join([name, *task.labels(name)]).encode())
    for mask in (split.train, split.validation, split.test):
        digest.update(np.packbits(mask).tobytes())
    path, found = folder / "split.json", {"items_labels_and_split": digest.hexdigest()}
    if config.resume and path.exists() and json.loads(path.read_text()) != found:
        raise RunError(
            f"{folder} belongs to a run on other items, labels or splits: the data or the table of genes have changed. "
            "Pass --overwrite, or another --output."
        )
    write_json(path, found)


def train_classifier(config: Any, task: Task, tokenizer: Any, split: Split, accelerator: Any) -> tuple[Any, Any]:
    """(trained plain model, TrainingResult)"""
    examples, lengths = task.examples(split.train)
    collate = task.collator(split.train, config.class_weights)
    validation, validation_lengths = task.examples(split.validation)

    def validate(model: torch.nn.Module) -> dict[str, float]:
        loss = mean_loss(
            model,
            validation,
            validation_lengths,
            collate,
            accelerator,
            max_tokens=config.max_tokens,
            packed=True,
        )
        return {"validation_loss": loss}

    facts = {
        "n_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "torch_threads": torch.get_num_threads(),
        "n_train": int(split.train.sum()),
        "n_validation": int(split.validation.sum()),
        "n_test": int(split.test.sum()),
    }
    model = task.load_model(config)
    result = train(
        model,
        examples,
        lengths,
        collate,
        config,
        accelerator,
        validate=validate if split.validation.any() else None,
        facts=facts,
        packed=True,
    )
    return task.plain_model(accelerator.unwrap_model(model), config).to(accelerator.device).eval(), result


@torch.no_grad()
def predict(
    model: Any, task: Task, tokenizer: Any, items: np.ndarray, accelerator: Any, *, max_tokens: int
) -> pd.DataFrame:
    """Probabilities of the marked items (see `Task.join`), each process predicting its share. None marked: empty."""
    if not items.any():
        return pd.DataFrame()
    examples, lengths = task.examples(items)
    collate = task.collator(None, "none")
    plan = EpochPlan(
        lengths,
        batch_size=256,
        max_tokens=max_tokens,
        packed=True,
        n_processes=accelerator.num_processes,
        shuffle=False,
    )
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for i in tqdm(range(len(plan)), desc="predict", unit="batch", disable=not accelerator.is_main_process):
        for micro in plan.step(i)[accelerator.process_index]:
            if micro.counts:
                index = list(micro.examples)
                batch = on_device(collate(examples[index], [()] * len(index)), accelerator.device)
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                with accelerator.autocast():
                    logits = model(**inputs).logits
                found.append(task.predicted(batch, logits, np.array(index)))
        # Genes come back in every batch: their sums are all that needs to be kept.
        found = [task.merge(found)] if found else []
    if accelerator.num_processes > 1:
        found = gather_object(found)
    predictions = task.join(items, *task.merge(found))
    return predictions.assign(name=task.items[predictions["item"]])


def measure(task: Task, predictions: pd.DataFrame, seed: int) -> dict[str, dict[str, Any]]:
    """label -> {"this model": figures}, over the predicted items whose label is known."""
    out: dict[str, dict[str, Any]] = {}
    for label, classes in task.classes.items() if len(predictions) else ():
        truth = task.labels(label)[predictions["item"]]
        known = truth != UNLABELLED
        scores = predictions[[f"{label}:{name}" for name in classes]].to_numpy()
        out[label] = {"this model": classification_metrics(truth[known], scores[known], classes, seed=seed)}
    return out


def add_baselines(result: SplitResult, task: Task, tokenizer: Any, split: Split, config: Any) -> None:
    """Adds to the metrics of a split, and to its model's card, what baselines make of the same items."""
    from .finetuning_report import write_card

    wanted = BASELINES if config.baselines else BASELINES[:1]
    if not result.metrics or all(name in models for models in result.metrics.values() for name in wanted):
        return
    rng = np.random.default_rng(config.seed)
    train = split.train | split.validation
    if not task.per_gene and train.sum() > MAX_BASELINE_CELLS:
        train = np.isin(np.arange(len(train)), rng.permutation(np.flatnonzero(train))[:MAX_BASELINE_CELLS])
    test = np.zeros_like(split.test)
    test[result.predictions["item"]] = True
    features = None
    if config.baselines:
        features = task.baseline_features(tokenizer, train, test, {"layer": config.layer, "gene_ids": config.gene_ids})
    x_train, x_test = features or (np.zeros((train.sum(), 1)), np.zeros((test.sum(), 1)))
    for label, classes in task.classes.items():
        names = task.labels(label)
        known_train, known_test = (names[mask] != UNLABELLED for mask in (train, test))
        for name in tqdm(wanted, desc=f"baselines for {label}", leave=False):
            if features is None and name != "majority":
                continue
            scores = baseline_scores(
                name,
                x_train[known_train],
                names[train][known_train],
                x_test[known_test],
                classes,
                seed=config.seed,
                n_jobs=config.cpu_threads,
            )
            result.metrics[label][name] = classification_metrics(
                names[test][known_test], scores, classes, seed=config.seed
            )
    result.save(dataclasses.replace(config, output=str(result.folder)))
    write_card(task, config, result)
