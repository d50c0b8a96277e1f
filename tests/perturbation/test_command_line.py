"""`python -m cellglot.perturb` on a model directory and a file of counts."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from cellglot import perturb_cells
from cellglot.perturb import CellStates, read_perturbations
from cellglot.perturbation.command_line import main
from cellglot.perturbation.states import read_states
from cellglot.perturbation.statistics import versus_null

from ..conftest import ensembl, make_tokenizer, synthetic_cells
from ..modeling.test_geneformer import tiny_model

N_GENES = 31


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model directory and cells whose genes have symbols."""
    folder = tmp_path_factory.mktemp("perturb")
    tokenizer = make_tokenizer(N_GENES)
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    adata = synthetic_cells(40, N_GENES)
    adata.var["gene_symbol"] = [f"SYM{i}" for i in range(N_GENES)]
    adata.write_h5ad(folder / "cells.h5ad")
    return folder, adata, model, tokenizer


def perturb(folder, output, *options, cells="cells.h5ad"):
    return main([str(folder / cells), "--model", str(folder / "model"), "--output", str(output), "--quiet", *options])


def test_shifts_to_a_goal_state(files, tmp_path, capsys):
    folder, adata, *_ = files
    states = ["--state-column", "cell_type", "--start", "B", "--goal", "T", "--alt", "NK"]
    assert perturb(folder, tmp_path / "out", *states) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"part-00000.parquet", "perturbation.json", "shift_ranking.png", "statistics.csv", "volcano.png"}
    assert written == {*expected, "states.parquet"}
    table = pd.read_csv(tmp_path / "out" / "statistics.csv")
    assert list(table["state"].unique()) == ["T", "NK"]
    assert table["symbol"].tolist() == [f"SYM{int(gene[4:]) - 1}" for gene in table["gene"]]
    n_start = int((adata.obs["cell_type"] == "B").sum())
    assert f"edits in {n_start} of 40 cells; {40 - n_start} are of other states" in capsys.readouterr().out
    # Again: nothing is left to do, and the other files do not count as another run's.
    assert perturb(folder, tmp_path / "out", *states) == 0


@pytest.mark.parametrize("states", [[], ["--state-column", "cell_type", "--start", "B", "--goal", "T"]])
@pytest.mark.parametrize("genes", ["all", ",".join(ensembl(9))])
def test_estimates_by_gradient(files, tmp_path, capsys, states, genes):
    folder, *_ = files
    options = ["--method", "gradient", "--genes", genes, "--max-cells", "9", *states]
    assert perturb(folder, tmp_path / "out", *options) == 0
    assert "Values are first-order estimates" in capsys.readouterr().out
    assert read_perturbations(tmp_path / "out").attrs["method"] == "gradient"
    shifts = [name for name in pd.read_csv(tmp_path / "out" / "statistics.csv") if "shift" in str(name)]
    assert bool(shifts) == bool(states)
    assert perturb(folder, tmp_path / "out", "--genes", genes, "--max-cells", "9", *states) == 1
    assert 'method: "gradient" there, "exact" now' in capsys.readouterr().err


def test_genes_joint_null_and_effects_on_genes(files, tmp_path):
    folder, adata, model, tokenizer = files
    genes = ensembl(3)
    options = ["--kind", "overexpress", "--genes", f"{genes[0]},{genes[1]}+{genes[2]}", "--effect", "gene"]
    assert perturb(folder, tmp_path / "a", *options, "--null", str(folder / "cells.h5ad"), "--max-cells", "7") == 0
    effects = pd.read_parquet(tmp_path / "a" / "part-00000.parquet")
    assert set(effects["gene"]) == {genes[0], f"{genes[1]}+{genes[2]}"}
    request = {"kind": "overexpress", "genes": [genes[0], genes[1:]], "effect": "gene", "max_cells": 7}
    expected = perturb_cells(adata, model, tokenizer, progress=False, **request)
    np.testing.assert_allclose(effects["cosine_similarity"], expected["cosine_similarity"], atol=1e-5)
    versus_null = pd.read_csv(tmp_path / "a" / "versus_null.csv")
    # The null set are the same cells.
    np.testing.assert_allclose(versus_null["difference"], 0, atol=1e-6)
    assert (tmp_path / "a" / "volcano_versus_null.png").exists()
    on_genes = pd.read_csv(tmp_path / "a" / "gene_effects.csv")
    assert len(on_genes) == len(effects.groupby(["gene", "affected"]))
    joint_options = ["--kind", "overexpress", "--genes", ",".join(genes[:2]), "--joint"]
    assert perturb(folder, tmp_path / "b", *joint_options) == 0
    joint = pd.read_csv(tmp_path / "b" / "statistics.csv")
    assert joint["gene"].tolist() == [f"{genes[0]}+{genes[1]}"]
    assert joint["symbol"].tolist() == ["SYM0+SYM1"]


def test_null_cells_of_any_state_are_compared_by_their_shift_to_the_goal(files, tmp_path, capsys):
    folder, adata, model, tokenizer = files
    # The null has no column of states.
    null = adata[20:].copy()
    null.obs = null.obs[["donor"]]
    null.write_h5ad(tmp_path / "null.h5ad")
    out = tmp_path / "out"
    options = ["--state-column", "cell_type", "--start", "B", "--goal", "T", "--null", str(tmp_path / "null.h5ad")]
    assert perturb(folder, out, *options) == 0
    assert "compared with the null cells by shift_to_T: " in capsys.readouterr().out
    table = pd.read_csv(out / "versus_null.csv")
    assert set(table["value"]) == {"shift_to_T"}
    # As by hand: all null cells have one state, whose embedding is that of the start.
    kept = read_states(out / "states.parquet")
    null.obs["any"] = "null"
    states = CellStates("any", "null", "T", embeddings={"null": kept["B"], "T": kept["T"]})
    of_null = perturb_cells(null, model, tokenizer, states=states, progress=False)
    expected = versus_null(read_perturbations(out), of_null, "shift_to_T")
    assert table["gene"].tolist() == expected["gene"].tolist()
    columns = ["n_cells", "n_null_cells", "mean", "null_mean", "difference", "p_value"]
    np.testing.assert_allclose(table[columns].to_numpy(), expected[columns].to_numpy(), atol=1e-5)
    # With the same command, it is finished; another null is refused before anything is computed.
    before = {path.name: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    assert perturb(folder, out, *options) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == before
    assert perturb(folder, out, *options[:-1], str(folder / "cells.h5ad")) == 1
    assert "null holds the results of another run" in capsys.readouterr().err


def test_what_tables_and_figures_need_is_looked_for_first(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert perturb(files[0], tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "need scikit-learn, not installed here: pip install 'cellglot[train]'" in error
    assert not (tmp_path / "out").exists()


def test_impact_of_all_genes(files, tmp_path):
    folder, *_ = files
    assert perturb(folder, tmp_path / "out", "--kind", "inhibit", "--rank-shift", "2", "--max-cells", "9") == 0
    assert "impact_share" in pd.read_csv(tmp_path / "out" / "statistics.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--genes", "NOPE"], "not in the vocabulary: 'NOPE'"),
        (["--state-column", "disease", "--start", "a", "--goal", "b"], "obs has no column 'disease'"),
        (["--state-column", "cell_type", "--start", "B", "--goal", "x"], "No cell has cell_type 'x'"),
        (["--rank-shift", "1"], "means nothing for 'delete'"),
        (["--pooling", "cls"], "use pooling='mean'"),
        (["--null", "absent.h5ad"], "absent.h5ad"),
        (["--model", "absent"], "absent"),
        (["--device", "gpu"], "--device gpu cannot be used"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    ],
)
def test_mistakes_of_users_are_one_line_each(files, tmp_path, capsys, options, message):
    folder, *_ = files
    assert perturb(folder, tmp_path / "out", "--max-cells", "2", *options) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "B"], "cell states need --state-column, --start and --goal"),
        (["--joint"], "--joint perturbs listed genes together"),
        (["--kind", "knockout"], "invalid choice: 'knockout'"),
    ],
)
def test_options_that_do_not_go_together(files, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        perturb(files[0], tmp_path / "out", *options)
    assert message in capsys.readouterr().err


def test_the_module_runs_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "cellglot.perturb", "--help"], capture_output=True, text=True, check=True
    )
    assert "--anchor GENE" in result.stdout
    # Importing the package stays cheap.
    code = "import sys, cellglot; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
