"""Memory of the corpus builders on files three times as large as the memory they may use.

    python benchmarks/corpora.py --json benchmarks/results/corpora.json          # all formats, about 7 GB of disk
    python benchmarks/corpora.py --formats csv --gigabytes 3 --work /scratch

Each format's files are generated at size in a work folder, in the published layout with the published number of genes,
and turned into a corpus by its builder, in a process of its own: read, checked, written as Parquet. `size_gb` is the
size of the counts as they would stand in memory were the file loaded at once (CSR for sparse files, float32 for dense
ones), `file_gb` that of the file. Peak memory is that of the whole process, with the libraries it has loaded
(`imports_mb`). The number of cells and the sum of all counts in the corpus must be those that were written.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
from simulated_profiles import generate_gct, generate_gctx
from simulated_screens import generate_multiome, generate_triplets
from tqdm.auto import tqdm

LIMIT_MB = 1000
CELLS_PER_BLOCK = 512


@dataclass(frozen=True)
class Format:
    """How a corpus' files are made and which builder reads them.

    generate  (folder, bytes of counts in memory, seed) -> (rows, sum of their values); writes the files into the folder
    builder   () -> class of the builder, imported only where it runs
    values    list column whose sum must be that of `generate`
    """

    generate: Callable[[Path, int, int], tuple[int, float]]
    builder: Callable[[], Callable[..., Any]]
    values: str = "count"


def generate_h5ad(folder: Path, n_bytes: int, seed: int, encoding: str = "csr_matrix") -> tuple[int, float]:
    """An uncompressed `.h5ad` of 2,500 detected genes a cell among 60,000, stored by cell (CSR) or by gene (CSC)."""
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    n_genes, per_cell = 60_000, 2_500
    n_cells = n_bytes // (8 * per_cell)
    n_major, n_minor = (n_cells, n_genes) if encoding == "csr_matrix" else (n_genes, n_cells)
    n_stored = n_cells * per_cell // n_major
    rng = np.random.default_rng(seed)
    total = 0.0
    with h5py.File(folder / "cells.h5ad", "w") as file:
        cell_names, gene_names = (pd.Index(np.arange(n)).astype(str) for n in (n_cells, n_genes))
        cell_type = pd.Categorical(rng.choice(["B", "T"], n_cells))
        write_elem(file, "obs", pd.DataFrame({"cell_type": cell_type}, index="cell" + cell_names))
        write_elem(file, "var", pd.DataFrame(index="GENE" + gene_names))
        x = file.create_group("X")
        x.attrs.update({"encoding-type": encoding, "encoding-version": "0.1.0", "shape": (n_cells, n_genes)})
        x["indptr"] = np.arange(n_major + 1) * n_stored
        data = x.create_dataset("data", (n_major * n_stored,), np.float32)
        indices = x.create_dataset("indices", (n_major * n_stored,), np.int32)
        # Ascending without a sort: random steps whose sum stays below the end, a quarter of the axis in reserve
        largest = int(1.5 * n_minor / n_stored) - 1
        for start, stop in _blocks(n_major):
            span = slice(start * n_stored, stop * n_stored)
            positions = np.cumsum(rng.integers(1, largest + 1, (stop - start, n_stored), np.int32), axis=1)
            assert positions.max() < n_minor
            indices[span] = positions.ravel()
            values = rng.integers(1, 50, (stop - start) * n_stored, np.uint8)
            data[span] = values
            total += values.sum(dtype=np.int64)
    return n_cells, total


def generate_loom(folder: Path, n_bytes: int, seed: int) -> tuple[int, float]:
    """`l5_all.loom` as mousebrain.org has it: genes x cells, float32 in gzip chunks of 64 x 64, a tenth non-zero."""
    import h5py

    from cellglot.datasets_scripts.mouse_brain import LABELS, LOOM

    n_genes = 27_998
    n_cells = n_bytes // (4 * n_genes)
    rng = np.random.default_rng(seed)
    total = 0.0
    with h5py.File(folder / LOOM, "w") as file:
        file.attrs["LOOM_SPEC_VERSION"] = "2.0.1"
        file["row_attrs/Accession"] = [f"ENSMUSG{i:011d}".encode() for i in range(n_genes)]
        file["row_attrs/Gene"] = [f"Gene{i}".encode() for i in range(n_genes)]
        file["col_attrs/CellID"] = [f"cell{i}".encode() for i in range(n_cells)]
        for name in LABELS:
            file[f"col_attrs/{name}"] = [f"{name} {i % 7}".encode() for i in range(n_cells)]
        matrix = file.create_dataset(
            "matrix",
            (n_genes, n_cells),
            np.float32,
            chunks=(64, 64),
            compression="gzip",
            compression_opts=2,
            shuffle=False,
        )
        for start, stop in _blocks(n_cells):
            values = rng.integers(0, 256, (n_genes, stop - start), np.uint8)
            values = np.where(values >= 230, values - 229, 0)
            matrix[:, start:stop] = values
            total += values.sum(dtype=np.int64)
    return n_cells, total


def generate_csv(folder: Path, n_bytes: int, seed: int) -> tuple[int, float]:
    """`matrix.csv` and `metadata.csv` as the Allen Institute has them: 50,281 genes, 9,000 of them in a nucleus.

    So large that the text, too, is of `n_bytes`. The rows are drawn from 97 different ones.
    """
    n_genes, n_detected = 50_281, 9_000
    rng = np.random.default_rng(seed)
    texts, sums = [], []
    for _ in range(97):
        counts = np.zeros(n_genes, np.int64)
        counts[rng.choice(n_genes, n_detected, replace=False)] = rng.geometric(0.01, n_detected)
        texts.append("," + ",".join(map(str, counts)) + "\n")
        sums.append(counts.sum())
    n_cells = int(n_bytes // np.mean([len(text) for text in texts]))
    picks = rng.integers(len(texts), size=n_cells)
    with (folder / "matrix.csv").open("w") as file:
        file.write("sample_name," + ",".join(f"GENE{i}" for i in range(n_genes)) + "\n")
        for i, pick in enumerate(tqdm(picks, "matrix.csv", unit="nuclei")):
            file.write(f"F1S4_{i:06d}")
            file.write(texts[pick])
    with (folder / "metadata.csv").open("w") as file:
        file.write("sample_name,class_label,subclass_label,cluster_label,region_label,outlier_call\n")
        file.writelines(f"F1S4_{i:06d},GABAergic,VIP,Inh L1 VIP {i % 90},MTG,False\n" for i in range(n_cells))
    return n_cells, float(np.array(sums)[picks].sum())


def _blocks(n_cells: int) -> Any:
    for start in tqdm(range(0, n_cells, CELLS_PER_BLOCK), "generating", unit="block"):
        yield start, min(start + CELLS_PER_BLOCK, n_cells)


def _anndata_folder() -> type:
    from cellglot.datasets_scripts.anndata_folder import AnnDataFolder

    return AnnDataFolder


def _mouse_brain() -> type:
    from cellglot.datasets_scripts.mouse_brain import MouseBrain

    return MouseBrain


def _human_cortex() -> type:
    from cellglot.datasets_scripts.human_cortex import HumanCortex

    return HumanCortex


def _lincs_l1000() -> Callable[..., Any]:
    from cellglot.datasets_scripts.lincs_l1000 import LincsL1000

    return partial(LincsL1000, config_name="phase1_level3")


def _sciplex3() -> type:
    from cellglot.datasets_scripts.sciplex3 import SciPlex3

    # The tables are simulated too.
    published = SciPlex3.SOURCES["default"]
    SciPlex3.SOURCES = {"default": [replace(source, checksum=None) for source in published]}
    return SciPlex3


def _bmmc_multiome() -> type:
    from cellglot.datasets_scripts.bmmc_multiome import BMMCMultiome

    return BMMCMultiome


FORMATS = {
    "h5ad": Format(generate_h5ad, _anndata_folder),
    "h5ad_csc": Format(partial(generate_h5ad, encoding="csc_matrix"), _anndata_folder),
    "loom": Format(generate_loom, _mouse_brain),
    "csv": Format(generate_csv, _human_cortex),
    "gctx": Format(generate_gctx, _lincs_l1000, "expression"),
    "gct": Format(generate_gct, _lincs_l1000, "expression"),
    "triplets": Format(generate_triplets, _sciplex3),
    "multiome": Format(generate_multiome, _bmmc_multiome),
}


def build(format_name: str, files: str, work: str) -> dict[str, Any]:
    """Builds the corpus from files on disk, in this process alone."""
    output = Path(work) / "corpus"
    shutil.rmtree(output, ignore_errors=True)
    builder = FORMATS[format_name].builder()(data_dir=files, cache_dir=str(Path(work) / "cache"))
    imports_mb = measure.peak_rss_mb()
    started = time.perf_counter()
    builder.prepare(output)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "imports_mb": imports_mb, "parts": len(list(output.glob("*/*train*.parquet")))}


def written(work: Path, values: str) -> tuple[int, float]:
    """Rows of the corpus, and the sum of a list column."""
    import pyarrow.parquet as pq

    n_rows, total = 0, 0.0
    for path in (work / "corpus").glob("*/*train*.parquet"):
        for batch in pq.ParquetFile(path).iter_batches(2048, columns=[values]):
            n_rows += len(batch)
            total += batch[values].flatten().to_numpy().sum(dtype=np.float64)
    return n_rows, total


def main() -> None:
    measure.answer_as_contender({"build": build})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the counts, 10^9 bytes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", help="folder for files and corpora, some times as large as the counts; absent: temporary"
    )
    parser.add_argument("--json", help="file for the results; formats that it has already are kept")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.json and Path(arguments.json).exists():
        results = json.loads(Path(arguments.json).read_text())
    rows, too_much = [], []
    for name in arguments.formats:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            files = Path(work) / "files"
            files.mkdir()
            expected = FORMATS[name].generate(files, int(arguments.gigabytes * 1e9), arguments.seed)
            file_gb = sum(file.stat().st_size for file in files.iterdir()) / 1e9
            runs = [
                measure.run_contender(__file__, "build", {"format_name": name, "files": str(files), "work": work})
                for _ in tqdm(range(arguments.repeats), name, unit="run")
            ]
            found = written(Path(work), FORMATS[name].values)
        if found != expected:
            raise RuntimeError(f"{name}: expected {expected} (rows, sum of values) in the corpus, found {found}.")
        per_second = expected[0] / measure.median(runs, "seconds")
        peak = measure.worst(runs, "peak_rss_mb")
        too_much += [name] if peak > LIMIT_MB else []
        imports = measure.median(runs, "imports_mb")
        rows.append([name, expected[0], arguments.gigabytes, file_gb, per_second, imports, peak])
        results |= {
            f"{name}_rows": expected[0],
            f"{name}_size_gb": arguments.gigabytes,
            f"{name}_file_gb": file_gb,
            f"{name}_rows_per_second": per_second,
            f"{name}_imports_mb": imports,
            f"{name}_peak_rss_mb": peak,
            f"{name}_repeats": arguments.repeats,
        }
    headers = ["format", "rows", "counts in memory, GB", "file, GB", "rows/s", "imports, MB", "peak memory, MB"]
    measure.print_table(headers, rows)
    measure.save_results({**results, "seed": arguments.seed, **measure.machine()}, arguments.json)
    if too_much:
        sys.exit(f"{', '.join(too_much)}: more than {LIMIT_MB} MB.")


if __name__ == "__main__":
    main()
