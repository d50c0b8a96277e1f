"""The PCA projection of sources: against scikit-learn, whatever the cells come in, and through both load routes."""

import json
import logging
import os
import subprocess
import sys

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch
from safetensors import safe_open
from sklearn.decomposition import PCA

from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_table
from cellglot.tokenization.pca_projection import PCAProjectionFeatureExtractor, ProjectionReport

from ..conftest import ensembl, synthetic_cells

N, G, MOUSE_G, K = 97, 61, 53, 17
# Of projections up to some hundreds, whose float32 sums may come in another order
ROUNDING = 1e-3


def mouse_cells(n=83, g=MOUSE_G, seed=1):
    adata = synthetic_cells(n, g, seed=seed)
    adata.var_names = [f"ENSMUSG{i:011d}" for i in range(1, g + 1)]
    return adata


def fit(sources, **options):
    return PCAProjectionFeatureExtractor.fit(sources, **{"n_components": K, "progress": False, **options})


@pytest.fixture(scope="module")
def sources():
    return {"human": synthetic_cells(N, G), "mouse": mouse_cells()}


@pytest.fixture(scope="module")
def extractor(sources):
    return fit(sources)


def log_normalized(adata, genes=None):
    """The formula, densely and in float64."""
    counts = adata.X.toarray().astype(np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    expression = np.log1p(np.divide(counts * 1e4, totals, out=np.zeros_like(counts), where=totals > 0))
    return expression if genes is None else expression[:, adata.var_names.get_indexer(genes)]


def test_genes_keep_the_symbols_that_the_cells_had(tmp_path):
    cells = synthetic_cells(N, G)
    ids = list(cells.var_names)
    symbols = [f"GENE{i}" for i in range(G)]
    named = cells.copy()
    named.var = pd.DataFrame({"ensembl_id": ids}, index=pd.Index(symbols))
    column = cells.copy()
    column.var["feature_name"] = symbols
    for given in (named, column):
        fit({"human": given}).save_pretrained(tmp_path)
        loaded = PCAProjectionFeatureExtractor.from_pretrained(tmp_path)
        kept = dict(zip(ids, symbols, strict=True))
        assert loaded.gene_symbols("human") == [kept[gene] for gene in loaded.gene_ids("human")]
    plain = fit({"human": cells})
    assert plain.gene_symbols("human") == plain.gene_ids("human")


# ---- what is computed


@pytest.mark.parametrize("source", ["human", "mouse"])
def test_projections_are_scikit_learns_of_data_scaled_to_the_range_of_the_paper(extractor, sources, source):
    x = log_normalized(sources[source], extractor.gene_ids(source))
    scaled = x * 100 / x.max() - 50
    oracle = PCA(K, svd_solver="full").fit(scaled)
    found = extractor(sources[source], source)["projections"]
    assert found.dtype == np.float32
    # The same subspace gives the same distances from the mean and between cells; its axes may be turned.
    expected = oracle.transform(scaled)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, rtol=1e-3, atol=1e-3 * expected.var() * K)
    scale = extractor.projection(source).scale
    explained = extractor.projection(source).explained_variance_k * scale**2
    np.testing.assert_allclose(explained, oracle.explained_variance_, rtol=1e-4)
    share = extractor.to_dict()["sources"][extractor.sources.index(source)]["explained_variance_share"]
    assert share == pytest.approx(oracle.explained_variance_ratio_.sum(), rel=1e-4)


def test_inverse_of_a_projection_is_scikit_learns_in_log_normalized_expression(extractor, sources):
    x = log_normalized(sources["human"], extractor.gene_ids("human"))
    oracle = PCA(K, svd_solver="full").fit(x)
    found = extractor.inverse(extractor(sources["human"], "human")["projections"], "human")
    np.testing.assert_allclose(found, oracle.inverse_transform(oracle.transform(x)), atol=ROUNDING)


def test_with_all_components_the_inverse_loses_nothing(sources):
    extractor = fit({"human": sources["human"]}, n_components=1200)
    x = log_normalized(sources["human"], extractor.gene_ids("human"))
    found = extractor.inverse(extractor(sources["human"], "human", return_tensors="pt")["projections"], "human")
    np.testing.assert_allclose(found, x, atol=1e-4)
    assert extractor.reconstruction_error(sources["human"], "human").unexplained_variance < 1e-9


def test_projecting_the_inverse_gives_the_projection_back(extractor, sources):
    projections = extractor(sources["mouse"], "mouse")["projections"]
    projection = extractor.projection("mouse")
    expression = extractor.inverse(projections, "mouse")
    again = (expression - projection.mean_g) @ projection.components_kg.T * projection.scale
    np.testing.assert_allclose(again, projections, atol=1e-4 * np.abs(projections).max())


def test_reconstruction_error_of_held_out_cells_is_the_plain_one(sources):
    adata = sources["human"]
    held_out = np.arange(N) % 3 == 0
    extractor = fit({"human": adata}, cells={"human": ~held_out})
    x = log_normalized(adata, extractor.gene_ids("human"))[held_out]
    back = extractor.inverse(extractor(adata[held_out].copy(), "human")["projections"], "human")
    mean = extractor.projection("human").mean_g
    found = extractor.reconstruction_error(adata, "human", mask=held_out)
    assert found.n_cells == held_out.sum()
    assert found.unexplained_variance == pytest.approx(((x - back) ** 2).sum() / ((x - mean) ** 2).sum(), rel=1e-4)
    assert found.expression_rmse == pytest.approx(np.sqrt(((x - back) ** 2).mean()), rel=1e-4)
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, back, strict=True)]
    assert found.cell_correlation == pytest.approx(np.median(correlations), rel=1e-4)
    assert 0 < found.projection_rmse < 1e-5


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("file", "least_lost"),
    [
        ("darmanis2015_human_cortex_267x22088", 0.5),
        ("zeisel2015_mouse_cortex_500x3529", 0.5),
        # A panel of 1,122 genes, of which 800 cells leave few directions out
        ("zhuang_merfish_mouse_brain_1000x1122", 0.05),
    ],
)
def test_real_held_out_cells_are_lossless_in_projection_space_only(real_data, file, least_lost):
    """The paper's "lossless" holds for fitted cells and for projections, not for what a held-out cell expresses."""
    adata = ad.read_h5ad(real_data / "cells" / f"{file}.h5ad")
    held_out = np.random.default_rng(0).random(adata.n_obs) < 0.2
    extractor = fit({"brain": adata}, n_components=1200, cells={"brain": ~held_out})
    found, fitted = (extractor.reconstruction_error(adata, "brain", mask=mask) for mask in (held_out, ~held_out))
    assert found.projection_rmse < 1e-5
    assert fitted.unexplained_variance < 1e-6
    assert found.unexplained_variance > least_lost


# ---- cells, genes and sources


def test_gene_order_does_not_matter(extractor, sources):
    adata = sources["human"]
    shuffled = adata[:, np.random.default_rng(0).permutation(G)].copy()
    assert list(shuffled.var_names) != list(adata.var_names)
    expected = extractor(adata, "human")["projections"]
    np.testing.assert_allclose(extractor(shuffled, "human")["projections"], expected, atol=ROUNDING)
    # A fit on other columns has its components in other columns, and gives the same projections.
    again = fit({"human": shuffled}, n_components=5)(adata, "human")["projections"]
    np.testing.assert_allclose(again, fit({"human": adata}, n_components=5)(adata, "human")["projections"], atol=1e-2)


def test_source_names_give_the_index_of_a_model(extractor, sources):
    assert extractor.sources == ("human", "mouse")
    for index, source in enumerate(extractor.sources):
        found = extractor(sources[source], source, return_tensors="pt")["source"]
        assert found.dtype == torch.int64
        assert found.tolist() == [index] * sources[source].n_obs


def test_an_unseen_source_is_refused_with_the_known_ones(extractor, sources):
    with pytest.raises(ValueError, match=r"Expected one of the sources 'human', 'mouse', found 'rat'"):
        extractor(sources["human"], "rat")
    with pytest.raises(ValueError, match="Nothing was fitted"):
        PCAProjectionFeatureExtractor()(sources["human"], "human")
    with pytest.raises(ValueError, match="found 'rat'"):
        extractor.inverse(np.zeros((1, K), dtype=np.float32), "rat")


def test_cells_of_another_source_are_refused_and_sent_there(extractor, sources):
    with pytest.raises(
        ValueError, match=rf"none of its {MOUSE_G} genes .* are genes of source 'mouse': name that source"
    ):
        extractor(sources["mouse"], "human")


def test_missing_genes_are_counted_told_and_taken_at_their_mean(extractor, sources, caplog):
    adata = sources["human"].copy()
    adata.obs["n_counts"] = np.asarray(adata.X.sum(axis=1)).ravel()
    part, report = adata[:, 7:].copy(), ProjectionReport()
    with caplog.at_level(logging.WARNING, logger="cellglot"):
        found = extractor(part, "human", report=report)["projections"]
    n_missing = len(set(extractor.gene_ids("human")) - set(part.var_names))
    assert 0 < n_missing <= 7
    assert (report.n_missing_genes, report.n_genes, report.n_cells) == (n_missing, G - 7, N)
    assert f"lacks {n_missing} of the" in caplog.text
    projection = extractor.projection("human")
    x = log_normalized(adata, projection.gene_ids)
    missing = ~np.isin(projection.gene_ids, part.var_names)
    x[:, missing] = projection.mean_g[missing]
    expected = (x - projection.mean_g) @ projection.components_kg.T * projection.scale
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_genes_outside_the_source_count_for_the_total_only(extractor, sources):
    adata = sources["human"]
    more = ad.AnnData(sp.hstack([adata.X, adata.X], format="csr"), obs=adata.obs)
    more.var_names = [*adata.var_names, *ensembl(G, start=5000)]
    found = extractor(more, "human")["projections"]
    halved = adata.copy()
    halved.obs["n_counts"] = 2 * np.asarray(adata.X.sum(axis=1)).ravel()
    np.testing.assert_array_equal(found, extractor(halved, "human")["projections"])


def test_columns_of_one_gene_are_summed_before_the_logarithm(extractor, sources):
    adata = sources["human"]
    split = ad.AnnData(sp.hstack([adata.X, adata.X], format="csr"), obs=adata.obs)
    split.var_names = [*adata.var_names, *(f"{gene}.3" for gene in adata.var_names)]
    report = ProjectionReport()
    found = extractor(split, "human", report=report)["projections"]
    np.testing.assert_allclose(found, extractor(adata, "human")["projections"], atol=1e-3)
    assert report.n_collapsed_genes == len(extractor.gene_ids("human"))


def test_stored_zeros_and_repeated_entries_change_nothing(extractor, sources):
    """A CSR matrix may store a count in parts, and zeros; the logarithm must see the sum."""
    x = sources["human"].X.tocoo()
    rows, columns = np.concatenate([x.row, x.row, [0, 1]]), np.concatenate([x.col, x.col, [0, 1]])
    halves = sp.coo_matrix((np.concatenate([x.data - 1, np.ones(x.nnz), [0, 0]]), (rows, columns)), x.shape)
    order = np.lexsort((halves.col, halves.row))
    indptr = np.searchsorted(halves.row[order], np.arange(N + 1))
    untidy = sp.csr_matrix((halves.data[order].astype(np.float32), halves.col[order], indptr), x.shape)
    assert untidy.nnz > x.nnz
    genes = list(sources["human"].var_names)
    expected = extractor(sources["human"], "human")["projections"]
    np.testing.assert_allclose(extractor(untidy, "human", gene_ids=genes)["projections"], expected, atol=ROUNDING)
    fitted = fit({"human": untidy}, gene_ids=genes, min_cells=40)
    assert fitted.gene_ids("human") == fit(sources, min_cells=40).gene_ids("human")


def test_cells_without_counts_are_told_and_get_the_projection_of_no_expression(extractor, sources, caplog):
    adata = sources["human"].copy()
    adata.X = sp.diags_array((~np.isin(np.arange(N), [3, 5])).astype(np.float32)) @ adata.X
    adata.X.eliminate_zeros()
    report = ProjectionReport()
    with caplog.at_level(logging.WARNING, logger="cellglot"):
        found = extractor(adata, "human", report=report)["projections"]
    assert report.n_empty_cells == 2
    assert "2 cells have no counts" in caplog.text
    projection = extractor.projection("human")
    expected = -projection.components_kg @ projection.mean_g * projection.scale
    np.testing.assert_allclose(found[[3, 5]], [expected, expected], rtol=1e-3, atol=1e-3)
    # They are no part of a fit.
    assert fit({"human": adata}).projection("human").n_cells == N - 2


def test_filters_drop_the_cells_and_genes_that_they_say(sources):
    adata = sources["human"]
    counts = adata.X.toarray()
    detected = (counts > 0).sum(axis=1)
    min_genes, min_cells = int(np.median(detected)), 20
    extractor = fit({"human": adata}, min_genes=min_genes, min_cells=min_cells)
    kept = detected >= min_genes
    assert extractor.projection("human").n_cells == kept.sum() < N
    genes = adata.var_names[(counts[kept] > 0).sum(axis=0) >= min_cells]
    assert extractor.gene_ids("human") == list(genes)
    assert len(genes) < G
    # Held-out cells and those that failed quality control are left out as well.
    flagged = adata.copy()
    flagged.obs["filter_pass"] = (np.arange(N) % 2).astype(int)
    mask = np.arange(N) < 60
    assert fit({"human": flagged}, cells={"human": mask}).projection("human").n_cells == 30


def test_fewer_cells_or_genes_than_components_is_told(sources, caplog):
    few = sources["human"][:13].copy()
    with caplog.at_level(logging.WARNING, logger="cellglot"):
        extractor = fit({"human": few, "mouse": sources["mouse"]}, n_components=1200, min_cells=1)
    assert extractor.n_components == 12
    assert "12 components in place of 1200, the most these sources have (human: 13 cells" in caplog.text
    for source in extractor.sources:
        assert extractor(sources[source], source)["projections"].shape[1] == 12


def test_cells_that_repeat_give_as_many_components_as_directions(caplog):
    counts = sp.csr_matrix(np.tile(np.random.default_rng(0).integers(1, 9, size=(4, 31)), (6, 1)).astype(np.float32))
    with caplog.at_level(logging.WARNING, logger="cellglot"):
        extractor = fit({"human": counts}, gene_ids=ensembl(31))
    assert extractor.n_components == 3
    assert "vary in no more directions" in caplog.text


@pytest.mark.parametrize(
    ("value", "told"), [(np.nan, "must be finite"), (-1, "cannot be negative"), (0.5, "expected raw counts, found 0.5")]
)
def test_what_cannot_be_counts_is_refused_in_fit_and_projection(extractor, sources, value, told):
    adata = sources["human"].copy()
    adata.X.data[5] = value
    with pytest.raises(ValueError, match=told):
        extractor(adata, "human")
    with pytest.raises(ValueError, match=told):
        fit({"human": adata})


def test_expected_counts_of_a_quantifier_go_through_when_allowed(sources):
    adata = sources["human"].copy()
    adata.X.data += 0.25
    extractor = fit({"human": adata}, allow_fractional=True)
    x = log_normalized(adata, extractor.gene_ids("human"))
    back = extractor.inverse(extractor(adata, "human")["projections"], "human")
    assert ((x - back) ** 2).sum() < 0.5 * ((x - x.mean(axis=0)) ** 2).sum()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cells": {"human": np.ones(3, dtype=bool)}}, "expected a boolean mask of its 97 cells, found bool of shape"),
        ({"cells": {"human": np.ones(N + 2, dtype=bool)}}, "2 entries more than there are cells"),
        ({"cells": {"rat": np.ones(N, dtype=bool)}}, "cells names 'rat'; the sources are 'human'"),
        ({"cells": {"human": np.zeros(N, dtype=bool)}}, "0 cells with 1 genes or more"),
        ({"min_cells": N + 1}, "0 of 61 genes in 98 cells or more"),
        ({"gene_ids": "symbol"}, "var has no column 'symbol'"),
        ({"n_components": 0}, "at least one"),
        ({"target_sum": 0}, "Expected a positive target_sum"),
        ({"oversampling": -1}, "oversampling of 0 or more"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(sources, given, told):
    with pytest.raises(ValueError, match=told):
        fit({"human": sources["human"]}, **given)


def test_cells_that_are_all_the_same_are_refused():
    with pytest.raises(ValueError, match="its 7 cells have the same expression"):
        fit({"human": np.tile(np.arange(1, 32), (7, 1))}, gene_ids=ensembl(31))


def test_files_of_one_source_without_common_genes_are_refused(sources):
    with pytest.raises(ValueError, match="no gene in common"):
        fit({"brain": [sources["human"], sources["mouse"]]})


def test_projections_of_another_width_are_refused(extractor):
    with pytest.raises(ValueError, match=rf"Expected projections \(cells, {K}\), found shape \(2, {K + 1}\)"):
        extractor.inverse(np.zeros((2, K + 1)), "human")


# ---- whatever the cells come in


def as_h5ad(adata, path, kind):
    adata = adata.copy()
    adata.X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": sp.csr_matrix.toarray}[kind](adata.X)
    adata.write_h5ad(path)
    return path


def as_loom(adata, path):
    with h5py.File(path, "w") as file:
        file["matrix"] = adata.X.toarray().T
        file["row_attrs/Accession"] = np.array(adata.var_names, dtype="S")
        file["col_attrs/CellID"] = np.array(adata.obs_names, dtype="S")
        file.create_group("layers")
    return path


def as_parquet(adata, folder):
    """Two files of two row groups and a bit, as the dataset scripts name them."""
    folder.mkdir()
    pd.DataFrame({"gene_id": adata.var_names}).to_parquet(folder / GENE_TABLE)
    middle = adata.n_obs // 2
    for i, part in enumerate((adata[:middle], adata[middle:])):
        table = ragged_table(sp.csr_matrix(part.X), part.obs)
        pq.write_table(table, folder / f"brain-train-0000{i}-of-00002.parquet", row_group_size=20)
    return folder


@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "loom", "parquet", "list"])
def test_files_fit_and_project_as_cells_in_memory_do(extractor, sources, tmp_path, kind):
    adata = sources["human"]
    if kind == "loom":
        cells = as_loom(adata, tmp_path / "cells.loom")
    elif kind == "parquet":
        cells = as_parquet(adata, tmp_path / "corpus")
    elif kind == "list":
        cells = [adata[:40].copy(), as_h5ad(adata[40:], tmp_path / "rest.h5ad", "csr")]
    else:
        cells = as_h5ad(adata, tmp_path / "cells.h5ad", kind)
    mask = np.arange(N) % 5 > 0
    fitted = fit({"human": cells}, cells={"human": mask})
    expected = fit({"human": adata}, cells={"human": mask})
    assert fitted.gene_ids("human") == expected.gene_ids("human")
    assert fitted.projection("human").n_cells == mask.sum()
    np.testing.assert_allclose(
        fitted.projection("human").explained_variance_k, expected.projection("human").explained_variance_k, rtol=1e-4
    )
    found = extractor(cells, "human", mask=mask)["projections"]
    np.testing.assert_allclose(found, extractor(adata, "human")["projections"][mask], atol=ROUNDING)


def test_a_parquet_file_beside_its_genes_is_a_part_of_the_corpus(extractor, sources, tmp_path):
    folder = as_parquet(sources["human"], tmp_path / "corpus")
    first, second = sorted(folder.glob("brain-*.parquet"))
    expected = extractor(folder, "human")["projections"]
    halves = [extractor(file, "human")["projections"] for file in (first, second)]
    np.testing.assert_allclose(np.concatenate(halves), expected, atol=ROUNDING)
    np.testing.assert_allclose(extractor([first, second], "human")["projections"], expected, atol=ROUNDING)


def sparse_tensor(counts):
    """Coordinates, every count in two parts of one place."""
    half = torch.from_numpy(counts).to_sparse()
    indices, values = torch.cat([half.indices()] * 2, dim=1), torch.cat([half.values() - 1, torch.ones(half._nnz())])
    return torch.sparse_coo_tensor(indices, values, half.shape, check_invariants=True)


def csr_tensor(counts):
    return torch.from_numpy(counts).to_sparse_csr()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(
    "kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, torch.from_numpy, sparse_tensor, csr_tensor]
)
def test_counts_in_arrays_project_as_annotated_ones(extractor, sources, kind):
    adata = sources["human"]
    counts, expected = kind(adata.X.toarray()), extractor(adata, "human")["projections"]
    np.testing.assert_array_equal(extractor(counts, "human", gene_ids=adata.var_names)["projections"], expected)
    kept = adata[:, extractor.gene_ids("human")]
    # Without names, the columns are the source's genes.
    found = extractor(kind(kept.X.toarray()), "human")["projections"]
    np.testing.assert_array_equal(found, extractor(kept.copy(), "human")["projections"])
    with pytest.raises(ValueError, match="name each column"):
        extractor(kind(adata.X[:, :5].toarray()), "human")


def test_symbols_are_found_beside_identifiers(sources):
    adata = sources["human"].copy()
    adata.var["gene_symbol"] = [f"Gene{i}" for i in range(G)]
    by_symbol = fit({"human": adata}, gene_ids={"human": "gene_symbol"})
    assert by_symbol.gene_ids("human")[0].startswith("Gene")
    assert np.isfinite(by_symbol(adata, "human")["projections"]).all()


def test_blocks_are_the_cells_in_order(extractor, sources, monkeypatch):
    from cellglot.tokenization import pca_projection

    expected = extractor(sources["human"], "human")["projections"]
    monkeypatch.setattr(pca_projection, "CELLS_PER_PRODUCT", 20)
    blocks = list(extractor.iter_projections(sources["human"], "human"))
    assert [len(block) for block in blocks] == [20, 20, 20, 20, 17]
    np.testing.assert_allclose(np.concatenate(blocks), expected, atol=ROUNDING)


def test_inputs_are_left_as_they_are(extractor, sources):
    adata = sources["human"].copy()
    extractor(adata, "human")
    assert (adata.X != sources["human"].X).nnz == 0


# ---- saving and loading


def test_saved_and_loaded_projects_the_same_bit_for_bit(extractor, sources, tmp_path):
    files = extractor.save_pretrained(tmp_path / "out")
    assert {"preprocessor_config.json", "projection.safetensors"} <= {os.path.basename(file) for file in files}
    loaded = PCAProjectionFeatureExtractor.from_pretrained(tmp_path / "out")
    assert loaded.to_dict() | {"auto_map": None} == extractor.to_dict() | {"auto_map": None}
    for source in extractor.sources:
        expected = extractor(sources[source], source)["projections"]
        np.testing.assert_array_equal(loaded(sources[source], source)["projections"], expected)
        np.testing.assert_array_equal(loaded.inverse(expected, source), extractor.inverse(expected, source))
    # A second generation, from the path of the configuration itself
    loaded.save_pretrained(tmp_path / "again")
    again = PCAProjectionFeatureExtractor.from_pretrained(tmp_path / "again" / "preprocessor_config.json")
    assert again.gene_ids("mouse") == extractor.gene_ids("mouse")


def test_files_are_json_and_safetensors_that_others_can_read(extractor, tmp_path):
    extractor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config["auto_map"] == {"AutoFeatureExtractor": "pca_projection.PCAProjectionFeatureExtractor"}
    assert [source["name"] for source in config["sources"]] == ["human", "mouse"]
    with safe_open(tmp_path / "projection.safetensors", framework="np") as file:
        components = file.get_tensor("human.components")
        genes = json.loads(file.metadata()["sources"])["human"]["gene_ids"]
    assert components.dtype == np.float32
    assert components.shape == (K, len(genes))


def test_a_failed_write_keeps_the_earlier_projection(extractor, sources, tmp_path, monkeypatch):
    extractor.save_pretrained(tmp_path)
    other = fit({"human": sources["human"]})

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("cellglot.tokenization.pca_projection.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(tmp_path)
    assert PCAProjectionFeatureExtractor.from_pretrained(tmp_path).sources == ("human", "mouse")
    assert not list(tmp_path.glob(".partial-*"))


def test_a_projection_of_another_configuration_is_refused(extractor, sources, tmp_path):
    extractor.save_pretrained(tmp_path / "one")
    fit({"human": sources["human"]}).save_pretrained(tmp_path / "two")
    os.replace(tmp_path / "two" / "projection.safetensors", tmp_path / "one" / "projection.safetensors")
    with pytest.raises(OSError, match=r"is not the file that its preprocessor_config\.json was saved with"):
        PCAProjectionFeatureExtractor.from_pretrained(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("route", ["package", "code in a folder", "code in a repository"])
def test_loads_through_the_auto_class_in_a_fresh_process(extractor, sources, tmp_path, route):
    """With the package registered, and by the saved code where the package cannot be imported."""
    name, folder = "org/brains", tmp_path / "hub" / "models--org--brains"
    if route == "code in a repository":
        # The cache of a download
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        extractor.save_pretrained(folder / "snapshots" / ("0" * 40))
    else:
        name = str(tmp_path / "out")
        extractor.save_pretrained(name)
    path = as_h5ad(sources["human"], tmp_path / "cells.h5ad", "csr")
    first, trust = ("import cellglot", "") if route == "package" else ("sys.modules['cellglot'] = None", "True")
    code = (
        f"import sys; {first}\n"
        "import numpy as np, anndata as ad\n"
        "from transformers import AutoFeatureExtractor\n"
        f"extractor = AutoFeatureExtractor.from_pretrained({name!r}, trust_remote_code={trust or None})\n"
        f"adata = ad.read_h5ad({str(path)!r})\n"
        f"found = [extractor(cells, 'human')['projections'] for cells in (adata, {str(path)!r})]\n"
        "found.append(extractor(adata.X, 'human', gene_ids=list(adata.var_names))['projections'])\n"
        "assert all(np.array_equal(found[0], other) for other in found)\n"
        "print(type(extractor).__module__.split('.')[0], extractor.inverse(found[0], 'human').shape)\n"
        f"np.save({str(tmp_path / 'found.npy')!r}, found[0])\n"
    )
    caches = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    environment = {**os.environ, **caches}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    package = "transformers_modules" if trust else "cellglot"
    assert result.stdout.strip() == f"{package} ({N}, {len(extractor.gene_ids('human'))})"
    expected = extractor(sources["human"], "human")["projections"]
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=ROUNDING)


@pytest.mark.gpu
def test_a_gpu_projects_the_same(extractor, sources):
    found = list(extractor.iter_projections(sources["human"], "human", device="cuda"))
    expected = extractor(sources["human"], "human")["projections"]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-2)
