"""Tokenizes a folder of count files of any size, in tasks that run anywhere and survive being killed.

    python datasets_scripts/tokenize_corpus.py FOLDER --tokenizer DIR --output OUT --workers 8
    python datasets_scripts/tokenize_corpus.py FOLDER --vocabulary TABLE --layout v2 --output OUT \\
        --executor slurm --partition cpu --tasks 600 --workers 100

The output is a dataset: `load_dataset(OUT)` gives input_ids, length and the chosen columns of obs, in order of file
name and cell, whatever the number of tasks; `train/pretrain.py --data OUT --vocabulary OUT/tokenizer` trains on it.
Beside the rows lie `lengths.npy`, `statistics.json`, the tokenizer, and a dataset card. The same command goes on with a
run that was interrupted.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.corpus_tasks import CorpusTask, TaskRun
from cellglot.datasets_scripts.task_executors import add_execution_options, carry_out
from cellglot.datasets_scripts.token_card import write_card
from cellglot.tokenization.rank_value import MIN_MATCHED_COUNTS, RankValueTokenizer, TokenizationReport
from cellglot.train.config import write_json
from cellglot.train.fingerprint import fingerprint

# 4,096 cells of 4,096 tokens are 67 MB before compression.
ROWS_PER_GROUP = 4096
REPORTS = b"tokenization_reports"
SUMMED = ("n_cells", "n_empty_cells", "n_truncated_cells", "total_counts", "matched_counts")


class TokenizeShares(CorpusTask):
    """Pipeline block: the cells of a task as rows of tokens in one Parquet file.

    threads             that read and encode
    min_matched_counts  share of a file's counts that must fall on the vocabulary; no part of the run's record, since
                        rows do not depend on it, so that it can be lowered for the file that is left
    """

    name = "rank-value tokens"
    PRELOADED = ("cellglot.tokenization.compiled_encoding",)

    def __init__(self, output: str, threads: int, min_matched_counts: float):
        super().__init__(output)
        self.threads, self.min_matched_counts = threads, min_matched_counts

    def command_options(self) -> list[str]:
        return ["--cpus-per-task", str(self.threads), "--min-matched-counts", str(self.min_matched_counts)]

    def write_part(self, run: TaskRun, rank: int, path: Path) -> int:
        options = run.record["options"]
        tokenizer = RankValueTokenizer.from_pretrained(run.folder / "tokenizer")
        schema = token_schema(run.plan.obs_types)
        reports = []
        with pq.ParquetWriter(path, schema) as writer:
            for share in run.plan.tasks[rank]:
                report = TokenizationReport()
                with run.open_share(share) as (matrix, cells):
                    batches = tokenizer.iter_encoded(
                        matrix,
                        cells=cells,
                        threads=self.threads,
                        report=report,
                        **{name: options[name] for name in ("max_length", "gene_ids", "obs_columns", "empty_cells")},
                        min_matched_counts=self.min_matched_counts,
                    )
                    for table in _row_groups(batches):
                        writer.write_table(table.cast(schema))
                reports.append(asdict(report) | {"name": share.shard})
            # In the file itself, which is there whole or not at all.
            writer.add_key_value_metadata({REPORTS: json.dumps(reports)})
        return sum(report["n_cells"] for report in reports)


def token_schema(obs_types: dict[str, str]) -> pa.Schema:
    """input_ids, length, and the columns of obs in the types of the plan."""
    obs = [(name, pa.type_for_alias(kind)) for name, kind in obs_types.items()]
    return pa.schema([("input_ids", pa.list_(pa.int32())), ("length", pa.int32()), *obs])


def _row_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(b.num_rows for b in held) >= ROWS_PER_GROUP:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def publish(run: TaskRun) -> None:
    """Lengths, statistics, card and tokenizer, and the parts as `data/`: by one rename, after all else.

    Raises  CorpusError if no cell has tokens
    """
    if not run.merged:
        parts = [run.part(rank) for rank in range(run.n_tasks)]
        n_rows = [pq.read_metadata(part).num_rows for part in parts]
        if not sum(n_rows):
            raise CorpusError(f"No cell of {run.record['corpus']} has a gene of the vocabulary.")
        lengths = _write_lengths(parts, sum(n_rows), run.output / "lengths.npy")
        statistics = _statistics(parts, lengths)
        write_json(run.output / "statistics.json", statistics)
        shutil.copytree(run.folder / "tokenizer", run.output / "tokenizer", dirs_exist_ok=True)
        write_card(run.output, statistics, pq.read_schema(parts[0]), np.bincount(lengths), parts)
        run.end_merge()
    if (run.folder / "merged").exists():
        for part in (run.folder / "merged").glob("[0-9]*"):
            os.replace(part, part.with_name(f"train-{part.name}-of-{run.n_tasks:05d}.parquet"))
        os.replace(run.folder / "merged", run.output / "data")
    found = json.loads((run.output / "statistics.json").read_text())
    print(
        f"{found['n_cells']:,} cells, {found['n_tokens']:,} tokens, median length {found['median_length']:,.0f}; "
        f"{found['n_truncated_cells']:,} cells truncated, {found['n_empty_cells']:,} without tokens\n{run.output}"
    )


def _write_lengths(parts: list[Path], n_rows: int, path: Path) -> np.ndarray:
    """(rows,) int32 number of tokens of each row, as a memory-mapped .npy."""
    partial = path.with_suffix(".tmp")
    lengths = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int32, shape=(n_rows,))
    start = 0
    for part in tqdm(parts, "lengths", unit="part"):
        column = pq.read_table(part, columns=["length"]).column("length").to_numpy()
        lengths[start : start + len(column)] = column
        start += len(column)
    lengths.flush()
    os.replace(partial, path)
    return lengths


def _statistics(parts: list[Path], lengths: np.ndarray) -> dict[str, Any]:
    """Cells, tokens and lengths of the corpus, and what was seen of each of its files."""
    shards: dict[str, dict[str, Any]] = {}
    for part in parts:
        for report in json.loads(pq.read_metadata(part).metadata[REPORTS]):
            name = report.pop("name")
            shard = shards.setdefault(name, report | dict.fromkeys(SUMMED, 0))
            for key in SUMMED:
                shard[key] += report[key]
    totals = {key: sum(shard[key] for shard in shards.values()) for key in SUMMED}
    return {
        **totals,
        "n_tokens": int(lengths.sum(dtype=np.int64)),
        "median_length": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "shards": shards,
    }


def begin(arguments: argparse.Namespace) -> TaskRun:
    """The run that the command line asks for."""
    if arguments.corpus is None or (arguments.tokenizer is None) == (arguments.vocabulary is None):
        raise CorpusError("Expected FOLDER and one of --tokenizer DIR and --vocabulary TABLE.")
    if arguments.tokenizer is not None and (arguments.layout is not None or arguments.aliases is not None):
        raise CorpusError("--layout and --aliases go with --vocabulary; a tokenizer has its own.")
    tables = (arguments.tokenizer, arguments.vocabulary, arguments.aliases)
    for table in filter(None, tables):
        if not Path(table).exists():
            raise CorpusError(f"{table} does not exist.")

    def save_tokenizer(folder: Path) -> None:
        if arguments.tokenizer is not None:
            tokenizer = RankValueTokenizer.from_pretrained(arguments.tokenizer)
        else:
            tokenizer = RankValueTokenizer.from_vocabulary(
                arguments.vocabulary,
                arguments.layout or "v1",
                arguments.aliases,
                max_length=arguments.max_length,
            )
        tokenizer.checked_max_length(arguments.max_length)
        tokenizer.save_pretrained(folder / "tokenizer")

    options = {
        "script": "tokenize_corpus",
        "vocabulary": fingerprint((), tables, {"layout": arguments.layout}),
        **{name: getattr(arguments, name) for name in ("max_length", "layer", "gene_ids", "obs_columns")},
        "empty_cells": arguments.empty_cells,
    }
    return TaskRun.begin(arguments.output, arguments.corpus, options, n_tasks=arguments.tasks, prepare=save_tokenizer)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="FOLDER", nargs="?", help=".h5ad, .loom, 10x .h5 or .mtx; or one file")
    parser.add_argument("--output", required=True, help="folder of the dataset; an interrupted run in it goes on")
    parser.add_argument("--tokenizer", metavar="DIR", help="saved rank-value tokenizer")
    parser.add_argument("--vocabulary", metavar="TABLE", help="table of token, token_id, nonzero_median")
    parser.add_argument("--layout", choices=("v1", "v2"), help="of a vocabulary table; absent: v1")
    parser.add_argument("--aliases", metavar="TABLE", help="table of alias, ensembl_id, with a vocabulary table")
    parser.add_argument("--max-length", type=int, help="tokens of a cell at the most; absent: the tokenizer's")
    parser.add_argument("--layer", help="layer with the raw counts, or raw; absent: X")
    parser.add_argument("--gene-ids", help="column of var with gene ids; absent: found")
    parser.add_argument("--obs-columns", nargs="+", default=[], metavar="NAME", help="columns of obs to carry along")
    parser.add_argument("--empty-cells", choices=("drop", "keep", "error"), default="drop", help="without any token")
    parser.add_argument("--min-matched-counts", type=float, default=MIN_MATCHED_COUNTS, help="share of a file's counts")
    parser.add_argument("--tasks", type=int, help="shares of the corpus, at the most; absent: by its size")
    add_execution_options(parser)
    arguments = parser.parse_args(argv)
    output = str(Path(arguments.output).absolute())
    block = TokenizeShares(output, arguments.cpus_per_task, arguments.min_matched_counts)
    try:
        carry_out(arguments, block, begin=lambda: begin(arguments), finish=publish)
    except (ValueError, OSError) as error:
        sys.exit(f"tokenize_corpus.py: {error}")


if __name__ == "__main__":
    # Under its own name, by which other processes find the block
    from cellglot.datasets_scripts.tokenize_corpus import main as main_of_module

    main_of_module()
