"""Fine-tunes a model to tell cell states or gene states, and says what that is worth beside simple baselines.

A Geneformer, or another method by `--method NAME` or `method: NAME` in the recipe:

    accelerate launch train/finetune.py --recipe train/recipes/finetune_pbmc.yaml
    accelerate launch train/finetune.py --model DIR --data cells.h5ad --labels cell_type --split_by donor --folds 5
    accelerate launch train/finetune.py --model DIR --data cells.h5ad --labels cell_type disease
    accelerate launch train/finetune.py --model DIR --data cells.h5ad --gene_labels dosage.tsv --folds 5
    accelerate launch train/finetune.py --method gene_graph --data cells.h5ad --edges network.tsv --smoothing global

Leaves in the output folder: `model/` (a complete model directory with `id2label`; with k folds, one in each `fold-*/`),
`metrics.json`, `predictions.csv`, confusion matrix, ROC and loss figures, `run.json`, `metrics.jsonl`, `checkpoints/`.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers.utils import logging as transformers_logging

from cellglot.loading import find_tokenizer
from cellglot.modeling.geneformer import GeneformerConfig
from cellglot.train.config import chosen_option, option, parse_config
from cellglot.train.finetuning_data import load_cells, read_gene_labels
from cellglot.train.finetuning_report import report_run
from cellglot.train.finetuning_run import add_baselines, train_and_test
from cellglot.train.finetuning_tasks import CellTask, GeneTask, Task
from cellglot.train.hyperparameter_search import search
from cellglot.train.labelled_cells_config import LabelledCellsConfig
from cellglot.train.loop import close, make_accelerator
from cellglot.train.output_folder import abandon_output, keep_output, prepare_output
from cellglot.train.publishing import publish_run
from cellglot.train.splits import UNLABELLED, Split, check_split, held_out, joint_labels, k_folds

# Method -> the module whose `main` fine-tunes it; Geneformer's is here
METHODS = {
    "geneformer": None,
    "gene_graph": "cellglot.train.finetune_gene_graph",
    "drug_response": "cellglot.train.finetune_drug_response",
}
DEFAULT = "geneformer"


@dataclass
class FinetuneConfig(LabelledCellsConfig):
    """Options of fine-tuning. Defaults are the paper's (Methods, "Geneformer fine-tuning") where it states them."""

    method: Literal["geneformer"] = option("geneformer", f"what is trained: one of {', '.join(METHODS)}")
    model: str = option("runs/geneformer-pbmc/model", "folder or repository of the model to start from")
    tokenizer: str | None = option(None, "folder of its tokenizer; absent: the model's")
    labels: list[str] = option(["cell_type"], "column(s) of obs to predict for cells; several make a multi-task model")
    gene_labels: str | None = option(None, "table of gene_id, label: predicts the state of genes in place of cells")
    max_length: int | None = option(None, "tokens of a cell at the most; absent: the model's context")
    untrained: bool = option(False, "starts from random weights of the model's sizes: what did pre-training bring?")
    num_hidden_layers: int | None = option(None, "layers of an untrained network, in place of the model's")
    pooling: Literal["first", "mean"] | None = option(
        None, "what a cell's classifier sees: BERT's pooler of the first token, or the mean; absent: the model's own"
    )
    freeze: int = option(0, "first layers (and the embeddings) to keep as they are")
    lora_rank: int = option(0, "rank of low-rank adapters, trained in place of the weights; 0: none")
    lora_alpha: float | None = option(None, "scale of the adapters; absent: twice the rank")
    lora_dropout: float = option(0.0, "dropout before the adapters")
    quantize: Literal["no", "8bit", "4bit"] = option("no", "loads the frozen weights in 8 or 4 bits, beneath adapters")
    search_trials: int = option(
        0, "trials of a search for learning rate (around the given one), warm-up, weight decay and frozen layers"
    )
    output: str = option("runs/geneformer-finetuned", "folder of the run")
    epochs: float = option(1.0, "passes over the training examples")
    batch_size: int = option(12, "cells of an optimizer step, over all processes")
    learning_rate: float = option(5e-5, "maximum learning rate")
    warmup_steps: float = option(500, "steps of linear warm-up; below 1, a share of all steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("freeze", "lora_rank", "search_trials"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative.")
        for name in ("max_length", "num_hidden_layers", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, found {value}.")
        if not self.labels and not self.gene_labels:
            raise ValueError("Nothing to predict: pass --labels COLUMN or --gene_labels FILE.")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels names a column twice: {', '.join(self.labels)}.")
        together = [
            (bool(self.gene_labels) and bool(self.split_by), "split_by is for cells; gene labels are split by gene"),
            (bool(self.gene_labels) and self.pooling is not None, "pooling is for cells, not for gene_labels"),
            (self.quantize != "no" and not self.lora_rank, "quantized weights cannot be trained: add --lora_rank 8"),
            (
                self.untrained and bool(self.quantize != "no" or self.lora_rank),
                "an untrained network has to be trained",
            ),
            (self.num_hidden_layers is not None and not self.untrained, "num_hidden_layers needs untrained"),
            (self.search_trials > 0 and self.folds > 0, "search_trials and folds exclude each other"),
            (self.lora_rank > 0 and self.freeze > 0, "adapters keep all weights as they are: freeze adds nothing"),
            (
                not self.lora_rank and bool(self.lora_alpha or self.lora_dropout),
                "lora_alpha and lora_dropout need lora_rank",
            ),
            (self.untrained and self.freeze > 0, "freeze would keep random layers of an untrained network"),
            (self.search_trials > 0 and self.freeze > 0, "search_trials chooses freeze: leave it out"),
            (
                bool(self.trackers) and self.search_trials > 0,
                "trackers follow one training: leave out search_trials, or read metrics.jsonl",
            ),
        ]
        for wrong, message in together:
            if wrong:
                raise ValueError(f"{message}.")

    @property
    def validates(self) -> bool:
        """Whether a part of the training items is put aside to validate on."""
        return bool(super().validates or self.search_trials)


def check_inputs(config: FinetuneConfig) -> None:
    """Raises ValueError or ImportError for what can be known to fail before any data are read."""
    for option_name, package, extra in (
        ("lora_rank", "peft", "lora"),
        ("search_trials", "optuna", "search"),
        ("quantize", "bitsandbytes", "quantize"),
    ):
        if getattr(config, option_name) not in (0, "no") and find_spec(package) is None:
            raise ImportError(f'--{option_name} needs {package}: pip install "cellglot[{extra}]"')
    output = Path(config.output).resolve()
    for name in ("model", "tokenizer", "data", "gene_labels"):
        value = getattr(config, name)
        if value is not None and Path(value).resolve().is_relative_to(output):
            raise ValueError(f"--{name} {value} lies in the output folder {config.output}: pass another --output.")
    find_tokenizer(config.tokenizer or config.model)
    n_layers = GeneformerConfig.from_pretrained(config.model).num_hidden_layers
    if config.freeze > n_layers:
        raise ValueError(f"Cannot freeze {config.freeze} layers of {n_layers}: lower --freeze.")


def make_task(config: FinetuneConfig, folder: Path, *, is_main_process: bool) -> tuple[Task, Any]:
    """The task that the options describe, and its tokenizer.

    Raises  ValueError or OSError for data, labels or a model that do not fit
    """
    tokenizer = find_tokenizer(config.tokenizer or config.model)
    model_config = GeneformerConfig.from_pretrained(config.model)
    if len(tokenizer) != model_config.vocab_size:
        raise ValueError(
            f"{config.model} knows {model_config.vocab_size:,} tokens, its tokenizer {len(tokenizer):,}: they do not "
            "belong together. Pass --tokenizer with the one that the model was trained with."
        )
    columns = [] if config.gene_labels else list(config.labels)
    cells: Any = load_cells(
        config.data,
        folder,
        tokenizer,
        columns=list(dict.fromkeys([*columns, *([config.split_by] if config.split_by else [])])),
        max_length=min(
            config.max_length or tokenizer.model_max_length,
            tokenizer.model_max_length,
            model_config.max_position_embeddings,
        ),
        layer=config.layer,
        gene_ids=config.gene_ids,
        is_main_process=is_main_process,
    )
    n_before = len(cells.obs)
    cells = usable_cells(cells, columns, config)
    if is_main_process and len(cells.obs) < n_before:
        left_out = n_before - len(cells.obs)
        print(f"{left_out:,} of {n_before:,} cells are left out: no label, no group, or beyond --max_cells")
    if not config.gene_labels:
        return CellTask(cells, columns), tokenizer
    genes = read_gene_labels(config.gene_labels, tokenizer)
    name = Path(config.gene_labels).stem
    return GeneTask(cells, genes, name, model_config.vocab_size, config.min_per_class), tokenizer


def usable_cells(cells: Any, columns: list[str], config: LabelledCellsConfig) -> Any:
    """Cells with a label and a group, at most `max_cells`; labels of fewer than `min_per_class` cells do not count.

    cells  `CellTable` or `ExpressionCells`
    """

    def labelled(cells: Any) -> np.ndarray:
        known = np.ones(len(cells.obs), dtype=bool)
        if columns:
            known &= (cells.obs[columns] != UNLABELLED).any(axis=1).to_numpy()
        if config.split_by:
            known &= (cells.obs[config.split_by] != UNLABELLED).to_numpy()
        return known

    cells = cells.select(labelled(cells))
    if config.max_cells is not None:
        drawn = np.random.default_rng(config.seed).permutation(len(cells.obs))[: config.max_cells]
        cells = cells.select(np.isin(np.arange(len(cells.obs)), drawn))
    obs = cells.obs.copy()
    for name in columns:
        counts = obs[name].value_counts()
        obs.loc[obs[name].isin(counts.index[counts < config.min_per_class]).to_numpy(), name] = UNLABELLED
    cells = dataclasses.replace(cells, obs=obs)
    return cells.select(labelled(cells))


def make_splits(config: LabelledCellsConfig, task: Task) -> list[Split]:
    """Training, validation and test items of each fold, or of the one split.

    Raises  ValueError for a split that leaves a label without training items, or a group that is not there
    """
    columns = [task.labels(name) for name in task.classes]
    labelled: Any = np.stack([column != UNLABELLED for column in columns]).any(axis=0)
    strata = columns[0] if len(columns) == 1 else joint_labels(columns, max(config.folds, 2))
    groups, prepared = None, None
    if isinstance(task, CellTask):
        prepared = task.cells.held_out
        groups = task.cells.obs[config.split_by].to_numpy(dtype=str) if config.split_by else None
    if config.folds:
        index = np.flatnonzero(labelled)
        of_index = None if groups is None else groups[index]
        tests = [index[fold] for fold in k_folds(strata[index], config.folds, groups=of_index, seed=config.seed)]
        tests = [np.isin(np.arange(len(labelled)), test) for test in tests]
    elif config.test_groups:
        assert groups is not None
        unknown = [group for group in config.test_groups if group not in set(groups)]
        if unknown:
            raise ValueError(
                f"No cell of the data has {config.split_by} {unknown[0]!r}; there are "
                f"{', '.join(sorted(set(groups))[:8])}."
            )
        tests = [labelled & np.isin(groups, config.test_groups)]
    elif prepared is not None and groups is None and config.test_fraction:
        # The part of the embedded corpus that pre-training has not seen either
        tests = [labelled & prepared]
    else:
        tests = [held_out(strata, config.test_fraction, groups=groups, among=labelled, seed=config.seed)]
    splits = []
    for i, test in enumerate(tests):
        rest = labelled & ~test
        validation = np.zeros_like(test)
        if config.validates:
            whole_groups = groups if groups is not None and len(set(groups[rest])) > 1 else None
            validation = held_out(
                strata, config.validation_fraction, groups=whole_groups, among=rest, seed=config.seed + i
            )
        splits.append(Split(rest & ~validation, validation, test))
        for name, column in zip(task.classes, columns, strict=True):
            check_split(splits[-1], column, f"fold {i} of {name!r}" if config.folds else repr(name))
    return splits


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    method = chosen_option("method", argv) or DEFAULT
    if method not in METHODS:
        sys.exit(f"finetune.py: unknown method {method!r}; expected one of {', '.join(METHODS)}.")
    if METHODS[method] is not None:
        importlib.import_module(METHODS[method]).main(argv)
        return
    config = parse_config(FinetuneConfig, argv, description=__doc__)
    fine_tune(config, check_inputs, make_task, choose=search if config.search_trials else None)


def fine_tune(
    config: Any,
    check_inputs: Callable[[Any], None],
    make_task: Callable[..., tuple[Task, Any]],
    *,
    choose: Callable[..., Any] | None = None,
) -> None:
    """Trains and tests every split of a method's cells (or genes), and reports on them.

    check_inputs  raises what can be known to fail before any data are read
    make_task     (config, folder for data, is_main_process=) -> the task and its tokenizer, None where cells need none
    choose        (config, task, tokenizer, split, accelerator) -> configuration to train with, on one process
    """
    # Its report of newly initialized classifiers is what fine-tuning is about.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        accelerator = make_accelerator(config)
        if choose is not None and accelerator.num_processes > 1:
            raise ValueError(
                "search_trials runs on one process: start it without others, then train with what it finds"
            )
        check_inputs(config)
        output = prepare_output(config, accelerator)
        try:
            task, tokenizer = make_task(config, output / "data", is_main_process=accelerator.is_main_process)
            splits = make_splits(config, task)
        except BaseException:
            abandon_output(output, accelerator)
            raise
        keep_output(output, accelerator)
        if choose is not None:
            config = choose(config, task, tokenizer, splits[0], accelerator)
        results = []
        for i, split in enumerate(splits):
            folder = output / f"fold-{i}" if config.folds else output
            run = dataclasses.replace(config, output=str(folder))
            results.append(train_and_test(run, task, tokenizer, split, accelerator))
        # The others do not wait: baselines and figures outlast the time-out of a barrier.
        if accelerator.is_main_process:
            for result, split in zip(results, splits, strict=True):
                add_baselines(result, task, tokenizer, split, config)
            report_run(results, task, config, output)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"finetune.py: {error}")
    close(accelerator)
    publish_run(config, accelerator)


if __name__ == "__main__":
    main()
