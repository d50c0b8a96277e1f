"""Results on disk: restart after a kill, and folders of other runs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from cellglot import perturb_cells
from cellglot.perturb import CellStates, read_perturbations, write_perturbations
from cellglot.perturbation.run import ROWS_PER_TABLE, Run
from cellglot.perturbation.states import embed_states, read_states
from cellglot.perturbation.statistics import mean_effects, shifts_to_states

from ..conftest import synthetic_cells
from .test_perturb import N_GENES, setup

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


@pytest.mark.parametrize("effect", ["cell", "gene"])
def test_means_of_a_folder_equal_those_of_its_rows(tmp_path, monkeypatch, effect):
    cells, model, tokenizer = setup(n_cells=11)
    rng = np.random.default_rng(0)
    states = CellStates("state", "a", "b", embeddings={name: rng.normal(size=32) for name in "ab"})
    dataset = datasets.Dataset.from_dict({"input_ids": cells, "state": ["a"] * len(cells)})
    write_perturbations(dataset, model, tokenizer, tmp_path, effect=effect, states=states, **OPTIONS)
    # As small as that, sums are merged many times.
    monkeypatch.setattr("cellglot.perturbation.streamed_means.ROWS_PER_READ", 7)
    monkeypatch.setattr("cellglot.perturbation.streamed_means.MAX_WAITING", 5)
    found, expected = mean_effects(tmp_path), mean_effects(read_perturbations(tmp_path))
    assert list(found.columns) == list(expected.columns)
    keys = [name for name in ("gene", "affected") if name in expected]
    assert len(found) == len(expected)
    if effect == "gene":
        assert (np.flatnonzero(found["affected"] == "cell") == np.arange((found["affected"] == "cell").sum())).all()
        assert found.loc[found["affected"] != "cell", "mean"].is_monotonic_increasing
    found, expected = (table.sort_values(keys, ignore_index=True) for table in (found, expected))
    # Squares of differences of 1e-8, float64's rounding of values near 1 being 1e-16
    pd.testing.assert_frame_equal(found, expected, rtol=1e-12, atol=1e-8)


def test_sums_do_not_cancel(tmp_path):
    cells, model, tokenizer = setup(n_cells=7)
    write_perturbations(cells, model, tokenizer, tmp_path, effect="gene", **OPTIONS)
    # Similarities so close to 1 that float32 has few steps between them
    for path in tmp_path.glob("part-*"):
        frame = pd.read_parquet(path)
        frame["cosine_similarity"] = np.float32(1) - np.float32(1e-6) * frame["position"].to_numpy(dtype=np.float32)
        frame.to_parquet(path)
    rows = read_perturbations(tmp_path)
    exact = rows.astype({"cosine_similarity": np.float64}).groupby(["gene", "affected"])["cosine_similarity"]
    table = mean_effects(tmp_path).set_index(["gene", "affected"])
    np.testing.assert_allclose(table["sd"], exact.std(ddof=0).loc[table.index], rtol=1e-6, atol=1e-15)


def test_parts_have_row_groups_of_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("cellglot.perturbation.run.ROWS_PER_GROUP", 30)
    options = {"max_tokens": 1, "progress": False}
    folder = write_perturbations(*setup(n_cells=19), tmp_path, **options)
    (path,) = folder.glob("part-*")
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert len(sizes) > 3
    assert min(sizes[:-1]) >= 30
    # At most one cell's rows more
    assert max(sizes) < 30 + 17
    pd.testing.assert_frame_equal(read_perturbations(folder), perturb_cells(*setup(n_cells=19), **options))


class TestStates:
    STATES = CellStates("cell_type", "B", "T", ["NK"])

    @pytest.fixture(autouse=True)
    def counted(self, monkeypatch):
        """Names of the states each time that they are embedded."""
        self.embedded = []

        def embed(cells, names, *args, **options):
            self.embedded.append(names)
            return embed_states(cells, names, *args, **options)

        monkeypatch.setattr("cellglot.perturbation.plan.embed_states", embed)

    def write(self, folder, **options):
        _, model, tokenizer = setup()
        adata = synthetic_cells(23, N_GENES)
        options = {"states": self.STATES, **options, **OPTIONS}
        return write_perturbations(adata, model, tokenizer, folder, **options)

    def test_are_embedded_once_and_kept(self, tmp_path):
        folder = self.write(tmp_path)
        assert self.embedded == [["T", "NK", "B"]]
        kept = read_states(folder / "states.parquet")
        assert list(kept) == ["T", "NK", "B"]
        assert [embedding.shape for embedding in kept.values()] == [(32,)] * 3
        before = contents(folder)
        (folder / "part-00001.parquet").unlink()
        self.write(folder)
        assert len(self.embedded) == 1
        assert contents(folder) == before
        # A run that was killed before it had them
        (folder / "states.parquet").unlink()
        self.write(folder)
        assert len(self.embedded) == 2
        assert contents(folder) == before

    def test_are_embedded_after_the_folder_was_found_to_fit(self, tmp_path):
        self.write(tmp_path)
        for change, message in (
            ({"kind": "inhibit"}, "kind: "),
            ({"states": CellStates("cell_type", "NK", "T", ["B"])}, 'start: "B" there, "NK" now'),
            ({"states": CellStates("cell_type", "B", "T", ["NK"], summary="median")}, 'state_summary: "mean" there'),
        ):
            with pytest.raises(FileExistsError, match=message):
                self.write(tmp_path, **change)
        assert len(self.embedded) == 1

    def test_start_and_report_are_known_of_what_is_read_back(self, tmp_path):
        frame = read_perturbations(self.write(tmp_path))
        assert list(shifts_to_states(frame)["state"].unique()) == ["T", "NK"]
        assert frame.attrs["start"] == "B"
        _, model, tokenizer = setup()
        adata = synthetic_cells(23, N_GENES)
        expected = perturb_cells(adata, model, tokenizer, states=self.STATES, progress=False)
        assert frame.attrs == expected.attrs


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
    left = ".part-00002.parquet.123.tmp"
    (folder / "part-00002.parquet").rename(folder / left)
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of \d parts \(e.g. part-00001.parquet\).*Start it again"):
        read_perturbations(folder)
    write_perturbations(cells, model, tokenizer, folder, **OPTIONS)
    after = contents(folder)
    del after[left]
    assert after == clean


def test_a_run_killed_while_it_wrote_its_record_starts_again(tmp_path):
    (tmp_path / ".perturbation.json.123.tmp").write_text("{")
    read_perturbations(write_perturbations(*setup(), tmp_path, **OPTIONS))


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
        while not ((folder / "part-00001.parquet").exists() and list(folder.glob(".part-00002.*.tmp"))):
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
    after = {name: data for name, data in contents(folder).items() if not name.endswith(".tmp")}
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


def test_cells_go_by_their_names(tmp_path):
    _, model, tokenizer = setup()
    adata = synthetic_cells(11, N_GENES)
    write_perturbations(adata, model, tokenizer, tmp_path, **OPTIONS)
    renamed = adata.copy()
    renamed.obs_names = [f"other{i}" for i in range(11)]
    tokens = tokenizer.encode_anndata(adata, max_length=17)
    for source, message in ((renamed, "cell_names: "), (tokens, r"cell_names: .* there, null now")):
        with pytest.raises(FileExistsError, match=rf"another run \({message}[^;]*\)"):
            write_perturbations(source, model, tokenizer, tmp_path, **OPTIONS)


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
