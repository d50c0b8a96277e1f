"""Tokenizing a corpus in tasks: one worker against two, and what 30 and 100 million cells would take and cost.

    python benchmarks/tokenize_corpus.py --json benchmarks/results/tokenize_corpus.json

Simulated cells of `benchmarks/tokenization.py` (gzip `.h5ad`, 2,555 detected genes a cell) in several files, through
`datasets_scripts/tokenize_corpus.py` and `compute_medians.py` with the local executor, one core a task. Each contender
is the whole command in a process of its own: cells a second from the start of the first task to the end of the last,
and of the whole command. Peak memory is that of the driver, and of its largest task, by sampling.

The projection assumes that tasks keep the pace they had with two at a time (storage and memory of the other machines
deliver as here), and that planning and merging, which one core does, grow with the cells.
"""

import argparse
import functools
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import measure
import psutil
from simulated_cells import generate, generate_tokenizer

SCRIPTS = {"tokens": "tokenize_corpus", "medians": "compute_medians"}
PROJECTED_CELLS = (30_000_000, 100_000_000)
SECONDS_BETWEEN_SAMPLES = 0.02


def command(what: str, workers: int, corpus: str, tokenizer: str, work: str, tasks: int) -> dict[str, Any]:
    """Runs one of the scripts as its command line does; seconds of its phases, and memory."""
    import importlib

    from cellglot.datasets_scripts.task_executors import LocalExecutor

    script: Any = importlib.import_module(f"cellglot.datasets_scripts.{SCRIPTS[what]}")
    seconds: dict[str, float] = {}

    def timed(phase: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            found = function(*arguments)
            seconds[phase] = time.perf_counter() - started
            return found

        return call

    script.begin = timed("plan_seconds", script.begin)
    LocalExecutor.run = timed("tasks_seconds", LocalExecutor.run)
    finish = "publish" if what == "tokens" else "merge"
    setattr(script, finish, timed("merge_seconds", getattr(script, finish)))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        output = Path(folder) / "out"
        words = [corpus, "--output", str(output), "--tasks", str(tasks), "--workers", str(workers)]
        started = time.perf_counter()
        with TaskMemory() as memory:
            script.main([*words, "--tokenizer", tokenizer] if what == "tokens" else words)
        seconds["seconds"] = time.perf_counter() - started
        stats = [json.loads(path.read_text())[0] for path in sorted((output / ".run" / "stats").iterdir())]
        written = sum(path.stat().st_size for path in output.rglob("*.parquet"))
    return {
        **seconds,
        "n_cells": sum(int(task["stats"]["cells"]["total"]) for task in stats),
        "task_seconds": sum(task["time_stats"]["total"] for task in stats),
        "task_peak_rss_mb": memory.peak_mb,
        "disk_mb": written / 1e6,
    }


class TaskMemory:
    """The largest resident memory that any child of this process had, looked at often."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "TaskMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(SECONDS_BETWEEN_SAMPLES):
            for child in this.children(recursive=True):
                try:
                    self.peak_mb = max(self.peak_mb, child.memory_info().rss / 1e6)
                except psutil.Error:
                    # It ended meanwhile.
                    continue


CONTENDERS = {
    f"{what}, {workers} worker{'s' * (workers > 1)}": functools.partial(command, what, workers)
    for what in SCRIPTS
    for workers in (1, 2)
}


def projected(answer: dict[str, float], n_cells: int, workers: int) -> tuple[float, float]:
    """(hours, core-hours) for so many cells with so many workers."""
    serial = (answer["plan_seconds"] + answer["merge_seconds"]) / answer["n_cells"] * n_cells
    tasks = answer["task_seconds"] / answer["n_cells"] * n_cells
    return (serial + tasks / workers) / 3600, (serial + tasks) / 3600


def main() -> None:
    measure.answer_as_contender(CONTENDERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where to save the results")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cellglot-benchmarks")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--cells", type=int, default=25_000, help="of each file")
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--price", type=float, default=0.05, help="US dollars of a core-hour (on-demand cloud, 2026)")
    parser.add_argument("--workers", type=int, default=64, help="to project for, beside two")
    arguments = parser.parse_args()
    corpus = arguments.work / f"corpus-{arguments.files}-{arguments.cells}-{arguments.genes}-{arguments.seed}"
    corpus.mkdir(parents=True, exist_ok=True)
    for i in range(arguments.files):
        generate(corpus, arguments.cells, arguments.genes, 0, arguments.seed + i)
    given = {
        "corpus": str(corpus),
        "tokenizer": str(generate_tokenizer(arguments.work, arguments.seed)),
        "work": str(arguments.work),
        "tasks": arguments.tasks,
    }
    answers = measure.interleaved(__file__, list(CONTENDERS), given, repeats=arguments.repeats)
    results: dict[str, Any] = {
        **measure.machine(),
        "n_cells": arguments.files * arguments.cells,
        "n_files": arguments.files,
        "n_tasks": arguments.tasks,
        "repeats": arguments.repeats,
        "price_per_core_hour_usd": arguments.price,
        "assumption": "tasks keep the pace of two at a time; planning and merging, on one core, grow with the cells",
    }
    rows, projections = [], []
    for what in SCRIPTS:
        for name in (name for name in CONTENDERS if name.startswith(what)):
            key = name.replace(", ", "_").replace(" ", "_")
            medians = {figure: measure.median(answers[name], figure) for figure in answers[name][0]}
            results |= {
                f"{key}_cells_per_second": medians["n_cells"] / medians["tasks_seconds"],
                f"{key}_whole_command_cells_per_second": medians["n_cells"] / medians["seconds"],
                f"{key}_task_cells_per_core_second": medians["n_cells"] / medians["task_seconds"],
                f"{key}_plan_seconds": medians["plan_seconds"],
                f"{key}_merge_seconds": medians["merge_seconds"],
                f"{key}_driver_peak_rss_mb": measure.worst(answers[name], "peak_rss_mb"),
                f"{key}_task_peak_rss_mb": measure.worst(answers[name], "task_peak_rss_mb"),
            }
            rows.append(
                [
                    name,
                    results[f"{key}_cells_per_second"],
                    results[f"{key}_whole_command_cells_per_second"],
                    results[f"{key}_task_cells_per_core_second"],
                    medians["plan_seconds"] + medians["merge_seconds"],
                    results[f"{key}_driver_peak_rss_mb"],
                    results[f"{key}_task_peak_rss_mb"],
                ]
            )
        results[f"{what}_scaling"] = (
            results[f"{what}_2_workers_cells_per_second"] / results[f"{what}_1_worker_cells_per_second"]
        )
        two = answers[f"{what}, 2 workers"]
        middle = {figure: measure.median(two, figure) for figure in two[0]}
        for n_cells in PROJECTED_CELLS:
            for workers in (2, arguments.workers):
                hours, core_hours = projected(middle, n_cells, workers)
                key = f"{what}_{n_cells // 1_000_000}m_cells_{workers}_workers"
                results |= {f"{key}_hours": hours, f"{key}_usd": core_hours * arguments.price}
                disk = middle["disk_mb"] / middle["n_cells"] * n_cells / 1e3
                projections.append([what, n_cells, workers, hours, core_hours * arguments.price, disk or "-"])
    results["tokens_mb_per_million_cells"] = (
        measure.median(answers["tokens, 2 workers"], "disk_mb") / results["n_cells"] * 1e6
    )
    print(results["machine"])
    headers = ["contender", "cells/s, tasks", "whole command", "of a task", "plan and merge, s"]
    headers += ["driver peak MB", "task peak MB"]
    measure.print_table(headers, rows)
    for what in SCRIPTS:
        print(f"{what}: {results[f'{what}_scaling']:.2f} times the cells a second with 2 workers in place of 1")
    measure.print_table(
        ["what", "cells", "workers", "hours", f"USD at {arguments.price}", "GB of Parquet"], projections
    )
    print(f"Assuming: {results['assumption']}.")
    measure.save_results(results, arguments.json)


if __name__ == "__main__":
    main()
