"""`dis` of 5,000 true and 5,000 predicted cells of 2,000 genes: in blocks, and as one correlation matrix.

    python benchmarks/response_correlation.py --json benchmarks/results/response_correlation.json

Each contender runs in a process of its own, in turns; medians, and the largest peak memory. The plain way is
`np.corrcoef` of both sets together, the formula as it stands.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import answer_as_contender, interleaved, machine, median, print_table, save_results, worst


def cells(n: int, n_genes: int, seed: int) -> np.ndarray:
    """(n, genes) float32: log(1 + Poisson counts) around programmes that cells share."""
    rng = np.random.default_rng(seed)
    programmes = np.random.default_rng(0).gamma(1.0, 1.0, size=(8, n_genes)).astype(np.float32)
    rates = rng.dirichlet(np.ones(8), size=n).astype(np.float32) @ programmes
    return np.log1p(rng.poisson(rates).astype(np.float32))


def blockwise(n: int, n_genes: int, seed: int) -> dict[str, Any]:
    from cellglot.metrics.cell_correlation import best_match_correlation

    true, predicted = cells(n, n_genes, seed), cells(n, n_genes, seed + 1)
    begun = time.perf_counter()
    value = best_match_correlation(true, predicted)
    return {"seconds": time.perf_counter() - begun, "value": value}


def one_matrix(n: int, n_genes: int, seed: int) -> dict[str, Any]:
    true, predicted = cells(n, n_genes, seed), cells(n, n_genes, seed + 1)
    begun = time.perf_counter()
    value = float(np.corrcoef(true, predicted)[:n, n:].max(axis=1).mean())
    return {"seconds": time.perf_counter() - begun, "value": value}


CONTENDERS = {"blockwise": blockwise, "one_matrix": one_matrix}


def main() -> None:
    answer_as_contender(CONTENDERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=5_000, help="true cells, and as many predicted ones")
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    arguments = {"n": args.cells, "n_genes": args.genes, "seed": args.seed}
    answers = interleaved(__file__, list(CONTENDERS), arguments, repeats=args.repeats)
    ours, plain = answers["blockwise"], answers["one_matrix"]
    record = {
        "cells": args.cells,
        "genes": args.genes,
        "repeats": args.repeats,
        "seed": args.seed,
        "seconds": median(ours, "seconds"),
        "reference_seconds": median(plain, "seconds"),
        "ratio": median(plain, "seconds") / median(ours, "seconds"),
        "peak_rss_mb": worst(ours, "peak_rss_mb"),
        "reference_peak_rss_mb": worst(plain, "peak_rss_mb"),
        "difference": abs(ours[0]["value"] - plain[0]["value"]),
    }
    print_table(
        ["dis", "seconds", "peak memory, MB"],
        [
            ["blockwise", record["seconds"], record["peak_rss_mb"]],
            ["one matrix", record["reference_seconds"], record["reference_peak_rss_mb"]],
        ],
    )
    print(f"ratio {record['ratio']:.2f}; figures differ by {record['difference']:.1e}")
    save_results({**record, **machine()}, args.json)


if __name__ == "__main__":
    main()
