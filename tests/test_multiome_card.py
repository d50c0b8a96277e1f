"""The multiome card: its code runs as it stands, block after block, and its tables are those of the results."""

import json
import re
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from .conftest import ROOT

CARD = (ROOT / "docs" / "multiome.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results" / "multiome.json"


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    from cellglot import BinarizedStringProcessor, MultiomeT5Config, MultiomeT5ForFeaturePrediction

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rna, atac = (ad.AnnData(sp.csr_matrix(rng.poisson(0.4, size=(29, n)).astype(np.float32))) for n in (67, 71))
    rna.var_names = [f"G{i}" for i in range(67)]
    atac.var_names = [f"chr1-{i}00-{i}50" for i in range(1, 72)]
    processor = BinarizedStringProcessor.from_cells((rna, atac))
    sizes: Any = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    model = MultiomeT5ForFeaturePrediction(MultiomeT5Config(**sizes, **processor.model_fields()))
    for part in (model, processor):
        part.save_pretrained("runs/multiome-set/model")
    rna.write_h5ad("rna.h5ad")
    atac.write_h5ad("atac.h5ad")
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "multiome.md", "exec"), names)
    assert len(BLOCKS) == 3
    assert names["probabilities"].shape == names["scores"].shape == (29, 71)
    assert list(names["processor"].feature_extractor.peaks) == atac.var_names.tolist()
    assert names["open_peaks"].nnz == int((names["probabilities"] >= model.config.gex2atac_threshold).sum())
    assert capsys.readouterr().out == f"(29, 71) {names['open_peaks'].nnz}\n"


def test_every_row_of_the_tables_is_one_of_the_results(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from multiome import print_tables

    for name, figures in json.loads(RESULTS.read_text())["figures"].items():
        print_tables(name, figures)
    printed = {_cells(line) for line in capsys.readouterr().out.splitlines()}
    after, before = CARD.index("## Figures against baselines"), CARD.index("## What was tried")
    rows = [_cells(line) for line in CARD[after:before].splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    assert [row for row in rows if row not in printed] == []


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip("| ").split("|"))
