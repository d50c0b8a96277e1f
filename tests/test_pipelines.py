"""The pipelines as a user meets them: from a directory, on AnnData and files, and what they say of wrong input."""

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2Model
from transformers.pipelines.base import PipelineException

from cellglot import GeneformerForMaskedLM, RankValueTokenizer, classify_cells, embed_cells

from . import test_classification, test_embedding
from .test_classification import LABELS, TASKS

# Its annotations know transformers' own tasks only.
pipeline: Any = transformers.pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories: of a masked LM, of a classifier, of a classifier of two tasks; and cells with an empty one."""
    root = tmp_path_factory.mktemp("models")
    model, tokenizer, adata = test_classification.setup()
    models = {
        "masked_lm": test_embedding.setup()[0],
        "classifier": model,
        "two_tasks": test_classification.setup(TASKS)[0],
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    adata.write_h5ad(root / "cells.h5ad")
    return root, models, tokenizer, adata


@pytest.mark.parametrize("name", ["masked_lm", "classifier", "two_tasks"])
def test_embeddings_from_the_directory_of_any_geneformer(folders, name):
    root, models, tokenizer, adata = folders
    pipe = pipeline("cell-embedding", model=root / name, progress=False)
    expected = embed_cells(adata, models[name], tokenizer, progress=False).obsm["X_geneformer"]
    assert np.flatnonzero(np.isnan(expected[:, 0])).tolist() == [3]
    found = pipe(adata)
    np.testing.assert_array_equal(found.obsm["X_geneformer"], expected)
    assert "X_geneformer" not in adata.obsm
    np.testing.assert_array_equal(pipe(root / "cells.h5ad"), expected)
    np.testing.assert_array_equal(pipe(str(root / "cells.h5ad")), expected)
    for result in pipe([root / "cells.h5ad", root / "cells.h5ad"]):
        np.testing.assert_array_equal(result, expected)


def test_options_when_made_and_when_called(folders, tmp_path):
    root, models, tokenizer, adata = folders
    pipe = pipeline("cell-embedding", model=str(root / "masked_lm"), progress=False, layer=0, key="X_last")
    last = embed_cells(adata, models["masked_lm"], tokenizer, layer=0, progress=False).obsm["X_geneformer"]
    np.testing.assert_array_equal(pipe(adata).obsm["X_last"], last)
    found = pipe(adata, layer=-1).obsm["X_last"]
    assert np.nanmax(abs(found - last)) > 0.01
    np.testing.assert_array_equal(pipe(adata).obsm["X_last"], last)
    assert pipe(root / "cells.h5ad", output=tmp_path / "e.parquet") == tmp_path / "e.parquet"
    with pytest.raises(ValueError, match="There is no option 'poolin'"):
        pipe(adata, poolin="mean")


def test_padding_changes_nothing(folders):
    root, _, _, adata = folders
    pipe = pipeline("cell-embedding", model=root / "masked_lm", progress=False)
    one_by_one = pipe(adata, max_tokens=1).obsm["X_geneformer"]
    np.testing.assert_allclose(pipe(adata).obsm["X_geneformer"], one_by_one, atol=1e-5)


def test_labels_from_a_directory(folders):
    root, models, tokenizer, adata = folders
    pipe = pipeline("cell-classification", model=root / "classifier", progress=False)
    expected = classify_cells(adata, models["classifier"], tokenizer, progress=False)
    found = pipe(adata)
    assert found.obs.equals(expected.obs)
    assert set(found.obs["label_predicted"].dropna()) <= set(LABELS)
    frame = pipe(root / "cells.h5ad", names="cell_type", probabilities=True)
    assert frame["cell_type_predicted"].tolist()[:3] == found.obs["label_predicted"].tolist()[:3]
    assert frame["cell_type_predicted"].isna().sum() == 1
    assert f"cell_type_probability_{LABELS[0]}" in frame


def test_labels_of_several_tasks_from_a_directory(folders):
    root, models, tokenizer, adata = folders
    found = pipeline("cell-classification", model=root / "two_tasks", progress=False)(adata)
    assert {f"{task}_predicted" for task in TASKS} <= set(found.obs)
    assert found.obs.equals(classify_cells(adata, models["two_tasks"], tokenizer, progress=False).obs)


def test_a_model_in_memory_and_the_device(folders):
    _, models, tokenizer, adata = folders
    pipe = pipeline(
        "cell-classification", model=models["classifier"], tokenizer=tokenizer, device="cpu", progress=False
    )
    assert pipe.device == torch.device("cpu")
    assert pipe(adata).obs["label_predicted"].notna().sum() == 12


def test_a_saved_pipeline_is_a_model_directory(folders, tmp_path):
    root, _, _, adata = folders
    first = pipeline("cell-embedding", model=root / "masked_lm", progress=False)
    first.save_pretrained(tmp_path / "again")
    second = pipeline("cell-embedding", model=tmp_path / "again", progress=False)
    np.testing.assert_array_equal(second(adata).obsm["X_geneformer"], first(adata).obsm["X_geneformer"])


def test_an_original_checkpoint_with_a_tokenizer_of_ours(folders, tmp_path):
    """A BERT is what the original saved; transformers alone would hand the pipeline a BertModel."""
    root, models, tokenizer, adata = folders
    models["masked_lm"].export_to_bert(tmp_path / "bert")
    models["classifier"].export_to_bert(tmp_path / "bert_classifier")
    pipe = pipeline("cell-embedding", model=tmp_path / "bert", tokenizer=tokenizer, progress=False)
    expected = pipeline("cell-embedding", model=root / "masked_lm", progress=False)(adata)
    np.testing.assert_array_equal(pipe(adata).obsm["X_geneformer"], expected.obsm["X_geneformer"])
    pipe = pipeline(
        "cell-classification", model=tmp_path / "bert_classifier", tokenizer=str(root / "masked_lm"), progress=False
    )
    assert pipe(adata).obs.equals(classify_cells(adata, models["classifier"], tokenizer, progress=False).obs)


def test_wrong_models_are_refused_with_the_way_out(folders, tmp_path):
    root, models, tokenizer, _ = folders
    with pytest.raises(PipelineException, match=r"holds GeneformerForMaskedLM, which has no classifier.*Fine-tune it"):
        pipeline("cell-classification", model=root / "masked_lm")
    with pytest.raises(ValueError, match="GeneformerForMaskedLM has no classifier of cells"):
        pipeline("cell-classification", model=models["masked_lm"], tokenizer=tokenizer)
    GPT2Model(GPT2Config(vocab_size=33, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    for task in ("cell-embedding", "cell-classification"):
        with pytest.raises(PipelineException, match=r"gpt2 holds a 'gpt2' model; expected 'geneformer', or 'bert'"):
            pipeline(task, model=tmp_path / "gpt2")
    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="knows 99 tokens, the tokenizer 33: they do not belong together"):
        pipeline("cell-embedding", model=tmp_path / "text", tokenizer=tokenizer)


def test_a_missing_tokenizer_is_named(folders, tmp_path):
    models = folders[1]
    models["masked_lm"].save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"No rank-value tokenizer in .*bare. Save it beside the model"):
        pipeline("cell-embedding", model=tmp_path / "bare")
    with pytest.raises(ValueError, match=r"tokenizer at .*nowhere, which is no directory here"):
        pipeline("cell-embedding", model=models["masked_lm"], tokenizer=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="No rank-value tokenizer in the model, which comes from no directory"):
        pipeline("cell-embedding", model=GeneformerForMaskedLM(models["masked_lm"].config))


def test_the_tokenizer_is_that_of_the_model_s_commit(folders, monkeypatch):
    model, tokenizer = copy.deepcopy(folders[1]["masked_lm"]), folders[2]
    model.config._commit_hash = "c0ffee"
    model.name_or_path = "org/model"
    asked = []
    monkeypatch.setattr(
        RankValueTokenizer, "from_pretrained", lambda *args, **kw: asked.append((args, kw)) or tokenizer
    )
    pipeline("cell-embedding", model=model)
    assert asked == [(("org/model",), {"revision": "c0ffee"})]


def test_batch_size_is_refused(folders):
    root, _, _, adata = folders
    with pytest.raises(ValueError, match=r"pass max_tokens= \(padded tokens a batch\), not batch_size="):
        pipeline("cell-embedding", model=root / "masked_lm", batch_size=8)
    with pytest.raises(ValueError, match="not batch_size="):
        pipeline("cell-embedding", model=root / "masked_lm")(adata, batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import cellglot; from transformers import pipeline",
        "from transformers import pipeline; import cellglot",
        "import cellglot.pipelines; from transformers import pipeline",
        "import transformers.pipelines.base, cellglot; from transformers.pipelines import pipeline",
        "from cellglot import GeneformerModel; from transformers import pipeline",
    ],
)
def test_tasks_are_known_in_any_order_of_imports(folders, code, tmp_path):
    root = folders[0]
    line = f"{code}\nprint(pipeline('cell-embedding', model={str(root / 'masked_lm')!r}, progress=False).task)"
    result = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "cell-embedding"
