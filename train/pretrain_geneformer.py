"""Pre-trains a Geneformer on masked genes. Other methods' options: `pretrain.py --method cross_species --help`.

    accelerate launch train/pretrain.py                                        # 700 real PBMCs, minutes on a laptop
    accelerate launch train/pretrain.py --recipe train/recipes/geneformer_v1_6l.yaml --data DIR --output runs/mine

Leaves in the output folder: `model/` (a complete model directory: weights, config, tokenizer, code, card with figures),
`metrics.jsonl`, `run.json`, `report.json`, `checkpoints/`.
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from cellglot.modeling.geneformer import PRESETS, GeneformerConfig, GeneformerForMaskedLM
from cellglot.tokenization.gene_masking import MaskedGeneCollator
from cellglot.train.config import option, parse_config
from cellglot.train.loop import LoopConfig, RunError, close, make_accelerator, mean_loss, train
from cellglot.train.output_folder import abandon_output, keep_output, prepare_output
from cellglot.train.pretraining_data import prepare_data
from cellglot.train.pretraining_report import write_report
from cellglot.train.publishing import publish_run

# Masks drawn of every validation cell: one draw hides 15% of its genes, which is few for a small validation set.
VALIDATION_SEEDS = tuple(range(1_000_003, 1_000_008))


@dataclass
class PretrainConfig(LoopConfig):
    """Options of pre-training. Defaults are those of the embedded PBMC corpus."""

    method: Literal["geneformer"] = option("geneformer", "what is trained")
    data: str | None = option(None, "folder or file: counts (.h5ad, .loom, 10x .h5) or tokens (.parquet); absent: PBMC")
    vocabulary: str | None = option(
        None, "tokenizer folder or table of token, token_id, nonzero_median; absent: from data"
    )
    aliases: str | None = option(None, "table of alias, ensembl_id, with a vocabulary table")
    layout: Literal["v1", "v2"] = option("v1", "token layout: v2 wraps cells in <cls> and <eos>")
    max_length: int | None = option(None, "tokens of a cell at the most; absent: 2,048 (v1) or 4,096 (v2)")
    layer: str | None = option(None, "layer with the raw counts, or raw; absent: X")
    gene_ids: str | None = option(None, "column of var with gene ids; absent: found")
    validation_fraction: float = option(0.15, "share of the cells held out")
    max_validation_cells: int = option(5_000, "held-out cells that the validation loss is measured on, at the most")
    on_the_fly: bool = option(
        False,
        "encodes training cells anew in each epoch, in place of tokens on disk; --num_workers 1: beside training",
    )
    split_by: str | None = option(None, "column of obs whose groups are held out whole, e.g. donor; absent: by cell")
    cell_type: str | None = option(
        None, "column of obs with cell types, for probe and UMAP; absent: cell_type if there is"
    )
    model: str = option("small", f"size: {', '.join(PRESETS)}")
    hidden_size: int | None = option(None, "width, in place of the size's")
    num_hidden_layers: int | None = option(None, "layers, in place of the size's")
    num_attention_heads: int | None = option(None, "heads, in place of the size's")
    intermediate_size: int | None = option(None, "feed-forward width, in place of the size's")
    dropout: float | None = option(None, "dropout of hidden states and attention, in place of the size's")
    mask_probability: float = option(0.15, "share of the genes to predict")
    mask_special_tokens: bool = option(False, "masks <cls> and <eos> too, as the original does")
    report: bool = option(True, "probe, UMAP and figures at the end")

    output: str = option("runs/geneformer-pbmc", "folder of the run: checkpoints, log, model")
    epochs: float = option(38, "passes over the training cells")
    batch_size: int = option(32, "cells of an optimizer step, over all processes")
    learning_rate: float = option(5e-3, "maximum learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("cosine", "learning rate after the warm-up")
    warmup_steps: float = option(0.05, "steps of linear warm-up; below 1, a share of all steps")
    eval_every: int = option(100, "steps between validations; 0: only at the end")
    save_every: int = option(400, "steps between checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_validation_cells <= 0:
            raise ValueError(f"max_validation_cells must be positive, found {self.max_validation_cells}.")
        if not 0 < self.validation_fraction < 1 or not 0 < self.mask_probability < 1:
            raise ValueError("validation_fraction and mask_probability must lie between 0 and 1.")
        if self.on_the_fly and self.num_workers > 1:
            raise ValueError(
                f"on_the_fly takes num_workers 0 or 1, found {self.num_workers}: every worker would read and encode "
                "all blocks of cells. Pass --num_workers 1; it encodes in threads."
            )
        try:
            model_config(self, vocab_size=10, max_length=10)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error


def model_config(config: PretrainConfig, *, vocab_size: int, max_length: int) -> GeneformerConfig:
    """Configuration of the model: the preset, overrides of it, and the sizes that the tokenizer decides."""
    overrides: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        if getattr(config, name) is not None
    }
    if config.dropout is not None:
        overrides |= {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    return GeneformerConfig.from_preset(
        config.model,
        **overrides,
        vocab_size=vocab_size,
        max_position_embeddings=max_length,
    )


def main(argv: list[str] | None = None) -> None:
    config = parse_config(PretrainConfig, argv, description=__doc__)
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
    lengths = np.asarray(data.train["length"])
    # The same ones every time
    measured = np.random.default_rng(0).permutation(len(data.validation))[: config.max_validation_cells]
    validation = data.validation.select(np.sort(measured))
    validation_lengths = np.asarray(validation["length"])
    collate = MaskedGeneCollator(data.tokenizer, config.mask_probability, config.mask_special_tokens)
    torch.manual_seed(config.seed)
    model = GeneformerForMaskedLM(
        model_config(config, vocab_size=len(data.tokenizer), max_length=data.tokenizer.model_max_length)
    )
    accelerator.print(
        f"Geneformer, {model.num_parameters() / 1e6:.1f}M parameters, on {data.description}: "
        f"{len(lengths):,} training and {len(data.validation):,} validation cells, {len(data.tokenizer):,} tokens, "
        f"median length {int(np.median(lengths)):,}"
    )

    def validate(model: torch.nn.Module) -> dict[str, float]:
        loss = mean_loss(
            model,
            validation,
            validation_lengths,
            collate,
            accelerator,
            max_tokens=config.max_tokens,
            seeds=VALIDATION_SEEDS,
            packed=True,
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
        result = train(
            model, data.train, lengths, collate, config, accelerator, validate=validate, facts=facts, packed=True
        )
    except (RunError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: {error}")
    # The others do not wait: a probe on many cells outlasts the time-out of a barrier.
    if accelerator.is_main_process:
        write_report(model, data, config, result, output)
    close(accelerator, model)
    publish_run(config, accelerator)
