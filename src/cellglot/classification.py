"""Labels of cells by a Geneformer with a classifier of cells."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .cell_stream import (
    annotated_copy,
    check_model,
    encoded_blocks,
    evaluating,
    is_path,
    open_every_cell,
    padded_batches,
)
from .tokenization.gene_ids import examples


def classify_cells(
    adata_or_path: Any,
    model: Any,
    tokenizer: Any,
    *,
    names: str | Sequence[str] | None = None,
    probabilities: bool = False,
    counts_layer: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    **encode_options: Any,
) -> Any:
    """The most probable label of each cell in each task of a classifier, computed block by block.

    adata_or_path   as of `embed_cells`
    model           GeneformerForSequenceClassification, or ...ForMultiTaskSequenceClassification
    names           what each task is called in the result; by default those of `config.tasks`, or `config.label_name`
                    ("label" if it has none) for the only task of a GeneformerForSequenceClassification
    probabilities   gives the probability of every label too
    counts_layer    None for X, "raw" for `raw`, else the name of the layer with raw counts
    max_tokens      padded tokens of one forward pass; by default what suits the device
    encode_options  further ones of `RankValueTokenizer.iter_encoded`
    Returns         an AnnData: a copy with obs["<name>_predicted"] (categorical), obs["<name>_score"] (its probability)
                    and, if asked for, obsm["<name>_probabilities"] (DataFrame, a column a label). A path: a DataFrame
                    by cell with columns <name>_predicted, <name>_score and, if asked for, <name>_probability_<label>.
                    A cell without a gene of the vocabulary has no label and NaN
    Raises          ValueError for a model without such a classifier, and as `embed_cells`
    """
    import pandas as pd

    check_model(model, tokenizer)
    tasks = task_labels(model, names)
    parts: list[list[np.ndarray]] = []
    with open_every_cell(adata_or_path, counts_layer, encode_options) as matrix:
        cell_names = matrix.obs.index
        with tqdm(total=matrix.n_cells, desc="classify", unit="cell", disable=not progress) as bar:
            for cells in encoded_blocks(matrix, model, tokenizer, encode_options):
                parts.append(classify_tokens(cells, model, tokenizer, max_tokens=max_tokens))
                bar.update(len(cells))
    columns: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for task, (name, labels) in enumerate(tasks.items()):
        table = np.concatenate([np.empty((0, len(labels)), np.float32), *(part[task] for part in parts)])
        known = ~np.isnan(table[:, 0])
        best = np.full(len(table), -1)
        best[known] = table[known].argmax(axis=1)
        columns[f"{name}_predicted"] = pd.Categorical.from_codes(best, dtype=pd.CategoricalDtype(labels))
        columns[f"{name}_score"] = table.max(axis=1)
        tables[name] = pd.DataFrame(table, index=cell_names, columns=pd.Index(labels))
    if not is_path(adata_or_path):
        annotated = annotated_copy(adata_or_path)
        for name, column in columns.items():
            annotated.obs[name] = column
        if probabilities:
            for name, table in tables.items():
                annotated.obsm[f"{name}_probabilities"] = table
        return annotated
    frame = pd.DataFrame(columns, index=cell_names)
    if probabilities:
        frame = frame.join([table.add_prefix(f"{name}_probability_") for name, table in tables.items()])
    return frame


@torch.inference_mode()
def classify_tokens(
    cells: Sequence[np.ndarray], model: Any, tokenizer: Any, *, max_tokens: int | None = None
) -> list[np.ndarray]:
    """Probabilities of the labels of each task, (cells, labels) float32 in the order given; NaN for an empty cell."""
    check_model(model, tokenizer)
    tables = [np.full((len(cells), len(labels)), np.nan, np.float32) for labels in task_labels(model).values()]
    with evaluating(model) as device:
        for chosen, input_ids, mask in padded_batches(cells, tokenizer, max_tokens, device):
            logits = model(input_ids, attention_mask=mask).logits
            for table, of_task in zip(tables, logits if isinstance(logits, tuple) else (logits,), strict=True):
                table[chosen] = of_task.float().softmax(dim=-1).cpu().numpy()
    return tables


def task_labels(model: Any, names: str | Sequence[str] | None = None) -> dict[str, list[str]]:
    """Labels of each task of a classifier of cells, by name (see `classify_cells`).

    Raises  ValueError for a model without a classifier of cells, or names that are not one a task
    """
    # PEFT wraps a model in a class of its own.
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    if not kind.endswith("SequenceClassification"):
        raise ValueError(
            f"{kind} has no classifier of cells. Fine-tune it as a GeneformerForSequenceClassification on labelled "
            "cells first, or ask for embeddings with embed_cells or pipeline('cell-embedding')."
        )
    config = model.config
    if "MultiTask" in kind:
        labels = [list(of_task) for of_task in config.tasks.values()]
        default = list(config.tasks)
    else:
        labels = [[str(config.id2label[i]) for i in range(config.num_labels)]]
        default = [config.label_name or "label"]
    if len(labels[0]) < 2:
        raise ValueError(f"This classifier has the label {examples(labels[0])} only, which tells no cells apart.")
    chosen = default if names is None else [names] if isinstance(names, str) else [str(name) for name in names]
    if len(chosen) != len(labels) or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"Expected {len(labels)} different names, one for each of {examples(default)}; found {chosen}."
        )
    return dict(zip(chosen, labels, strict=True))
