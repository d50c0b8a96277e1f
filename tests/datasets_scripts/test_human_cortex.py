"""Human cortex from files of the Allen Institute's layout."""

import numpy as np
import pandas as pd
import pytest
from datasets import load_dataset

from cellglot.datasets_scripts import human_cortex
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.human_cortex import HumanCortex
from cellglot.datasets_scripts.ragged_counts import read_ragged

from ..conftest import synthetic_cells

OUTLIERS = [2, 11]


@pytest.fixture
def cells():
    cells = synthetic_cells(13, 29)
    cells.var_names = [f"GENE-{i}" for i in range(29)]
    cells.obs_names = [f"F2S4_160113_{i:03d}_A01" for i in range(13)]
    return cells


@pytest.fixture
def publisher(file_server, cells, monkeypatch):
    cells.to_df().astype(int).to_csv(file_server.folder / "matrix.csv", index_label="sample_name")
    obs = pd.DataFrame(
        {
            "sample_name": cells.obs_names,
            "exp_component_name": "SM-GE5YM",
            "cluster_color": "#FFFFFF",
            "cluster_label": [f"Inh L{i} VIP" for i in range(13)],
            "class_label": ["GABAergic", "Glutamatergic"] * 6 + ["Non-neuronal"],
            "subclass_label": cells.obs["cell_type"].to_numpy(),
            "external_donor_name_label": "H200.1030",
            "region_label": ["NA", "MTG"] * 6 + ["V1C"],
            "outlier_call": ["True" if i in OUTLIERS else "False" for i in range(13)],
        }
    )
    labels = ["cluster_label", "class_label", "subclass_label"]
    obs.loc[OUTLIERS, labels] = ""
    # The two files need not have the same order.
    obs.sample(frac=1, random_state=0).to_csv(file_server.folder / "metadata.csv", index=False)
    file_server.serve(HumanCortex)
    # Several parts, cut within lines
    monkeypatch.setattr(human_cortex, "BYTES_PER_PART", 300)
    return file_server


def built(tmp_path, config="default"):
    return HumanCortex(cache_dir=str(tmp_path / "cache"), config_name=config).prepare(tmp_path / "out")


def test_nuclei_equal_the_files_without_outliers(publisher, cells, tmp_path):
    found = read_ragged(built(tmp_path), "train")
    kept = cells[~np.isin(np.arange(13), OUTLIERS)]
    np.testing.assert_array_equal(found.X.toarray(), kept.X.toarray())
    assert found.obs_names.tolist() == kept.obs_names.tolist()
    assert found.var_names.tolist() == cells.var_names.tolist()
    metadata = pd.read_csv(publisher.folder / "metadata.csv", index_col=0, keep_default_na=False).loc[kept.obs_names]
    for name in (*human_cortex.LABELS, "external_donor_name_label"):
        assert found.obs[name].tolist() == metadata[name].tolist()
    assert set(found.obs["region_label"]) == {"NA", "MTG", "V1C"}
    assert found.obs["donor_sex_label"].isna().all()
    assert not found.obs["outlier_call"].any()


def test_outliers_are_flagged_in_the_config_that_keeps_them(publisher, cells, tmp_path):
    found = read_ragged(built(tmp_path, "with_outliers"), "train")
    np.testing.assert_array_equal(found.X.toarray(), cells.X.toarray())
    assert np.flatnonzero(found.obs["outlier_call"]).tolist() == OUTLIERS
    assert np.flatnonzero(found.obs["subclass_label"].isna()).tolist() == OUTLIERS


def test_both_configs_load_and_stream_from_one_folder(publisher, cells, tmp_path):
    for config in ("default", "with_outliers"):
        human_cortex.command_line(
            HumanCortex, ["--config", config, "--data-dir", str(publisher.folder), "--output", str(tmp_path / "out")]
        )
    for config, n_cells in (("default", 11), ("with_outliers", 13)):
        rows = load_dataset(str(tmp_path / "out"), config, split="train", cache_dir=str(tmp_path / "cache"))
        stream = load_dataset(str(tmp_path / "out"), config, split="train", streaming=True)
        assert rows.num_rows == n_cells
        assert list(stream) == rows.to_list()
    default = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert default.num_rows == 11


def damage(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "metadata.csv",
            "class_label",
            "klass",
            r"metadata\.csv has no column 'class_label'; it has sample_name, exp_",
        ),
        ("metadata.csv", "F2S4_160113_003_A01", "other", r"metadata\.csv lacks 1 of .* 'F2S4_160113_003_A01'"),
        ("metadata.csv", "_003_", "_004_", r"names 'F2S4_160113_004_A01' twice"),
        ("metadata.csv", "True", "maybe", "expected True or False in outlier_call, found 'maybe'"),
        ("matrix.csv", "sample_name", "", r"matrix\.csv, first of 30 columns, has no column 'sample_name'; it has "),
        ("matrix.csv", "_004_A01,", "_004_A01,7,", r"matrix\.csv, line 6: expected 30 fields .* found 31"),
        (
            "matrix.csv",
            "F2S4_160113_007",
            "\n",
            r"matrix\.csv has 14 nuclei, metadata\.csv 13: one of them is truncated",
        ),
    ],
)
def test_files_of_another_layout_are_refused_and_nothing_is_left(publisher, tmp_path, file, old, new, message):
    damage(publisher.folder / file, old, new)
    with pytest.raises(CorpusError, match=message):
        HumanCortex(cache_dir=str(tmp_path), data_dir=str(publisher.folder)).prepare(tmp_path / "out")
    assert not (tmp_path / "out" / "default").exists()
