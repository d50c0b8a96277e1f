"""One's own count files as a corpus: each cell as in its file, over the union of the genes."""

import gzip
import io
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from datasets import load_dataset

from cellglot.datasets_scripts import corpus
from cellglot.datasets_scripts.anndata_folder import AnnDataFolder, command_line
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.ragged_counts import read_ragged
from cellglot.tokenization.count_matrix import open_counts
from cellglot.tokenization.gene_ids import canonical_id

from ..conftest import ensembl, synthetic_cells


def built(tmp_path, *inputs, num_proc=None, out="out", **options: Any):
    builder = AnnDataFolder(cache_dir=str(tmp_path / "cache"), inputs=[str(path) for path in inputs], **options)
    return read_ragged(builder.prepare(tmp_path / out, num_proc), "train")


def expected(path, genes, layer=None):
    """Counts of a file over the given genes, as one dense matrix."""
    place = {gene: i for i, gene in enumerate(genes)}
    with open_counts(path, layer=layer) as counts:
        names = zip(counts.gene_names(), counts.var.index, strict=True)
        dense_gn = np.zeros((len(genes), counts.n_cells))
        stored_ng = counts.read_block(0, counts.n_cells)[1].toarray()
        np.add.at(dense_gn, [place[canonical_id(name) or index] for name, index in names], stored_ng.T)
        return dense_gn.T, counts.obs


@pytest.fixture
def folder(tmp_path):
    """Files of every format, with genes that overlap in part."""
    folder = tmp_path / "files"
    (folder / "batch2").mkdir(parents=True)
    first, second, third = synthetic_cells(7, 11), synthetic_cells(13, 5, seed=1), synthetic_cells(3, 17, seed=2)
    first.var["ensembl_id"] = [f"{gene}.{i}" for i, gene in enumerate(first.var_names)]
    first.var_names = [f"GENE{i}" for i in range(11)]
    first.obs["n_genes"] = np.arange(7)
    first.write_h5ad(folder / "a.h5ad")
    second.var_names = ensembl(5, start=9)
    second.obs["n_genes"] = np.arange(13) + 0.5
    second.X = sp.csc_matrix(second.X)
    second.write_h5ad(folder / "batch2" / "a.h5ad")
    # Dense, and with an obs column of a name that the schema has
    third.X = third.X.toarray()
    third.obs["count"] = [True, False, True]
    third.write_loom(folder / "c.loom")
    tenx = folder / "tenx"
    tenx.mkdir()
    matrix = io.BytesIO()
    scipy.io.mmwrite(matrix, sp.coo_matrix(synthetic_cells(5, 3, seed=3).X.T.astype(int)))
    (tenx / "matrix.mtx.gz").write_bytes(gzip.compress(matrix.getvalue()))
    features = [(gene, "S" + gene[-1], "Gene Expression") for gene in ensembl(3, start=20)]
    pd.DataFrame(features).to_csv(tenx / "features.tsv.gz", sep="\t", header=False, index=False)
    pd.Series([f"cell{i}-1" for i in range(5)]).to_csv(tenx / "barcodes.tsv.gz", header=False, index=False)
    return folder


# Cells of several files may have the same name.
pytestmark = pytest.mark.filterwarnings("ignore:Observation names are not unique")
FILES = {"a.h5ad": 7, "batch2/a.h5ad": 13, "c.loom": 3, "tenx": 5}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_cells_of_all_files_equal_theirs_over_the_union_of_genes(folder, tmp_path, monkeypatch, num_proc):
    monkeypatch.setattr(corpus, "ROWS_PER_PART", 5)
    monkeypatch.setattr(corpus, "ROWS_PER_BLOCK", 2)
    found = built(tmp_path, folder, num_proc=num_proc)
    genes = found.var_names.tolist()
    assert genes == [*ensembl(17), *ensembl(3, start=20)]
    assert found.obs["source"].value_counts().to_dict() == FILES
    for name in FILES:
        counts, obs = expected(folder / name, genes)
        mine = found[found.obs["source"] == name]
        np.testing.assert_array_equal(mine.X.toarray(), counts)
        assert mine.obs_names.tolist() == obs.index.tolist()
        if "cell_type" in obs:
            assert mine.obs["cell_type"].tolist() == obs["cell_type"].tolist()
    # The widest type, and null where a file has no such column
    np.testing.assert_array_equal(found.obs["n_genes"][:20], [*np.arange(7), *np.arange(13) + 0.5])
    assert found.obs["n_genes"][20:].isna().all()
    assert found.obs["cell_type"][23:].isna().all()
    assert found.var["gene_symbol"].tolist()[:11] == [f"GENE{i}" for i in range(11)]
    assert found.var["gene_symbol"].tolist()[17:] == ["S0", "S1", "S2"]


def test_columns_that_are_chosen_and_only_those_are_kept(folder, tmp_path):
    found = built(tmp_path, folder / "a.h5ad", folder / "batch2", obs_columns=["donor"])
    assert found.obs.columns.tolist() == ["source", "donor"]
    assert set(found.obs["source"]) == {"a.h5ad", "batch2/a.h5ad"}


def test_a_column_with_a_name_of_the_schema_gets_another(tmp_path):
    cells = synthetic_cells(5, 3)
    cells.obs["count"] = np.arange(5)
    cells.write_h5ad(tmp_path / "a.h5ad")
    found = built(tmp_path, tmp_path / "a.h5ad")
    assert found.obs["obs_count"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found.X.toarray(), cells.X.toarray())


def test_a_layer_is_read_where_it_is_asked_for(tmp_path):
    cells = synthetic_cells(5, 3)
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.astype(np.float32) / 3
    cells.write_h5ad(tmp_path / "a.h5ad")
    found = built(tmp_path, tmp_path / "a.h5ad", layer="counts")
    np.testing.assert_array_equal(found.X.toarray(), cells.layers["counts"].toarray())
    with pytest.raises(CorpusError, match=r"not an integer.*Raw counts seem to be in counts"):
        built(tmp_path, tmp_path / "a.h5ad", out="other")
    found = built(tmp_path, tmp_path / "a.h5ad", out="any", allow_normalized=True)
    np.testing.assert_array_equal(found.X.toarray(), cells.X.toarray().astype(np.float32))


def test_genes_that_stand_twice_are_summed_and_unnamed_ones_keep_their_index(tmp_path):
    cells = synthetic_cells(5, 3)
    cells.var["ensembl_id"] = [*ensembl(1), f"{ensembl(1)[0]}.2", ""]
    cells.var_names = ["A", "B", "C"]
    cells.write_h5ad(tmp_path / "a.h5ad")
    found = built(tmp_path, tmp_path / "a.h5ad")
    assert found.var_names.tolist() == [ensembl(1)[0], "C"]
    counts = cells.X.toarray()
    np.testing.assert_array_equal(found.X.toarray(), np.stack([counts[:, 0] + counts[:, 1], counts[:, 2]], axis=1))


def test_ids_here_and_symbols_there_are_warned_of(tmp_path):
    synthetic_cells(5, 3).write_h5ad(tmp_path / "a.h5ad")
    other = synthetic_cells(5, 3)
    other.var_names = ["A", "B", "C"]
    other.write_h5ad(tmp_path / "b.h5ad")
    with pytest.warns(UserWarning, match=r"a\.h5ad names its genes by Ensembl ids and .*b\.h5ad does not"):
        assert built(tmp_path, tmp_path / "a.h5ad", tmp_path / "b.h5ad").n_vars == 6


@pytest.mark.filterwarnings("ignore")
def test_an_h5ad_of_an_older_anndata_is_read(tmp_path):
    """Before AnnData 0.7, obs and var were compound data sets."""
    cells = synthetic_cells(7, 5)
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", cells.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(cells.X, name)
        file["obs"] = np.array(
            [(name.encode(), i) for i, name in enumerate(cells.obs_names)], dtype=[("index", "S9"), ("plate", "i4")]
        )
        file["var"] = np.array([(name.encode(),) for name in cells.var_names], dtype=[("index", "S15")])
    found = built(tmp_path, tmp_path / "old.h5ad")
    np.testing.assert_array_equal(found.X.toarray(), cells.X.toarray())
    assert found.obs_names.tolist() == cells.obs_names.tolist()
    assert found.obs["plate"].tolist() == list(range(7))


def test_bad_inputs_are_named_and_leave_nothing(folder, tmp_path):
    whole = (folder / "a.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    (folder / "tenx" / "matrix.mtx.gz").write_bytes((folder / "tenx" / "matrix.mtx.gz").read_bytes()[:-12])
    text = synthetic_cells(5, 3)
    text.obs["n_genes"] = ["many"] * 5
    text.write_h5ad(tmp_path / "text.h5ad")
    cases: list[tuple[list, dict[str, Any], str]] = [
        ([tmp_path / "cut.h5ad"], {}, r"cut\.h5ad cannot be read: truncated or corrupt"),
        ([folder / "tenx"], {}, r"tenx cannot be read: truncated or corrupt"),
        ([tmp_path / "absent"], {}, r"absent does not exist"),
        ([tmp_path / "cache"], {}, r"cache holds no \.h5ad"),
        ([], {}, "Expected files or folders with cells, found none"),
        ([folder, folder / "a.h5ad"], {}, r"a\.h5ad is named twice"),
        (
            [folder / "a.h5ad"],
            {"obs_columns": ["tissue"]},
            r"a\.h5ad \(obs\) has no column 'tissue'; it has cell_type, d",
        ),
        ([folder / "a.h5ad"], {"layer": "spliced"}, "no layer 'spliced'; it has X"),
        ([folder / "a.h5ad"], {"gene_ids": "hgnc"}, "var has no column 'hgnc'; it has ensembl_id"),
        ([folder / "a.h5ad", tmp_path / "text.h5ad"], {}, r"text\.h5ad: a column of obs has another type .*n_genes"),
    ]
    for inputs, options, message in cases:
        with pytest.raises(CorpusError, match=message):
            built(tmp_path, *inputs, **options)
    assert not (tmp_path / "out" / "default").exists()


def test_other_files_or_options_are_not_taken_for_what_is_built(folder, tmp_path):
    built(tmp_path, folder / "a.h5ad")
    assert built(tmp_path, folder / "a.h5ad").n_obs == 7
    others: list[tuple[list, dict[str, Any]]] = [([folder], {}), ([folder / "a.h5ad"], {"obs_columns": ["donor"]})]
    for inputs, options in others:
        with pytest.raises(CorpusError, match="holds the cells of other files or of other options"):
            built(tmp_path, *inputs, **options)


def test_the_command_line_reads_a_folder(folder, tmp_path, capsys):
    command_line(AnnDataFolder, ["--data-dir", str(folder), "--output", str(tmp_path / "out")])
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == sum(FILES.values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| batch2/a.h5ad | 13 |" in card
    with pytest.raises(SystemExit):
        command_line(AnnDataFolder, ["--output", str(tmp_path / "none")])
    assert "found none" in capsys.readouterr().err


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:.*names its genes by Ensembl ids")
def test_real_brains_equal_their_files(real_data, tmp_path):
    names = [
        "darmanis2015_human_cortex_267x22088.h5ad",
        "zeisel2015_mouse_cortex_500x3529.h5ad",
        "zhuang_merfish_mouse_brain_1000x1122.h5ad",
    ]
    paths = [real_data / "cells" / name for name in names]
    found = built(tmp_path, *paths)
    assert found.n_obs == 267 + 500 + 1000
    genes = found.var_names.tolist()
    for name, path in zip(names, paths, strict=True):
        counts, obs = expected(path, genes)
        mine = found[found.obs["source"] == name]
        np.testing.assert_array_equal(mine.X.toarray(), counts)
        assert mine.obs["cell_type"].tolist() == obs["cell_type"].tolist()
        assert counts.any()
