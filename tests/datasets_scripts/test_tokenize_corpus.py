"""Tokenization in tasks: the rows of one pass, whatever the tasks, interruptions and executors."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets, load_dataset

from cellglot.datasets_scripts import corpus_tasks, tokenize_corpus
from cellglot.datasets_scripts.corpus_tasks import TaskRun
from cellglot.datasets_scripts.tokenize_corpus import TokenizeShares, main
from cellglot.tokenization.rank_value import RankValueTokenizer

from ..conftest import ROOT, make_tokenizer, synthetic_cells
from .killed_runs import kill_thrice

SIZES = {"a.h5ad": 1301, "b.h5ad": 523, "c.h5ad": 307}
N_GENES = 13


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (name, n_cells) in enumerate(SIZES.items()):
        adata = synthetic_cells(n_cells, N_GENES, seed)
        if name == "c.h5ad":
            adata.X = adata.X.tocsc()
        adata.obs["age"] = np.arange(n_cells) if seed else np.arange(n_cells) / 2
        adata.write_h5ad(folder / name)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "v2"
    make_tokenizer(N_GENES, "v2", medians=np.random.default_rng(0).gamma(2, size=N_GENES)).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenize(corpus, tokenizer, tmp_path):
    """Runs the script in this process; returns the output folder, which is always called `out`."""

    def run(*options, folder=corpus, output=tmp_path / "out", tasks=4):
        words = [folder, "--tokenizer", tokenizer, "--output", output, "--tasks", tasks, "--workers", 2, *options]
        main(list(map(str, words)))
        return output

    return run


def files(output: Path) -> dict[str, bytes]:
    """All that was published."""
    paths = [path for path in output.rglob("*") if path.is_file() and ".run" not in path.parts]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def one_pass(corpus: Path, tokenizer: Path, **options) -> Dataset:
    encoder = RankValueTokenizer.from_pretrained(tokenizer)
    parts = [encoder.encode_anndata(corpus / name, empty_cells="drop", **options) for name in sorted(SIZES)]
    return concatenate_datasets([part.cast_column("length", parts[0].features["length"]) for part in parts])


def test_the_dataset_holds_the_rows_of_one_pass_in_order(tokenize, corpus, tokenizer, tmp_path):
    output = tokenize("--obs-columns", "donor", "age", "--max-length", 7)
    rows = load_dataset(str(output), cache_dir=str(tmp_path / "cache"), split="train")
    expected = one_pass(corpus, tokenizer, max_length=7, obs_columns=["donor"])
    assert rows["input_ids"][:] == expected["input_ids"][:]
    assert rows["donor"][:] == expected["donor"][:]
    assert rows.features["age"].dtype == "float64"
    streamed = load_dataset(str(output), split="train", streaming=True)
    assert [row["input_ids"] for row in streamed] == expected["input_ids"][:]
    lengths = np.load(output / "lengths.npy", allow_pickle=False)
    assert lengths.tolist() == expected["length"][:]
    statistics = json.loads((output / "statistics.json").read_text())
    assert statistics["n_tokens"] == lengths.sum()
    assert statistics["n_cells"] + statistics["n_empty_cells"] == sum(SIZES.values())
    assert {name: seen["n_cells"] + seen["n_empty_cells"] for name, seen in statistics["shards"].items()} == SIZES


@pytest.mark.parametrize("tasks", [1, 100])
def test_rows_do_not_depend_on_the_number_of_tasks(tokenize, corpus, tokenizer, tmp_path, tasks):
    rows = load_dataset(str(tokenize(tasks=tasks)), cache_dir=str(tmp_path / "cache"), split="train")
    assert rows["input_ids"][:] == one_pass(corpus, tokenizer)["input_ids"][:]


def test_pretraining_takes_the_output(tokenize, tmp_path):
    from cellglot.train.pretrain_geneformer import PretrainConfig
    from cellglot.train.pretraining_data import prepare_data

    output = tokenize()
    config = PretrainConfig(data=str(output), vocabulary=str(output / "tokenizer"), layout="v2")
    data = prepare_data(config, tmp_path / "run")
    lengths = [*data.train["length"], *data.validation["length"]]
    assert sorted(lengths) == sorted(np.load(output / "lengths.npy").tolist())


def break_shard(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:9000])
    elif how == "a file of text":
        path.write_text("<html>404</html>")
    elif how == "without X":
        with h5py.File(path, "r+") as file:
            del file["X"]
    elif how == "an index of too few cells":
        with h5py.File(path, "r+") as file:
            starts: Any = file["X/indptr"]
            starts = starts[:-5]
            del file["X/indptr"]
            file["X/indptr"] = starts
    else:
        with h5py.File(path, "r+") as file:
            indices: Any = file["X/indices"]
            indices[5] = 99


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "cannot be read: truncated or corrupt"),
        ("a file of text", "cannot be read: truncated or corrupt"),
        ("an index out of range", "cannot be read: truncated or corrupt"),
        ("an index of too few cells", "cannot be read: truncated or corrupt"),
        ("without X", "has no X"),
    ],
)
def test_a_broken_shard_fails_its_task_alone_and_may_be_replaced(tokenize, corpus, tokenizer, tmp_path, how, message):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    break_shard(folder / "b.h5ad", how)
    with pytest.raises(SystemExit) as stopped:
        tokenize(folder=folder, tasks=100)
    run = TaskRun(tmp_path / "out")
    failed = [k for k, shares in enumerate(run.plan.tasks) if shares[0].shard == "b.h5ad" and shares[0].start == 0]
    assert run.unfinished() == failed
    told = f"tokenize_corpus.py: 1 of {run.n_tasks} tasks failed:\n  task {failed[0]}: b.h5ad"
    assert str(stopped.value).startswith(told)
    assert message in str(stopped.value)
    assert not (tmp_path / "out" / "data").exists()
    others = [k for k, shares in enumerate(run.plan.tasks) if "b.h5ad" not in [share.shard for share in shares]]
    marks = {k: (run.folder / "completions" / f"{k:05d}").stat().st_mtime_ns for k in others}
    shutil.copy(corpus / "b.h5ad", folder)
    tokenize(folder=folder, tasks=100)
    for k, when in marks.items():
        assert (run.folder / "completions" / f"{k:05d}").stat().st_mtime_ns == when, "a finished task was done again"
    rows = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), split="train")
    assert rows["input_ids"][:] == one_pass(corpus, tokenizer)["input_ids"][:]


def test_cells_that_are_no_counts_name_their_shard(tokenize, corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    adata = synthetic_cells(301, N_GENES)
    adata.X.data[7] = 0.5
    adata.write_h5ad(folder / "log.h5ad")
    with pytest.raises(SystemExit, match=r"log\.h5ad: cell 'cell\d+', gene 'ENSG\d+' has 0\.5, not an integer"):
        tokenize(folder=folder)


def test_a_file_of_which_little_is_known_may_be_let_pass_in_a_rerun(tokenize, corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    adata = synthetic_cells(301, 4 * N_GENES, density=1)
    adata.write_h5ad(folder / "other_genes.h5ad")
    told = r"other_genes\.h5ad: only \d\d\.\d% of counts fall on genes of the vocabulary .* --gene-ids .*"
    with pytest.raises(SystemExit, match=told + r"--min-matched-counts 0\.\d\d goes on all the same"):
        tokenize(folder=folder)
    tokenize("--min-matched-counts", 0.01, folder=folder)


def test_a_full_disk_is_said_and_the_rerun_goes_on(tokenize, corpus, tokenizer, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        # The driver without its executor, so that the block runs in this process.
        patch.setattr(tokenize_corpus, "carry_out", lambda arguments, block, begin, finish: begin())
        tokenize()
    run = TaskRun(output)
    block = TokenizeShares(str(output), 1, 0.5)

    class FullDisk(tokenize_corpus.pq.ParquetWriter):
        def write_table(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_corpus.pq, "ParquetWriter", FullDisk)
        with pytest.raises(ValueError, match="The disk is full"):
            block.run(rank=0)
    assert "The disk is full: writing to" in run.failure(0).read_text()
    assert not list((run.folder / "partial").iterdir())
    assert not list((run.folder / "parts").iterdir())
    assert files(tokenize()) == files(tokenize(output=tmp_path / "clean" / "out"))


def test_a_lost_part_is_made_again(tokenize, corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_corpus, "publish", lambda run: None)
        output = tokenize()
    TaskRun(output).part(1).unlink()
    assert files(tokenize()) == files(tokenize(output=tmp_path / "clean" / "out"))


def test_publishing_goes_on_wherever_it_was_cut_off(tokenize, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_corpus, "publish", lambda run: None)
        tokenize()
    prepared = tmp_path / "out"
    expected = files(tokenize(output=tmp_path / "clean" / "out"))
    real = os.replace
    for survived in range(100):
        output = shutil.copytree(prepared, tmp_path / str(survived) / "out")
        calls = iter(range(100))

        def replace(source, target, calls=calls, survived=survived):
            if next(calls) == survived:
                raise KeyboardInterrupt
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                tokenize_corpus.publish(TaskRun(output))
            except KeyboardInterrupt:
                assert not (output / "data").exists()
                patch.undo()
                tokenize(output=output)
                assert files(output) == expected
            else:
                break
    assert survived > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", "9"], "max_length None, now 9"),
        (["--layer", "counts"], "layer None, now 'counts'"),
        (["--tasks", "3"], "tasks 4, now 3"),
        (["--obs-columns", "donor"], r"obs_columns \[\], now \['donor'\]"),
    ],
)
def test_other_options_are_refused(tokenize, options, message):
    tokenize()
    with pytest.raises(SystemExit, match=f"was begun with other options: {message}. Pass the same, or another"):
        tokenize(*options)


def test_another_vocabulary_is_refused(tokenize, tokenizer, tmp_path):
    tokenize()
    other = tmp_path / "other"
    make_tokenizer(N_GENES, "v2").save_pretrained(other)
    with pytest.raises(SystemExit, match="was begun with other options: vocabulary"):
        tokenize("--tokenizer", str(other))


def test_changed_new_and_lost_files_are_refused(tokenize, corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    tokenize(folder=folder)
    synthetic_cells(31, N_GENES, 7).write_h5ad(folder / "a.h5ad")
    with pytest.raises(SystemExit, match=r"a\.h5ad has changed since it was read"):
        tokenize(folder=folder)
    shutil.copy(corpus / "a.h5ad", folder / "z.h5ad")
    shutil.copy(corpus / "a.h5ad", folder)
    (folder / "b.h5ad").unlink()
    with pytest.raises(SystemExit, match=r"begun with other files: z\.h5ad is new; b\.h5ad is gone\. Restore them"):
        tokenize(folder=folder)


def test_a_folder_that_moved_is_the_same(tokenize, corpus, tmp_path):
    before = files(tokenize())
    moved = shutil.copytree(corpus, tmp_path / "moved")
    assert files(tokenize(folder=moved)) == before


def test_outputs_of_other_origin_are_left_alone(tokenize, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="has files of other origin in it"):
        tokenize()
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_cells_of_no_known_gene_are_an_error(tokenize, tmp_path):
    synthetic_cells(31, N_GENES).write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        values: Any = file["X/data"]
        values[:] = 0
    with pytest.raises(SystemExit, match=r"No cell of .* has a gene of the vocabulary"):
        tokenize(folder=tmp_path / "cells.h5ad")


class KilledOnce(TokenizeShares):
    """Dies at its second task as when memory runs out, the first time."""

    def write_part(self, run, rank, path):
        n_cells = super().write_part(run, rank, path)
        died = run.folder / "died"
        if rank == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return n_cells


def test_a_killed_task_fails_alone(tokenize, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_corpus, "TokenizeShares", KilledOnce)
        with pytest.raises(SystemExit, match=r"1 of 4 tasks failed:\n  task 1: its process was killed by signal 9"):
            tokenize()
    assert TaskRun(tmp_path / "out").unfinished() == [1]
    assert files(tokenize()) == files(tokenize(output=tmp_path / "clean" / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["driver", "driver and tasks"])
def test_killed_at_any_moment_and_run_again_gives_the_same_files(tokenizer, tokenize, tmp_path, victims):
    rng = np.random.default_rng(len(victims))
    folder = tmp_path / "many"
    folder.mkdir()
    for seed in range(3):
        synthetic_cells(512 * 5 + 41, N_GENES, seed).write_h5ad(folder / f"{seed}.h5ad")
    expected = files(tokenize(folder=folder, tasks=18, output=tmp_path / "clean" / "out"))
    output = tmp_path / "out"
    script = ROOT / "datasets_scripts" / "tokenize_corpus.py"
    words = [sys.executable, script, folder, "--tokenizer", tokenizer, "--output", output, "--tasks", 18]
    command = [str(word) for word in [*words, "--workers", 2]]
    completed = kill_thrice(command, output / ".run" / "completions", rng, tasks_too="tasks" in victims)
    assert 0 < completed[-1] < 14
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(output) == expected
    assert not (output / ".run" / "partial").exists()


def test_without_a_corpus_or_vocabulary_the_error_says_so(tmp_path, capsys):
    for words in (["--output", "x"], [str(tmp_path), "--output", "x"]):
        with pytest.raises(SystemExit, match="Expected FOLDER and one of --tokenizer DIR and --vocabulary TABLE"):
            main(words)


def test_a_length_beyond_the_tokenizer_s_is_refused_before_any_task(tokenize, tmp_path):
    with pytest.raises(SystemExit, match="Expected max_length between 3 and the tokenizer's 4,096, found 5,000"):
        tokenize("--max-length", 5000)
    assert not (tmp_path / "out" / ".run").exists()


def test_a_share_without_tokens_is_an_empty_part(tokenize, corpus, tmp_path):
    adata = synthetic_cells(600, N_GENES)
    adata.X.data[:] = 0
    folder = tmp_path / "copy"
    folder.mkdir()
    adata.write_h5ad(folder / "zeros.h5ad")
    shutil.copy(corpus / "a.h5ad", folder)
    output = tokenize(folder=folder, tasks=100)
    assert len(list((output / "data").iterdir())) == 3 + 2
    rows = load_dataset(str(output), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(rows) == len(np.load(output / "lengths.npy"))


def test_many_failures_are_told_in_part(tokenize, corpus, monkeypatch):
    monkeypatch.setattr(corpus_tasks, "FAILURES_TOLD", 2)
    with pytest.raises(SystemExit) as stopped:
        tokenize("--gene-ids", "absent", tasks=100)
    assert str(stopped.value).count("var has no column 'absent'") == 2
    assert "6 of 6 tasks failed" in str(stopped.value)
    assert "  and 4 more, see " in str(stopped.value)


def test_run_records_hold_no_pickles(tokenize):
    output = tokenize()
    assert not [path for path in output.rglob("*") if path.suffix in (".pik", ".pkl", ".pickle")]
    assert corpus_tasks.TaskRun(output).record["options"]["script"] == "tokenize_corpus"
