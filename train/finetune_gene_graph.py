"""Trains a gene-graph classifier of cells, and says what it is worth beside simple baselines.

    accelerate launch train/finetune.py --method gene_graph                     # 700 real PBMCs, seconds
    accelerate launch train/finetune.py --recipe train/recipes/finetune_gene_graph_pbmc.yaml
    accelerate launch train/finetune.py --method gene_graph --data cells.h5ad --label cell_type --split_by donor \\
        --folds 5 --edges network.tsv --smoothing global

Without `--model` it starts from random weights; with an autoencoder of `train/pretrain.py --method gene_graph`, from
its encoder (the paper's initialization). Leaves in the output folder what `train/finetune.py` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cellglot.modeling.gene_graph import GeneGraphConfig, GeneGraphForSequenceClassification
from cellglot.train.config import option, parse_config
from cellglot.train.expression_features import variable_genes
from cellglot.train.expression_rows import ExpressionCollator
from cellglot.train.finetune import fine_tune, usable_cells
from cellglot.train.finetuning_tasks import CellTask
from cellglot.train.gene_graph_card import classifier_card
from cellglot.train.gene_graph_data import ExpressionCells, common_genes, load_expression
from cellglot.train.gene_graph_network import NetworkOptions, make_model, make_network, read_start
from cellglot.train.labelled_cells_config import LabelledCellsConfig
from cellglot.train.labelled_examples import balanced_weights


@dataclass
class GeneGraphFinetuneConfig(NetworkOptions, LabelledCellsConfig):
    """Options of the classifier. Adam is the paper's: betas 0.9 and 0.999, epsilon 1e-8, no decay, 64 cells a step."""

    method: Literal["gene_graph"] = option("gene_graph", "what is trained")
    model: str | None = option(None, "folder or repository of the model to start from; absent: random weights")
    label: str = option("cell_type", "column of obs to predict")
    output: str = option("runs/gene-graph-classifier", "folder of the run: checkpoints, log, model")
    epochs: float = option(10, "passes over the training cells")
    batch_size: int = option(64, "cells of an optimizer step, over all processes")
    max_tokens: int = option(256, "cells of one forward pass on one process; larger steps are accumulated")
    learning_rate: float = option(1e-3, "maximum learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("constant", "learning rate after the warm-up")
    warmup_steps: float = option(0, "steps of linear warm-up; below 1, a share of all steps")
    weight_decay: float = option(0.0, "AdamW weight decay; 0: plain Adam")
    max_grad_norm: float = option(1e6, "gradients are scaled down to this norm, which is out of reach by default")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_network(self.model)


class GeneGraphTask(CellTask):
    """Cell-state classification over the expression of genes.

    start  configuration of the model that is started from, or None
    """

    def __init__(
        self, cells: ExpressionCells, label: str, model_config: GeneGraphConfig, graph: Any, start: Any = None
    ):
        super().__init__(cells, [label])  # type: ignore[arg-type]
        self.cells: Any = cells
        self.graph = graph
        names = self.classes[label]
        self.model_config = GeneGraphConfig.from_dict(
            {
                **model_config.to_dict(),
                "id2label": dict(enumerate(names)),
                "label2id": {name: i for i, name in enumerate(names)},
                "label_name": label,
            }
        )
        self._new_labels = start is not None and (
            start.id2label != self.model_config.id2label or start.label_name != label
        )

    def load_model(self, config: Any) -> Any:
        torch.manual_seed(config.seed)
        model = make_model(GeneGraphForSequenceClassification, config, self.model_config, self.graph, config.model)
        if self._new_labels:
            # As many classes, but others
            model.classifier.reset_parameters()
        return model

    def plain_model(self, model: Any, config: Any) -> Any:
        return model

    def card(self, config: Any, result: Any, figures: Sequence[str]) -> str:
        return classifier_card(self, config, result, figures)

    def examples(self, items: np.ndarray) -> tuple[Any, np.ndarray]:
        examples = self.cells.examples(items, self._numbers[:, 0])
        return examples, np.ones(len(examples), dtype=np.int64)

    def collator(self, train: np.ndarray | None, class_weights: str) -> ExpressionCollator:
        if train is None or class_weights == "none":
            return ExpressionCollator()
        known = self._numbers[train & (self._numbers[:, 0] >= 0), 0]
        n_classes = len(self.classes[self.columns[0]])
        return ExpressionCollator(balanced_weights(np.bincount(known, minlength=n_classes)))

    def baseline_features(
        self, tokenizer: Any, train: np.ndarray, test: np.ndarray, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log expression of the genes that vary most among the training cells."""
        wanted = train | test
        x = variable_genes(self.cells.expression(wanted), train[wanted])
        return x[train[wanted]].astype(np.float32), x[test[wanted]].astype(np.float32)


def check_inputs(config: GeneGraphFinetuneConfig) -> None:
    """Raises ValueError or OSError for what can be known to fail before any data are read."""
    output = Path(config.output).resolve()
    for name in ("model", "data", "edges"):
        value = getattr(config, name)
        if value is not None and Path(value).resolve().is_relative_to(output):
            raise ValueError(f"--{name} {value} lies in the output folder {config.output}: pass another --output.")
    if config.model is not None:
        read_start(config.model)


def make_task(config: GeneGraphFinetuneConfig, folder: Path, *, is_main_process: bool) -> tuple[GeneGraphTask, None]:
    """The task that the options describe; no tokenizer.

    Raises  ValueError or OSError for data, labels, a network or a model that do not fit
    """
    start = None if config.model is None else read_start(config.model)
    genes = common_genes(config.data, config.gene_ids, config.layer) if start is None else None
    model_config, graph = make_network(config, genes, start)
    if graph is not None and is_main_process:
        print(graph.report)
    cells = load_expression(
        config.data,
        folder,
        model_config,
        columns=list(dict.fromkeys([config.label, *([config.split_by] if config.split_by else [])])),
        layer=config.layer,
        gene_ids=config.gene_ids,
        aliases=config.aliases,
        is_main_process=is_main_process,
    )
    n_before = len(cells.obs)
    cells = usable_cells(cells, [config.label], config)
    if is_main_process and len(cells.obs) < n_before:
        left_out = n_before - len(cells.obs)
        print(f"{left_out:,} of {n_before:,} cells are left out: no label, no group, or beyond --max_cells")
    return GeneGraphTask(cells, config.label, model_config, graph, start), None


def main(argv: list[str] | None = None) -> None:
    config = parse_config(GeneGraphFinetuneConfig, argv, description=__doc__)
    fine_tune(config, check_inputs, make_task)
