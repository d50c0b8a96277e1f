"""What `multiome.py` compares: baselines, and the multiome T5 with either head, on the cells of a split."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from datasets import concatenate_datasets
from multiome_cells import Split

from cellglot.multiome import (
    Cajal,
    Dance,
    Dengkw,
    Frequency,
    ModalityPredictor,
    NearestCells,
    SVDLinear,
    Zeros,
)
from cellglot.tokenization.binarized_string import TASKS
from cellglot.train.loop import close, make_accelerator, mean_loss, train
from cellglot.train.pretrain_multiome import MultiomePretrainConfig, new_model, pair_lengths

BASELINES = ("zeros", "frequency", "nearest cells", "SVD, linear", "Dengkw", "Cajal", "DANCE")
SET_HEAD, T5 = "set head", "T5, greedy"
METHODS = (*BASELINES, SET_HEAD, T5)
# Options of train/pretrain.py, chosen on splits of other seeds of the same cells. All features of a cell are read: how
# many there are says something. Plain cross-entropy keeps the frequencies, which the biases begin with, calibrated.
SMALL = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_heads": 2, "num_layers": 1, "save_every": 10_000}
# Models so small gain nothing from a second thread, and lose much where other processes run.
SMALL["cpu_threads"] = 1
SET_HEAD_TRAINING: dict[str, dict[str, Any]] = {
    "scicar": {"learning_rate": 3e-3, "epochs": 2, "eval_every": 20},
    "bmmc": {"learning_rate": 1e-3, "epochs": 10, "batch_size": 32, "eval_every": 5},
}
for _options in SET_HEAD_TRAINING.values():
    _options |= {**SMALL, "principal_embeddings": True, "gamma_negative": 0.0, "patience": 3}
# Few steps: on sci-CAR each takes a second
T5_TRAINING: dict[str, Any] = {**SMALL, "head": "t5", "learning_rate": 3e-3, "max_steps": 150, "batch_size": 16}
# Test cells that the T5 writes out, a token at a time
GENERATED_CELLS = 32
CELLS_AT_ONCE = 64


@dataclass
class Prediction:
    """What a method says of validation and test cells, of one task.

    scores   part -> (n, f) the higher, the likelier, or None of a method that gives sets only
    values   (test cells, f) log-normalized expression or accessibility, or None
    present  (test cells, f) boolean, of a method that gives sets only
    tested   positions among the test cells that it was asked for, where not all
    """

    scores: dict[str, np.ndarray] | None = None
    values: np.ndarray | None = None
    present: np.ndarray | None = None
    tested: np.ndarray | None = None


def predictions(method: str, split: Split, work: Path) -> dict[str, Prediction]:
    """Task -> what a method predicts; trained networks are left below `work`."""
    if method == SET_HEAD:
        return set_head_predictions(split, work)
    if method == T5:
        return t5_predictions(split, work)
    return {task: baseline_prediction(method, split, task) for task in TASKS}


# ---- baselines


def new_baseline(name: str, task: Any, seed: int) -> ModalityPredictor:
    """An untrained one of BASELINES."""
    if name == "Dengkw":
        return Dengkw(task, seed)
    if name == "Cajal":
        return Cajal(task, seed)
    others = {"nearest cells": NearestCells, "SVD, linear": SVDLinear, "DANCE": Dance}
    if name in others:
        return others[name](seed=seed)
    return {"zeros": Zeros, "frequency": Frequency}[name]()


def baseline_prediction(name: str, split: Split, task: str) -> Prediction:
    """Fitted on what is there for scores, and on levels for values, where these are not the same."""
    modality, cells = TASKS[task][1], split.cells

    def fitted(target: sp.csr_matrix) -> ModalityPredictor:
        return new_baseline(name, task, split.seed).fit(split.source(task, cells.train), target[cells.train])

    ranks = fitted(split.present[modality])
    parts = {"validation": cells.validation, "test": cells.test}
    scores = {part: ranks.predict(split.source(task, mask)) for part, mask in parts.items()}
    if modality == "accessibility":
        return Prediction(scores, values=scores["test"])
    return Prediction(scores, values=fitted(split.values[modality]).predict(split.source(task, cells.test)))


# ---- the multiome T5


def trained(split: Split, output: Path, options: dict[str, Any]) -> tuple[Any, Any, MultiomePretrainConfig]:
    """A model of both directions, and its processor, trained as train/pretrain.py does: until the validation cells'
    loss no longer falls."""
    shutil.rmtree(output, ignore_errors=True)
    config = MultiomePretrainConfig(output=str(output), seed=split.seed, **options)
    processor = split.new_processor(config.encoding)
    rows, validation = (
        concatenate_datasets([encoded(split, processor, task, cells) for task in TASKS])
        for cells in (split.cells.train, split.cells.validation)
    )
    model = new_model(config, processor, rows)
    accelerator = make_accelerator(config)
    collate = processor.collator(config.max_source_length, config.max_target_length)

    def collate_for_loss(rows: Any, keys: Any) -> dict[str, Any]:
        return {**collate(rows, keys), "return_logits": False}

    def validate(model: torch.nn.Module) -> dict[str, float]:
        lengths, n = pair_lengths(validation, config), config.max_tokens
        return {"validation_loss": mean_loss(model, validation, lengths, collate_for_loss, accelerator, max_tokens=n)}

    train(model, rows, pair_lengths(rows, config), collate, config, accelerator, validate=validate)
    close(accelerator, model)
    return model.eval(), processor, config


def encoded(split: Split, processor: Any, task: str, cells: np.ndarray) -> Any:
    return processor.encode((split.pair.rna, split.pair.atac), task, cells_mask=cells, with_values=True)


def set_head_predictions(split: Split, work: Path) -> dict[str, Prediction]:
    model, processor, config = trained(split, work / "set_head", SET_HEAD_TRAINING[split.pair.name])
    collate, found = processor.collator(config.max_source_length), {}
    for task in TASKS:
        outputs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for part in ("validation", "test"):
            rows = encoded(split, processor, task, getattr(split.cells, part))
            batches = [collate(list(rows.select(some))) for some in parts_of(len(rows))]
            with torch.no_grad():
                told = [model(batch["input_ids"], batch["attention_mask"]) for batch in batches]
            outputs[part] = tuple(torch.cat([out[name] for out in told]).numpy() for name in ("logits", "values"))  # type: ignore[assignment]
        scores = {part: 1 / (1 + np.exp(-logits)) for part, (logits, _) in outputs.items()}
        # Of what is there or not, the probability is the expected value.
        values = scores["test"] if TASKS[task][1] == "accessibility" else outputs["test"][1]
        found[task] = Prediction(scores, values=values)
    return found


def t5_predictions(split: Split, work: Path) -> dict[str, Prediction]:
    model, processor, config = trained(split, work / "t5", T5_TRAINING)
    collate, found = processor.collator(config.max_source_length), {}
    for task, (_, modality) in TASKS.items():
        rows = encoded(split, processor, task, split.cells.test)
        tested = np.arange(min(GENERATED_CELLS, len(rows)))
        batch = collate(list(rows.select(tested)))
        ids = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"])
        present = processor.decode_matrix(ids, modality).toarray() > 0
        found[task] = Prediction(present=present, tested=tested)
    return found


def parts_of(n: int) -> list[range]:
    return [range(start, min(start + CELLS_AT_ONCE, n)) for start in range(0, n, CELLS_AT_ONCE)]
