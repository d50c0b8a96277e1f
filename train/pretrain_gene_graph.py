"""Trains the autoencoder whose encoder a gene-graph classifier starts from.

    accelerate launch train/pretrain.py --method gene_graph                     # 700 real PBMCs, seconds
    accelerate launch train/pretrain.py --recipe train/recipes/gene_graph_pbmc.yaml \\
        --data cells.h5ad --split_by donor --leave_out 1256 1488

Encoder: the classifier's layers; decoder: their mirror image; loss: the mean squared error of log-normalized
expression. Leaves in the output folder: `model/` (a complete model directory: weights, config, graph, code, card with
figures), `metrics.jsonl`, `run.json`, `report.json`, `checkpoints/`, `data/` (the expression of all cells).
"""

import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from cellglot.modeling.gene_graph import GeneGraphForReconstruction
from cellglot.train.config import option, parse_config
from cellglot.train.expression_rows import ExpressionCollator
from cellglot.train.gene_graph_data import ExpressionCells, common_genes, load_expression
from cellglot.train.gene_graph_network import NetworkOptions, make_model, make_network
from cellglot.train.gene_graph_report import write_report
from cellglot.train.loop import LoopConfig, RunError, close, make_accelerator, mean_loss, train
from cellglot.train.output_folder import abandon_output, keep_output, prepare_output
from cellglot.train.publishing import publish_run
from cellglot.train.splits import UNLABELLED, held_out


@dataclass
class GeneGraphPretrainConfig(NetworkOptions, LoopConfig):
    """Options of the autoencoder. Adam is the paper's: betas 0.9 and 0.999, epsilon 1e-8, no decay, 64 cells a step."""

    method: Literal["gene_graph"] = option("gene_graph", "what is trained")
    data: str | None = option(None, "count file or folder of them; absent: the embedded PBMCs")
    layer: str | None = option(None, "layer with the raw counts, or raw; absent: X")
    gene_ids: str | None = option(None, "column of var with gene ids; absent: found")
    split_by: str | None = option(None, "column of obs whose groups are held out whole, e.g. donor or batch")
    leave_out: list[str] = option([], "groups of split_by that take no part: those a classifier will be tested on")
    validation_fraction: float = option(0.1, "share of the cells to validate on (not of the PBMCs, whose part is set)")
    report: bool = option(True, "errors beside those of the mean and of principal components, and a loss curve")

    output: str = option("runs/gene-graph-autoencoder", "folder of the run: checkpoints, log, model")
    epochs: float = option(20, "passes over the training cells")
    batch_size: int = option(64, "cells of an optimizer step, over all processes")
    max_tokens: int = option(256, "cells of one forward pass on one process; larger steps are accumulated")
    learning_rate: float = option(1e-3, "maximum learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("constant", "learning rate after the warm-up")
    warmup_steps: float = option(0, "steps of linear warm-up; below 1, a share of all steps")
    weight_decay: float = option(0.0, "AdamW weight decay; 0: plain Adam")
    max_grad_norm: float = option(1e6, "gradients are scaled down to this norm, which is out of reach by default")
    eval_every: int = option(100, "steps between validations; 0: only at the end")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_network()
        if not 0 < self.validation_fraction < 1:
            raise ValueError("validation_fraction must lie between 0 and 1.")
        if self.leave_out and self.split_by is None:
            raise ValueError("leave_out needs split_by, the column it has values of.")


def split_cells(cells: ExpressionCells, config: GeneGraphPretrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the cells that train and that validate.

    Raises  ValueError for groups that are not there, or a split that leaves nothing on a side
    """
    groups = cells.obs[config.split_by].to_numpy(dtype=str) if config.split_by else None
    among = np.ones(len(cells.obs), dtype=bool)
    if groups is not None:
        unknown = [group for group in config.leave_out if group not in set(groups)]
        if unknown:
            found = ", ".join(sorted(set(groups) - {UNLABELLED})[:8])
            raise ValueError(f"No cell of the data has {config.split_by} {unknown[0]!r}; there are {found}.")
        among = (groups != UNLABELLED) & ~np.isin(groups, config.leave_out)
    if cells.held_out is not None and groups is None:
        return among & ~cells.held_out, among & cells.held_out
    alike = np.full(len(among), "")
    validation = held_out(alike, config.validation_fraction, groups=groups, among=among, seed=config.seed)
    if not validation.any() or not (among & ~validation).any():
        raise ValueError(
            f"{int(among.sum()):,} cells cannot be split with validation_fraction={config.validation_fraction}."
        )
    return among & ~validation, validation


def main(argv: list[str] | None = None) -> None:
    config = parse_config(GeneGraphPretrainConfig, argv, description=__doc__)
    try:
        accelerator = make_accelerator(config)
        output = prepare_output(config, accelerator)
        try:
            model_config, graph = make_network(config, common_genes(config.data, config.gene_ids, config.layer))
            cells = load_expression(
                config.data,
                output / "data",
                model_config,
                columns=[] if config.split_by is None else [config.split_by],
                layer=config.layer,
                gene_ids=config.gene_ids,
                aliases=config.aliases,
                is_main_process=accelerator.is_main_process,
            )
            in_training, in_validation = split_cells(cells, config)
        except BaseException:
            abandon_output(output, accelerator)
            raise
        keep_output(output, accelerator)
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain.py: {error}")
    if graph is not None:
        accelerator.print(graph.report)
    training, validation = cells.examples(in_training), cells.examples(in_validation)
    collate = ExpressionCollator()
    torch.manual_seed(config.seed)
    model = make_model(GeneGraphForReconstruction, config, model_config, graph, None)
    accelerator.print(
        f"Autoencoder, {model.num_parameters() / 1e6:.1f}M parameters, smoothing {model_config.smoothing!r}, on "
        f"{cells.description}: {len(training):,} training and {len(validation):,} validation cells, "
        f"{model_config.n_genes:,} genes"
    )

    def validate(model: torch.nn.Module) -> dict[str, float]:
        lengths = np.ones(len(validation), dtype=np.int64)
        loss = mean_loss(model, validation, lengths, collate, accelerator, max_tokens=config.max_tokens)
        return {"validation_loss": loss}

    facts = {
        "data": {"source": cells.description, "fingerprint": cells.fingerprint},
        "graph": None if graph is None else str(graph.report),
        "n_processes": accelerator.num_processes,
        "strategy": accelerator.distributed_type.value,
        "device": str(accelerator.device),
        "torch_threads": torch.get_num_threads(),
    }
    try:
        lengths = np.ones(len(training), dtype=np.int64)
        result = train(model, training, lengths, collate, config, accelerator, validate=validate, facts=facts)
    except (RunError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: {error}")
    # The others do not wait: a report on many cells outlasts the time-out of a barrier.
    if accelerator.is_main_process:
        write_report(model, cells, graph, in_training, in_validation, config, result, output)
    close(accelerator, model)
    publish_run(config, accelerator)
