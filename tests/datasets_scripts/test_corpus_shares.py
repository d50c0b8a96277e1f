"""Shares: every cell once, in order, about equal in stored values, the same each time."""

import json
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellglot.datasets_scripts import corpus_shares
from cellglot.datasets_scripts.corpus_shares import Plan, Share, make_plan, shard_digest

from ..conftest import synthetic_cells

SIZES = {"a.h5ad": 1301, "deep/b.h5ad": 701, "deep/c.loom": 523, "d.h5ad": 0}


def write_loom(path, adata: Any) -> None:
    with h5py.File(path, "w") as file:
        file["matrix"] = adata.X.toarray().T
        file["col_attrs/CellID"] = np.array(adata.obs_names, dtype="S")
        file["col_attrs/donor"] = np.array(adata.obs["donor"], dtype="S")
        file["row_attrs/Accession"] = np.array(adata.var_names, dtype="S")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "deep").mkdir()
    for seed, (name, n_cells) in enumerate(SIZES.items()):
        adata = synthetic_cells(n_cells, 13, seed)
        write_loom(folder / name, adata) if name.endswith("loom") else adata.write_h5ad(folder / name)
    return folder


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 5, 100, None])
def test_every_cell_has_one_share_in_file_order(folder, n_tasks):
    plan = make_plan(folder, n_tasks=n_tasks, layer=None)
    assert plan == make_plan(folder, n_tasks=n_tasks, layer=None)
    shares = [share for task in plan.tasks for share in task]
    names = list(dict.fromkeys(share.shard for share in shares))
    assert names == sorted(name for name, n in SIZES.items() if n)
    for name in names:
        spans = [(share.start, share.stop) for share in shares if share.shard == name]
        assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), SIZES[name]]
        assert all(start % 512 == 0 for start, _ in spans)
    assert all(plan.tasks)
    assert len(plan.tasks) == {100: 3 + 2 + 2, None: 1}.get(n_tasks, n_tasks)


def test_shares_are_equal_in_stored_values_not_in_cells(tmp_path):
    # The second half of the cells has ten times the values of the first.
    blocks = [sp.random(512 * 10, 100, density, "csr", random_state=3) for density in (0.05, 0.5)]
    ad.AnnData(sp.vstack(blocks).tocsr()).write_h5ad(tmp_path / "cells.h5ad")
    cuts = [task[0].stop for task in make_plan(tmp_path, n_tasks=2, layer=None).tasks]
    # With one for the cell, a cell is work of 6 or 51; half of 10 x 6 + 10 x 51 is done after 14.4 of 20 blocks.
    assert cuts[0] == 512 * 14


def test_a_matrix_stored_by_gene_is_cut_where_a_new_pass_begins(tmp_path, monkeypatch):
    adata = synthetic_cells(2051, 13)
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(corpus_shares, "CSC_VALUES_PER_PASS", adata.X.nnz // 2)
    tasks = make_plan(tmp_path, n_tasks=50, layer=None).tasks
    assert [len(task) for task in tasks] == [1] * len(tasks)
    assert 2 <= len(tasks) <= 3


def test_a_file_that_cannot_be_read_is_one_whole_share(folder, tmp_path):
    (tmp_path / "bad.h5ad").write_bytes((folder / "a.h5ad").read_bytes()[:5000])
    synthetic_cells(600, 13).write_h5ad(tmp_path / "good.h5ad")
    plan = make_plan(tmp_path, n_tasks=100, layer=None)
    assert plan.tasks == [[Share("bad.h5ad")], [Share("good.h5ad", 0, 512)], [Share("good.h5ad", 512, 600)]]


def test_files_none_of_which_can_be_read_are_refused_at_once(folder, tmp_path):
    synthetic_cells(5, 13).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"a\.h5ad has no layer 'counts'"):
        make_plan(tmp_path, n_tasks=1, layer="counts")


def test_a_plan_comes_back_from_json(folder):
    plan = make_plan(folder, n_tasks=3, layer=None, obs_columns=["donor"])
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_obs_columns_get_the_widest_type_of_the_files(tmp_path):
    for name, values in {"a": [1, 2], "b": [0.5, np.nan], "c": pd.Categorical([None, None])}.items():
        adata = synthetic_cells(2, 5)
        adata.obs["age"] = values
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    assert make_plan(tmp_path, n_tasks=1, layer=None, obs_columns=["age"]).obs_types == {"age": "double"}


def test_obs_columns_of_two_kinds_are_refused_by_file(tmp_path):
    for name, values in {"a": [1, 2], "b": ["old", "young"]}.items():
        adata = synthetic_cells(2, 5)
        adata.obs["age"] = values
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    with pytest.raises(ValueError, match=r"b\.h5ad: a column of obs has another type .*age.*int64"):
        make_plan(tmp_path, n_tasks=1, layer=None, obs_columns=["age"])


def test_a_missing_obs_column_is_named_with_what_there_is(folder):
    with pytest.raises(ValueError, match=r"a\.h5ad: obs has no column 'sex'; it has cell_type, donor"):
        make_plan(folder, n_tasks=1, layer=None, obs_columns=["sex"])


def test_folders_without_cells_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist"):
        make_plan(tmp_path / "absent", n_tasks=1, layer=None)
    with pytest.raises(ValueError, match=r"holds no \.h5ad, \.loom, \.h5 and no 10x folder"):
        make_plan(tmp_path, n_tasks=1, layer=None)
    synthetic_cells(0, 5).write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(ValueError, match=r"The 1 file\(s\) of .* hold no cells"):
        make_plan(tmp_path, n_tasks=1, layer=None)


def test_the_digest_sees_a_change_of_either_end_and_of_size(tmp_path):
    path = tmp_path / "file"
    contents = [b"a" * 1000, b"b" + b"a" * 999, b"a" * 999 + b"b", b"a" * 1001]
    digests = set()
    for content in contents:
        path.write_bytes(content)
        digests.add(shard_digest(path))
    assert len(digests) == 4
