"""The cross-species card: its code runs as it stands, block after block, and its tables are those of the results."""

import json
import re

import pytest

from cellglot.modeling.cross_species import configuration_cross_species

from .conftest import ROOT
from .test_translation import COMPONENTS, make_model, species_cells

CARD = (ROOT / "docs" / "cross_species.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", CARD, re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results" / "cross_species.json"


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    from cellglot import PCAProjectionFeatureExtractor

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    cells = {"human": species_cells(41, 31, "ENSG", 0), "mouse": species_cells(37, 23, "ENSMUSG", 1)}
    cells["mouse"].write_h5ad("mouse.h5ad")
    extractor = PCAProjectionFeatureExtractor.fit(cells, n_components=COMPONENTS, min_cells=1, progress=False)
    extractor.save_pretrained("runs/brain-aligned/model")
    model = make_model()  # with aligners
    model.save_pretrained("runs/brain-aligned/model")
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "cross_species.md", "exec"), names)
    assert len(BLOCKS) == 3
    assert names["translated"].shape == names["expression"].shape == (37, len(extractor.gene_ids("human")))
    assert names["embeddings"].shape == (37, 32)
    assert (tmp_path / "translated.h5ad").exists()
    # The code beside the weights says the same as the package.
    assert names["expression"] == pytest.approx(names["translated"].X, abs=1e-4)


def test_every_row_of_the_tables_is_one_of_the_results(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from cross_species import print_tables

    record = json.loads(RESULTS.read_text())
    for mouse, figures in record["figures"].items():
        print_tables(mouse, figures)
    printed = {_cells(line) for line in capsys.readouterr().out.splitlines()}
    after, before = CARD.index("## Figures against baselines"), CARD.index("## The paper's figures")
    rows = [_cells(line) for line in CARD[after:before].splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    assert [row for row in rows if row not in printed] == []


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip("| ").split("|"))


def test_the_default_axis_is_the_one_that_the_card_gives():
    default = configuration_cross_species.CrossSpeciesConfig().token_axis
    assert f'`token_axis="{default}"`, the default' in CARD
