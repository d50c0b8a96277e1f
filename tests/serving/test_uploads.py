"""Files that strangers send: real ones are read as they are, hostile ones get one sentence each, within limits."""

import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellglot.serving import Limits, UploadError, read_upload, sampled, uploads

CELLS, GENES = 23, 31


def cells() -> Any:
    counts = np.random.default_rng(0).poisson(1.0, (CELLS, GENES)).astype(np.float32)
    counts[4] = 0
    obs = pd.DataFrame({"cell_type": pd.Categorical(["a", "b", None] + ["a"] * (CELLS - 3)), "n": np.arange(CELLS)})
    obs.index = [f"cell{i}" for i in range(CELLS)]
    var = pd.DataFrame({"ensembl_id": [f"ENSG{i:011d}" for i in range(GENES)]}, index=[f"G{i}" for i in range(GENES)])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cells().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_counts_and_labels_come_through(layout: str, compression: str | None, tmp_path: Path) -> None:
    expected = cells()
    matrix = sp.csr_matrix(expected.X)
    expected.X = {"csr": matrix, "csc": matrix.tocsc(), "dense": matrix.toarray()}[layout]
    expected.write_h5ad(tmp_path / "cells.h5ad", compression=compression)  # type: ignore[arg-type]
    found = read_upload(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(found.X.toarray(), matrix.toarray())
    assert list(found.obs_names) == list(expected.obs_names)
    assert list(found.var["ensembl_id"]) == list(expected.var["ensembl_id"])
    assert list(found.obs["cell_type"])[:4] == ["a", "b", "", "a"]
    assert list(found.obs["n"]) == list(range(CELLS))


@pytest.mark.parametrize("place", ["layers", "raw"])
def test_counts_are_found_beside_normalized_values(place: str, tmp_path: Path) -> None:
    expected = cells()
    normalized = expected[:, :7].copy() if place == "raw" else expected.copy()
    normalized.X = sp.csr_matrix(normalized.X).log1p()
    if place == "raw":
        normalized.raw = expected
    else:
        normalized.layers["counts"] = sp.csr_matrix(expected.X)
    normalized.write_h5ad(tmp_path / "cells.h5ad")
    found = read_upload(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(found.X.toarray(), sp.csr_matrix(expected.X).toarray())
    assert list(found.var_names) == list(expected.var_names)
    assert found.uns["counts"] == {"layers": "layers/counts", "raw": "raw/X"}[place]


def test_names_that_repeat_are_made_unique(tmp_path: Path) -> None:
    twice = cells()
    twice.obs_names = ["same"] * CELLS
    twice.write_h5ad(tmp_path / "cells.h5ad")
    assert read_upload(tmp_path / "cells.h5ad").obs_names.is_unique


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "a") as file:
        change(file)


def replace_node(name: str, **dataset: object) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        file.create_dataset(name, **dataset)

    return lambda path: edit(path, change)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def scramble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for i in rng.integers(100, len(content), 400):
        content[i] = rng.integers(256)
    path.write_bytes(content)


def declare_huge(path: Path) -> None:
    edit(path, lambda file: file["X"].attrs.modify("shape", np.array([10**12, GENES])))


def index_out_of_range(path: Path) -> None:
    def change(file: h5py.File) -> None:
        file["X/indices"][0] = GENES  # type: ignore[index]

    edit(path, change)


def link_out(path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["X"]
        file["X"] = h5py.ExternalLink("/etc/passwd", "X")

    edit(path, change)


def soft_link(path: Path) -> None:
    def change(file: h5py.File) -> None:
        file.move("obs", "elsewhere")
        file["obs"] = h5py.SoftLink("/elsewhere")

    edit(path, change)


def virtual(path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["X"]
        layout = h5py.VirtualLayout((CELLS, GENES), "u1")
        layout[:] = h5py.VirtualSource("/etc/passwd", "X", (CELLS, GENES))
        file.create_virtual_dataset("X", layout)

    edit(path, change)


def unknown_filter(path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["X"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((CELLS, GENES))
        # 32015 is Zstandard, a plugin; optional, so that the file can be made without it
        plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((CELLS, GENES))
        h5py.h5d.create(file.id, b"X", h5py.h5t.NATIVE_FLOAT, space, plist)

    edit(path, change)


def normalized(path: Path) -> None:
    edit(path, lambda file: file["X/data"].write_direct(np.full(len(file["X/data"]), 0.5, np.float32)))  # type: ignore


def not_finite(path: Path) -> None:
    edit(path, lambda file: file["X/data"].write_direct(np.full(len(file["X/data"]), np.nan, np.float32)))  # type: ignore


def categories_out_of_range(path: Path) -> None:
    edit(path, lambda file: file["obs/cell_type/codes"].write_direct(np.full(CELLS, 100, np.int8)))  # type: ignore


class Exploit:
    def __reduce__(self) -> tuple:
        return os.system, ("touch EXPLOITED",)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("cell,gene\n1,2\n"), "Expected an .h5ad file"),
    "empty": (lambda path: path.write_bytes(b""), "Expected an .h5ad file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Exploit())), "Expected an .h5ad file"),
    "signature only": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500)), "damaged"),
    "truncated": (truncate, "damaged"),
    "scrambled": (scramble, "damaged"),
    "huge declared shape": (declare_huge, "1,000,000,000,000 cells"),
    "decompression bomb, dense": (
        replace_node("X", shape=(20, 10**9), dtype="f4", chunks=(1, 10**6), compression="gzip"),
        "unpacks to 80,000 MB",
    ),
    "decompression bomb, sparse": (
        replace_node("X/data", shape=(10**9,), dtype="f8", chunks=(10**6,), compression="gzip"),
        "unpacks to 8,000 MB",
    ),
    "index out of range": (index_out_of_range, "do not fit"),
    "link to another file": (link_out, "is a link"),
    "soft link": (soft_link, "is a link"),
    "data in another file": (
        replace_node("X", shape=(CELLS, GENES), dtype="u1", external=[("/etc/passwd", 0, CELLS * GENES)]),
        "in other files",
    ),
    "virtual data": (virtual, "in other files"),
    "filter of a plugin": (unknown_filter, "filter of number 32015"),
    "matrix of text": (replace_node("X", data=np.full((CELLS, GENES), b"x")), "matrix of numbers"),
    "matrix of three axes": (replace_node("X", data=np.ones((2, 3, 5))), "3 axes"),
    "no cells": (replace_node("X", data=np.ones((0, GENES))), "0 cells"),
    "no matrix": (lambda path: edit(path, lambda file: file.__delitem__("X")), "holds no matrix"),
    "normalized": (normalized, "Expected raw counts"),
    "not finite": (not_finite, "Expected raw counts"),
    "names of other cells": (replace_node("obs/_index", data=["a", "b"]), "has no 23 names"),
    "no obs": (lambda path: edit(path, lambda file: file.__delitem__("obs")), "obs or var is missing"),
    "damaged categories": (categories_out_of_range, "damaged categorical"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_words(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    make, message = HOSTILE[name]
    make(path)
    with pytest.raises(UploadError, match=message):
        read_upload(path)
    assert {item.name for item in path.parent.iterdir()} == {path.name}


def test_one_long_text_behind_many_names_ends_at_the_memory_limit(path: Path) -> None:
    n = 4000

    def change(file: h5py.File) -> None:
        del file["obs/_index"], file["X"]
        file.create_dataset("X", data=np.ones((n, 2), "u1"))
        file.create_dataset("obs/_index", data=["x" * 1_000_000, *["short"] * (n - 1)], dtype=h5py.string_dtype())

    edit(path, change)
    with h5py.File(path, "r") as file:
        offset = file["obs/_index"].id.get_offset()  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<I", content, offset)
    assert length == 1_000_000
    content[offset : offset + 16 * n] = content[offset : offset + 16] * n
    path.write_bytes(content)
    with pytest.raises(UploadError, match="more than 1,500 MB"):
        read_upload(path, replace(Limits(), memory=1_500_000_000))


def test_time_is_limited(path: Path) -> None:
    with pytest.raises(UploadError, match=r"within the limits|took over"):
        read_upload(path, replace(Limits(), seconds=0))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"file_bytes": 1000}, "MB are read"),
        ({"cells": 22}, "23 cells; at most 22"),
        ({"genes": 30}, "31 genes; at most 30"),
        ({"nonzero": 9}, "values; at most 9"),
    ],
)
def test_each_limit_is_named(limits: dict[str, int], message: str, path: Path) -> None:
    with pytest.raises(UploadError, match=message):
        read_upload(path, replace(Limits(), **limits))


def test_a_link_in_place_of_the_file_is_not_followed(path: Path) -> None:
    link = path.with_name("link.h5ad")
    link.symlink_to(path)
    with pytest.raises(UploadError, match="found none"):
        read_upload(link)


def test_a_sample_keeps_the_order_and_is_the_same_again() -> None:
    names = list(sampled(cells(), 7).obs_names)
    assert names == list(sampled(cells(), 7).obs_names)
    assert names == sorted(names, key=lambda name: int(name.removeprefix("cell")))
    assert len(names) == 7
    assert sampled(cells(), CELLS).n_obs == CELLS


def test_a_sample_has_no_more_than_a_session_may_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    given = cells()
    monkeypatch.setattr(uploads, "KEPT_VALUES", 100)
    found = sampled(given, CELLS)
    assert 0 < found.n_obs < CELLS
    assert 100 - GENES < found.X.nnz <= 100
    assert set(found.obs_names) < set(given.obs_names)
    monkeypatch.setattr(uploads, "KEPT_TEXT", 1000)
    with pytest.raises(UploadError, match="at most 0 MB are kept"):
        sampled(given, 7)
