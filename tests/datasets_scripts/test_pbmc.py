"""The embedded corpus: real cells, recovered counts, a split that does not leak."""

from typing import Any

import numpy as np
import pytest
import scanpy
import scipy.sparse as sp
from datasets import load_dataset

from cellglot.datasets_scripts.pbmc import PBMC, recover_counts
from cellglot.datasets_scripts.ragged_counts import read_ragged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return PBMC(cache_dir=str(tmp_path_factory.mktemp("cache"))).prepare()


@pytest.mark.filterwarnings("ignore")
def test_counts_are_integers_that_give_scanpy_s_values_back(folder):
    original: Any = scanpy.datasets.pbmc68k_reduced()
    parts = {split: read_ragged(folder, split) for split in ("train", "validation")}
    for cells in parts.values():
        values = original[cells.obs_names].raw.X.toarray()
        counts = cells.X.toarray()
        assert (counts == np.rint(counts)).all()
        assert ((counts > 0) == (values > 0)).all()
        # One factor a cell turns counts into expm1(raw), but for the rounding of raw to three decimals.
        factor = np.array([np.expm1(v[v > 0].min()) for v in values])
        assert np.abs(np.log1p(counts * factor[:, None]) - values).max() < 0.01
        assert (counts.sum(axis=1) <= cells.obs["n_counts"]).all()
        assert cells.obs["cell_type"].tolist() == original.obs.loc[cells.obs_names, "bulk_labels"].tolist()
    assert list(parts["train"].var_names) == list(original.raw.var_names)


def test_each_cell_is_in_one_split_and_each_type_in_both(folder):
    train, validation = (read_ragged(folder, split) for split in ("train", "validation"))
    assert (train.n_obs, validation.n_obs, train.n_vars) == (595, 105, 765)
    assert not set(train.obs_names) & set(validation.obs_names)
    assert set(train.obs["cell_type"]) == set(validation.obs["cell_type"])
    assert train.obs["cell_type"].nunique() == 10


def test_parquet_loads_as_any_dataset(folder, tmp_path):
    files = {split: str(folder / f"pbmc-{split}.parquet") for split in ("train", "validation")}
    cells = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert cells["train"].num_rows == 595
    assert cells["train"].column_names == ["cell_name", "gene_index", "count", "cell_type", "n_counts"]


def test_the_script_writes_its_output(tmp_path):
    import subprocess
    import sys

    from ..conftest import ROOT

    script = ROOT / "datasets_scripts" / "pbmc.py"
    subprocess.run([sys.executable, script, "--output", tmp_path / "pbmc"], check=True, capture_output=True)
    assert read_ragged(tmp_path / "pbmc" / "default", "validation").n_obs == 105


def test_values_that_are_no_scaled_counts_are_refused():
    with pytest.raises(ValueError, match=r"multiples of each cell's smallest value, found one that is 0\.50 off"):
        recover_counts(sp.csr_matrix(np.log1p([[0.0, 2.0, 3.0, 4.0]])))


def test_a_folder_without_a_split_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prepared split 'train'"):
        read_ragged(tmp_path, "train")
