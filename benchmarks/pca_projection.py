"""The PCA projection of cells: time and memory of the fit, speed beside bare products, and what is lost of real cells.

    python benchmarks/pca_projection.py --json benchmarks/results/pca_projection.json   # CELLGLOT_DATA: the real cells

- fit: 1,200 components of 160,000 simulated cells x 25,000 genes, 5% of them detected, from a gzip-compressed `.h5ad`.
- projection: cells in memory through the feature extractor, beside the product alone of their sparse log-normalized
  expression and the components: by SciPy in one thread and in as many as there are cores, and by torch (MKL).
- components: variance captured on real cells, as a share of what the exact components capture (a dense eigenvalue
  decomposition in float64), by block Krylov iteration and by subspace iteration with as many vectors multiplied.
- reconstruction: real brain cells, a fifth of them held out, in projection and in gene space.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
import numpy as np
import scipy.sparse as sp
from simulated_cells import generate
from tqdm.auto import tqdm

# Cells of a repeat of the projection benchmark, and of a block of its bare products
PROJECTED, BLOCK = 8_192, 1_024
# File, and components that are compared with exact ones: fewer than cells, as 1,200 are in an atlas
SPECTRA = {
    "darmanis2015_human_cortex_267x22088": 50,
    "zeisel2015_mouse_cortex_500x3529": 100,
    "zhuang_merfish_mouse_brain_1000x1122": 150,
    "tian2019_scmixology_celseq2_dropseq": 200,
}
BRAINS = [name for name in SPECTRA if "brain" in name or "cortex" in name]


def fit(path: str, n_components: int, saved: str, passes: int, seed: int) -> dict[str, Any]:
    """Fits and saves; the file is read anew in every pass."""
    from cellglot import PCAProjectionFeatureExtractor

    started = time.perf_counter()
    extractor = PCAProjectionFeatureExtractor.fit(
        {"simulated": path}, n_components=n_components, passes=passes, seed=seed, progress=False
    )
    seconds = time.perf_counter() - started
    extractor.save_pretrained(saved)
    return {"seconds": seconds, "genes_kept": len(extractor.gene_ids("simulated"))}


def project(path: str, saved: str) -> dict[str, Any]:
    """Cells in memory, through all that a user's cells go through."""
    from cellglot import PCAProjectionFeatureExtractor

    extractor, adata = PCAProjectionFeatureExtractor.from_pretrained(saved), _cells(path)
    return _pace(lambda: extractor(adata, "simulated")["projections"], adata.n_obs)


def project_file(path: str, saved: str) -> dict[str, Any]:
    """The same cells from the compressed file."""
    from cellglot import PCAProjectionFeatureExtractor
    from cellglot.tokenization.count_matrix import open_counts

    extractor = PCAProjectionFeatureExtractor.from_pretrained(saved)
    with open_counts(path) as matrix:
        mask = np.arange(matrix.n_cells) < PROJECTED
    return _pace(lambda: extractor(path, "simulated", mask=mask)["projections"], int(mask.sum()))


def bare_scipy(path: str, saved: str) -> dict[str, Any]:
    """CSR times dense array, in one thread."""
    blocks, weight_gk = _blocks_and_weight(path, saved)
    return _pace(lambda: [block @ weight_gk for block in blocks], PROJECTED)


def bare_scipy_threads(path: str, saved: str) -> dict[str, Any]:
    """The same, a block a thread: SciPy lets go of the interpreter while it multiplies."""
    blocks, weight_gk = _blocks_and_weight(path, saved)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return _pace(lambda: list(pool.map(lambda block: block @ weight_gk, blocks)), PROJECTED)


def bare_torch(path: str, saved: str) -> dict[str, Any]:
    """torch's product of a CSR tensor and a dense one, which is MKL's."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    blocks, weight_gk = _blocks_and_weight(path, saved)
    weight = torch.from_numpy(weight_gk)
    tensors = [
        torch.sparse_csr_tensor(*map(torch.from_numpy, (b.indptr, b.indices, b.data)), size=b.shape) for b in blocks
    ]
    return _pace(lambda: [tensor @ weight for tensor in tensors], PROJECTED)


def _pace(function: Callable[[], Any], n_cells: int) -> dict[str, Any]:
    """Cells/s of the second of two calls: the first starts threads and fills caches."""
    function()
    started = time.perf_counter()
    function()
    return {"cells_per_second": n_cells / (time.perf_counter() - started)}


def _cells(path: str) -> Any:
    import anndata as ad

    return ad.read_h5ad(path, backed="r")[:PROJECTED].to_memory()


def _blocks_and_weight(path: str, saved: str) -> tuple[list[sp.csr_matrix], np.ndarray]:
    """Log-normalized expression of the cells in blocks, and the components (genes, components) to multiply by."""
    from cellglot import PCAProjectionFeatureExtractor
    from cellglot.tokenization.count_matrix import open_counts
    from cellglot.tokenization.gene_ids import GeneResolver
    from cellglot.tokenization.log_expression import LogExpression

    extractor = PCAProjectionFeatureExtractor.from_pretrained(saved)
    transform = LogExpression(GeneResolver(extractor.gene_ids("simulated")), extractor.target_sum)
    with open_counts(_cells(path)) as matrix:
        blocks = [x_ng for _, x_ng in transform.blocks(matrix, transform.match(matrix), cells_per_block=BLOCK)]
    return blocks, np.ascontiguousarray(extractor.projection("simulated").components_kg.T)


def captured_variance(file: Path, k: int, seeds: list[int]) -> dict[str, float]:
    """Share of the exact components' variance that each way of finding them captures, a mean over the seeds.

    Every way multiplies the cells by as many vectors as the default does: 3 blocks of k + 100.
    """
    x_ng = _expression(file)
    mean_g = np.asarray(x_ng.mean(axis=0, dtype=np.float64)).ravel()
    centred = x_ng.toarray().astype(np.float64) - mean_g
    exact = np.linalg.eigvalsh(centred @ centred.T)[-k:].sum()
    centred = centred.astype(np.float32)
    shares = {}
    for way, passes in (("krylov", 3), ("krylov", 2), ("subspace", 3), ("subspace", 2)):
        find = _krylov if way == "krylov" else _subspace
        found = [
            float(np.square(centred @ find(x_ng, mean_g, k, passes, 3 * (k + 100) // passes, seed).T).sum() / exact)
            for seed in tqdm(seeds, f"{file.stem} {way} {passes}")
        ]
        shares[f"{way}_{passes}"] = float(np.mean(found))
    return shares


def _krylov(x_ng: sp.csr_matrix, mean_g: np.ndarray, k: int, passes: int, n_vectors: int, seed: int) -> np.ndarray:
    from cellglot.tokenization.streaming_pca import principal_components

    options: dict[str, Any] = {"passes": passes, "oversampling": n_vectors - k, "seed": seed}
    return principal_components(lambda: [x_ng], mean_g, k, **options).components_kg


def _subspace(x_ng: sp.csr_matrix, mean_g: np.ndarray, k: int, passes: int, n_vectors: int, seed: int) -> np.ndarray:
    """The same, but that a pass goes on from the last block alone."""
    import torch

    from cellglot.tokenization.streaming_pca import _covariance_product, _nystrom, _orthonormal

    mean = torch.from_numpy(mean_g.astype(np.float32))
    new = torch.randn(min(n_vectors, len(mean)), len(mean), generator=torch.Generator().manual_seed(seed))
    for _ in range(passes):
        q = _orthonormal(new, new[:0])
        new, _ = _covariance_product([x_ng], mean, q)
    return _nystrom(q, new, k)[0].numpy()


def _expression(file: Path) -> sp.csr_matrix:
    from cellglot.tokenization.count_matrix import open_counts
    from cellglot.tokenization.gene_ids import GeneResolver
    from cellglot.tokenization.log_expression import LogExpression, common_genes

    with open_counts(file) as matrix:
        transform = LogExpression(GeneResolver(common_genes([(matrix.name, matrix.gene_names())])), 1e4)
        return sp.csr_matrix(sp.vstack([x_ng for _, x_ng in transform.blocks(matrix, transform.match(matrix))]))


def reconstruction(file: Path, seeds: list[int]) -> dict[str, Any]:
    """Held-out and fitted cells, a fifth held out anew for each seed: mean and standard deviation over the seeds."""
    from cellglot import PCAProjectionFeatureExtractor
    from cellglot.tokenization.count_matrix import open_counts

    with open_counts(file) as matrix:
        n_cells = matrix.n_cells
    found, n_components = [], 0
    for seed in tqdm(seeds, f"{file.stem} held out"):
        held_out = np.random.default_rng(seed).random(n_cells) < 0.2
        extractor = PCAProjectionFeatureExtractor.fit(
            {"brain": file}, cells={"brain": ~held_out}, seed=seed, progress=False
        )
        n_components = extractor.n_components
        out, fitted = (extractor.reconstruction_error(file, "brain", mask=mask) for mask in (held_out, ~held_out))
        mean_only = _rmse_of_the_mean(extractor, file, held_out)
        found.append(
            {
                "held_out_projection_rmse": out.projection_rmse,
                "held_out_unexplained_variance": out.unexplained_variance,
                "held_out_expression_rmse": out.expression_rmse,
                "mean_expression_rmse": mean_only,
                "held_out_cell_correlation": out.cell_correlation,
                "fitted_unexplained_variance": fitted.unexplained_variance,
            }
        )
    figures: dict[str, Any] = {"n_components": n_components}
    for name in found[0]:
        values = [run[name] for run in found]
        figures |= {name: float(np.mean(values)), f"{name}_sd": float(np.std(values, ddof=1))}
    return figures


def _rmse_of_the_mean(extractor: Any, file: Path, held_out: np.ndarray) -> float:
    """Of held-out cells where every one is given as the mean of the fitted ones: no components at all."""
    error = extractor.reconstruction_error(file, "brain", mask=held_out)
    return error.expression_rmse / np.sqrt(error.unexplained_variance)


def speed(args: argparse.Namespace) -> dict[str, Any]:
    args.work.mkdir(parents=True, exist_ok=True)
    path = str(generate(args.work, args.cells, args.genes, 0, args.seed, detected_share=args.detected_share))
    results: dict[str, Any] = {
        "cells": args.cells,
        "genes": args.genes,
        "detected_share": args.detected_share,
        "n_components": args.components,
        "passes": args.passes,
    }
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        saved = str(Path(folder) / "extractor")
        given = {"path": path, "n_components": args.components, "passes": args.passes, "seed": args.seed}
        fitted = measure.run_contender(__file__, "fit", {**given, "saved": saved})
        results |= {f"fit_{name}": value for name, value in fitted.items()}
        print(f"fit: {fitted['seconds']:,.0f} s, {fitted['peak_rss_mb']:,.0f} MB")
        ways = ["project", "project_file", "bare_scipy", "bare_scipy_threads", "bare_torch"]
        answers = measure.interleaved(__file__, ways, {"path": path, "saved": saved}, repeats=args.repeats)
    pace = {way: measure.median(found, "cells_per_second") for way, found in answers.items()}
    results |= {f"{way}_cells_per_second": value for way, value in pace.items()}
    results |= {f"{way}_peak_rss_mb": measure.worst(found, "peak_rss_mb") for way, found in answers.items()}
    bare = max(value for way, value in pace.items() if way.startswith("bare"))
    results |= {"ratio": pace["project"] / bare, "file_ratio": pace["project_file"] / bare}
    rows = [[way, pace[way], pace[way] / bare, results[f"{way}_peak_rss_mb"]] for way in ways]
    measure.print_table(["contender", "cells/s", "of the fastest bare product", "peak MB"], rows)
    if not args.keep:
        os.remove(path)
    return results


def components(args: argparse.Namespace) -> dict[str, Any]:
    shares = {name: captured_variance(args.data / f"{name}.h5ad", k, args.seeds) for name, k in SPECTRA.items()}
    ways = list(next(iter(shares.values())))
    measure.print_table(
        ["cells", "components", *ways],
        [[name, SPECTRA[name], *(f"{found[way]:.4f}" for way in ways)] for name, found in shares.items()],
    )
    return {f"captured_{name}_{way}": share for name, found in shares.items() for way, share in found.items()}


def brains(args: argparse.Namespace) -> dict[str, Any]:
    found = {name: reconstruction(args.data / f"{name}.h5ad", args.seeds) for name in BRAINS}
    figures = [figure for figure in found[BRAINS[0]] if not figure.endswith("_sd")]
    measure.print_table(["cells", *figures], [[name, *(found[name][figure] for figure in figures)] for name in BRAINS])
    return {f"{name}_{figure}": value for name in BRAINS for figure, value in found[name].items()}


def main() -> None:
    measure.answer_as_contender(
        {
            "fit": fit,
            "project": project,
            "project_file": project_file,
            "bare_scipy": bare_scipy,
            "bare_scipy_threads": bare_scipy_threads,
            "bare_torch": bare_torch,
        }
    )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=160_000)
    parser.add_argument("--genes", type=int, default=25_000)
    parser.add_argument("--detected-share", type=float, default=0.05)
    parser.add_argument("--components", type=int, default=1_200)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cellglot-benchmarks")
    parser.add_argument("--keep", action="store_true", help="keep the simulated cells (1 GB) for another run")
    parts = {"components": components, "reconstruction": brains, "speed": speed}
    parser.add_argument("--only", choices=parts, help="one of the tables")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    args.data = Path(os.environ.get("CELLGLOT_DATA", "../shared/data")) / "cells"
    results: dict[str, Any] = {**measure.machine(), "seed": args.seed, "seeds": args.seeds}
    print(results["machine"])
    for part in [args.only] if args.only else parts:
        results |= parts[part](args)
    measure.save_results(results, args.json)


if __name__ == "__main__":
    main()
