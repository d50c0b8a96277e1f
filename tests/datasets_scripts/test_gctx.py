"""Blocks of profiles out of `.gctx` files equal the whole matrix, in any order of genes, whatever the chunks."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.gctx import Gctx

N_PROFILES, N_GENES = 23, 11


def write_gctx(
    path: Path,
    profiles: pd.DataFrame,
    chunks: tuple[int, int] | None = None,
    annotations: dict[str, pd.DataFrame] | None = None,
    compression: str | None = None,
) -> Path:
    """The published layout: ids as byte strings of equal length, `version` an attribute; profiles x genes."""
    with h5py.File(path, "w") as file:
        file.attrs["version"] = np.bytes_("GCTX1.0")
        file.create_dataset(
            "/0/DATA/0/matrix", data=profiles.to_numpy(np.float32), chunks=chunks, compression=compression
        )
        for group, ids in (("ROW", profiles.columns), ("COL", profiles.index)):
            file[f"/0/META/{group}/id"] = np.char.encode(ids.to_numpy(str))
            for name, column in (annotations or {}).get(group, pd.DataFrame()).items():
                file[f"/0/META/{group}/{name}"] = np.char.encode(column.to_numpy(str))
    return path


def some_profiles(n_profiles: int = N_PROFILES, n_genes: int = N_GENES, seed: int = 0) -> pd.DataFrame:
    values = np.random.default_rng(seed).normal(size=(n_profiles, n_genes)).astype(np.float32)
    genes = [str(1000 + 7 * i) for i in range(n_genes)]
    return pd.DataFrame(
        values, index=pd.Index([f"P{i:03d}_A375_24H:A{i % 5:02d}" for i in range(n_profiles)]), columns=genes
    )


def all_of(gctx: Gctx, genes: np.ndarray, start: int, stop: int, **options) -> np.ndarray:
    edges, blocks = [start], []
    for a, b, values in gctx.blocks(start, stop, genes, **options):
        assert a == edges[-1]
        edges.append(b)
        blocks.append(values)
    assert edges[-1] == stop
    return np.concatenate(blocks)


@pytest.fixture
def profiles() -> pd.DataFrame:
    return some_profiles()


@pytest.mark.parametrize("chunks", [None, (5, 3), (N_PROFILES, 1), (1, N_GENES)])
@pytest.mark.parametrize("block_bytes", [1, 13 * N_GENES * 4, 1 << 20])
def test_blocks_equal_the_matrix(profiles, tmp_path, chunks, block_bytes):
    with Gctx(write_gctx(tmp_path / "a.gctx", profiles, chunks)) as gctx:
        genes = np.array([10, 0, 3, 4])
        found = all_of(gctx, genes, 2, 19, block_bytes=block_bytes)
        ids = gctx.profile_ids(2, 19)
    np.testing.assert_array_equal(found, profiles.to_numpy()[2:19][:, genes])
    assert found.dtype == np.float32
    assert ids.to_pylist() == profiles.index[2:19].tolist()


def test_blocks_end_with_chunks_and_stay_within_their_bound(profiles, tmp_path):
    with Gctx(write_gctx(tmp_path / "a.gctx", profiles, (5, 3))) as gctx:
        blocks = list(gctx.blocks(2, N_PROFILES, np.arange(N_GENES), block_bytes=13 * N_GENES * 4))
    assert [(a, b) for a, b, _ in blocks] == [(2, 10), (10, 20), (20, 23)]


def test_padded_and_variable_length_and_numeric_ids_are_the_same_ids(profiles, tmp_path):
    path = write_gctx(tmp_path / "a.gctx", profiles)
    with h5py.File(path, "r+") as file:
        del file["/0/META/ROW/id"], file["/0/META/COL/id"]
        file["/0/META/ROW/id"] = profiles.columns.astype(int)
        file["/0/META/COL/id"] = [f"{i}   " for i in profiles.index]
    with Gctx(path) as gctx:
        assert gctx.gene_ids.to_pylist() == profiles.columns.tolist()
        assert gctx.profile_ids().to_pylist() == profiles.index.tolist()


def test_annotations_lose_the_connectivity_maps_missing_value(profiles, tmp_path):
    annotations = pd.DataFrame({"pert_dose": ["-666", "10.0"] + ["-666.0"] * (N_PROFILES - 2)})
    with Gctx(write_gctx(tmp_path / "a.gctx", profiles, annotations={"COL": annotations})) as gctx:
        found = gctx.annotations("profiles")
    assert found.index.tolist() == profiles.index.tolist()
    assert found["pert_dose"].dropna().to_dict() == {profiles.index[1]: "10.0"}


@pytest.mark.filterwarnings("ignore:errors='ignore' is deprecated:FutureWarning")
def test_equals_cmappy(profiles, tmp_path):
    parse_gctx = pytest.importorskip("cmapPy.pandasGEXpress.parse_gctx")
    path = write_gctx(tmp_path / "a.gctx", profiles, (5, 3))
    theirs = parse_gctx.parse(str(path)).data_df
    with Gctx(path) as gctx:
        genes = gctx.gene_positions(pa.array(theirs.index))
        np.testing.assert_array_equal(all_of(gctx, genes, 0, N_PROFILES), theirs[profiles.index].to_numpy().T)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["l1000_level3_HT115_681x978", "l1000_cmappy_test_377x978"])
def test_real_l1000_values_come_back(real_data, tmp_path, name):
    cells = ad.read_h5ad(real_data / "drug" / f"{name}.h5ad")
    # 262 profiles x 1,000 genes are the chunks of the Connectivity Map's own writer.
    path = write_gctx(tmp_path / "a.gctx", cells.to_df(), (262, 978), compression="gzip")
    with Gctx(path) as gctx:
        assert gctx.gene_ids.to_pylist() == cells.var_names.tolist()
        found = all_of(gctx, gctx.gene_positions(pa.array(cells.var_names)), 0, cells.n_obs, block_bytes=1 << 20)
    np.testing.assert_array_equal(found, cells.X)


def test_genes_that_the_matrix_lacks_are_named(profiles, tmp_path):
    with Gctx(write_gctx(tmp_path / "a.gctx", profiles)) as gctx:
        with pytest.raises(CorpusError, match=r"lacks 2 of 3 genes of the gene table \(e\.g\. 'TP53', 'ACTB'\).*11"):
            gctx.gene_positions(pa.array(["TP53", "1000", "ACTB"]))


def test_a_gene_that_stands_twice_is_named(profiles, tmp_path):
    path = write_gctx(tmp_path / "a.gctx", profiles.set_axis(["1000", "1000", *profiles.columns[2:]], axis=1))
    with Gctx(path) as gctx, pytest.raises(CorpusError, match=r"more than once .*'1000'"):
        gctx.gene_positions(pa.array(["1014"]))


@pytest.mark.parametrize("dataset", ["/0/DATA/0/matrix", "/0/META/ROW/id", "/0/META/COL/id"])
def test_a_missing_dataset_is_named(profiles, tmp_path, dataset):
    path = write_gctx(tmp_path / "a.gctx", profiles)
    with h5py.File(path, "r+") as file:
        del file[dataset]
    with pytest.raises(CorpusError, match=f"no dataset {dataset}"):
        Gctx(path)


def test_a_transposed_matrix_is_refused(profiles, tmp_path):
    path = write_gctx(tmp_path / "a.gctx", profiles)
    with h5py.File(path, "r+") as file:
        del file["/0/DATA/0/matrix"]
        file["/0/DATA/0/matrix"] = profiles.to_numpy().T
    with pytest.raises(CorpusError, match="23 profiles and 11 genes"):
        Gctx(path)


def test_a_truncated_file_is_said_to_be(profiles, tmp_path):
    path = write_gctx(tmp_path / "a.gctx", profiles)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorpusError, match=r"a\.gctx .* is truncated"):
        Gctx(path)


def test_a_damaged_chunk_is_found(profiles, tmp_path):
    path = write_gctx(tmp_path / "a.gctx", profiles, (5, N_GENES), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["/0/DATA/0/matrix"].id.get_chunk_info(2)  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    with Gctx(path) as gctx, pytest.raises(CorpusError, match="profiles 10 to 15 cannot be read"):
        all_of(gctx, np.arange(N_GENES), 0, N_PROFILES, block_bytes=5 * N_GENES * 4)


@pytest.mark.parametrize(
    ("content", "message"), [(b"\x1f\x8b\x08", "gzip-compressed"), (b"#1.3\n2\t3", "no HDF5 file")]
)
def test_what_is_no_gctx_is_refused(tmp_path, content, message):
    path = tmp_path / "a.gctx"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        Gctx(path)
