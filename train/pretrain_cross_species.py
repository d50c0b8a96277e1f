"""Pre-trains a mouse <-> human model on masked principal components (Pang & Tegnér 2020, section 2.1).

    accelerate launch train/pretrain.py --recipe train/recipes/cross_species_brain_small.yaml \\
        --sources human=human.h5ad mouse=mouse.h5ad
    accelerate launch train/pretrain.py --recipe train/recipes/cross_species_base.yaml \\
        --sources human=data/human_cortex mouse=data/mouse_brain \\
        --cell_type human=class_label mouse=Class

Leaves in the output folder: `model/` (a complete model directory: weights, config, PCA projection, code, card with
figures), `metrics.jsonl`, `run.json`, `report.json`, `checkpoints/`, `data/` (the projections of all cells).
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from cellglot.modeling.cross_species import PRESETS, CrossSpeciesConfig, CrossSpeciesForMaskedReconstruction
from cellglot.tokenization.streaming_pca import PASSES
from cellglot.train.config import option, parse_config
from cellglot.train.cross_species_data import MaskedComponentCollator, prepare_data, tokens_of_cell
from cellglot.train.cross_species_report import write_report
from cellglot.train.loop import LoopConfig, RunError, close, make_accelerator, mean_loss, train
from cellglot.train.output_folder import abandon_output, keep_output, prepare_output
from cellglot.train.publishing import publish_run

# Masks drawn of every validation cell
VALIDATION_SEEDS = tuple(range(1_000_003, 1_000_006))


@dataclass
class CrossSpeciesPretrainConfig(LoopConfig):
    """Options of pre-training. An option by source is one value for all of them, or NAME=VALUE for some."""

    method: Literal["cross_species"] = option("cross_species", "what is trained")
    sources: list[str] = option(
        [],
        "NAME=PATH of each source of cells: count file (.h5ad, .loom, 10x .h5), folder of such files, or corpus of "
        "human_cortex.py or mouse_brain.py",
    )
    layer: list[str] = option([], "layer with the raw counts, or raw, by source; absent: X")
    gene_ids: list[str] = option([], "column of var with gene ids, by source; absent: found")
    split_by: list[str] = option([], "column of obs whose groups are held out whole, by source; absent: by cell")
    cell_type: list[str] = option([], "column of obs with the class, by source, for the UMAP")
    validation_fraction: float = option(0.1, "share of the cells of each source held out")
    max_validation_cells: int = option(5_000, "held-out cells that figures are measured on, at the most")
    n_components: int = option(1200, "principal components of a cell; fewer where there are fewer cells or genes")
    pca_passes: int = option(PASSES, "passes over the training cells that find the components")
    allow_fractional: bool = option(False, "takes counts that are no integers (expected counts of a quantifier)")

    model: str = option("small", f"size: {', '.join(PRESETS)}")
    token_axis: Literal["cells", "components"] | None = option(
        None,
        "what attention runs across: the cells of a forward pass (the paper; max_tokens cells see each other), or "
        "patches of one cell's components; absent: the model's default",
    )
    num_patches: int | None = option(None, "tokens a cell's components are cut into, with token_axis components")
    hidden_size: int | None = option(None, "width, in place of the size's")
    num_hidden_layers: int | None = option(None, "layers of encoder and decoder each, in place of the size's")
    num_attention_heads: int | None = option(None, "heads, in place of the size's")
    intermediate_size: int | None = option(None, "feed-forward width, in place of the size's")
    dropout: float | None = option(None, "dropout of hidden states and attention, in place of the size's")
    mask_probability: float = option(0.1, "share of the entries to reconstruct")
    report: bool = option(True, "errors beside baselines, UMAP and figures at the end")

    output: str = option("runs/cross-species", "folder of the run: checkpoints, log, model")
    epochs: float = option(20, "passes over the training cells")
    batch_size: int = option(1024, "cells of an optimizer step, over all processes")
    learning_rate: float = option(3e-4, "maximum learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("cosine", "learning rate after the warm-up")
    warmup_steps: float = option(0.05, "steps of linear warm-up; below 1, a share of all steps")
    eval_every: int = option(100, "steps between validations; 0: only at the end")
    save_every: int = option(400, "steps between checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_validation_cells", "n_components", "pca_passes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}.")
        if not 0 < self.validation_fraction < 1 or not 0 < self.mask_probability < 1:
            raise ValueError("validation_fraction and mask_probability must lie between 0 and 1.")
        try:
            model_config(self, sources=["one"], n_components=self.n_components)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def free_options(self) -> set[str]:
        """Across cells, `max_tokens` decides which cells see each other."""
        free = super().free_options()
        return free if self.axis == "components" else free - {"max_tokens"}

    @property
    def axis(self) -> str:
        return self.token_axis or CrossSpeciesConfig().token_axis


def model_config(
    config: CrossSpeciesPretrainConfig, *, sources: list[str], n_components: int, rms: list[float] | None = None
) -> CrossSpeciesConfig:
    """Configuration of the model: the preset, overrides of it, and what the data decide."""
    names = ("token_axis", "num_patches", "hidden_size", "num_hidden_layers", "num_attention_heads")
    overrides: dict[str, Any] = {
        name: getattr(config, name) for name in (*names, "intermediate_size") if getattr(config, name) is not None
    }
    if config.dropout is not None:
        overrides |= {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout}
    return CrossSpeciesConfig.from_preset(
        config.model,
        **overrides,
        sources=sources,
        n_components=n_components,
        projection_rms=rms,
        mask_probability=config.mask_probability,
    )


def main(argv: list[str] | None = None) -> None:
    config = parse_config(CrossSpeciesPretrainConfig, argv, description=__doc__)
    try:
        accelerator = make_accelerator(config)
        output = prepare_output(config, accelerator)
        try:
            data = prepare_data(
                config, output / "data", is_main_process=accelerator.is_main_process, device=accelerator.device
            )
        except BaseException:
            abandon_output(output, accelerator)
            raise
        keep_output(output, accelerator)
        sizes = model_config(
            config, sources=list(data.extractor.sources), n_components=data.extractor.n_components, rms=data.rms
        )
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain.py: {error}")
    n_tokens = tokens_of_cell(sizes)
    # In random order, so that the cells that see each other are of all sources
    measured = np.random.default_rng(0).permutation(len(data.validation))[: config.max_validation_cells]
    validation = data.validation.subset(measured)
    collate = MaskedComponentCollator(config.mask_probability)
    torch.manual_seed(config.seed)
    model = CrossSpeciesForMaskedReconstruction(sizes)
    accelerator.print(
        f"Cross-species model, {model.num_parameters() / 1e6:.1f}M parameters, attention across {config.axis}, on "
        f"{data.description}: {len(data.train):,} training and {len(data.validation):,} validation cells, "
        f"{sizes.n_components:,} components"
    )

    def validate(model: torch.nn.Module) -> dict[str, float]:
        loss = mean_loss(
            model,
            validation,
            np.full(len(validation), n_tokens),
            collate,
            accelerator,
            max_tokens=config.max_tokens,
            # As in training, where it decides which cells see each other
            batch_size=config.batch_size,
            seeds=VALIDATION_SEEDS,
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
        lengths = np.full(len(data.train), n_tokens)
        result = train(model, data.train, lengths, collate, config, accelerator, validate=validate, facts=facts)
    except (RunError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: {error}")
    # The others do not wait: a report on many cells outlasts the time-out of a barrier.
    if accelerator.is_main_process:
        write_report(model, data, validation, config, result, output)
    close(accelerator, model)
    publish_run(config, accelerator)
