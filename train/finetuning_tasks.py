"""What is fine-tuned: the state of cells, or the state of genes. Each task knows its splits, examples and predictions.

Both answer the same methods, so that the script that trains them knows neither by name.
"""

from collections.abc import Sequence
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

from .classifier import load_classifier, plain_model
from .expression_features import log_expression, variable_genes
from .finetuning_card import finetuning_card
from .finetuning_data import CellTable, LabelledGeneList
from .labelled_examples import LabelCollator, LabelledCells, LabelledGenes, balanced_weights
from .splits import UNLABELLED

# Cells whose expression the baselines see at the most
MAX_BASELINE_CELLS = 20_000


class Task(Protocol):
    """classes: name of each label -> its class names. items: what is split, by name."""

    per_gene: bool
    classes: dict[str, list[str]]
    items: np.ndarray

    def labels(self, name: str) -> np.ndarray:
        """(items,) class names, "" where unknown."""
        ...

    def load_model(self, config: Any) -> Any:
        """The network that the configuration describes, ready to be trained."""
        ...

    def plain_model(self, model: Any, config: Any) -> Any:
        """The trained network as it is saved."""
        ...

    def card(self, config: Any, result: Any, figures: Sequence[str]) -> str:
        """README.md of the model directory of one split, a `SplitResult`."""
        ...

    def examples(self, items: np.ndarray) -> tuple[Any, np.ndarray]:
        """(examples that teach or ask about the marked items, tokens of each)"""
        ...

    def collator(self, train: np.ndarray | None, class_weights: str) -> Any: ...

    def predicted(self, batch: dict[str, Any], logits: Any, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(keys, scores) of the items of a batch, to be put together by `merge`."""
        ...

    def merge(self, found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """(keys, scores) of several batches as of one."""
        ...

    def join(self, items: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
        """One row a marked item that was predicted: item, and a column LABEL:CLASS of probabilities for each class.

        keys, scores  of `merge`
        """
        ...

    def baseline_features(
        self, tokenizer: Any, train: np.ndarray, test: np.ndarray, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Dense (items, features) of the marked training and test items, for linear models and the like.

        options  layer and gene_ids of the count files
        Returns  None where only tokens are at hand
        """
        ...


class GeneformerTask:
    """What both tasks of a Geneformer have in common."""

    def load_model(self, config: Any) -> Any:
        return load_classifier(config, self)

    def plain_model(self, model: Any, config: Any) -> Any:
        return plain_model(model, config, self)

    def card(self, config: Any, result: Any, figures: Sequence[str]) -> str:
        return finetuning_card(self, config, result, figures)


class CellTask(GeneformerTask):
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
            # All of them: the model that is started from may have been of one label, or of others.
            return {"tasks": self.classes, "task_weights": None, "label_name": None}
        return _one_label(self.columns[0], self.classes[self.columns[0]])

    def _of_model(self, numbers: np.ndarray) -> np.ndarray:
        return numbers if len(self.columns) > 1 else numbers[..., 0]

    def examples(self, items: np.ndarray) -> tuple[Any, np.ndarray]:
        index = np.flatnonzero(items)
        tokens = self.cells.tokens.select(index)
        return LabelledCells(tokens, self._of_model(self._numbers[index])), np.asarray(tokens["length"])

    def collator(self, train: np.ndarray | None, class_weights: str) -> LabelCollator:
        weights = None
        if train is not None and class_weights == "balanced":
            most = max(len(names) for names in self.classes.values())
            counts = [np.bincount(column[train & (column >= 0)], minlength=most) for column in self._numbers.T]
            weights = np.stack([balanced_weights(of_task) for of_task in counts])
            weights = weights if len(self.columns) > 1 else weights[0]
        return LabelCollator(per_gene=False, class_weights=weights)

    def predicted(self, batch: dict[str, Any], logits: Any, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = logits if isinstance(logits, tuple) else (logits,)
        return examples, np.concatenate([softmax(part.float().cpu().numpy()) for part in parts], axis=1)

    def merge(self, found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        keys, scores = zip(*found, strict=True)
        return np.concatenate(keys), np.concatenate(scores)

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
        return x[train[wanted]].astype(np.float32), x[test[wanted]].astype(np.float32)


class GeneTask(GeneformerTask):
    """Gene-state classification: the same gene in many cells, its label known for some genes."""

    per_gene = True

    def __init__(
        self, cells: CellTable, genes: LabelledGeneList, name: str, vocabulary_size: int, min_per_class: int = 0
    ):
        self.genes, self.name = genes, name
        self.items = genes.names.astype(str)
        self.vocabulary_size = vocabulary_size
        self._item_of_token = np.full(vocabulary_size, -1)
        self._item_of_token[genes.tokens] = np.arange(len(genes.tokens))
        holds = np.zeros(len(cells.tokens), dtype=bool)
        # Cells that hold each labelled gene
        self.n_cells_g = np.zeros(len(genes.tokens), dtype=np.int64)
        for i, ids in enumerate(cells.tokens["input_ids"]):
            found = self._item_of_token[ids]
            found = found[found >= 0]
            holds[i] = len(found) > 0
            self.n_cells_g[found] += 1
        # A gene that no cell holds can be neither learned nor predicted.
        names, counts = np.unique(genes.labels[self.n_cells_g > 0].astype(str), return_counts=True)
        self.classes = {name: [str(label) for label in names[counts >= max(min_per_class, 1)]]}
        if len(self.classes[name]) < 2:
            raise ValueError(
                f"Of {len(genes.tokens):,} labelled genes, {int((self.n_cells_g > 0).sum()):,} are expressed in the "
                f"{len(holds):,} cells of the data; they have {len(self.classes[name])} labels with "
                f"{max(min_per_class, 1)} genes or more, expected two."
            )
        usable = (self.n_cells_g > 0) & np.isin(genes.labels.astype(str), self.classes[name])
        self._labels = np.where(usable, genes.labels, UNLABELLED).astype(str)
        number = {label: i for i, label in enumerate(self.classes[name])}
        self._numbers = np.array([number.get(label, IGNORED_LABEL) for label in self._labels], dtype=np.int64)
        self.cells = cells.select(holds)

    def labels(self, name: str) -> np.ndarray:
        return self._labels

    def model_class(self) -> Any:
        return GeneformerForTokenClassification

    def model_options(self) -> dict[str, Any]:
        return _one_label(self.name, self.classes[self.name])

    def examples(self, items: np.ndarray) -> tuple[Any, np.ndarray]:
        label_of_token = np.full(self.vocabulary_size, IGNORED_LABEL, dtype=np.int64)
        label_of_token[self.genes.tokens[items]] = self._numbers[items]
        return LabelledGenes(self.cells.tokens, label_of_token), np.asarray(self.cells.tokens["length"])

    def collator(self, train: np.ndarray | None, class_weights: str) -> LabelCollator:
        weights = None
        if train is not None and class_weights == "balanced":
            # By occurrence: a gene in many cells is met often.
            met = np.bincount(
                self._numbers[train], weights=self.n_cells_g[train], minlength=len(self.classes[self.name])
            )
            weights = balanced_weights(met)
        return LabelCollator(per_gene=True, class_weights=weights)

    def predicted(self, batch: dict[str, Any], logits: Any, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked = batch["labels"] != IGNORED_LABEL
        keys = self._item_of_token[batch["input_ids"][asked].cpu().numpy()]
        scores = softmax(logits[asked].float().cpu().numpy())
        # The last column counts occurrences.
        return self.merge([(keys, np.column_stack([scores, np.ones(len(scores))]))])

    def merge(self, found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Sums over occurrences: what is kept does not grow with the number of cells."""
        keys, scores = zip(*found, strict=True)
        genes, index = np.unique(np.concatenate(keys), return_inverse=True)
        sums = np.zeros((len(genes), len(self.classes[self.name]) + 1))
        np.add.at(sums, index, np.concatenate(scores))
        return genes, sums

    def join(self, items: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
        """A gene's probabilities are the mean over the cells that hold it."""
        columns = [f"{self.name}:{label}" for label in self.classes[self.name]]
        table = pd.DataFrame(scores[:, :-1] / scores[:, -1:], columns=columns)
        return table.assign(item=keys, n_cells=scores[:, -1].astype(int))

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
    # All of them: the model that is started from may have been of other labels, or of several.
    options = {"id2label": dict(enumerate(classes)), "label2id": numbers, "label_name": name}
    return {**options, "tasks": None, "task_weights": None}


def _log_expression(source: Any, positions: np.ndarray, tokenizer: Any, options: dict[str, Any]) -> sp.csr_matrix:
    """Log expression of rows of a source, given by their ascending positions."""
    with open_counts(source, layer=options.get("layer")) as matrix:
        chosen = np.zeros(matrix.n_cells, dtype=bool)
    chosen[positions] = True
    return log_expression(source, chosen, tokenizer, **options)[0]
