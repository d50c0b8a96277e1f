"""The options of each prepare.py for files of one's own: real ones become a Space that answers about them."""

import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from .conftest import SPACES, prepare

pytestmark = [pytest.mark.slow, pytest.mark.realdata]


def opened_space(method: str, bundle: Path) -> Any:
    """The `Space` of its app.py, on a bundle."""
    spec = importlib.util.spec_from_file_location(f"app_of_{method}", SPACES / method / "app.py")
    assert spec is not None
    assert spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app.Space(bundle)


def silent(*_: Any, **__: Any) -> None:
    pass


def test_cross_species_takes_brain_cells_and_orthologs(real_data: Path, tmp_path: Path) -> None:
    options = {
        "--human": real_data / "cells/darmanis2015_human_cortex_267x22088.h5ad",
        "--mouse": real_data / "cells/zhuang_merfish_mouse_brain_1000x1122.h5ad",
        "--orthologs": real_data / "graph/orthologs_ensembl105_human2mouse.csv.gz",
    }
    words = [str(word) for item in options.items() for word in item]
    space = opened_space("cross_species", prepare("cross_species", tmp_path / "model", *words, "--epochs", "2"))
    translated, said, figures = space.translate(space.examples, "built in", silent)
    assert space.examples.n_obs == 400
    assert "1,106 of the 1,106 genes" in said
    assert "GABAergic neuron" in translated.distances.index
    assert len(figures) == 4


def test_multiome_takes_both_modalities_and_holds_out_batches(real_data: Path, tmp_path: Path) -> None:
    files = [str(real_data / f"multiome/bmmc_multiome_neurips2021_v1_{name}_500x600.h5ad") for name in ("rna", "atac")]
    options = ["--rna", files[0], "--atac", files[1], "--split-by", "batch", "--epochs", "1"]
    space = opened_space("multiome", prepare("multiome", tmp_path / "model", *options))
    assert space.about["accessibility"] == "measured"
    # Cells are named after their batches
    assert len({name.rsplit("-", 1)[1] for name in space.examples(silent).types}) < 4
    said, *figures = space.figures(space.examples(silent), next(iter(space.examples(silent).types)), "atac2gex")
    assert "planted" not in said
    assert None not in figures


def test_drug_response_takes_measured_responses_and_a_recipe(real_data: Path, tmp_path: Path) -> None:
    recipe = SPACES.parent / "train" / "recipes" / "finetune_drug_response_interferon.yaml"
    data = real_data / "cells/kang2018_ifnb_1556x1267.h5ad"
    options = ["--data", str(data), "--recipe", str(recipe), "--epochs", "2"]
    space = opened_space("drug_response", prepare("drug_response", tmp_path / "model", *options))
    drug, dose, line, structure = space.tries()["held out"]
    assert (drug, line, structure) == ("stim", "CD14+ Monocytes", "")
    said, *figures = space.predict(drug, dose, line, structure, None, silent)
    assert "**Held out**" in said
    assert None not in figures


def test_gene_graph_takes_a_network(real_data: Path, tmp_path: Path) -> None:
    network = real_data / "graph/pin_string.tsv.gz"
    options = ["--edges", str(network), "--epochs", "2"]
    space = opened_space("gene_graph", prepare("gene_graph", tmp_path / "model", *options))
    assert space.about["network"] == "pin_string.tsv.gz"
    known = {frozenset(pair) for pair in pd.read_csv(network, sep="\t").itertuples(index=False)}
    edges = space.examples(silent).edges.query("gene != neighbor")
    assert len(edges) > 100
    assert all(frozenset(pair) in known for pair in zip(edges["gene_symbol"], edges["neighbor_symbol"], strict=True))
