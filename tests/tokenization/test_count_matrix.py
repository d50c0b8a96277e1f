"""Every way counts come on disk gives the same blocks of cells."""

import gzip
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from cellglot.tokenization.count_matrix import _CSCRows, open_counts

from ..conftest import make_tokenizer, synthetic_cells

N, G = 23, 7


@pytest.fixture
def cells():
    return synthetic_cells(N, G)


def assert_same_counts(source, expected, layer=None, cells_per_block=5, mask=None, column=None):
    with open_counts(source, layer=layer) as matrix:
        blocks = list(matrix.blocks(mask, cells_per_block))
        names = matrix.obs.index
        genes = matrix.gene_names() if column is None else list(matrix.var.index)
    rows = np.concatenate([rows for rows, _ in blocks])
    mask = np.ones(len(expected.obs), dtype=bool) if mask is None else mask
    np.testing.assert_array_equal(rows, np.flatnonzero(mask))
    np.testing.assert_array_equal(sp.vstack([b for _, b in blocks]).toarray(), expected.X.toarray()[mask])
    assert list(names) == list(expected.obs_names)
    assert genes == list(expected.var_names)


def as_container(adata, container) -> Any:
    return ad.AnnData(container(adata.X.toarray()), obs=adata.obs, var=adata.var)


@pytest.mark.parametrize("container", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("on_disk", [False, True])
def test_csr_csc_and_dense(cells, container, on_disk, tmp_path):
    adata = as_container(cells, container)
    if on_disk:
        adata.write_h5ad(tmp_path / "c.h5ad", compression="gzip")
    assert_same_counts(tmp_path / "c.h5ad" if on_disk else adata, cells)


def test_backed_anndata(cells, tmp_path):
    cells.write_h5ad(tmp_path / "c.h5ad")
    assert_same_counts(ad.read_h5ad(tmp_path / "c.h5ad", backed="r"), cells)


@pytest.mark.parametrize("container", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("where", ["layer", "raw"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_layers_and_raw(cells, container, where, on_disk, tmp_path):
    adata = as_container(cells, container)
    if where == "raw":
        adata.raw = adata
        adata = adata[:, :3].copy()  # raw keeps all genes
        layer = "raw"
    else:
        adata.layers["counts"] = adata.X
        layer = "counts"
    adata.X = np.log1p(adata.X if isinstance(adata.X, np.ndarray) else adata.X.toarray())
    if on_disk:
        adata.write_h5ad(tmp_path / "c.h5ad")
    assert_same_counts(tmp_path / "c.h5ad" if on_disk else adata, cells, layer)


def test_counts_in_a_layer_of_a_file_without_x(cells, tmp_path):
    adata = ad.AnnData(obs=cells.obs, var=cells.var, layers={"counts": cells.X})
    adata.write_h5ad(tmp_path / "c.h5ad")
    assert_same_counts(tmp_path / "c.h5ad", cells, "counts")
    with pytest.raises(ValueError, match="has no X; it has counts"), open_counts(tmp_path / "c.h5ad"):
        pass


def test_masked_cells_only(cells, tmp_path):
    cells.write_h5ad(tmp_path / "c.h5ad")
    mask = np.arange(N) % 3 == 1
    mask[5:10] = False  # a whole block without a cell
    assert_same_counts(tmp_path / "c.h5ad", cells, mask=mask)


def test_csc_on_disk_in_several_bounded_passes(cells):
    csc = sp.csc_matrix(cells.X)
    reader = _CSCRows(csc.data, csc.indices, csc.indptr, csc.shape, values_per_pass=12)
    reader.values_per_read = 5
    blocks = []
    for start in range(0, N, 4):
        blocks.append(reader.read(start, min(start + 4, N)))
        assert reader._rows.nnz <= 12 or reader._rows.shape[0] == 4
    np.testing.assert_array_equal(sp.vstack(blocks).toarray(), cells.X.toarray())


def test_loom(cells, tmp_path):
    loompy = pytest.importorskip("loompy")
    path = str(tmp_path / "c.loom")
    rows = {"Gene": np.array([f"SYM{i}" for i in range(G)]), "Accession": cells.var_names.to_numpy(dtype=str)}
    columns = {"CellID": cells.obs_names.to_numpy(dtype=str), "Class": cells.obs["cell_type"].to_numpy(dtype=str)}
    loompy.create(path, cells.X.toarray().T, rows, columns)
    assert_same_counts(path, cells)
    encoded = make_tokenizer().encode_anndata(path, obs_columns=["Class"])
    assert encoded["input_ids"][:] == make_tokenizer().encode_anndata(cells)["input_ids"][:]
    assert encoded["Class"][:] == cells.obs["cell_type"].tolist()


def test_10x_h5_without_its_antibodies(cells, tmp_path):
    antibodies = np.full((N, 2), 500)
    matrix = sp.csr_matrix(np.hstack([antibodies[:, :1], cells.X.toarray(), antibodies[:, 1:]]))
    with h5py.File(tmp_path / "c.h5", "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = np.array([G + 2, N])
        group["barcodes"] = cells.obs_names.to_numpy(dtype="S")
        group["features/id"] = np.array(["CD3", *cells.var_names, "CD4"], dtype="S")
        group["features/name"] = np.array([f"SYM{i}" for i in range(G + 2)], dtype="S")
        kinds = ["Antibody Capture", *["Gene Expression"] * G, "Antibody Capture"]
        group["features/feature_type"] = np.array(kinds, dtype="S")
    assert_same_counts(tmp_path / "c.h5", cells)


def test_10x_folder(cells, tmp_path):
    with gzip.open(tmp_path / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, cells.X.T.astype(int))  # type: ignore[arg-type]
    features = pd.DataFrame({"id": cells.var_names, "name": [f"SYM{i}" for i in range(G)], "type": "Gene Expression"})
    features.to_csv(tmp_path / "features.tsv.gz", sep="\t", header=False, index=False)
    pd.Series(cells.obs_names).to_csv(tmp_path / "barcodes.tsv.gz", header=False, index=False)
    assert_same_counts(tmp_path, cells)


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_an_old_anndata():
    import scanpy

    path = Path(scanpy.__file__).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"
    expected = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    assert_same_counts(path, expected, "raw", cells_per_block=300)


def change_data_set(path, name, change):
    with h5py.File(path, "a") as file:
        values = change(file[name][:])  # type: ignore[index]
        del file[name]
        file[name] = values


DAMAGE = {
    "gene beyond the matrix": ("X/indices", lambda x: np.where(np.arange(len(x)) == 5, 10**8, x)),
    "negative gene": ("X/indices", lambda x: np.where(np.arange(len(x)) == 5, -5, x)),
    "fewer values than announced": ("X/data", lambda x: x[:-3]),
    "fewer cells than announced": ("X/indptr", lambda x: x[:-3]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_matrices(cells, kind, tmp_path):
    cells.write_h5ad(tmp_path / "c.h5ad")
    change_data_set(tmp_path / "c.h5ad", *DAMAGE[kind])
    with pytest.raises(OSError, match=r"c\.h5ad cannot be read: truncated or corrupt"):
        make_tokenizer().encode_anndata(tmp_path / "c.h5ad")


@pytest.mark.parametrize("kind", ["truncated", "not hdf5", "missing group"])
def test_corrupt_files(cells, kind, tmp_path):
    path = tmp_path / "c.h5ad"
    cells.write_h5ad(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "not hdf5":
        path.write_text("gene,cell\n")
    else:
        with h5py.File(path, "a") as file:
            del file["X/indptr"]
    with pytest.raises(OSError, match=r"c\.h5ad cannot be read: truncated or corrupt"):
        make_tokenizer().encode_anndata(path)


def test_wrong_paths_and_types(tmp_path):
    for source, error, message in (
        (tmp_path / "none.h5ad", FileNotFoundError, "does not exist"),
        (tmp_path, ValueError, "folder without matrix.mtx"),
        (np.ones((2, 2)), ValueError, "Expected an AnnData or the path .* found ndarray"),
    ):
        with pytest.raises(error, match=message), open_counts(source):
            pass
    (tmp_path / "cells.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"expected one of \.h5ad, \.loom, \.h5"), open_counts(tmp_path / "cells.csv"):
        pass


@pytest.mark.realdata
def test_real_file_streams_to_the_same_counts(real_data):
    path = real_data / "golden" / "scmixology150_input.h5ad"
    assert_same_counts(path, ad.read_h5ad(path).copy(), cells_per_block=64, column="index")
