"""What the speed benchmarks share: contenders in processes of their own, medians, peak memory, the machine in words.

A contender is one function of a benchmark script. It runs in a fresh Python process, `python SCRIPT --contender NAME
--arguments JSON`, so that its peak memory is its own, and writes what it found as one line of JSON on standard output.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

Contender = Callable[..., dict[str, Any]]


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which Linux starts at the peak of the process that started this one.
        peak_line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak_line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in KiB.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def run_contender(
    script: str | Path, name: str, arguments: Mapping[str, Any], *, python: str = sys.executable
) -> dict[str, Any]:
    """What the contender `name` of `script` returns, from a process of its own, with its `peak_rss_mb`.

    python  interpreter to run it with, e.g. of an environment that has the original's versions
    Raises  RuntimeError with the end of its errors if it fails
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [
            python,
            str(script),
            "--contender",
            name,
            "--arguments",
            json.dumps(arguments),
            "--answer",
            str(answer),
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode or not answer.exists():
            raise RuntimeError(f"{name} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(answer.read_text())


def interleaved(
    script: str | Path,
    contenders: Sequence[str],
    arguments: Mapping[str, Any],
    *,
    repeats: int,
    python: Mapping[str, str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Answers of every contender, `repeats` of each, in turns: what slows the machine for a while slows all alike."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tqdm(total=repeats * len(contenders), unit="run") as bar:
        for _ in range(repeats):
            for name in contenders:
                bar.set_description(name)
                interpreter = (python or {}).get(name, sys.executable)
                answers[name].append(run_contender(script, name, arguments, python=interpreter))
                bar.update()
    return answers


def median(answers: Sequence[Mapping[str, Any]], key: str) -> float:
    """Median of one figure over the repeats of a contender."""
    return statistics.median(answer[key] for answer in answers)


def worst(answers: Sequence[Mapping[str, Any]], key: str) -> float:
    """Largest value of one figure over the repeats of a contender (peak memory)."""
    return max(answer[key] for answer in answers)


def answer_as_contender(contenders: Mapping[str, Contender]) -> None:
    """Runs the contender that the command line names, if it names one, and exits.

    To be called first in a script's `main`.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--contender")
    parser.add_argument("--arguments")
    parser.add_argument("--answer")
    known, _ = parser.parse_known_args()
    if known.contender is None:
        return
    found = contenders[known.contender](**json.loads(known.arguments))
    Path(known.answer).write_text(json.dumps({**found, "peak_rss_mb": peak_rss_mb()}))
    sys.exit(0)


def machine() -> dict[str, Any]:
    """The machine in words, and the versions that decide speed."""
    return {"machine": describe_machine(), "versions": _versions()}


def describe_machine() -> str:
    """Processor, cores this process may use, memory, GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = _gpu()
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB memory, {gpu or 'no GPU'}, {platform.system()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    names = ("cellglot", "torch", "transformers", "datasets", "numpy", "numba", "isal", "h5py", "pyarrow")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def save_results(results: Mapping[str, Any], path: str | Path | None) -> None:
    """Writes flat results as JSON, aside and renamed; does nothing without a path."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)
    print(f"saved {path}")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table, numbers to three digits or with thousands separators."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    cells = [list(headers), *[[text(value) for value in row] for row in rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(headers))]
    for i, row in enumerate(cells):
        print("| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
