"""The gene-graph card: its code runs as it stands, block after block, and its tables are those of the results."""

import json
import re

import matplotlib
import pytest

from cellglot.gene_graph import gene_names

from .conftest import ROOT
from .gene_graph.conftest import make_model, some_cells

CARD = (ROOT / "docs" / "gene_graph.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    cells = some_cells()
    cells.write_h5ad("cells.h5ad")
    (tmp_path / "edges.tsv").write_text("gene_a\tgene_b\nG1\tG2\nG2\tG3\nG5\tG9\n")
    model = make_model(gene_names(cells))
    # Untrained, it may call no cell a B cell.
    model.classifier.bias.data[0] += 9
    model.save_pretrained("runs/gene-graph-classifier/model")
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "gene_graph.md", "exec"), names)
    assert len(BLOCKS) == 3
    assert len(names["graph"].pairs) == 3
    # The code beside the weights says the same as the package.
    found = names["logits"].softmax(-1).amax(-1).detach().numpy()
    assert names["labels"]["cell_type_score"].to_numpy() == pytest.approx(found, abs=1e-5)
    assert names["ax"].texts


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip("| ").split("|"))


def test_every_row_of_the_tables_is_one_of_the_results(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gene_graph import print_summary
    from gene_graph_markers import print_ranks

    for table, summary in json.loads((RESULTS / "gene_graph.json").read_text())["tables"].items():
        print_summary(table, summary)
    print_ranks(json.loads((RESULTS / "gene_graph_markers.json").read_text()))
    printed = {_cells(line) for line in capsys.readouterr().out.splitlines()}
    rows = [_cells(line) for line in CARD[CARD.index("## Figures against") :].splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    assert [row for row in rows if row not in printed] == []
