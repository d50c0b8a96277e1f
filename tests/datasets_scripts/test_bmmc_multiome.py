"""The multiome corpus: both modalities of each cell as published, splits that keep batches whole."""

import gzip
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from datasets import load_dataset

from cellglot.datasets_scripts import corpus
from cellglot.datasets_scripts.bmmc_multiome import COMPETITION, DATASETS, GEO_FILE, SPLIT_OF_BATCH, BMMCMultiome
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.dataset_card import write_card
from cellglot.tokenization.binarized_string import BinarizedStringProcessor

N_CELLS, N_GENES, N_PEAKS = 97, 13, 29
PEAKS = [f"chr{1 + i % 22}-{9776 + 1000 * i}-{10668 + 1000 * i}" for i in range(N_PEAKS - 1)]
PEAKS += ["GL000194.1-55758-56597"]


def multiome() -> Any:
    """Cells in the layout of the GEO file: genes, then peaks; normalized X, counts in a layer; all batches mixed."""
    rng = np.random.default_rng(0)
    values = rng.poisson(0.4, (N_CELLS, N_GENES + N_PEAKS)).astype(np.float32)
    values[3] = 0
    counts = sp.csr_matrix(values)
    batches = rng.permutation(np.resize(list(SPLIT_OF_BATCH), N_CELLS))
    obs = pd.DataFrame(
        {
            "GEX_pct_counts_mt": rng.random(N_CELLS),
            "cell_type": pd.Categorical(rng.choice(["HSC", "pDC", "MK/E prog"], N_CELLS)),
            "batch": pd.Categorical(batches),
            "Site": [f"site{batch[1]}" for batch in batches],
        },
        index=pd.Index([f"{i:016d}-1-{batch}" for i, batch in enumerate(batches)]),
    )
    var = pd.DataFrame(
        {
            "feature_types": pd.Categorical(["GEX"] * N_GENES + ["ATAC"] * N_PEAKS),
            "gene_id": [f"ENSG{i:011d}" for i in range(N_GENES)] + PEAKS,
        },
        index=pd.Index([f"GENE{i}" for i in range(N_GENES)] + PEAKS),
    )
    cells: Any = ad.AnnData(counts.log1p(), obs=obs, var=var, layers={"counts": counts})
    cells.obsm["GEX_X_pca"] = rng.random((N_CELLS, 2))
    cells.uns["ATAC_gene_activity_var_names"] = np.array(["A", "B"])
    return cells


def publish(folder: Path, cells: Any) -> None:
    plain = folder / GEO_FILE.removesuffix(".gz")
    cells.write_h5ad(plain)
    (folder / GEO_FILE).write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


def publish_competition(folder: Path, cells: Any, config: str) -> dict[str, list[str]]:
    """The four files of a task: CSC layers, as R writes them, and `gene_ids`; returns the cells of each split."""
    in_test = cells.obs["batch"].map(SPLIT_OF_BATCH).to_numpy() == "test"
    rows_of_split = {"train": ~in_test, "test": in_test}
    for split, rows in rows_of_split.items():
        for number, modality in enumerate(["GEX", "ATAC"] if config == "gex2atac" else ["ATAC", "GEX"], 1):
            part = cells[rows, cells.var["feature_types"] == modality].copy()
            part.obs = part.obs[["batch"]].assign(size_factors=1.0)
            part.var = part.var.rename(columns={"gene_id": "gene_ids"})
            part.X, part.layers["counts"] = sp.csc_matrix(part.X), sp.csc_matrix(part.layers["counts"])
            part.write_h5ad(folder / f"{DATASETS[config]}.censor_dataset.output_{split}_mod{number}.h5ad")
    return {split: cells.obs_names[rows].tolist() for split, rows in rows_of_split.items()}


def build(tmp_path: Path, config: str = "default", **options) -> Path:
    """The output folder, with one config built in it."""
    BMMCMultiome(cache_dir=str(tmp_path / "cache"), config_name=config, **options).prepare(tmp_path / "bmmc")
    return tmp_path / "bmmc"


def loaded(folder: Path, config: str = "default", **options) -> Any:
    write_card(BMMCMultiome(config_name=config), folder)
    return load_dataset(str(folder), config, cache_dir=str(folder.parent / "loaded"), **options)


def assert_rows_are(rows: Any, cells: Any) -> None:
    """Each row against the cell of its name, gene by gene and peak by peak."""
    counts = cells.layers["counts"].toarray()
    genes = cells.var["feature_types"].to_numpy() == "GEX"
    position = {name: i for i, name in enumerate(cells.obs_names)}
    assert sorted(row["cell_name"] for row in rows) == sorted(position)
    for row in rows:
        i = position[row["cell_name"]]
        for index, values, of_modality in (("gene_index", "count", genes), ("peak_index", "peak_count", ~genes)):
            expected = counts[i, of_modality]
            np.testing.assert_array_equal(row[index], np.flatnonzero(expected))
            np.testing.assert_array_equal(row[values], expected[row[index]])
        batch = cells.obs["batch"].iloc[i]
        assert (row["batch"], row["site"] + row["donor"]) == (batch, batch)
        assert row.get("cell_type", cells.obs["cell_type"].iloc[i]) == cells.obs["cell_type"].iloc[i]


def test_the_corpus_is_read_by_the_binarized_string_processor_as_the_published_file_is(file_server, tmp_path):
    cells = multiome()
    publish(file_server.folder, cells)
    file_server.serve(BMMCMultiome)
    folder = build(tmp_path)
    processor = BinarizedStringProcessor.from_cells(folder, split="train", threshold=1.0)
    train = (cells.obs["batch"].map(SPLIT_OF_BATCH) == "train").to_numpy()
    options = {"obs_columns": ["batch", "cell_type"], "with_values": True}
    for task in ("gex2atac", "atac2gex"):
        expected = processor.encode(cells, task, layer="counts", cells_mask=train, **options)
        assert processor.encode(folder, task, split="train", **options).to_dict() == expected.to_dict()


# In parts of 512 cells there is one part a split; in parts of 31, cells of a split are in several.
@pytest.mark.parametrize("rows_per_part", [31, 512])
def test_each_cell_comes_out_with_both_modalities_in_the_split_of_its_batch(
    file_server, tmp_path, monkeypatch, rows_per_part
):
    monkeypatch.setattr(corpus, "ROWS_PER_PART", rows_per_part)
    cells = multiome()
    publish(file_server.folder, cells)
    file_server.serve(BMMCMultiome)
    folder = build(tmp_path)
    assert file_server.downloads == [GEO_FILE]
    found = loaded(folder)
    split_of_cell = cells.obs["batch"].map(SPLIT_OF_BATCH).to_numpy()
    assert set(found) == {"train", "validation", "test"}
    for split, rows in found.items():
        assert_rows_are(rows, cells[split_of_cell == split])
    assert list(loaded(folder, split="test", streaming=True)) == list(found["test"])


def test_tables_of_genes_and_peaks_lie_beside_the_cells(file_server, tmp_path):
    publish(file_server.folder, multiome())
    file_server.serve(BMMCMultiome)
    folder = build(tmp_path) / "default"
    genes, peaks = pd.read_parquet(folder / "genes.parquet"), pd.read_parquet(folder / "peaks.parquet")
    assert genes.loc[7].to_dict() == {"gene_id": "ENSG00000000007", "gene_symbol": "GENE7"}
    assert len(genes) == N_GENES
    assert len(peaks) == N_PEAKS
    assert peaks.loc[1].to_dict() == {"peak_id": "chr2-10776-11668", "chromosome": "chr2", "start": 10776, "end": 11668}
    assert peaks["chromosome"].iloc[-1] == "GL000194.1"


@pytest.mark.parametrize("config", list(DATASETS))
def test_the_competition_s_files_are_paired_into_rows(file_server, tmp_path, config):
    cells = multiome()
    names = publish_competition(file_server.folder, cells, config)
    file_server.serve(BMMCMultiome)
    found = loaded(build(tmp_path, config), config)
    assert set(found) == {"train", "test"}
    for split, rows in found.items():
        assert rows["cell_name"][:] == names[split]
        assert_rows_are(rows, cells[names[split]])


def test_addresses_are_those_of_the_competition_s_bucket():
    first = BMMCMultiome.SOURCES["gex2atac"][0]
    dataset = "openproblems_bmmc_multiome_phase2_rna"
    assert first.url == f"{COMPETITION}/{dataset}/{dataset}.censor_dataset.output_train_mod1.h5ad"
    assert len(BMMCMultiome.SOURCES["atac2gex"]) == 4


def test_no_batch_is_in_two_splits_and_the_site_of_the_test_set_is_new():
    sites = {split: {b[:2] for b, s in SPLIT_OF_BATCH.items() if s == split} for split in SPLIT_OF_BATCH.values()}
    assert len(SPLIT_OF_BATCH) == 13
    assert sites["test"] == {"s4"}
    assert "s4" not in sites["train"] | sites["validation"]


def test_files_of_different_cells_are_not_paired(file_server, tmp_path):
    publish_competition(file_server.folder, multiome(), "gex2atac")
    path = file_server.folder / f"{DATASETS['gex2atac']}.censor_dataset.output_test_mod2.h5ad"
    ad.read_h5ad(path)[::-1].write_h5ad(path)
    file_server.serve(BMMCMultiome)
    with pytest.raises(CorpusError, match="not of the same cells in the same order"):
        build(tmp_path, "gex2atac")


def without_counts(cells):
    del cells.layers["counts"]


def with_normalized_counts(cells):
    cells.layers["counts"] = cells.X.copy()


def without_cell_types(cells):
    del cells.obs["cell_type"]


def without_feature_types(cells):
    del cells.var["feature_types"]


def without_peaks(cells):
    cells.var["feature_types"] = "GEX"


def with_an_unknown_batch(cells):
    cells.obs["batch"] = "s5d1"


def with_intervals_of_another_form(cells):
    cells.var_names = [name.replace("-", ":", 1) if name.startswith("chr") else name for name in cells.var_names]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_counts, r"has no layer 'counts'; it has X"),
        (with_normalized_counts, r"not an integer: this looks normalized"),
        (without_cell_types, r"no column 'cell_type'; it has GEX_pct_counts_mt, batch"),
        (without_feature_types, r"var has no column 'feature_types'; it has gene_id"),
        (without_peaks, r"no feature has var\['feature_types'\] 'ATAC'; there is 'GEX'"),
        (with_an_unknown_batch, r"'s5d1', of which the competition's splits know nothing"),
        (with_intervals_of_another_form, r"28 peaks are not named chr-start-end, e\.g\. 'chr1:9776-10668'"),
    ],
)
def test_a_file_of_another_layout_is_refused(file_server, tmp_path, edit, message):
    cells = multiome()
    edit(cells)
    publish(file_server.folder, cells)
    file_server.serve(BMMCMultiome)
    with pytest.raises(CorpusError, match=message):
        build(tmp_path)
    assert not (tmp_path / "bmmc" / "default").exists()


def test_a_truncated_file_is_refused(tmp_path):
    publish(tmp_path, multiome())
    plain = tmp_path / GEO_FILE.removesuffix(".gz")
    plain.write_bytes(gzip.decompress((tmp_path / GEO_FILE).read_bytes())[:20_000])
    (tmp_path / GEO_FILE).unlink()
    with pytest.raises(CorpusError, match="cannot be read: truncated or corrupt"):
        build(tmp_path, data_dir=str(tmp_path))


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore")
def test_real_cells_of_the_benchmark_come_out_as_they_are(real_data, file_server, tmp_path):
    """500 cells of s1d1 and s1d2 that the competition published, joined into the layout of the whole file."""
    names = [f"bmmc_multiome_neurips2021_v1_{kind}_500x600.h5ad" for kind in ("rna", "atac")]
    rna, atac = (ad.read_h5ad(real_data / "multiome" / name) for name in names)
    assert rna.obs_names.equals(atac.obs_names)
    cells: Any = ad.concat([rna, atac], axis=1, merge="first")
    cells.var["gene_id"] = [*rna.var["gene_ids"], *atac.var_names]
    cells.layers["counts"] = cells.X.copy()
    publish(file_server.folder, cells)
    file_server.serve(BMMCMultiome)
    folder = build(tmp_path)
    found = loaded(folder)
    assert {split: rows.num_rows for split, rows in found.items()} == {"train": 221, "validation": 279}
    for split, rows in found.items():
        assert_rows_are(rows, cells[cells.obs["batch"].map(SPLIT_OF_BATCH) == split])
    assert pd.read_parquet(folder / "default" / "peaks.parquet")["chromosome"].str.match(r"^chr|^[GK]").all()
