"""Binarized strings: counts into token ids, in cells per second of one core and peak memory.

`python benchmarks/binarized_string.py --json benchmarks/results/binarized_string.json`

Simulated cells: about 500 expressed genes (of 600 detected among 13,431), 500 open peaks (of 20,000). Contenders,
each in a fresh process on one core, the data's file read before the clock starts except where it says "file":

genes, peaks     `processor.iter_encoded` of one modality of an AnnData
pairs            both, as input and labels
file             genes from an `.h5ad` that is read meanwhile
subword          genes, spelled in pieces of a vocabulary learned from the strings
dense traversal  the paper's way: every cell as a dense row, names of its features joined, the string tokenized (of the
                 first cells only)

All ids of the dense traversal are checked against the others'.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import answer_as_contender, interleaved, machine, median, print_table, save_results, worst
from simulated_multiome import generate_multiome

TRAVERSED_CELLS = 500


def _setting(genes: str, peaks: str, **options: Any) -> tuple[Any, Any, Any]:
    """Expression and accessibility in memory, and a processor that has spelled every feature."""
    import anndata as ad

    from cellglot.tokenization.binarized_string import BinarizedStringProcessor

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cells = ad.read_h5ad(genes), ad.read_h5ad(peaks)
    processor = BinarizedStringProcessor.from_cells(cells, **options)
    processor.encode((cells[0][:10], cells[1][:10]))
    return *cells, processor


def _encode(processor: Any, cells: Any, task: str) -> dict[str, float]:
    start = time.perf_counter()
    n_cells = n_tokens = 0
    for batch in processor.iter_encoded(cells, task):
        n_cells += batch.num_rows
        n_tokens += len(batch.column("input_ids").flatten())
    seconds = time.perf_counter() - start
    return {"cells_per_second": n_cells / seconds, "features": n_tokens / n_cells - 2}


def genes_contender(genes: str, peaks: str) -> dict[str, float]:
    expression, _, processor = _setting(genes, peaks)
    return _encode(processor, expression, "gex2atac")


def peaks_contender(genes: str, peaks: str) -> dict[str, float]:
    _, accessibility, processor = _setting(genes, peaks)
    return _encode(processor, accessibility, "atac2gex")


def pairs_contender(genes: str, peaks: str) -> dict[str, float]:
    expression, accessibility, processor = _setting(genes, peaks)
    return _encode(processor, (expression, accessibility), "gex2atac")


def file_contender(genes: str, peaks: str) -> dict[str, float]:
    *_, processor = _setting(genes, peaks)
    return _encode(processor, genes, "gex2atac")


def subword_contender(genes: str, peaks: str) -> dict[str, float]:
    expression, _, processor = _setting(genes, peaks, vocabulary="subword", subword_size=8_000, subword_cells=200)
    return _encode(processor, expression, "gex2atac")


def traversal_contender(genes: str, peaks: str) -> dict[str, float]:
    expression, _, processor = _setting(genes, peaks)
    names = [str(name) for name in expression.var_names]
    start = time.perf_counter()
    texts = []
    for cell in range(TRAVERSED_CELLS):
        counts = expression.X[cell].toarray()[0].astype(np.float64)
        levels = np.log1p(counts / counts.sum() * 10_000)
        texts.append("<gex2atac> " + " ".join(name for name, level in zip(names, levels, strict=True) if level >= 2.0))
    ids = processor.tokenizer(texts)["input_ids"]
    seconds = time.perf_counter() - start
    if ids != list(processor.encode(expression[:TRAVERSED_CELLS])["input_ids"]):
        raise RuntimeError("The ids of the strings differ from those of the arrays.")
    features = sum(map(len, ids)) / TRAVERSED_CELLS - 2
    return {"cells_per_second": TRAVERSED_CELLS / seconds, "features": features}


CONTENDERS = {
    "genes": genes_contender,
    "peaks": peaks_contender,
    "pairs": pairs_contender,
    "file": file_contender,
    "subword": subword_contender,
    "dense traversal": traversal_contender,
}


def main() -> None:
    answer_as_contender(CONTENDERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cellglot-benchmarks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    shape = {"gene_density": 600 / 13_431, "highest_count": 12, "peak_density": 500 / 20_000}
    files = generate_multiome(args.work, args.cells, 13_431, 20_000, **shape, seed=args.seed)
    arguments: dict[str, Any] = dict(zip(("genes", "peaks"), map(str, files), strict=True))
    answers = interleaved(__file__, list(CONTENDERS), arguments, repeats=args.repeats)
    results: dict[str, Any] = {"cells": args.cells, "repeats": args.repeats}
    for name, found in answers.items():
        key = name.replace(" ", "_")
        for figure in ("cells_per_second", "features"):
            results[f"{key}_{figure}"] = median(found, figure)
        results[f"{key}_peak_rss_mb"] = worst(found, "peak_rss_mb")
    results["cells_per_second"] = results["genes_cells_per_second"]
    results["reference_cells_per_second"] = results["dense_traversal_cells_per_second"]
    results["ratio"] = results["cells_per_second"] / results["reference_cells_per_second"]
    headers = ["one core", "cells/s", "tokens of input a cell", "peak memory, MB"]
    rows = [
        [name, median(found, "cells_per_second"), median(found, "features"), worst(found, "peak_rss_mb")]
        for name, found in answers.items()
    ]
    print_table(headers, rows)
    print(machine()["machine"])
    save_results({**machine(), **results}, args.json)


if __name__ == "__main__":
    main()
