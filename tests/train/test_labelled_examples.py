"""Batches of labelled cells and genes, and the weights of their classes."""

import datasets
import numpy as np
import torch

from cellglot.train.labelled_examples import LabelCollator, LabelledCells, LabelledGenes, balanced_weights

CELLS = [[5, 2, 9], [7], [3, 5, 4, 8]]


def tokens():
    return datasets.Dataset.from_dict({"input_ids": CELLS, "length": [3, 1, 4]}).with_format("numpy")


def test_cells_keep_their_labels_in_any_order():
    examples = LabelledCells(tokens(), np.array([2, -100, 0]))
    batch = LabelCollator(per_gene=False, class_weights=np.array([0.5, 1, 2]))(examples[[2, 0, 1]], [()] * 3)
    assert batch["input_ids"].tolist() == [[3, 5, 4, 8, 5, 2, 9, 7]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 7, 8]
    assert batch["labels"].tolist() == [0, 2, -100]
    assert batch["class_weights"].dtype == torch.float32


def test_as_many_tasks_as_tokens_are_still_labels_of_the_cell():
    examples = LabelledCells(tokens(), np.array([[1, 0, 1], [0, 0, 0], [2, 1, 0]]))
    batch = LabelCollator(per_gene=False)(examples[[0]], [()])
    assert batch["labels"].tolist() == [[1, 0, 1]]
    assert "class_weights" not in batch


def test_genes_are_labelled_wherever_they_stand():
    label_of_token = np.full(10, -100)
    label_of_token[[5, 8]] = [1, 0]
    examples = LabelledGenes(tokens(), label_of_token)
    batch = LabelCollator(per_gene=True)(examples[[0, 1, 2]], [()] * 3)
    assert batch["labels"].tolist() == [[1, -100, -100, -100, -100, 1, -100, 0]]


def test_balanced_weights_make_classes_count_alike():
    known = np.array([0] * 30 + [1] * 10 + [3] * 5)
    weights = balanced_weights(np.bincount(known, minlength=5))
    assert np.isclose(weights[known].mean(), 1)
    assert np.allclose([weights[c] * (known == c).sum() for c in (0, 1, 3)], len(known) / 3)
    assert weights[2] == weights[4] == 1
