"""The method card's code runs as it stands, block after block, on small files of the names it uses."""

import re

import anndata as ad
import matplotlib
import pytest
from transformers import BertConfig, BertForSequenceClassification

from cellglot import GeneformerForMaskedLM, GeneformerForSequenceClassification

from .conftest import ROOT, ensembl, make_tokenizer, synthetic_cells, vocabulary_table
from .modeling.test_geneformer import tiny_config

CARD = ROOT / "docs" / "geneformer.md"
BLOCKS = re.findall(r"```python\n(.*?)```", CARD.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(31)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    GeneformerForMaskedLM(tiny_config(**sizes)).save_pretrained("runs/geneformer-pbmc/model")
    labels = {"id2label": {0: "B", 1: "NK", 2: "T"}, "label_name": "cell_type"}
    classifier = GeneformerForSequenceClassification(tiny_config(**sizes, **labels))
    classifier.save_pretrained("runs/geneformer-pbmc-celltypes/model")
    for run in ("geneformer-pbmc", "geneformer-pbmc-celltypes"):
        tokenizer.save_pretrained(f"runs/{run}/model")
    original = BertConfig(
        vocab_size=33,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        hidden_act="relu",
    )
    BertForSequenceClassification(original).save_pretrained("original-checkpoint")
    synthetic_cells(20, 31).write_h5ad("cells.h5ad")
    vocabulary_table(ensembl(31), [1.0] * 31).to_csv("vocabulary.tsv.gz", sep="\t", index=False)
    (tmp_path / "aliases.tsv").write_text("alias\tensembl_id\n")
    names: dict = {"adata": ad.read_h5ad("cells.h5ad")}
    for block in BLOCKS:
        exec(compile(block.replace("aliases.tsv.gz", "aliases.tsv"), "geneformer.md", "exec"), names)
    assert len(BLOCKS) >= 4
    assert len(names["dataset"]) == 20
    assert (tmp_path / "bert-checkpoint" / "model.safetensors").exists()
    assert names["adata"].obsm["cell_type_probabilities"].shape == (20, 3)
    assert "X_geneformer" in ad.read_h5ad("cells.h5ad").obsm
    assert {"T", "NK"} <= set(names["shifts"]["state"])
    assert len(names["effects"]) > 50
