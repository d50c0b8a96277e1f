"""What is fine-tuned: the state of cells, or the state of genes. Each task knows its splits, examples and predictions.

Both answer the same methods, so that the script that trains them knows neither by name.
"""

from typing import Any, Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellglot.metrics.classification import softmax
from cellglot.modeling.geneformer import (
    GeneformerForMultiTaskSequenceClassification,
    GeneformerForSequenceClassification,
    GeneformerForTokenClassification,
)
from cellglot.tokenization.count_matrix import open_counts
from cellglot.tokenization.gene_masking import IGNORED_LABEL

from .expression_features import log_expression, variable_genes
from .finetuning_data import UNLABELLED, CellTable, LabelledGeneList
from .labelled_examples import LabelCollator, LabelledCells, LabelledGenes, balanced_weights

# Cells whose expression the baselines of gene labels see at the most
MAX_BASELINE_CELLS = 20_000


class Task(Protocol):
    """classes: name of each label -> its class names. items: what is split, by name."""

    per_gene: bool
    classes: dict[str, list[str]]
    items: np.ndarray

    def labels(self, name: str) -> np.ndarray:
        """(items,) class names, "" where unknown."""
        ...

    def model_class(self) -> Any: ...

    def model_options(self) -> dict[str, Any]: ...

    def examples(self, items: np.ndarray) -> tuple[Any, np.ndarray]:
        """(examples that teach or ask about the marked items, tokens of each)"""
        ...

    def collator(self, pad_token_id: int, train: np.ndarray | None, class_weights: str) -> LabelCollator: ...

    def predicted(self, batch: dict[str, Any], logits: Any, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(keys, scores) of the items of a batch, to be joined by `join`."""
        ...

    def join(self, items: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
        """One row a marked item that was predicted: item, and a column LABEL:CLASS of probabilities for each class."""
        ...

    def baseline_features(
        self, tokenizer: Any, train: np.ndarray, test: np.ndarray, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Dense (items, features) of the marked training and test items, for linear models and the like.

        options  layer and gene_ids of the count files
        Returns  None where only tokens are at hand
        """
        ...


class CellTask:
    """Cell-state classification, of one label or of several at once."""

    per_gene = False

    def __init__(self, cells: CellTable, columns: list[str]):
        self.cells = cells
        # In order of name, as the model keeps its tasks
        self.columns = sorted(columns)
        self.items = cells.obs.index.to_numpy(dtype=str)
        self.classes = {}
        for name in self.columns:
            found = sorted(set(cells.obs[name]) - {UNLABELLED})
            if len(found) < 2:
                raise ValueError(
                    f"Expected two labels or more in obs[{name!r}], found {found if found else 'none at all'}."
                )
            self.classes[name] = found
        self._numbers = np.stack([self._numbered(name) for name in self.columns], axis=1)

    def _numbered(self, name: str) -> np.ndarray:
        number = {label: i for i, label in enumerate(self.classes[name])}
        return np.array([number.get(label, IGNORED_LABEL) for label in self.cells.obs[name]], dtype=np.int64)

    def labels(self, name: str) -> np.ndarray:
        return self.cells.obs[name].to_numpy(dtype=str)

    def model_class(self) -> Any:
        several = len(self.columns) > 1
        return GeneformerForMultiTaskSequenceClassification if several else GeneformerForSequenceClassification

    def model_options(self) -> dict[str, Any]:
        if len(self.columns) > 1:
            return {"tasks": self.classes}
        return _one_label(self.columns[0], self.classes[self.columns[0]])

    def _of_model(self, numbers: np.ndarray) -> np.ndarray:
        return numbers if len(self.columns) > 1 else numbers[..., 0]

    def examples(self, items: np.ndarray) -> tuple[Any, np.ndarray]:
        index = np.flatnonzero(items)
        tokens = self.cells.tokens.select(index)
        return LabelledCells(tokens, self._of_model(self._numbers[index])), np.asarray(tokens["length"])

    def collator(self, pad_token_id: int, train: np.ndarray | None, class_weights: str) -> LabelCollator:
        weights = None
        if train is not None and class_weights == "balanced":
            most = max(len(names) for names in self.classes.values())
            weights = np.stack([balanced_weights(column[train], most) for column in self._numbers.T])
            weights = weights if len(self.columns) > 1 else weights[0]
        return LabelCollator(pad_token_id, per_gene=False, class_weights=weights)

    def predicted(self, batch: dict[str, Any], logits: Any, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = logits if isinstance(logits, tuple) else (logits,)
        return examples, np.concatenate([softmax(part.float().cpu().numpy()) for part in parts], axis=1)

    def join(self, items: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
        index = np.flatnonzero(items)[keys]
        columns = [f"{name}:{label}" for name in self.columns for label in self.classes[name]]
        order = np.argsort(index)
        return pd.DataFrame(scores[order], columns=columns).assign(item=index[order])

    def baseline_features(
        self, tokenizer: Any, train: np.ndarray, test: np.ndarray, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Log expression of the genes that vary most among the training cells."""
        cells, wanted = self.cells, train | test
        if not cells.sources:
            return None
        blocks = [
            _log_expression(source, cells.position[wanted & (cells.source == i)], tokenizer, options)
            for i, source in enumerate(cells.sources)
        ]
        x = variable_genes(sp.csr_matrix(sp.vstack(blocks)), train[wanted])
        return x[train[wanted]], x[test[wanted]]


class GeneTask:
    """Gene-state classification: the same gene in many cells, its label known for some genes."""

    per_gene = True

    def __init__(self, cells: CellTable, genes: LabelledGeneList, name: str, vocabulary_size: int):
        self.genes, self.name = genes, name
        self.items = genes.names.astype(str)
        self.classes = {name: sorted(set(genes.labels))}
        number = {label: i for i, label in enumerate(self.classes[name])}
        self._numbers = np.array([number[label] for label in genes.labels], dtype=np.int64)
        self.vocabulary_size = vocabulary_size
        self._item_of_token = np.full(vocabulary_size, -1)
        self._item_of_token[genes.tokens] = np.arange(len(genes.tokens))
        holds = np.zeros(len(cells.tokens), dtype=bool)
        seen = np.zeros(len(genes.tokens), dtype=bool)
        for i, ids in enumerate(cells.tokens["input_ids"]):
            found = self._item_of_token[ids]
            found = found[found >= 0]
            holds[i] = len(found) > 0
            seen[found] = True
        if not seen.any():
            raise ValueError(
                f"None of the {len(seen):,} labelled genes is expressed in the {len(holds):,} cells of the data."
            )
        # A gene that no cell holds can be neither learned nor predicted.
        self.expressed = seen
        self.cells = cells.select(holds)

    def labels(self, name: str) -> np.ndarray:
        return np.where(self.expressed, self.genes.labels, UNLABELLED)

    def model_class(self) -> Any:
        return GeneformerForTokenClassification

    def model_options(self) -> dict[str, Any]:
        return _one_label(self.name, self.classes[self.name])

    def examples(self, items: np.ndarray) -> tuple[Any, np.ndarray]:
        label_of_token = np.full(self.vocabulary_size, IGNORED_LABEL, dtype=np.int64)
        label_of_token[self.genes.tokens[items]] = self._numbers[items]
        return LabelledGenes(self.cells.tokens, label_of_token), np.asarray(self.cells.tokens["length"])

    def collator(self, pad_token_id: int, train: np.ndarray | None, class_weights: str) -> LabelCollator:
        weights = None
        if train is not None and class_weights == "balanced":
            # By occurrence: a gene in many cells is met often.
            met = np.zeros(self.vocabulary_size, dtype=np.int64)
            for ids in self.cells.tokens["input_ids"]:
                met[ids] += 1
            numbers = np.repeat(self._numbers[train], met[self.genes.tokens[train]])
            weights = balanced_weights(numbers, len(self.classes[self.name]))
        return LabelCollator(pad_token_id, per_gene=True, class_weights=weights)

    def predicted(self, batch: dict[str, Any], logits: Any, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked = batch["labels"] != IGNORED_LABEL
        keys = self._item_of_token[batch["input_ids"][asked].cpu().numpy()]
        return keys, softmax(logits[asked].float().cpu().numpy())

    def join(self, items: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
        """A gene's probabilities are the mean over the cells that hold it."""
        columns = [f"{self.name}:{label}" for label in self.classes[self.name]]
        of_gene = pd.DataFrame(scores, columns=columns).groupby(keys)
        return of_gene.mean().assign(n_cells=of_gene.size()).rename_axis("item").reset_index()

    def baseline_features(
        self, tokenizer: Any, train: np.ndarray, test: np.ndarray, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A gene's log expression in each of the cells (of at most MAX_BASELINE_CELLS of them)."""
        cells = self.cells
        if not cells.sources:
            return None
        drawn = np.random.default_rng(0).permutation(len(cells.source))[:MAX_BASELINE_CELLS]
        chosen = np.isin(np.arange(len(cells.source)), drawn)
        columns = self.genes.tokens - int(tokenizer.gene_token_ids[0])
        blocks = [
            _log_expression(source, cells.position[chosen & (cells.source == i)], tokenizer, options)[:, columns]
            for i, source in enumerate(cells.sources)
        ]
        x = sp.csr_matrix(sp.vstack(blocks)).toarray().T
        return x[train], x[test]


def _one_label(name: str, classes: list[str]) -> dict[str, Any]:
    """Options of the configuration of a classifier of one label."""
    numbers = {label: i for i, label in enumerate(classes)}
    return {"id2label": dict(enumerate(classes)), "label2id": numbers, "label_name": name}


def _log_expression(source: Any, positions: np.ndarray, tokenizer: Any, options: dict[str, Any]) -> sp.csr_matrix:
    """Log expression of rows of a source, given by their ascending positions."""
    with open_counts(source, layer=options.get("layer")) as matrix:
        chosen = np.zeros(matrix.n_cells, dtype=bool)
    chosen[positions] = True
    return log_expression(source, chosen, tokenizer, **options)[0]
