"""The drug response card: its code runs as it stands, block after block, and its tables are those of the results."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from cellglot import DrugResponseConfig, DrugResponseForConditionalGeneration, ExpressionFeatureExtractor
from cellglot.drug_response.data import ResponseData

from .conftest import ROOT

CARD = ROOT / "docs" / "drug_response.md"
BLOCKS = re.findall(r"```python\n(.*?)```", CARD.read_text(), re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results" / "drug_response.json"
GENES = 13


def l1000() -> ResponseData:
    """Two wells of each of 80 drugs, and controls, on one plate."""
    drugs = ["vorinostat", *(f"drug {i}" for i in range(79))]
    rng = np.random.default_rng(0)
    rows = [("DMSO", "HT115", 0.0, True)] * 6 + [(drug, "HT115", 10.0, False) for drug in drugs for _ in range(2)]
    obs = pd.DataFrame(rows, columns=["drug", "cell_line", "dose", "is_control"])
    genes = pd.DataFrame({"gene_symbol": [f"GENE{i}" for i in range(GENES)]}, index=[f"GENE{i}" for i in range(GENES)])
    smiles = {drug: "C" * (i + 1) + "O" for i, drug in enumerate(drugs)}
    expression = rng.normal(8, 1, size=(len(obs), GENES)).astype(np.float32)
    return ResponseData(expression, obs, genes, smiles, ("cell_line",), "l1000")


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = l1000()
    data.to_anndata().write_h5ad("l1000.h5ad")
    extractor = ExpressionFeatureExtractor.fit(data, drug_encoder="fingerprint", fingerprint_size=64)
    sizes = {"n_genes": GENES, "n_cell_lines": 1, "drug_encoder": "fingerprint", "fingerprint_size": 64}
    folder = "runs/drug-response-small-finetuned/model"
    DrugResponseForConditionalGeneration(DrugResponseConfig.from_preset("small", **sizes)).save_pretrained(folder)
    extractor.save_pretrained(folder)
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "drug_response.md", "exec"), names)
    assert len(BLOCKS) == 2
    assert names["predicted"].shape == (12, GENES)  # six controls at two doses
    assert len(names["responses"]) == 70


def test_every_row_of_the_tables_is_one_of_the_results(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from drug_response import print_tables

    print_tables(json.loads(RESULTS.read_text()))
    printed = {cells_of(line) for line in capsys.readouterr().out.splitlines()}
    card = CARD.read_text()
    after, before = card.index("## What it is worth"), card.index("## The paper's figures")
    rows = [cells_of(line) for line in card[after:before].splitlines() if line.startswith("| ")]
    assert len(rows) > 50
    assert [row for row in rows if row not in printed] == []


def cells_of(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip("|").split("|"))
