"""The README's code runs as it stands, in a folder like the one its first command leaves."""

import re

import matplotlib
import pytest

from cellglot import GeneformerForMaskedLM

from .conftest import ROOT, make_tokenizer, synthetic_cells
from .modeling.test_geneformer import tiny_config

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(code, tmp_path, monkeypatch):
    from .conftest import ensembl, vocabulary_table

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(31)
    tokenizer.save_pretrained("runs/geneformer-pbmc/model")
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=2048)
    GeneformerForMaskedLM(config).save_pretrained("runs/geneformer-pbmc/model")
    synthetic_cells(40, 31).write_h5ad("cells.h5ad")
    table = vocabulary_table(ensembl(31), [1.0] * 31, "v2")
    table.to_csv("vocabulary.tsv.gz", sep="\t", index=False)
    table.iloc[:0].assign(alias="", ensembl_id="").to_csv("aliases.tsv.gz", sep="\t", index=False)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    if "adata" in names:
        assert names["adata"].obsm["X_geneformer"].shape == (40, 32)
        assert (tmp_path / "figures" / "umap.png").exists()
    else:
        assert len(names["dataset"]) == 40


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 2
