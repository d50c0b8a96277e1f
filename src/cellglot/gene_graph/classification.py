"""Labels of cells by a gene-graph classifier."""

from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..cell_stream import evaluating
from ..tokenization.count_matrix import open_counts
from .expression import expression_report, iter_expression

CELLS_PER_BATCH = 64


@torch.inference_mode()
def classify_expression(
    source: Any, model: Any, *, layer: str | None = None, progress: bool = True, **options: Any
) -> Any:
    """The most probable label of each cell, computed block by block.

    source   AnnData with raw counts, or the path of a count file
    model    GeneGraphForSequenceClassification with gene_ids in its configuration
    layer    None for X, "raw" for `raw`, else the name of the layer with the counts
    options  gene_ids, cells, aliases as of `read_expression`
    Returns  DataFrame by cell: <label_name>_predicted (categorical), <label_name>_score (its probability). Genes that
             the model has and the cells have not, or the other way round, are counted on the screen
    Raises   ValueError as `read_expression`
    """
    import pandas as pd

    name = model.config.label_name or "label"
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    probabilities = []
    with open_counts(source, layer=layer) as matrix, evaluating(model) as device:
        report = expression_report(matrix, model, **options)
        print(report)
        cells = options.get("cells")
        index = matrix.obs.index if cells is None else matrix.obs.index[cells]
        with tqdm(total=report.n_cells, desc="classify", unit="cell", disable=not progress) as bar:
            for rows, block in iter_expression(matrix, model, **options):
                for start in range(0, len(rows), CELLS_PER_BATCH):
                    x = torch.from_numpy(block[start : start + CELLS_PER_BATCH].toarray()).to(device)
                    probabilities.append(model(x).logits.float().softmax(dim=-1).cpu().numpy())
                bar.update(len(rows))
    table = np.concatenate(probabilities) if probabilities else np.empty((0, len(labels)), np.float32)
    best = pd.Categorical.from_codes(table.argmax(axis=1), dtype=pd.CategoricalDtype(labels))
    return pd.DataFrame({f"{name}_predicted": best, f"{name}_score": table.max(axis=1)}, index=index)
