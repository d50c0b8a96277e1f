"""Ranges read past h5py's lock are those h5py reads, however the values are stored."""

from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from cellglot.tokenization import hdf5_ranges
from cellglot.tokenization.count_matrix import open_counts
from cellglot.tokenization.hdf5_ranges import range_reader

from ..conftest import make_tokenizer, synthetic_cells

N = 101
STORAGE = {
    "gzip": {"compression": "gzip", "chunks": (13,)},
    "gzip and shuffle": {"compression": "gzip", "shuffle": True, "chunks": (13,)},
    "shuffle": {"shuffle": True, "chunks": (13,)},
    "chunks as they are": {"chunks": (13,)},
    "one chunk": {"compression": "gzip", "chunks": (N,)},
    "chunk beyond the end": {"compression": "gzip", "chunks": (N + 6,), "maxshape": (None,)},
    "checksum": {"compression": "gzip", "fletcher32": True, "chunks": (13,)},
    "lzf": {"compression": "lzf", "chunks": (13,)},
    "contiguous": {},
}
DIRECT = {"gzip", "gzip and shuffle", "shuffle", "chunks as they are", "one chunk", "chunk beyond the end"}


def is_direct(reader):
    return isinstance(getattr(reader, "__self__", None), hdf5_ranges._ChunkedRanges)


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">i4", "<i8", "<u2", "u1"])
@pytest.mark.parametrize("storage", STORAGE)
def test_every_range_of_every_storage(storage, kind, tmp_path):
    values = np.arange(N).astype(kind)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=values, **STORAGE[storage])
        reader = range_reader(dataset)
        assert is_direct(reader) == (storage in DIRECT)
        for start in range(0, N, 3):
            for stop in range(start, N + 20, 7):
                np.testing.assert_array_equal(reader(start, stop), values[start:stop])


def test_chunks_that_were_never_written_or_skip_a_filter(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        sparse = file.create_dataset("sparse", (N,), "f4", chunks=(13,), compression="gzip", fillvalue=3)
        sparse[40:60] = 7
        np.testing.assert_array_equal(range_reader(sparse)(30, 90), sparse[30:90])
        raw = file.create_dataset("raw", data=np.arange(26, dtype="<i4"), chunks=(13,), compression="gzip")
        # Filter 0 is left out of the second chunk, as the library does where compression gains nothing.
        raw.id.write_direct_chunk((13,), np.arange(50, 63, dtype="<i4").tobytes(), filter_mask=1)
        reader = range_reader(raw)
        assert is_direct(reader)
        np.testing.assert_array_equal(reader(5, 26), [*range(5, 13), *range(50, 63)])


def test_threads_read_any_range_in_any_order(tmp_path):
    values = np.random.default_rng(0).integers(0, 9, 20_011).astype(np.float32)
    starts = np.random.default_rng(1).integers(0, 20_000, 500)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=values, compression="gzip", chunks=(97,))
        reader = range_reader(dataset)
        with ThreadPoolExecutor(4) as pool:
            for start, found in zip(starts, pool.map(lambda a: reader(a, a + 301), starts), strict=True):
                np.testing.assert_array_equal(found, values[start : start + 301])


def test_a_chunk_that_ranges_share_is_inflated_once(tmp_path, monkeypatch):
    inflated = []
    decompress = hdf5_ranges.decompress

    def counted(stored, bits, size):
        inflated.append(size)
        return decompress(stored, bits, size)

    monkeypatch.setattr(hdf5_ranges, "decompress", counted)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=np.arange(N), compression="gzip", chunks=(50,))
        reader = range_reader(dataset)
        for start in range(0, N, 7):
            reader(start, start + 7)
    assert len(inflated) == 3


def test_both_inflaters_give_the_same(tmp_path, monkeypatch):
    import zlib

    isal_zlib = pytest.importorskip("isal.isal_zlib")
    values = np.random.default_rng(0).poisson(1.0, 10_007).astype(np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", data=values, compression="gzip", chunks=(997,))
        for decompress in (zlib.decompress, isal_zlib.decompress):
            monkeypatch.setattr(hdf5_ranges, "decompress", decompress)
            np.testing.assert_array_equal(range_reader(dataset)(0, 10_007), values)


@pytest.mark.parametrize("damage", ["garbage", "cut", "too short"])
@pytest.mark.parametrize("inflater", ["zlib", "isal"])
def test_a_damaged_chunk_is_an_error_that_names_the_file(damage, inflater, tmp_path, monkeypatch):
    import zlib

    if inflater == "zlib":
        monkeypatch.setattr(hdf5_ranges, "decompress", zlib.decompress)
        monkeypatch.setattr(hdf5_ranges, "InflateError", zlib.error)
    else:
        pytest.importorskip("isal.isal_zlib")
    path = tmp_path / "c.h5ad"
    synthetic_cells(23, 7).write_h5ad(path, compression="gzip")
    with h5py.File(path, "a") as file:
        dataset = file["X/data"]
        _, stored = dataset.id.read_direct_chunk((0,))
        wrong = {
            "garbage": b"\x07" * len(stored),
            "cut": stored[: len(stored) // 2],
            "too short": zlib.compress(b"1234"),
        }
        dataset.id.write_direct_chunk((0,), wrong[damage])
    with pytest.raises(OSError, match=r"c\.h5ad cannot be read: truncated or corrupt.*chunk at value 0 of /X/data"):
        make_tokenizer().encode_anndata(path)


def test_a_matrix_of_another_shape_than_its_annotations_is_refused(tmp_path):
    path = tmp_path / "c.h5ad"
    synthetic_cells(23, 7).write_h5ad(path)
    with h5py.File(path, "a") as file:
        file["X"].attrs["shape"] = np.array([23, 11])
    with open_counts(path) as matrix, pytest.raises(OSError, match=r"cells 0 to 5 of 7 genes have shape \(5, 11\)"):
        matrix.read_block(0, 5)
