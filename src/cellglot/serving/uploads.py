"""Cells of a file that a stranger sent: read in a limited process of its own, or refused with one clear sentence."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
READER = Path(__file__).with_name("untrusted_h5ad.py")
# Of the cells of a session, 64 of which are kept: values that are not 0 (8 bytes each), and bytes of obs and var
KEPT_VALUES, KEPT_TEXT = 8_000_000, 40_000_000


class UploadError(ValueError):
    """The file is not used; the message says what was expected, what was found and how to mend it."""


@dataclass(frozen=True)
class Limits:
    """What is read of a file at most."""

    file_bytes: int = 200_000_000
    cells: int = 20_000
    genes: int = 70_000
    # values that are not 0
    nonzero: int = 60_000_000
    # of any one array of the file, once decompressed
    unpacked_bytes: int = 1_000_000_000
    # address space of the reading process
    memory: int = 4_000_000_000
    # CPU time of the reading process, and twice that on the clock
    seconds: int = 60
    # longer names are cut
    text_length: int = 60


def read_upload(path: str | Path, limits: Limits = Limits()) -> Any:
    """AnnData with raw counts as X, and the plain columns of obs and var, of an .h5ad file that is not trusted.

    Counts are taken from X, layers["counts"] or raw, whichever holds whole numbers first (`uns["counts"]` says which).
    uns, obsm, obsp and all else in the file are not looked at. Links out of the file, plugins and pickles are refused.
    Raises  UploadError
    """
    import anndata as ad
    import scipy.sparse as sp

    path = Path(path)
    check_file(path, limits)
    with tempfile.TemporaryDirectory(prefix="cellglot-upload-") as folder:
        output = Path(folder) / "cells.npz"
        answer = run_reader(path, output, limits)
        with np.load(output, allow_pickle=False) as stored:
            arrays = {name: stored[f"array{i}"] for i, name in enumerate(answer["names"])}
    n_cells, n_genes = arrays["shape"].tolist()
    matrix = sp.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(n_cells, n_genes))
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return ad.AnnData(matrix, obs=table(arrays, "obs"), var=table(arrays, "var"), uns={"counts": answer["counts"]})


def sampled(adata: Any, n_cells: int) -> Any:
    """The cells, or a copy of `n_cells` of them, drawn at random, in their order; the same each time.

    As a session may keep what this returns, it has fewer cells where those have more than KEPT_VALUES values.
    Raises  UploadError if its tables take more than KEPT_TEXT
    """
    import scipy.sparse as sp

    n_values = sp.csr_matrix(adata.X).getnnz(axis=1)
    if adata.n_obs > n_cells or n_values.sum() > KEPT_VALUES:
        chosen = np.random.default_rng(0).choice(adata.n_obs, min(n_cells, adata.n_obs), replace=False)
        adata = adata[np.sort(chosen[np.cumsum(n_values[chosen]) <= KEPT_VALUES])].copy()
    text = sum(int(table.memory_usage(deep=True).sum()) for table in (adata.obs, adata.var))
    if text > KEPT_TEXT:
        raise UploadError(
            f"The names and columns of obs and var take {text / 1e6:,.0f} MB; at most {KEPT_TEXT / 1e6:,.0f} MB are "
            "kept. Leave out the columns that hold neither types nor names of genes, or genes."
        )
    return adata


def counted(n: int, n_given: int) -> str:
    """How many cells a page looks at, of those it was given, in Markdown."""
    return f"**{n:,} of {n_given:,} cells**" if n_given > n else f"**{n:,} cells**"


def check_file(path: Path, limits: Limits) -> None:
    """Size and first bytes, before anything parses the file."""
    if path.is_symlink() or not path.is_file():
        raise UploadError("Expected one .h5ad file, found none. Choose a file and wait until it is uploaded.")
    size = path.stat().st_size
    if size > limits.file_bytes:
        raise UploadError(
            f"The file has {size / 1e6:,.0f} MB; at most {limits.file_bytes / 1e6:,.0f} MB are read. "
            "Upload fewer cells."
        )
    with path.open("rb") as file:
        found = file.read(len(HDF5_SIGNATURE))
    if found != HDF5_SIGNATURE:
        raise UploadError(
            "Expected an .h5ad file (HDF5), found something else. Save the cells with adata.write_h5ad(path)."
        )


def run_reader(path: Path, output: Path, limits: Limits) -> dict[str, Any]:
    """The answer of untrusted_h5ad.py."""
    # -I: neither the working directory nor PYTHON* variables decide which code runs
    command = [sys.executable, "-I", str(READER), str(path.resolve()), str(output), json.dumps(asdict(limits))]
    # Only what the interpreter needs: no tokens, and no folder that HDF5 would load plugins from
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HDF5_PLUGIN_PATH": "::"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=output.parent,
            capture_output=True,
            text=True,
            timeout=2 * limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UploadError(f"Reading the file took over {2 * limits.seconds} seconds. Upload fewer cells.") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        # The reader was ended by a limit, or by HDF5 itself
        raise UploadError("The file could not be read within the limits, or is damaged. Upload fewer cells.") from None
    if "refused" in answer:
        raise UploadError(answer["refused"])
    return answer


def table(arrays: dict[str, np.ndarray], name: str) -> Any:
    """DataFrame of obs or var; names made unique, since nothing promises that they are."""
    import pandas as pd
    from anndata.utils import make_index_unique

    prefix = f"{name}/column/"
    columns = {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}
    frame = pd.DataFrame(columns, index=pd.Index(arrays[f"{name}/index"].astype(object)))
    frame.index = make_index_unique(frame.index)
    return frame
