"""Mouse nervous system from a loom file of mousebrain.org's layout."""

import h5py
import loompy
import numpy as np
import pytest

from cellglot.datasets_scripts import corpus
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.mouse_brain import LABELS, LOOM, MouseBrain
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, read_ragged

from ..conftest import synthetic_cells


@pytest.fixture
def cells():
    return synthetic_cells(31, 19)


@pytest.fixture
def publisher(file_server, cells):
    accessions = np.array([f"ENSMUSG{i:011d}" for i in range(19)])
    # As published, some symbols and cell ids stand twice.
    genes = np.array([f"Gene{i % 17}" for i in range(19)])
    ids = np.array([f"10X82_2_TCTCTCACCAGT{i % 29}-" for i in range(31)])
    labels = {name: np.array([f"{name} {i % 5}" for i in range(31)]) for name in LABELS}
    attributes = {"CellID": ids, "Age": np.full(31, "p21"), "_LogCV": np.linspace(0, 1, 31), **labels}
    loompy.create(
        str(file_server.folder / LOOM), cells.X.toarray().T, {"Accession": accessions, "Gene": genes}, attributes
    )
    file_server.serve(MouseBrain)
    return file_server


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cells_equal_what_loompy_reads(publisher, cells, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS_PER_PART", 13)
    monkeypatch.setattr(corpus, "ROWS_PER_BLOCK", 5)
    folder = MouseBrain(cache_dir=str(tmp_path / "cache")).prepare(tmp_path / "out")
    assert len(list(folder.glob("mouse_brain-train-*.parquet"))) == 3
    found = read_ragged(folder, "train")
    with loompy.connect(str(publisher.folder / LOOM), "r") as loom:
        np.testing.assert_array_equal(found.X.toarray(), loom[:, :].T)
        assert found.obs_names.tolist() == loom.ca["CellID"].tolist()
        assert found.var_names.tolist() == loom.ra["Accession"].tolist()
        assert found.var["gene_symbol"].tolist() == loom.ra["Gene"].tolist()
        for name in LABELS:
            assert found.obs[name].tolist() == loom.ca[name].tolist()
    assert found.obs.columns.tolist() == list(LABELS)
    assert (folder / GENE_TABLE).exists()


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("col_attrs/TaxonomyRank3", r"column attributes\) has no column 'TaxonomyRank3'; it has .*TaxonomyRank4"),
        ("row_attrs/Accession", r"row attributes\) has no column 'Accession'; it has Gene"),
    ],
)
def test_a_missing_attribute_is_named_with_what_is_there(publisher, tmp_path, attribute, message):
    with h5py.File(publisher.folder / LOOM, "a") as file:
        del file[attribute]
    with pytest.raises(CorpusError, match=message):
        MouseBrain(cache_dir=str(tmp_path), data_dir=str(publisher.folder)).prepare(tmp_path / "out")


def test_a_truncated_download_without_checksum_is_named_with_its_place(publisher, tmp_path):
    whole = (publisher.folder / LOOM).read_bytes()
    (publisher.folder / LOOM).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=rf"{LOOM} cannot be read: truncated.*to be deleted.*{LOOM} is .*downloads"):
        MouseBrain(cache_dir=str(tmp_path / "cache")).prepare(tmp_path / "out")
    assert not (tmp_path / "out" / "default").exists()
