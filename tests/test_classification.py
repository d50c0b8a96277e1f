"""Labels of cells: what the classifier says of each cell alone."""

from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellglot import (
    GeneformerForMultiTaskSequenceClassification,
    GeneformerForSequenceClassification,
    classify_cells,
)

from .conftest import make_tokenizer, synthetic_cells
from .modeling.test_geneformer import tiny_config, tiny_model

LABELS = ["B", "NK", "T"]
TASKS = {"cell_type": LABELS, "condition": ["ctrl", "stim"]}


def classifier(tokenizer, tasks=None, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.2, **options}
    if tasks is not None:
        return GeneformerForMultiTaskSequenceClassification(tiny_config(tasks=tasks, **sizes))
    return GeneformerForSequenceClassification(tiny_config(id2label=dict(enumerate(LABELS)), **sizes))


def setup(tasks=None, layout: Literal["v1", "v2"] = "v1", **options):
    """A classifier, a tokenizer, and 13 cells of which number 3 is empty."""
    tokenizer = make_tokenizer(31, layout)
    adata = synthetic_cells(13, 31)
    counts = adata.X.toarray()
    counts[3] = 0
    adata.X = sp.csr_matrix(counts)
    model = classifier(tokenizer, tasks, **options).eval()
    heads: Any = [model.classifier] if tasks is None else model.classifiers
    for head, logits in zip(heads, zip(*all_logits(model, tokenizer, adata), strict=True), strict=True):
        # So that cells get different labels
        head.bias.data -= torch.cat(logits).mean(0)
    return model, tokenizer, adata


def all_logits(model, tokenizer, adata):
    """For each cell that is not empty, run alone without padding, its logits (1, labels) of each task."""
    with torch.no_grad():
        for ids in tokenizer.encode_anndata(adata)["input_ids"]:
            if len(ids):
                logits = model(torch.tensor([ids])).logits
                yield logits if isinstance(logits, tuple) else (logits,)


def one_by_one(model, tokenizer, adata):
    """Probabilities of each task, (12, labels)."""
    by_task = zip(*all_logits(model.eval(), tokenizer, adata), strict=True)
    return [torch.cat(logits).softmax(1).numpy() for logits in by_task]


FILLED = [i for i in range(13) if i != 3]


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("options", [{}, {"max_tokens": 50, "cells_per_block": 4}])
def test_labels_equal_those_of_each_cell_alone(layout, pooling, options):
    model, tokenizer, adata = setup(layout=layout, classifier_pooling=pooling)
    model.train()
    annotated = classify_cells(adata, model, tokenizer, probabilities=True, progress=False, **options)
    assert model.training
    (expected,) = one_by_one(model, tokenizer, adata)
    assert len(set(expected.argmax(1))) > 1
    table = annotated.obsm["label_probabilities"]
    assert list(table.columns) == LABELS
    assert list(table.index) == list(adata.obs_names)
    np.testing.assert_allclose(table.iloc[FILLED], expected, atol=1e-5)
    assert list(annotated.obs["label_predicted"].iloc[FILLED]) == [LABELS[i] for i in expected.argmax(1)]
    np.testing.assert_allclose(annotated.obs["label_score"].iloc[FILLED], expected.max(1), atol=1e-5)
    assert "label_predicted" not in adata.obs


def test_an_empty_cell_has_no_label_and_the_result_can_be_saved(tmp_path):
    model, tokenizer, adata = setup()
    annotated = classify_cells(adata, model, tokenizer, names="cell_type", probabilities=True, progress=False)
    assert annotated.obs["cell_type_predicted"].isna().tolist() == [i == 3 for i in range(13)]
    assert annotated.obs["cell_type_score"].isna().tolist() == [i == 3 for i in range(13)]
    assert list(annotated.obs["cell_type_predicted"].cat.categories) == LABELS
    annotated.write_h5ad(tmp_path / "a.h5ad")
    again: Any = ad.read_h5ad(tmp_path / "a.h5ad")
    assert again.obs["cell_type_predicted"].isna().tolist() == [i == 3 for i in range(13)]
    assert list(again.obsm["cell_type_probabilities"].columns) == LABELS


def test_several_tasks_and_a_path(tmp_path):
    model, tokenizer, adata = setup(TASKS)
    adata.write_h5ad(tmp_path / "c.h5ad")
    frame = classify_cells(tmp_path / "c.h5ad", model, tokenizer, probabilities=True, progress=False)
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.index) == list(adata.obs_names)
    assert list(frame.columns) == [
        *("cell_type_predicted", "cell_type_score", "condition_predicted", "condition_score"),
        *(f"{name}_probability_{label}" for name, labels in TASKS.items() for label in labels),
    ]
    for (name, labels), expected in zip(TASKS.items(), one_by_one(model, tokenizer, adata), strict=True):
        columns = [f"{name}_probability_{label}" for label in labels]
        np.testing.assert_allclose(frame[columns].iloc[FILLED], expected, atol=1e-5)
        assert list(frame[f"{name}_predicted"].iloc[FILLED]) == [labels[i] for i in expected.argmax(1)]
    plain = classify_cells(tmp_path / "c.h5ad", model, tokenizer, names=["a", "b"], progress=False)
    assert list(plain.columns) == ["a_predicted", "a_score", "b_predicted", "b_score"]


def test_models_and_names_that_do_not_fit():
    model, tokenizer, adata = setup(TASKS)
    masked_lm = tiny_model(vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=r"GeneformerForMaskedLM has no classifier of cells. Fine-tune it"):
        classify_cells(adata, masked_lm, tokenizer, progress=False)
    for names in ("cell_type", ["a", "a"]):
        with pytest.raises(ValueError, match=r"Expected 2 different names, one for each of 'cell_type', 'condition'"):
            classify_cells(adata, model, tokenizer, names=names, progress=False)
    with pytest.raises(ValueError, match="they do not belong together"):
        classify_cells(adata, model, make_tokenizer(7), progress=False)
    only_one = GeneformerForSequenceClassification(tiny_config(vocab_size=len(tokenizer), num_labels=1))
    with pytest.raises(ValueError, match="has the label 'LABEL_0' only"):
        classify_cells(adata, only_one, tokenizer, progress=False)
    adata.obs["filter_pass"] = [1] * 12 + [0]
    with pytest.raises(ValueError, match="selects 12 of 13 cells: subset them first"):
        classify_cells(adata, model, tokenizer, progress=False)


@pytest.mark.parametrize("tasks", [None, TASKS])
def test_low_rank_adapters_take_part(tasks):
    peft = pytest.importorskip("peft")
    model, tokenizer, adata = setup(tasks)
    before = classify_cells(adata, model, tokenizer, probabilities=True, progress=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    after = classify_cells(adata, adapted, tokenizer, probabilities=True, progress=False)
    assert list(after.obs) == list(before.obs)
    for name in before.obsm:
        change = (after.obsm[name] - before.obsm[name]).iloc[FILLED]
        assert abs(change).max().max() > 1e-3
    with adapted.disable_adapter():
        again = classify_cells(adata, adapted, tokenizer, probabilities=True, progress=False)
    for name in before.obsm:
        np.testing.assert_allclose(again.obsm[name], before.obsm[name], atol=1e-6)


def test_no_cells_give_an_empty_result():
    model, tokenizer, adata = setup()
    assert classify_cells(adata[:0].copy(), model, tokenizer, progress=False).obs["label_predicted"].tolist() == []
