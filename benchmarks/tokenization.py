"""Tokenization: raw counts in an `.h5ad` into a dataset on disk, in cells per second and peak memory.

`python benchmarks/tokenization.py --json benchmarks/results/tokenization.json`

The files are generated (kept in `--work` for the next run): log-normal gene means and cell depths, Poisson counts,
20,000 genes of which about 2,555 are detected in a cell, float32 CSR written with gzip as anndata does. Contenders,
each in a fresh process with its libraries imported before the clock starts:

cellglot          `tokenizer.encode_anndata(path, cache_file=...)`: the first file of a process, loading of the compiled
                  loops included, and a second one
numpy             the same with the simple encoder, `cellglot.tokenization.rank_encoding`, for all cells
reading           h5py reads and inflates the values and indices, and nothing else is done: the floor
reading, threads  the same through `cellglot.tokenization.hdf5_ranges` in as many threads as cellglot takes
original's way    the algorithm of the original TranscriptomeTokenizer (read whole, chunks of 512 cells, argsort a cell,
                  Python lists, datasets.map, save_to_disk; nproc=1), written anew
SLAF              with --slaf-python, an environment with slafdb and torch: its Geneformer loader over a converted file,
                  which knows no medians and writes nothing; conversion is timed apart

All tokens of `cellglot` are checked against those of `numpy`. A file with columns that mean the same gene and one of
ten times the cells follow.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import answer_as_contender, interleaved, machine, median, print_table, save_results, worst
from simulated_cells import generate, generate_tokenizer

MAX_TOKENS = 2048
VALUES_AT_ONCE = 1_000_000


# ---- contenders: each returns seconds


def fresh(path: str) -> str:
    """The path, where no file is: to free the pages of an old one takes time of its own."""
    Path(path).unlink(missing_ok=True)
    return path


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cellglot_contender(path: str, tokenizer: str, output: str, **_: Any) -> dict[str, float]:
    # Libraries are imported before the clock starts, for every contender.
    import anndata.io  # noqa: F401
    import datasets
    import numba  # noqa: F401

    from cellglot import RankValueTokenizer

    datasets.disable_progress_bars()
    load_seconds = timed(lambda: RankValueTokenizer.from_pretrained(tokenizer))
    encoder = RankValueTokenizer.from_pretrained(tokenizer)
    first, second = fresh(f"{output}/cellglot.arrow"), fresh(f"{output}/cellglot-second.arrow")
    seconds = timed(lambda: encoder.encode_anndata(path, cache_file=first))
    again = timed(lambda: encoder.encode_anndata(path, cache_file=second))
    return {"seconds": seconds, "second_file_seconds": again, "tokenizer_load_ms": load_seconds * 1000}


def numpy_contender(path: str, tokenizer: str, output: str, **_: Any) -> dict[str, float]:
    import anndata.io  # noqa: F401
    import datasets  # noqa: F401

    from cellglot import RankValueTokenizer
    from cellglot.tokenization import block_encoding

    block_encoding.FEW_CELLS = sys.maxsize
    encoder = RankValueTokenizer.from_pretrained(tokenizer)
    file = fresh(f"{output}/numpy.arrow")
    return {"seconds": timed(lambda: encoder.encode_anndata(path, cache_file=file))}


def reading_contender(path: str, **_: Any) -> dict[str, float]:
    import h5py

    def read() -> None:
        with h5py.File(path) as file:
            for name in ("X/data", "X/indices"):
                dataset: Any = file[name]
                for start in range(0, len(dataset), VALUES_AT_ONCE):
                    dataset[start : start + VALUES_AT_ONCE]

    return {"seconds": timed(read)}


def threaded_reading_contender(path: str, **_: Any) -> dict[str, float]:
    import h5py

    from cellglot.tokenization.hdf5_ranges import range_reader
    from cellglot.tokenization.ordered_map import available_threads, ordered_map

    def read() -> None:
        with h5py.File(path) as file:
            for name in ("X/data", "X/indices"):
                dataset: Any = file[name]
                starts = range(0, len(dataset), VALUES_AT_ONCE)
                part = functools.partial(read_part, range_reader(dataset))
                deque(ordered_map(part, starts, threads=available_threads()), maxlen=0)

    def read_part(reader: Callable[[int, int], np.ndarray], start: int) -> None:
        reader(start, start + VALUES_AT_ONCE)

    return {"seconds": timed(read)}


def original_contender(path: str, tokenizer: str, output: str, **_: Any) -> dict[str, float]:
    """The original's algorithm for `.h5ad` files whose columns are all different genes."""
    import anndata
    import datasets
    import scipy.sparse as sp

    from cellglot import RankValueTokenizer

    datasets.disable_progress_bars()
    medians = RankValueTokenizer.from_pretrained(tokenizer).gene_medians
    token_of = {gene: 2 + i for i, gene in enumerate(medians)}

    def tokenize() -> None:
        adata: Any = anndata.read_h5ad(path)
        names = adata.var["ensembl_id"]
        known = np.flatnonzero([name in token_of for name in names])
        factors = np.array([medians[name] for name in names.iloc[known]])
        tokens = np.array([token_of[name] for name in names.iloc[known]])
        cells = []
        for start in range(0, adata.n_obs, 512):
            chunk = adata[start : start + 512]
            counts: Any = chunk.X[:, known]
            totals = chunk.obs["n_counts"].to_numpy()[:, None]
            ranked = sp.csr_matrix(counts / totals * 10_000 / factors)
            for n in range(ranked.shape[0]):
                cell = ranked[n]
                cells.append(tokens[cell.indices][np.argsort(-cell.data)])

        def crop(example: dict[str, Any]) -> dict[str, Any]:
            ids = example["input_ids"][:MAX_TOKENS]
            return {"input_ids": ids, "length": len(ids)}

        datasets.Dataset.from_dict({"input_ids": cells}).map(crop).save_to_disk(f"{output}/original")

    return {"seconds": timed(tokenize)}


def slaf_conversion(path: str, output: str, **_: Any) -> dict[str, float]:
    from slaf.data import SLAFConverter  # type: ignore[import-not-found]

    return {"seconds": timed(lambda: SLAFConverter().convert(path, f"{output}/cells.slaf"))}


def slaf_contender(output: str, n_cells: int, **_: Any) -> dict[str, float]:
    import slaf  # type: ignore[import-not-found]
    from slaf.ml.dataloaders import SLAFDataLoader  # type: ignore[import-not-found]

    def tokenize() -> None:
        cells = slaf.SLAFArray(f"{output}/cells.slaf")
        loader = SLAFDataLoader(cells, tokenizer_type="geneformer", max_genes=MAX_TOKENS, verbose=False)
        seen = 0
        for batch in loader:
            seen += len(batch["input_ids"])
            # At its end the loader waits more than a minute for cells that do not come; that is not counted.
            if seen == n_cells:
                return
        raise RuntimeError(f"The loader gave {seen:,} of {n_cells:,} cells.")

    return {"seconds": timed(tokenize)}


CONTENDERS = {
    "cellglot": cellglot_contender,
    "numpy": numpy_contender,
    "reading": reading_contender,
    "reading, threads": threaded_reading_contender,
    "original's way": original_contender,
    "SLAF conversion": slaf_conversion,
    "SLAF": slaf_contender,
}


# ---- the run


def token_columns(path: Path) -> Iterator[Any]:
    """The input_ids of a tokenized Arrow stream, a batch of cells at a time."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            yield batch.column("input_ids")


def require_equal_tokens(path: Path, other: Path) -> None:
    for column, expected in zip(token_columns(path), token_columns(other), strict=True):
        if not column.equals(expected):
            raise RuntimeError(f"{path.name} and {other.name} differ.")


def main() -> None:
    answer_as_contender(CONTENDERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--collapsing", type=int, default=100, help="columns of the second file that name a gene again")
    parser.add_argument("--large-cells", type=int, default=100_000, help="cells of the third file; 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cellglot-benchmarks")
    parser.add_argument("--slaf-python", help="interpreter of an environment with slafdb and torch")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    tokenizer = generate_tokenizer(args.work, args.seed)
    path = generate(args.work, args.cells, args.genes, 0, args.seed)
    collapsing = generate(args.work, args.cells, args.genes, args.collapsing, args.seed)
    large = generate(args.work, args.large_cells, args.genes, 0, args.seed) if args.large_cells else None

    python = {name: args.slaf_python for name in CONTENDERS if name.startswith("SLAF")}
    names = [name for name in CONTENDERS if not name.startswith("SLAF")]
    names += ["SLAF"] if args.slaf_python else []

    with tempfile.TemporaryDirectory(dir=args.work) as output:

        def run(source: Path, names: list[str], repeats: int = args.repeats) -> dict[str, list[dict[str, Any]]]:
            arguments = {"path": str(source), "tokenizer": str(tokenizer), "output": output, "n_cells": args.cells}
            return interleaved(__file__, names, arguments, repeats=repeats, python=python)

        answers = run(path, ["SLAF conversion"], 1) if args.slaf_python else {}
        answers |= run(path, names)
        require_equal_tokens(Path(output) / "cellglot.arrow", Path(output) / "numpy.arrow")
        collapsed = run(collapsing, ["cellglot"])["cellglot"]
        many = run(large, ["cellglot", "reading"]) if large else {}

    def pace(found: list[dict[str, Any]], key: str = "seconds", n_cells: int = args.cells) -> float:
        return n_cells / statistics.median(answer[key] for answer in found)

    ours, reading = answers["cellglot"], answers["reading"]
    results: dict[str, Any] = {
        "cells": args.cells,
        "genes": args.genes,
        "file_mb": path.stat().st_size / 1e6,
        "repeats": args.repeats,
        "cells_per_second": pace(ours),
        "cells_per_second_second_file": pace(ours, "second_file_seconds"),
        "peak_rss_mb": worst(ours, "peak_rss_mb"),
        "numpy_cells_per_second": pace(answers["numpy"]),
        "numpy_peak_rss_mb": worst(answers["numpy"], "peak_rss_mb"),
        "reading_cells_per_second": pace(reading),
        "reading_threads_cells_per_second": pace(answers["reading, threads"]),
        "share_of_reading": pace(ours) / pace(reading),
        "reference_cells_per_second": pace(answers["original's way"]),
        "reference_peak_rss_mb": worst(answers["original's way"], "peak_rss_mb"),
        "ratio": pace(ours) / pace(answers["original's way"]),
        "collapsing_columns": args.collapsing,
        "collapsing_cells_per_second": pace(collapsed),
        "collapsing_cells_per_second_second_file": pace(collapsed, "second_file_seconds"),
        "tokenizer_load_ms": median(ours, "tokenizer_load_ms"),
    }
    if args.slaf_python:
        results["slaf_conversion_seconds"] = answers["SLAF conversion"][0]["seconds"]
        results["slaf_cells_per_second"] = pace(answers["SLAF"])
        results["slaf_peak_rss_mb"] = worst(answers["SLAF"], "peak_rss_mb")
    if many:
        results["large_cells"] = args.large_cells
        results["large_cells_per_second"] = pace(many["cellglot"], n_cells=args.large_cells)
        results["large_cells_per_second_second_file"] = pace(many["cellglot"], "second_file_seconds", args.large_cells)
        results["large_peak_rss_mb"] = worst(many["cellglot"], "peak_rss_mb")
        results["large_reading_cells_per_second"] = pace(many["reading"], n_cells=args.large_cells)
        results["large_share_of_reading"] = (
            results["large_cells_per_second"] / results["large_reading_cells_per_second"]
        )

    rows: list[list[Any]] = [
        [f"{name}, {args.cells:,} cells", pace(answers[name]), worst(answers[name], "peak_rss_mb")] for name in names
    ]
    rows.insert(1, ["cellglot, second file of a process", results["cells_per_second_second_file"], ""])
    rows.append([f"cellglot, {args.collapsing} collapsing columns", pace(collapsed), worst(collapsed, "peak_rss_mb")])
    rows.append(["the same, second file", results["collapsing_cells_per_second_second_file"], ""])
    rows += [
        [f"{name}, {args.large_cells:,} cells", pace(found, n_cells=args.large_cells), worst(found, "peak_rss_mb")]
        for name, found in many.items()
    ]
    print_table(["", "cells/s", "peak memory, MB"], rows)
    print(f"tokenizer load: {results['tokenizer_load_ms']:.0f} ms; {machine()['machine']}")
    save_results({**machine(), **results}, args.json)


if __name__ == "__main__":
    main()
