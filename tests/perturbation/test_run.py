"""Results on disk: restart after a kill, and folders of other runs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellglot import perturb_cells
from cellglot.perturb import read_perturbations, write_perturbations
from cellglot.perturbation.run import ROWS_PER_TABLE, Run

from .test_perturb import setup

OPTIONS = {"part_tokens": 100, "progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_holds_what_the_function_returns(tmp_path):
    cells, model, tokenizer = setup(n_cells=7)
    expected = perturb_cells(cells, model, tokenizer, effect="gene", progress=False)
    folder = write_perturbations(cells, model, tokenizer, tmp_path / "out", effect="gene", **OPTIONS)
    assert len(list(folder.glob("part-*.parquet"))) > 2
    found = read_perturbations(folder)
    exact = ["cell", "gene", "position", "affected"]
    pd.testing.assert_frame_equal(found[exact], expected[exact])
    np.testing.assert_allclose(found["cosine_similarity"], expected["cosine_similarity"], atol=1e-5)
    on_cells = expected[expected["affected"] == "cell"].reset_index(drop=True)
    pd.testing.assert_frame_equal(read_perturbations(folder, only_cells=True)[exact], on_cells[exact])
    record = json.loads((folder / "perturbation.json").read_text())
    assert record["report"]["n_edits"] == len(on_cells)
    # Read and write in one call, and no part is computed again.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    again = perturb_cells(cells, model, tokenizer, effect="gene", output=folder, **OPTIONS)
    pd.testing.assert_frame_equal(again, found)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}


def test_large_tables_are_made_in_pieces(monkeypatch):
    cells, model, tokenizer = setup(n_cells=5)
    expected = perturb_cells(cells, model, tokenizer, effect="gene", progress=False)
    assert len(expected) < ROWS_PER_TABLE
    monkeypatch.setattr("cellglot.perturbation.run.ROWS_PER_TABLE", 40)
    sizes = []
    rows = Run._rows

    def counted(self, edits, effects):
        table = rows(self, edits, effects)
        sizes.append(table.num_rows)
        return table

    monkeypatch.setattr(Run, "_rows", counted)
    pd.testing.assert_frame_equal(perturb_cells(cells, model, tokenizer, effect="gene", progress=False), expected)
    # At most one edit's rows more than was set
    assert max(sizes) <= 40 + 17
    assert sum(sizes) == len(expected)


def test_missing_parts_are_computed_and_nothing_else(tmp_path):
    cells, model, tokenizer = setup(n_cells=7)
    clean = contents(write_perturbations(cells, model, tokenizer, tmp_path / "clean", **OPTIONS))
    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "clean", folder)
    (folder / "part-00001.parquet").unlink()
    # What a killed writer leaves
    (folder / "part-00002.parquet").rename(folder / "part-00002.parquet.tmp")
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of \d parts \(e.g. part-00001.parquet\).*Start it again"):
        read_perturbations(folder)
    write_perturbations(cells, model, tokenizer, folder, **OPTIONS)
    assert contents(folder) == clean


KILLED = """
import sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from tests.perturbation.test_run import OPTIONS
from tests.perturbation.test_perturb import setup
from cellglot.perturb import write_perturbations
from cellglot.perturbation.run import Run
tables = Run.tables
def slowly(self, part, bar):
    for table in tables(self, part, bar):
        time.sleep(0.2)
        yield table
Run.tables = slowly
write_perturbations(*setup(n_cells=9), {folder!r}, effect="gene", max_tokens=16, **OPTIONS)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    folder = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(root=root, folder=str(folder))], cwd=root)
    try:
        deadline = time.monotonic() + 120
        # Killed in the middle of a later part.
        while not ((folder / "part-00001.parquet").exists() and (folder / "part-00002.parquet.tmp").exists()):
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    survived = {name: data for name, data in contents(folder).items() if not name.endswith(".tmp")}
    options = {"effect": "gene", "max_tokens": 16, **OPTIONS}
    write_perturbations(*setup(n_cells=9), folder, **options)
    after = contents(folder)
    assert {name: after[name] for name in survived} == survived
    clean = contents(write_perturbations(*setup(n_cells=9), tmp_path / "clean", **options))
    assert after == clean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "overexpress"}, 'kind: "delete" there, "overexpress" now'),
        ({"layer": 0}, "layer: -1 there, 0 now"),
        ({"effect": "gene"}, 'effect: "cell" there, "gene" now'),
        ({"max_cells": 3}, "max_cells: null there, 3 now"),
        ({"cells": 8}, "cells: "),
        ({"model": 1}, "model: "),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path, change, message):
    cells, model, tokenizer = setup(n_cells=7)
    write_perturbations(cells, model, tokenizer, tmp_path, **OPTIONS)
    before = contents(tmp_path)
    change = dict(change)
    cells = setup(n_cells=change.pop("cells", 7))[0]
    if change.pop("model", None):
        model.bert.encoder.layer[0].output.dense.bias.data[0] += 1
    with pytest.raises(FileExistsError, match=f"results of another run.*{message}.*nothing was changed"):
        write_perturbations(cells, model, tokenizer, tmp_path, **change, **OPTIONS)
    assert contents(tmp_path) == before


def test_max_tokens_may_differ_when_a_run_goes_on(tmp_path):
    cells, model, tokenizer = setup(n_cells=7)
    expected = read_perturbations(write_perturbations(cells, model, tokenizer, tmp_path, max_tokens=10, **OPTIONS))
    (tmp_path / "part-00001.parquet").unlink()
    found = read_perturbations(write_perturbations(cells, model, tokenizer, tmp_path, max_tokens=99, **OPTIONS))
    np.testing.assert_allclose(found["cosine_similarity"], expected["cosine_similarity"], atol=1e-5)


def test_folders_of_something_else(tmp_path):
    cells, model, tokenizer = setup()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"is not empty \(it holds 'thesis.tex'\)"):
        write_perturbations(cells, model, tokenizer, tmp_path, **OPTIONS)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}
    with pytest.raises(FileNotFoundError, match=r"has no perturbation.json"):
        read_perturbations(tmp_path)
