"""Tasks on Slurm and Ray: the scripts that would be submitted, run as Slurm would run them; the same rows."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cellglot.datasets_scripts.tokenize_corpus import main

from ..conftest import make_tokenizer, synthetic_cells

# What Slurm has on a node: `srun -l -n 1 COMMAND` runs the command, `scontrol show hostnames LIST` prints names.
NODE_COMMANDS = {"srun": 'exec "${@:4}"', "scontrol": "echo localhost"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    synthetic_cells(1301, 11).write_h5ad(folder / "cells.h5ad")
    return folder


@pytest.fixture
def words(corpus, tmp_path):
    make_tokenizer(11).save_pretrained(tmp_path / "tokenizer")
    return [str(corpus), "--tokenizer", str(tmp_path / "tokenizer"), "--tasks", "3", "--output", str(tmp_path / "out")]


def add_commands(folder: Path, commands: dict[str, str]) -> str:
    """The PATH on which these shell commands come first."""
    folder.mkdir(exist_ok=True)
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))


def test_slurm_scripts_are_written_and_give_the_dataset_when_run(words, tmp_path, capsys):
    slurm = ["--executor", "slurm", "--partition", "cpu", "--time", "01:00:00", "--workers", "2"]
    main([*words, *slurm, "--cpus-per-task", "2", "--memory-gb", "6", "--sbatch", "account=lab"])
    printed = capsys.readouterr().out
    run = tmp_path / "out" / ".run"
    tasks, finish = ((run / f"{name}.slurm").read_text() for name in ("tasks", "finish"))
    assert tasks in printed
    assert finish in printed
    assert "No sbatch here: the scripts above were not submitted" in printed
    expected = {"array": "0-2%2", "partition": "cpu", "time": "01:00:00", "cpus-per-task": "2", "mem-per-cpu": "3G"}
    found = directives(tasks)
    assert {**found, **expected, "account": "lab", "job-name": "tokenize_corpus"} == found
    assert "array" not in directives(finish)
    command = f"{sys.executable} -m cellglot.datasets_scripts.tokenize_corpus --output {tmp_path / 'out'}"
    assert f"srun -l -n 1 {command} --cpus-per-task 2 --min-matched-counts 0.5 --step task\n" in tasks
    assert f"srun -l -n 1 {command} --cpus-per-task 2 --min-matched-counts 0.5 --step finish\n" in finish
    assert not list(run.rglob("*.pik"))

    path = add_commands(tmp_path / "bin", NODE_COMMANDS)
    slurm_variables = {"PATH": path, "SLURM_NODELIST": "node[1]", "RUN_OFFSET": "0"}

    def bash(script: str, **variables: str) -> subprocess.CompletedProcess:
        environment = os.environ | slurm_variables | variables
        return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)

    for i in (2, 0):
        done = bash(tasks, SLURM_ARRAY_TASK_ID=str(i))
        assert done.returncode == 0, done.stderr
    early = bash(finish)
    assert early.returncode == 1
    assert "tokenize_corpus.py: 1 of 3 tasks failed:\n  task 1: did not run to its end" in early.stderr
    # Submitted again, the array is of the task that is left.
    main([*words, *slurm])
    assert directives((run / "tasks.slurm").read_text())["array"] == "0-0%2"
    assert bash((run / "tasks.slurm").read_text(), SLURM_ARRAY_TASK_ID="0").returncode == 0
    assert bash(finish).returncode == 0
    main([*words[:-1], str(tmp_path / "local" / "out")])
    for name in ("lengths.npy", "statistics.json", "README.md", "data/train-00001-of-00003.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / "out" / name).read_bytes()


def test_slurm_jobs_are_submitted_one_after_another(words, tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    body = f'echo "${{@:1:$#-1}}" >> {log}; echo "Submitted batch job $(wc -l < {log})"'
    monkeypatch.setenv("PATH", add_commands(tmp_path / "bin", {"sbatch": body}))
    monkeypatch.setattr("cellglot.datasets_scripts.task_executors.MAX_ARRAY_SIZE", 2)
    main([*words, "--executor", "slurm", "--partition", "cpu"])
    assert log.read_text().splitlines() == [
        "--export=ALL,RUN_OFFSET=0",
        "--export=ALL,RUN_OFFSET=1 --dependency=afterany:1",
        "--dependency=afterany:2",
    ]
    assert "Submitted 3 tasks; job 3 finishes the run" in capsys.readouterr().out


@pytest.mark.parametrize(("refused", "told"), [(1, "above. Mend"), (2, "Job 1 was submitted before: scancel it.")])
def test_a_refusal_of_sbatch_is_told(words, tmp_path, monkeypatch, refused, told):
    log = tmp_path / "log"
    body = f'echo >> {log}; n=$(wc -l < {log}); [ $n = {refused} ] && exit 3; echo "Submitted batch job $n"'
    monkeypatch.setenv("PATH", add_commands(tmp_path / "bin", {"sbatch": body}))
    with pytest.raises(SystemExit, match=f"sbatch ended with status 3, for a reason that it .*{told}"):
        main([*words, "--executor", "slurm", "--partition", "cpu"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--executor", "slurm"], "--executor slurm needs --partition"),
        (["--workers", "0"], "--workers must be positive, found 0"),
        (["--tasks", "-1"], "--tasks must be positive, found -1"),
        (["--sbatch", "exclusive"], "Expected --sbatch NAME=VALUE, found exclusive"),
    ],
)
def test_options_that_cannot_be_are_refused(words, options, message):
    with pytest.raises(SystemExit, match=message):
        main([*words, *options])


def test_without_datatrove_the_error_names_the_extra():
    code = "import sys; sys.modules['datatrove'] = None; import cellglot.datasets_scripts.tokenize_corpus"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: Tasks over a corpus need datatrove: pip install 'cellglot[scale-out]'" in done.stderr


def test_a_step_without_a_run_or_an_array_is_refused(words, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="holds no run"):
        main(["--output", str(tmp_path / "out"), "--step", "finish"])
    main([*words, "--executor", "slurm", "--partition", "cpu"])
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(SystemExit, match="--step task is for jobs of a Slurm array"):
        main(["--output", str(tmp_path / "out"), "--step", "task"])


HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_error_names_the_extra(words):
    with pytest.raises(SystemExit, match=r"--executor ray needs Ray: pip install 'cellglot\[ray\]'"):
        main([*words, "--executor", "ray"])


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")
def test_ray_gives_the_files_of_the_local_executor(words, tmp_path):
    # In a process of its own, which leaves no cluster behind
    command = [sys.executable, "-m", "cellglot.datasets_scripts.tokenize_corpus", *words]
    done = subprocess.run([*command, "--executor", "ray", "--memory-gb", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    main([*words[:-1], str(tmp_path / "local" / "out")])
    for name in ("lengths.npy", "README.md", *(f"data/train-0000{i}-of-00003.parquet" for i in range(3))):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / "out" / name).read_bytes()
