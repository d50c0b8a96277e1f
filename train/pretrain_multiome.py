"""Trains a multiome T5: gene expression <-> chromatin accessibility (Lee et al., "Translating the Code of Life").

    accelerate launch train/pretrain.py --recipe train/recipes/multiome_set.yaml --cells rna.h5ad atac.h5ad
    accelerate launch train/pretrain.py --recipe train/recipes/multiome_bmmc_t5.yaml --cells data/bmmc

One model learns both directions, told apart by a task token. With `--head t5` it writes the features of the other
modality one by one, as published; with `--head set` it scores all of them in one pass.

Leaves in the output folder: `model/` (a complete model directory: weights, config, processor, code, card),
`metrics.jsonl`, `run.json`, `report.json`, `checkpoints/`, `data/` (the encoded cells).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm

from cellglot.modeling.multiome import (
    PRESETS,
    MultiomeT5Config,
    MultiomeT5ForConditionalGeneration,
    MultiomeT5ForFeaturePrediction,
)
from cellglot.multiome import begin_with_principal_embeddings
from cellglot.tokenization.binarized_string import TASKS
from cellglot.train.config import option, parse_config
from cellglot.train.loop import LoopConfig, RunError, close, make_accelerator, mean_loss, train
from cellglot.train.multiome_data import (
    feature_means,
    list_lengths,
    prepare_data,
    present_features,
    task_token_ids,
)
from cellglot.train.multiome_report import write_report
from cellglot.train.output_folder import abandon_output, keep_output, prepare_output
from cellglot.train.publishing import publish_run

SIZES = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
# Training cells whose principal components embeddings begin with, at the most: 512 components of 130,000 features take
# three minutes and 1.5 GB on a core
PRINCIPAL_CELLS = 5_000
LOSS_OPTIONS = ("gamma_positive", "gamma_negative", "probability_margin", "value_loss_weight")


@dataclass
class MultiomePretrainConfig(LoopConfig):
    """Options of training."""

    method: Literal["multiome"] = option("multiome", "what is trained")
    cells: list[str] = option(
        [], "a file with both modalities, or the folder of bmmc_multiome.py; or two files: expression, accessibility"
    )
    tasks: list[str] = option(list(TASKS), f"what is learned: {', '.join(TASKS)}, or one of them")
    layer: str | None = option(None, "layer with the raw counts, or raw; absent: X")
    gene_names: str | None = option(None, "column of var with the names that strings hold; absent: its index")
    split_by: str | None = option(None, "column of obs whose groups are held out whole, e.g. batch; absent: by cell")
    validation_fraction: float = option(0.1, "share of the cells held out, where a corpus has no validation split")
    max_validation_cells: int = option(1_000, "held-out cells of each task that figures are measured on, at the most")

    vocabulary: Literal["features", "subword"] = option("features", "a token for each feature, or learned pieces")
    subword_size: int = option(32_000, "pieces at the most, with vocabulary subword")
    encoding: Literal["set", "rank", "binned"] = option(
        "set", "order of genes: as in the file; by falling expression; as in the file, each with its level"
    )
    threshold: float = option(2.0, "log-normalized expression from which on a gene is expressed")
    expression_values: Literal["counts", "log_normalized"] = option("counts", "what the values of expression are")
    min_cells: int = option(1, "leaves out features of fewer training cells")
    max_source_length: int | None = option(
        None, "tokens of an input at the most: of longer ones a sample of features, drawn anew in each epoch"
    )
    max_target_length: int | None = option(None, "tokens to write at the most, likewise, with head t5")

    head: Literal["set", "t5"] = option("set", "scores all features in one pass, or writes them one by one")
    model: str = option("small", f"size: {', '.join(PRESETS)}")
    d_model: int | None = option(None, "width, in place of the size's")
    d_kv: int | None = option(None, "width of a head, in place of the size's")
    d_ff: int | None = option(None, "feed-forward width, in place of the size's")
    num_layers: int | None = option(None, "layers of encoder and decoder each, in place of the size's")
    num_heads: int | None = option(None, "heads, in place of the size's")
    dropout: float | None = option(None, "dropout, in place of the size's")
    encoder_position_bias: bool | None = option(
        None, "whether the encoder knows the order of its input; absent: not with head set and encoding set"
    )
    principal_embeddings: bool = option(
        True, "embeddings begin as principal components of the training cells' genes and peaks, with head set"
    )
    gamma_positive: float = option(0.0, "focusing of features that are there, with head set")
    gamma_negative: float = option(0.0, "focusing of features that are not, with head set")
    probability_margin: float = option(0.0, "probability under which those that are not count nothing, with head set")
    value_loss_weight: float = option(1.0, "weight of the squared error of measured values, with head set")
    report: bool = option(True, "predictions of held-out cells beside the frequency baseline, at the end")
    generated_cells: int = option(64, "held-out cells of each task that are written out for the report, with head t5")

    output: str = option("runs/multiome", "folder of the run: checkpoints, log, model")
    epochs: float = option(30, "passes over the training cells")
    batch_size: int = option(64, "cells of an optimizer step, over all processes and tasks")
    learning_rate: float = option(1e-3, "maximum learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("cosine", "learning rate after the warm-up")
    warmup_steps: float = option(0.05, "steps of linear warm-up; below 1, a share of all steps")
    eval_every: int = option(100, "steps between validations; 0: only at the end")
    save_every: int = option(400, "steps between checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_validation_cells", "generated_cells", "subword_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, found {self.validation_fraction}.")
        if not self.tasks or set(self.tasks) - set(TASKS) or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"Expected tasks among {', '.join(TASKS)}, each once; found {', '.join(self.tasks)}.")
        for name in ("max_source_length", "max_target_length"):
            length = getattr(self, name)
            if length is not None and length < 8:
                raise ValueError(f"{name} must be 8 or more, found {length}.")
        if self.head == "set" and self.vocabulary == "subword":
            raise ValueError("head set scores features, each of which must be a token: pass --vocabulary features.")
        if self.head == "set" and self.max_target_length is not None:
            raise ValueError("max_target_length is for head t5; head set scores all features.")
        try:
            model_config(self, {})
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def free_options(self) -> set[str]:
        return super().free_options() | {"generated_cells"}


def model_config(config: MultiomePretrainConfig, fields: dict[str, Any]) -> MultiomeT5Config:
    """Configuration of the model: the size, overrides of it, and the fields that the processor decides."""
    overrides = {name: getattr(config, name) for name in SIZES if getattr(config, name) is not None}
    if config.dropout is not None:
        overrides["dropout_rate"] = config.dropout
    if config.head == "set":
        overrides |= {name: getattr(config, name) for name in LOSS_OPTIONS}
    bias = config.encoder_position_bias
    overrides["encoder_position_bias"] = (config.head, config.encoding) != ("set", "set") if bias is None else bias
    return MultiomeT5Config.from_preset(config.model, **overrides, **fields)


def new_model(config: MultiomePretrainConfig, processor: Any, rows: Any) -> Any:
    """An untrained model for encoded training cells; a set head's biases are their frequencies and mean values, and its
    embeddings their principal components."""
    fields = processor.model_fields()
    torch.manual_seed(config.seed)
    if config.head == "t5":
        longest = config.max_target_length or int(list_lengths(rows, "labels").max())
        return MultiomeT5ForConditionalGeneration(model_config(config, fields | {"max_target_length": longest}))
    model = MultiomeT5ForFeaturePrediction(model_config(config, fields))
    # Genes, then peaks
    means = [feature_means(rows, processor, task) for task in ("atac2gex", "gex2atac")]
    model.set_frequencies(*(torch.from_numpy(np.concatenate(part)) for part in zip(*means, strict=True)))
    if config.principal_embeddings:
        known = present_features(rows, processor, config.tasks[0], max_cells=PRINCIPAL_CELLS, seed=config.seed)
        # Minutes where there are 100,000 peaks
        told = f"principal components of {known.shape[0]:,} cells"
        with tqdm(total=1, desc=told, unit="PCA", disable=known.nnz < 1_000_000) as bar:
            begin_with_principal_embeddings(model, known, config.seed)
            bar.update()
    return model


def pair_lengths(rows: Any, config: MultiomePretrainConfig) -> np.ndarray:
    """(rows,) tokens that each cell takes in a forward pass: those that are read, and with a T5 those written."""
    lengths = np.minimum(np.asarray(rows["length"]), config.max_source_length or np.inf)
    if config.head == "t5":
        lengths = lengths + np.minimum(list_lengths(rows, "labels"), config.max_target_length or np.inf)
    return lengths.astype(np.int64)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(MultiomePretrainConfig, argv, description=__doc__)
    try:
        accelerator = make_accelerator(config)
        output = prepare_output(config, accelerator)
        try:
            data = prepare_data(config, output / "data", is_main_process=accelerator.is_main_process)
        except BaseException:
            abandon_output(output, accelerator)
            raise
        keep_output(output, accelerator)
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain.py: {error}")
    validation = measured_rows(data.validation, data.processor, config)
    collate = data.processor.collator(config.max_source_length, config.max_target_length)
    model = new_model(config, data.processor, data.train)
    extractor = data.processor.feature_extractor
    accelerator.print(
        f"Multiome T5, head {config.head}, {model.num_parameters() / 1e6:.1f}M parameters, on {data.description}: "
        f"{len(data.train):,} training and {len(data.validation):,} validation rows (cells x tasks), "
        f"{len(extractor.genes):,} genes, {len(extractor.peaks):,} peaks"
    )

    def collate_for_loss(rows: Sequence[Any], keys: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {**collate(rows, keys), "return_logits": False}

    def validate(model: torch.nn.Module) -> dict[str, float]:
        loss = mean_loss(
            model,
            validation,
            pair_lengths(validation, config),
            collate_for_loss,
            accelerator,
            max_tokens=config.max_tokens,
        )
        return {"validation_loss": loss}

    facts = {
        "data": {"source": data.description, "fingerprint": data.fingerprint},
        "n_processes": accelerator.num_processes,
        "strategy": accelerator.distributed_type.value,
        "device": str(accelerator.device),
        "torch_threads": torch.get_num_threads(),
    }
    try:
        lengths = pair_lengths(data.train, config)
        result = train(model, data.train, lengths, collate, config, accelerator, validate=validate, facts=facts)
    except (RunError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: {error}")
    # The others do not wait: a report on many cells outlasts the time-out of a barrier.
    if accelerator.is_main_process:
        write_report(model, data, validation, config, result, output)
    close(accelerator, model)
    publish_run(config, accelerator)


def measured_rows(rows: Any, processor: Any, config: MultiomePretrainConfig) -> Any:
    """Up to `max_validation_cells` rows of each task, the same ones every time."""
    tasks = task_token_ids(rows)
    chosen = [
        np.random.default_rng(0).permutation(np.flatnonzero(tasks == processor.task_token_id(task)))
        for task in config.tasks
    ]
    return rows.select(np.sort(np.concatenate([found[: config.max_validation_cells] for found in chosen])))
