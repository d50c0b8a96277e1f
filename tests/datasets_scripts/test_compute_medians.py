"""Medians in tasks: those of one pass, exact or within the error that is stated."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from cellglot.datasets_scripts import compute_medians
from cellglot.datasets_scripts.compute_medians import main
from cellglot.datasets_scripts.corpus_tasks import TaskRun
from cellglot.tokenization.gene_tables import read_table
from cellglot.tokenization.medians import vocabulary_from_corpus
from cellglot.tokenization.rank_value import SPECIAL_TOKENS, RankValueTokenizer

from ..conftest import ROOT, synthetic_cells
from .killed_runs import kill_thrice

SIZES = {"a.h5ad": 1301, "b.h5ad": 523, "c.h5ad": 307}
COLUMNS = ("token", "token_id", "nonzero_median")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    # The files have other genes: 11, 13 and 17 of them.
    for n_genes, (name, n_cells) in zip((11, 13, 17), SIZES.items(), strict=True):
        synthetic_cells(n_cells, n_genes, n_genes).write_h5ad(folder / name)
    return folder


@pytest.fixture
def medians(corpus, tmp_path):
    """Runs the script in this process; returns the table and medians.json."""

    def run(*options, folder=corpus, output=tmp_path / "out", tasks=4):
        words = [folder, "--output", output, "--tasks", tasks, "--workers", 2, *options]
        main(list(map(str, words)))
        return read_table(output / "vocabulary.tsv", COLUMNS), json.loads((output / "medians.json").read_text())

    return run


@pytest.fixture(scope="module")
def one_pass(corpus):
    files = [corpus / name for name in SIZES]
    return vocabulary_from_corpus(files, special_tokens=SPECIAL_TOKENS["v2"], progress=False)


@pytest.mark.parametrize("tasks", [1, 4, 100])
def test_few_values_give_the_medians_of_one_pass(medians, one_pass, tasks):
    table, facts = medians("--layout", "v2", tasks=tasks)
    assert table["token"].tolist() == one_pass["token"].tolist()
    np.testing.assert_array_equal(table["nonzero_median"], one_pass["nonzero_median"])
    assert facts == {"n_genes": len(one_pass) - 4, "n_cells": sum(SIZES.values()), "relative_error": 0.0}


def test_many_values_give_medians_within_the_stated_error(medians, one_pass, tmp_path, capsys):
    sketched = ["--max-exact-values", 1000, "--sketch-error", 0.01, "--layout", "v2"]
    table, facts = medians(*sketched)
    assert facts["relative_error"] == 0.01
    assert "medians within 1.00%" in capsys.readouterr().out
    error = np.abs(table["nonzero_median"] / one_pass["nonzero_median"] - 1)[4:]
    assert 0 < error.max() <= 0.01
    other, _ = medians(*sketched, tasks=2, output=tmp_path / "two")
    assert other.equals(table)


def test_the_table_makes_a_tokenizer(medians, tmp_path):
    table, _ = medians("--layout", "v2")
    tokenizer = RankValueTokenizer.from_vocabulary(tmp_path / "out" / "vocabulary.tsv", layout="v2")
    assert list(tokenizer.gene_medians.values()) == table["nonzero_median"].tolist()[4:]


def test_aliases_name_the_genes(medians, tmp_path):
    aliases = tmp_path / "aliases.tsv"
    aliases.write_text("alias\tensembl_id\nENSG00000000001\tENSG00000000999\n")
    table, _ = medians("--aliases", aliases)
    assert "ENSG00000000999" in table["token"].tolist()
    assert "ENSG00000000001" not in table["token"].tolist()


def test_a_broken_shard_is_named_and_the_rest_is_kept(medians, corpus, one_pass, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    (folder / "b.h5ad").write_bytes((corpus / "b.h5ad").read_bytes()[:9000])
    with pytest.raises(
        SystemExit, match=r"compute_medians\.py: 1 of \d tasks failed:\n  task \d: b\.h5ad cannot be read"
    ):
        medians("--layout", "v2", folder=folder, tasks=100)
    shutil.copy(corpus / "b.h5ad", folder)
    table, _ = medians("--layout", "v2", folder=folder, tasks=100)
    np.testing.assert_array_equal(table["nonzero_median"], one_pass["nonzero_median"])


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_gives_the_same_table(medians, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for seed in range(3):
        synthetic_cells(512 * 5 + 41, 11 + seed, seed).write_h5ad(folder / f"{seed}.h5ad")
    sketched = ["--max-exact-values", 1000]
    medians(*sketched, folder=folder, tasks=18, output=tmp_path / "clean")
    output, script = tmp_path / "out", ROOT / "datasets_scripts" / "compute_medians.py"
    words = [sys.executable, script, folder, "--output", output, "--tasks", 18, "--workers", 2, *sketched]
    command = [str(word) for word in words]
    rng = np.random.default_rng(0)
    assert 0 < kill_thrice(command, output / ".run" / "completions", rng, tasks_too=False)[-1] < 14
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("vocabulary.tsv", "medians.json"):
        assert (output / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()


def test_a_merge_that_was_cut_off_is_done_again(medians, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TaskRun, "end_merge", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            medians()
    table, _ = medians()
    assert table.equals(medians(output=tmp_path / "clean")[0])
    assert not (tmp_path / "out" / ".run" / "merged").exists()
    assert medians()[0].equals(table)


def test_other_options_are_refused(medians):
    medians()
    with pytest.raises(SystemExit, match=r"was begun with other options: sketch_error 0\.005, now 0\.1"):
        medians("--sketch-error", 0.1)


@pytest.mark.parametrize("error", ["0", "1.5"])
def test_an_error_that_is_none_is_refused(medians, error):
    with pytest.raises(SystemExit, match="--sketch-error must lie between 0 and 1"):
        medians("--sketch-error", error)


def test_cells_without_counts_are_an_error(medians, tmp_path):
    adata = synthetic_cells(31, 5)
    adata.X.data[:] = 0
    adata.write_h5ad(tmp_path / "zeros.h5ad")
    with pytest.raises(SystemExit, match="No counts above zero in 31 cells"):
        medians(folder=tmp_path / "zeros.h5ad")


def test_no_single_values_are_kept_where_the_corpus_has_too_many(medians, tmp_path, monkeypatch):
    monkeypatch.setattr(compute_medians, "merge", lambda run: None)
    with pytest.raises(FileNotFoundError):
        medians("--max-exact-values", 1000)
    run = TaskRun(tmp_path / "out")
    for rank in range(run.n_tasks):
        with np.load(run.part(rank), allow_pickle=False) as part:
            assert "values" not in part
