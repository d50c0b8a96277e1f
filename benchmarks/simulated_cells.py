"""Simulated cells of the size of real ones, for the benchmarks of reading and tokenizing.

Log-normal gene means and cell depths, Poisson counts, 20,000 genes of which about 2,555 are detected in a cell, float32
CSR written with gzip as anndata does. Files are kept in a folder for the next run.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

N_VOCABULARY = 25_424
# Share of the genes that are detected in a cell on average: 2,555 of 20,000
DETECTED_SHARE = 2_555 / 20_000
# Spread of the counts of a cell, as the standard deviation of their logarithm
DEPTH_SPREAD = 0.35
SIMULATED_AT_ONCE = 500


def generate(
    work: Path, n_cells: int, n_genes: int, n_collapsing: int, seed: int, *, detected_share: float = DETECTED_SHARE
) -> Path:
    """Path of an `.h5ad` of simulated cells, made if it is not there.

    n_collapsing    columns whose name is another column's gene with a version
    detected_share  of the genes, in a cell on average
    """
    import anndata.io
    import h5py
    import pandas as pd

    density = "" if detected_share == DETECTED_SHARE else f"-detected-{detected_share}"
    path = work / f"cells-{n_cells}-genes-{n_genes}-collapsing-{n_collapsing}{density}-seed-{seed}.h5ad"
    if path.exists():
        return path
    rng = np.random.default_rng(seed)
    genes = np.array(vocabulary_genes())[rng.permutation(N_VOCABULARY)[:n_genes]]
    if n_collapsing:
        genes[-n_collapsing:] = [f"{gene}.7" for gene in genes[:n_collapsing]]
    mean_g = mean_counts(rng, n_genes, detected_share)
    partial = path.with_suffix(".tmp")
    with h5py.File(partial, "w") as file:
        group = file.create_group("X")
        # Sized as it will be, about, so that the chunks come out as when anndata writes the whole.
        expected = int(n_cells * n_genes * detected_share)
        values, columns = (
            group.create_dataset(name, (expected,), kind, compression="gzip", maxshape=(None,))
            for name, kind in (("data", np.float32), ("indices", np.int32))
        )
        indptr, n_counts = np.zeros(n_cells + 1, dtype=np.int64), np.zeros(n_cells)
        starts = range(0, n_cells, SIMULATED_AT_ONCE)
        for start in tqdm(starts, f"generating {n_cells:,} cells", unit="block"):
            cells = slice(start, min(start + SIMULATED_AT_ONCE, n_cells))
            counts, genes_detected, detected = simulate([seed, start], mean_g, cells.stop - start)
            first = indptr[start]
            indptr[start + 1 : cells.stop + 1] = first + np.cumsum(detected)
            for dataset, part in ((values, counts), (columns, genes_detected)):
                dataset.resize((max(first + len(part), len(dataset)),))
                dataset[first : first + len(part)] = part
            n_counts[cells] = np.add.reduceat(counts, indptr[start : cells.stop] - first, dtype=np.float64)
        for dataset in (values, columns):
            dataset.resize((indptr[-1],))
        small = indptr[-1] < 2**31
        group.create_dataset(
            "indptr", data=indptr.astype(np.int32 if small else np.int64), compression="gzip", maxshape=(None,)
        )
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, n_genes)})
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        names = [f"cell{n}" for n in range(n_cells)]
        anndata.io.write_elem(file, "obs", pd.DataFrame({"n_counts": n_counts}, index=pd.Index(names)))
        anndata.io.write_elem(file, "var", pd.DataFrame({"ensembl_id": genes}, index=pd.Index(genes)))
    os.replace(partial, path)
    return path


def mean_counts(rng: np.random.Generator, n_genes: int, detected_share: float = DETECTED_SHARE) -> np.ndarray:
    """(genes,) log-normal mean counts of a cell of median depth, scaled to the detected share."""
    mean_g = rng.lognormal(0, 2.0, n_genes)
    depths = rng.lognormal(0, DEPTH_SPREAD, 100)[:, None]
    low, high = 1e-9, 1e9
    for _ in range(60):
        middle = np.sqrt(low * high)
        enough = (1 - np.exp(-depths * middle * mean_g)).mean() > detected_share
        low, high = (low, middle) if enough else (middle, high)
    return mean_g * low


def simulate(seed: list[int], mean_g: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, genes and number of detected genes of cells with Poisson counts.

    A Poisson process of rate r has its first event at an exponential time; where that is below r the count is one plus
    the events of the time that is left. So one fast draw settles the genes that are not detected.
    """
    rng = np.random.Generator(np.random.SFC64(seed))
    rate_ng = (rng.lognormal(0, DEPTH_SPREAD, n_cells)[:, None] * mean_g).astype(np.float32)
    first_ng = rng.standard_exponential(rate_ng.shape, dtype=np.float32)
    rows, columns = np.nonzero(first_ng < rate_ng)
    counts = 1 + rng.poisson(rate_ng[rows, columns] - first_ng[rows, columns])
    return counts.astype(np.float32), columns.astype(np.int32), np.bincount(rows, minlength=n_cells)


def vocabulary_genes() -> list[str]:
    return [f"ENSG{i:011d}" for i in range(N_VOCABULARY)]


def generate_tokenizer(work: Path, seed: int) -> Path:
    """Folder of a tokenizer of 25,424 genes with log-normal medians and as many symbols, made if it is not there."""
    import pandas as pd

    from cellglot import RankValueTokenizer

    folder = work / f"tokenizer-seed-{seed}"
    if not folder.exists():
        medians = np.random.default_rng(seed).lognormal(1.0, 0.5, N_VOCABULARY)
        tokens = ["<pad>", "<mask>", *vocabulary_genes()]
        table = pd.DataFrame(
            {"token": tokens, "token_id": range(len(tokens)), "nonzero_median": [np.nan, np.nan, *medians]}
        )
        symbols = {f"SYMBOL{i}": gene for i, gene in enumerate(vocabulary_genes())}
        with tempfile.TemporaryDirectory(dir=work) as partial:
            RankValueTokenizer.from_vocabulary(table, aliases=symbols).save_pretrained(Path(partial) / "tokenizer")
            os.replace(Path(partial) / "tokenizer", folder)
    return folder
