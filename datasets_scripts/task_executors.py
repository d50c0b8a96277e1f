"""Runs the tasks of a corpus through datatrove: processes of this machine, a Slurm cluster, or Ray."""

import argparse
import contextlib
import math
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor, launch_slurm_job
from loguru import logger
from tqdm.auto import tqdm

from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.corpus_tasks import CorpusTask, TaskRun

SECONDS_BETWEEN_LOOKS = 0.5
# Jobs of a Slurm array: one less than Slurm's own default of MaxArraySize
MAX_ARRAY_SIZE = 1000


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    """Options of where and how tasks run. None of them changes what they write."""
    group = parser.add_argument_group("execution")
    group.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    group.add_argument("--workers", type=int, help="tasks at a time; absent: as many as the cores allow (local, ray)")
    group.add_argument("--cpus-per-task", type=int, default=1, help="cores of a task, and threads it reads with")
    group.add_argument("--memory-gb", type=int, default=4, help="memory of a task (slurm, ray)")
    group.add_argument("--partition", help="slurm: partition")
    group.add_argument("--time", default="08:00:00", help="slurm: time limit of a task")
    group.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="slurm: e.g. account=lab")
    group.add_argument(
        "--step",
        choices=("task", "finish"),
        help="what the submitted Slurm jobs call, with --output alone: the array's task, or the end of the run",
    )


def check_execution_options(arguments: argparse.Namespace) -> None:
    """Raises CorpusError for options that cannot be."""
    for name in ("tasks", "workers", "cpus_per_task", "memory_gb"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise CorpusError(f"--{name.replace('_', '-')} must be positive, found {value}.")
    if arguments.executor == "slurm" and arguments.step is None and arguments.partition is None:
        raise CorpusError("--executor slurm needs --partition.")
    if any("=" not in option for option in arguments.sbatch):
        raise CorpusError(f"Expected --sbatch NAME=VALUE, found {' '.join(arguments.sbatch)}.")


def carry_out(
    arguments: argparse.Namespace,
    block: CorpusTask,
    *,
    begin: Callable[[], TaskRun],
    finish: Callable[[TaskRun], None],
) -> None:
    """What a script of tasks does: begins or goes on with a run, runs the tasks that are left, finishes.

    finish   merges the parts, unless that was done before
    Raises   CorpusError if tasks failed, naming tasks, shards and errors
    """
    logger.disable("datatrove")
    check_execution_options(arguments)
    run = begin() if arguments.step is None else TaskRun(arguments.output)
    if arguments.step == "task":
        _run_array_task(run, block, arguments)
        return
    left = [] if run.merged else run.unfinished()
    if arguments.step is None and left:
        for rank in left:
            run.failure(rank).unlink(missing_ok=True)
        if arguments.executor == "slurm":
            _slurm_executor(run, block, arguments).launch_job()
            return
        make = _ray_executor if arguments.executor == "ray" else _local_executor
        executor = make(run, block, arguments)
        with _progress(run, len(left)):
            executor.run()
        left = run.unfinished()
    if left:
        raise CorpusError(run.explain_failures())
    finish(run)


def _local_executor(run: TaskRun, block: CorpusTask, arguments: argparse.Namespace) -> LocalPipelineExecutor:
    return LocalExecutor([block], run.n_tasks, _workers(arguments), str(run.folder))


def _workers(arguments: argparse.Namespace) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return arguments.workers or max(1, cores // arguments.cpus_per_task)


def _memory_per_core(arguments: argparse.Namespace) -> int:
    return math.ceil(arguments.memory_gb / arguments.cpus_per_task)


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's, with a process for each task, so that one that fails or is killed does not end or stop the others.

    (A pool ends at the first error, and waits forever for a task whose process was killed, as for want of memory.)
    """

    def run(self) -> None:
        context = multiprocessing.get_context(self.start_method)
        if self.start_method == "forkserver":
            # Imported once, not for each task
            modules = [name for step in self.pipeline for name in (type(step).__module__, *step.PRELOADED)]  # type: ignore[attr-defined]
            multiprocessing.set_forkserver_preload(modules)
        waiting = deque(self.get_incomplete_ranks())
        running: dict[int, tuple[int, BaseProcess]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    rank = waiting.popleft()
                    process = context.Process(  # type: ignore[attr-defined]
                        target=_run_alone, args=(self, rank), daemon=True
                    )
                    process.start()
                    running[process.sentinel] = rank, process
                for sentinel in connection.wait(list(running)):
                    rank, process = running.pop(sentinel)  # type: ignore[arg-type]
                    process.join()
                    self._note_end(rank, process.exitcode or 0)
        finally:
            for _, process in running.values():
                process.kill()

    def _note_end(self, rank: int, exit_code: int) -> None:
        failure = Path(self.logging_dir.path) / "failures" / f"{rank:05d}"
        if exit_code and not failure.exists():
            how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with status {exit_code}"
            failure.write_text(f"its process {how} (for want of memory or disk?)")


def _run_alone(executor: LocalExecutor, rank: int) -> None:
    """A task in its process, which ends with the one that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Errors are in failures/, all else in logs/; the screen has a progress bar.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            executor._run_for_rank(rank)
        except Exception:
            sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


class SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's, with jobs that call our command line again, in place of one that unpickles the executor.

    A last job, which waits for the array, finishes the run. Where there is no `sbatch`, scripts are only written.
    """

    command: str

    def launch_job(self) -> None:
        ranks = self.get_incomplete_ranks()
        with self.logging_dir.open("ranks_to_run.json", "w") as file:
            file.write(str(ranks))
        n_jobs = min(len(ranks), self.max_array_size)
        array = self._written("tasks.slurm", self.get_sbatch_args(n_jobs), "task")
        alone = {k: v for k, v in self.get_sbatch_args().items() if k != "array"}
        alone |= {name: value.replace("%A_%a", "%j") for name, value in alone.items() if name in ("output", "error")}
        finish = self._written("finish.slurm", alone, "finish")
        if shutil.which("sbatch") is None:
            print(f"No sbatch here: the scripts above were not submitted. They are in {self.logging_dir.path}.")
            return
        job = None
        try:
            for offset in range(math.ceil(len(ranks) / n_jobs)):
                after = [f"--dependency=afterany:{job}"] if job else []
                job = launch_slurm_job(array, self.job_id_retriever, f"--export=ALL,RUN_OFFSET={offset}", *after)
            last = launch_slurm_job(finish, self.job_id_retriever, f"--dependency=afterany:{job}")
        except subprocess.CalledProcessError as error:
            submitted = f"Job {job} was submitted before: scancel it. " if job else ""
            raise CorpusError(
                f"sbatch ended with status {error.returncode}, for a reason that it gives above. {submitted}Mend the "
                "options and run the same command again."
            ) from error
        print(f"Submitted {len(ranks)} tasks; job {last} finishes the run, or says which of them failed.")

    def _written(self, name: str, sbatch_args: dict[str, Any], step: str) -> str:
        script = self.get_launch_file_contents(sbatch_args, f"srun -l -n 1 {self.command} --step {step}")
        with self.logging_dir.open(name, "w") as file:
            file.write(script)
        print(f"--- {name}\n{script}")
        return script


def _slurm_executor(run: TaskRun, block: CorpusTask, arguments: argparse.Namespace) -> SlurmExecutor:
    module = type(block).__module__
    executor = SlurmExecutor(
        [block],
        run.n_tasks,
        arguments.time,
        arguments.partition,
        cpus_per_task=arguments.cpus_per_task,
        mem_per_cpu_gb=_memory_per_core(arguments),
        workers=arguments.workers or -1,
        job_name=module.rpartition(".")[2],
        max_array_size=MAX_ARRAY_SIZE,
        qos=None,  # type: ignore[arg-type]
        sbatch_args=dict(option.split("=", 1) for option in arguments.sbatch),
        logging_dir=str(run.folder),
    )
    executor.command = shlex.join([sys.executable, "-m", module, "--output", str(run.output), *block.command_options()])
    return executor


def _run_array_task(run: TaskRun, block: CorpusTask, arguments: argparse.Namespace) -> None:
    """Inside a Slurm job: the task of SLURM_ARRAY_TASK_ID."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise CorpusError("--step task is for jobs of a Slurm array: SLURM_ARRAY_TASK_ID is not set.")
    logger.enable("datatrove")
    _slurm_executor(run, block, arguments).run()


def _ray_executor(run: TaskRun, block: CorpusTask, arguments: argparse.Namespace) -> Any:
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError as error:
        raise CorpusError("--executor ray needs Ray: pip install 'cellglot[ray]'") from error
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        # The cluster that RAY_ADDRESS names, else this machine
        ray.init(log_to_driver=False, include_dashboard=False)
    return RayPipelineExecutor(
        [block],
        run.n_tasks,
        _workers(arguments),
        logging_dir=str(run.folder),
        cpus_per_task=arguments.cpus_per_task,
        mem_per_cpu_gb=_memory_per_core(arguments),
    )


@contextlib.contextmanager
def _progress(run: TaskRun, n_tasks: int) -> Iterator[None]:
    """A bar of tasks that completed, looked up in the run's folder, since each executor reports otherwise."""
    before = run.n_tasks - n_tasks
    ended = threading.Event()
    with tqdm(total=run.n_tasks, initial=before, desc="tasks", unit="task") as bar:

        def look() -> None:
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                refresh()

        def refresh() -> None:
            bar.n = len(os.listdir(run.folder / "completions"))
            n_failed = len(os.listdir(run.folder / "failures"))
            bar.set_postfix_str(f"{n_failed} failed" if n_failed else "")

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            refresh()
