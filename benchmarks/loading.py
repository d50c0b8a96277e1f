"""Feeding training from raw counts: cells encoded on the fly beside tokens on disk, in shuffled cells per second.

    python benchmarks/loading.py --json benchmarks/results/loading.json

Simulated cells of `benchmarks/tokenization.py` (gzip `.h5ad`), one epoch in batches of 144 cells, as NumPy token ids on
the way to the collator, with machine code loaded before the clock starts. Contenders, each in a process of its own:

on the fly    `cellglot.train.on_the_fly.OnTheFlyCells` in the order of an epoch: blocks of 512 cells shuffled, 16 mixed
datasets      tokens on disk (Arrow, as `train/pretrain.py` stores them), in random order
scDataset     where it is installed (or in --scdataset-path): blocks of 512 cells, 16 fetched at once, from a backed
              AnnData; each fetch is encoded by cellglot's tokenizer, in as many threads as on the fly
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
from simulated_cells import generate, generate_tokenizer

BATCH = 144


def on_the_fly(path: str, tokenizer_path: str, work: str, seed: int, **_: Any) -> dict[str, Any]:
    """Blocks of cells are read and encoded as their turn comes."""
    from cellglot import RankValueTokenizer
    from cellglot.train.batches import EpochPlan
    from cellglot.train.on_the_fly import OnTheFlyCells, measure_lengths

    tokenizer = RankValueTokenizer.from_pretrained(tokenizer_path)
    lengths_file = Path(work) / "train-00000.npy"
    started = time.perf_counter()
    measure_lengths(tokenizer, path, np.ones(_n_cells(path), dtype=bool), lengths_file)
    first_pass = time.perf_counter() - started
    cells = OnTheFlyCells(tokenizer, [(path, {})], [lengths_file], BATCH)
    started = time.perf_counter()
    blocks = cells.block_of_example
    plan = EpochPlan(cells.lengths, batch_size=BATCH, max_tokens=10**9, packed=True, seed=seed, blocks=blocks)
    cells.follow(plan.order)
    n_tokens = 0
    for i in range(len(plan)):
        (micro,) = plan.step(i)[0]
        n_tokens += sum(len(row["input_ids"]) for row in cells.__getitems__(list(micro.examples)))
    seconds = time.perf_counter() - started
    return {
        "cells_per_second": len(cells) / seconds,
        "n_tokens": n_tokens,
        "first_pass_seconds": first_pass,
        "blocks": len(np.unique(blocks)),
        "blocks_kept": cells.n_kept,
    }


def stored(path: str, tokenizer_path: str, work: str, seed: int, **_: Any) -> dict[str, Any]:
    """Rows of a data set on disk in random order."""
    import datasets

    from cellglot import RankValueTokenizer
    from cellglot.train.batches import EpochPlan

    file = Path(work) / "tokens.arrow"
    started = time.perf_counter()
    RankValueTokenizer.from_pretrained(tokenizer_path).encode_anndata(path, cache_file=file)
    first_pass = time.perf_counter() - started
    tokens = datasets.Dataset.from_file(str(file)).with_format("numpy", columns=["input_ids"], output_all_columns=True)
    started = time.perf_counter()
    plan = EpochPlan(np.asarray(tokens["length"]), batch_size=BATCH, max_tokens=10**9, packed=True, seed=seed)
    n_tokens = 0
    for i in range(len(plan)):
        (micro,) = plan.step(i)[0]
        n_tokens += sum(len(row["input_ids"]) for row in tokens.__getitems__(list(micro.examples)))
    seconds = time.perf_counter() - started
    megabytes = file.stat().st_size / 1e6
    return {
        "cells_per_second": len(tokens) / seconds,
        "n_tokens": n_tokens,
        "first_pass_seconds": first_pass,
        "disk_mb": megabytes,
    }


def sc_dataset(path: str, tokenizer_path: str, work: str, seed: int, scdataset_path: str | None) -> dict[str, Any]:
    """scDataset over a backed AnnData, each fetch encoded at once."""
    if scdataset_path:
        sys.path.append(scdataset_path)
    import anndata
    from scdataset import BlockShuffling, scDataset  # type: ignore[import-not-found]

    from cellglot import RankValueTokenizer
    from cellglot.tokenization.count_matrix import CountMatrix

    adata = anndata.read_h5ad(path, backed="r")
    tokenizer = RankValueTokenizer.from_pretrained(tokenizer_path)

    def fetch(collection: Any, indices: np.ndarray) -> list[np.ndarray]:
        counts_ng = collection.X[indices]
        matrix = CountMatrix(
            "fetch", collection.obs.iloc[indices], collection.var, lambda start, stop: counts_ng[start:stop], {}
        )
        cells: list[np.ndarray] = []
        for batch in tokenizer.iter_encoded(matrix):
            ids = batch.column("input_ids")
            cells += np.split(ids.values.to_numpy(), ids.offsets.to_numpy()[1:-1])
        return cells

    data = scDataset(
        adata,
        BlockShuffling(block_size=512),
        batch_size=BATCH,
        fetch_factor=57,
        fetch_callback=fetch,
        batch_callback=lambda cells, chosen: [cells[i] for i in chosen],
        seed=seed,
    )
    # As the first pass of the others does, so that loading the compiled loops is not counted.
    fetch(adata, np.arange(2_048))
    started = time.perf_counter()
    n_cells = n_tokens = 0
    for batch in data:
        n_cells += len(batch)
        n_tokens += sum(len(ids) for ids in batch)
    return {"cells_per_second": n_cells / (time.perf_counter() - started), "n_tokens": n_tokens}


def _n_cells(path: str) -> int:
    from cellglot.tokenization.count_matrix import open_counts

    with open_counts(path) as matrix:
        return matrix.n_cells


def main() -> None:
    contenders = {"on the fly": on_the_fly, "datasets": stored, "scDataset": sc_dataset}
    measure.answer_as_contender(contenders)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cellglot-benchmarks")
    parser.add_argument("--scdataset", action="store_true", help="scDataset too")
    parser.add_argument("--scdataset-path", help="folder that scDataset was installed to with pip's --target")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path, tokenizer = (
        generate(args.work, args.cells, args.genes, 0, args.seed),
        generate_tokenizer(args.work, args.seed),
    )
    results: dict[str, Any] = {**measure.machine(), "cells": args.cells, "genes": args.genes, "seed": args.seed}
    names = [name for name in contenders if args.scdataset or args.scdataset_path or name != "scDataset"]
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        given = {
            "path": str(path),
            "tokenizer_path": str(tokenizer),
            "work": folder,
            "seed": args.seed,
            "scdataset_path": args.scdataset_path,
        }
        answers = measure.interleaved(__file__, names, given, repeats=args.repeats)
    assert len({answer["n_tokens"] for found in answers.values() for answer in found}) == 1, "contenders disagree"
    rows = []
    for name, found in answers.items():
        key = name.replace(" ", "_").lower()
        pace = measure.median(found, "cells_per_second")
        results |= {f"{key}_cells_per_second": pace, f"{key}_peak_rss_mb": measure.worst(found, "peak_rss_mb")}
        for figure in ("first_pass_seconds", "disk_mb", "blocks", "blocks_kept"):
            if figure in found[0]:
                results[f"{key}_{figure}"] = measure.median(found, figure)
        rows.append([name, pace, results[f"{key}_peak_rss_mb"], results.get(f"{key}_first_pass_seconds", 0.0)])
    for name in names[1:]:
        key = name.lower()
        results[f"ratio_to_{key}"] = results["on_the_fly_cells_per_second"] / results[f"{key}_cells_per_second"]
    print(results["machine"])
    measure.print_table(["contender", "shuffled cells/s", "peak MB", "seconds before the first epoch"], rows)
    measure.save_results(results, args.json)


if __name__ == "__main__":
    main()
