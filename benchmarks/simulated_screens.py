"""Simulated sci-Plex 3 as triplet text and BMMC multiome as `.h5ad`, at any size, in the published layouts.

The tables of sci-Plex 3 have the full screen's 799,317 nuclei and 110,983 genes, of which the matrix describes the
first nuclei, 1,260 genes each as published. A cell of the multiome has 5,400 of 13,431 genes and 116,490 peaks.
"""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from tqdm.auto import tqdm

N_NUCLEI, N_GENES, GENES_PER_NUCLEUS = 799_317, 110_983, 1_260
N_EXPRESSED, N_PEAKS, FEATURES_PER_CELL = 13_431, 116_490, 5_400
N_DRUGS = 188
CELLS_PER_BLOCK = 512


def generate_triplets(folder: Path, n_bytes: int, seed: int) -> tuple[int, float]:
    """The five files of GSM4150378, the matrix unpacked, nearly twice as long as its counts in memory.

    Returns nuclei, and the sum of counts.
    """
    from cellglot.datasets_scripts.sciplex3 import MATRIX

    n_measured = n_bytes // (8 * GENES_PER_NUCLEUS)
    if n_measured > N_NUCLEI:
        raise ValueError(f"{n_bytes:,} bytes of counts are those of more than the screen's {N_NUCLEI:,} nuclei.")
    _write_screen_tables(folder)
    rng = np.random.default_rng(seed)
    options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t")
    total = 0.0
    with (folder / MATRIX.removesuffix(".gz")).open("wb") as text:
        for start in tqdm(range(0, n_measured, CELLS_PER_BLOCK), "generating", unit="block"):
            stop = min(start + CELLS_PER_BLOCK, n_measured)
            genes = _ascending(rng, stop - start, N_GENES, GENES_PER_NUCLEUS)
            counts = rng.geometric(0.6, genes.size).astype(np.int32)
            cells = np.repeat(np.arange(start, stop, dtype=np.int32), GENES_PER_NUCLEUS)
            triplets = pa.table({"gene": genes.ravel() + 1, "cell": cells + 1, "count": counts})
            pyarrow.csv.write_csv(triplets, text, options)
            total += counts.sum(dtype=np.int64)
    return N_NUCLEI, total


def _write_screen_tables(folder: Path) -> None:
    from cellglot.datasets_scripts.sciplex3 import CELLS, GENES, PDATA, WELLS

    header = ["cell", "sample", "Size_Factor", "n.umi", "hash_umis_W", "pval_W", "qval_W", "top_to_second_best_ratio_W"]
    header += ["hash_umis_P", "pval_P", "qval_P", "top_to_second_best_ratio_P", "well_oligo", "plate_oligo", "Combo"]
    header += ["cell_type", "replicate", "time_point", "catalog_number", "vehicle", "dose", "product_name"]
    header += ["pathway_level_1", "pathway_level_2", "target", "pathway"]
    names = [f"A01_E09_RT_BC_{i}_Lig_BC_{i % 384}" for i in range(N_NUCLEI)]

    def annotations(i: int, name: str) -> str:
        drug, well, plate = f"S{1000 + i % N_DRUGS}", f"plate{i % 9}_A{i % 96}", f"plate{i % 52}"
        figures = f"1.75110435800108 {1000 + i % 7000} 79 2.04e-211 4.97e-209 5.66505810656352"
        figures += " 194 1.5e-274 1.6e-271 274.556876355147"
        treatment = f'"{well}" "{plate}" "{well}{plate}" "MCF7" "rep{1 + i % 2}" 24 "{drug}" FALSE 10000 "Drug {drug}"'
        classes = f'"Tyrosine kinase signaling" "RTK activity" "Aurora Kinase {i % 88}" "Cell Cycle"'
        return f'"{name}" "{name}" "Chem3_Screen2" {figures} {treatment} {classes}\n'

    with gzip.open(folder / PDATA, "wt", 1) as file:
        file.write(" ".join(f'"{name}"' for name in header) + "\n")
        file.writelines(annotations(i, name) for i, name in enumerate(tqdm(names, "pData", unit="nuclei")))
    with gzip.open(folder / CELLS, "wt", 1) as file:
        file.writelines(f"{name}\tChem3_Screen2\n" for name in names)
    with gzip.open(folder / GENES, "wt", 1) as file:
        file.write("id gene_short_name\n")
        file.writelines(f"ENSG{i:011d}.{i % 17} GENE{i}\n" for i in range(N_GENES))
    with gzip.open(folder / WELLS, "wt", 1) as file:
        file.write("catalog_number\tname\tSMILES\n")
        file.writelines(f"S{1000 + i}\tDrug S{1000 + i}\tC{'C' * (i % 60)}O |c:1|\n" for i in range(N_DRUGS))


def generate_multiome(folder: Path, n_bytes: int, seed: int) -> tuple[int, float]:
    """The file of GSE194122, unpacked, with counts of so many bytes in CSR; returns cells and the sum over genes.

    All cells are of batches of the training split. X, which nothing reads, is a link to the counts.
    """
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    from cellglot.datasets_scripts.bmmc_multiome import GEO_FILE, SPLIT_OF_BATCH

    rng = np.random.default_rng(seed)
    n_cells, n_features = n_bytes // (8 * FEATURES_PER_CELL), N_EXPRESSED + N_PEAKS
    total = 0.0
    with h5py.File(folder / GEO_FILE.removesuffix(".gz"), "w") as file:
        counts = file.create_group("layers/counts")
        attributes = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, n_features)}
        counts.attrs.update(attributes)
        data = counts.create_dataset("data", (n_cells * FEATURES_PER_CELL,), np.float32)
        indices = counts.create_dataset("indices", (n_cells * FEATURES_PER_CELL,), np.int32)
        counts["indptr"] = np.arange(n_cells + 1) * FEATURES_PER_CELL
        for start in tqdm(range(0, n_cells, CELLS_PER_BLOCK), "generating", unit="block"):
            stop = min(start + CELLS_PER_BLOCK, n_cells)
            columns = _ascending(rng, stop - start, n_features, FEATURES_PER_CELL).ravel()
            values = rng.geometric(0.6, columns.size).astype(np.float32)
            span = slice(start * FEATURES_PER_CELL, stop * FEATURES_PER_CELL)
            indices[span], data[span] = columns, values
            total += values[columns < N_EXPRESSED].sum(dtype=np.float64)
        file["X"] = counts
        batches = np.resize([batch for batch, split in SPLIT_OF_BATCH.items() if split == "train"], n_cells)
        obs = {"cell_type": pd.Categorical(np.resize(["HSC", "pDC"], n_cells)), "batch": pd.Categorical(batches)}
        cells = [f"{i:016d}-1-{batch}" for i, batch in enumerate(batches)]
        genes = [f"GENE{i}" for i in range(N_EXPRESSED)]
        peaks = [f"chr{1 + i % 22}-{1000 * i}-{1000 * i + 900}" for i in range(N_PEAKS)]
        kinds = pd.Categorical(["GEX"] * N_EXPRESSED + ["ATAC"] * N_PEAKS)
        ids = [f"ENSG{i:011d}" for i in range(N_EXPRESSED)] + peaks
        write_elem(file, "obs", pd.DataFrame(obs, index=pd.Index(cells)))
        write_elem(file, "var", pd.DataFrame({"feature_types": kinds, "gene_id": ids}, index=pd.Index(genes + peaks)))
    return n_cells, total


def _ascending(rng: np.random.Generator, n_rows: int, n_columns: int, per_row: int) -> np.ndarray:
    """(n_rows, per_row) int32 ascending columns: sums of random steps, which end six deviations below n_columns."""
    longest_step = int(1.8 * n_columns / per_row)
    return np.cumsum(rng.integers(1, longest_step, (n_rows, per_row), np.int32), axis=1)
