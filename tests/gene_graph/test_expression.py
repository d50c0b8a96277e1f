"""Cells of any genes in any order become a model's input, and what does not fit is said."""

import numpy as np
import pytest

from cellglot.gene_graph import classify_expression, gene_names, iter_expression, read_expression
from cellglot.gene_graph.expression import expression_report

from ..conftest import ensembl
from .conftest import LABELS, N_GENES, make_model, some_cells


def test_expression_is_log_of_counts_per_ten_thousand(cells, model):
    expression, obs, report = read_expression(cells, model)
    counts = cells.X.toarray()
    expected = np.log1p(counts * (10_000 / counts.sum(axis=1, keepdims=True)))
    np.testing.assert_allclose(expression.toarray(), expected, rtol=1e-6)
    assert expression.dtype == np.float32
    assert obs is cells.obs or obs.equals(cells.obs)
    assert (report.n_cells, report.n_matched, report.n_unseen, report.missing) == (29, N_GENES, 0, ())


def test_order_of_genes_does_not_matter_and_unknown_ones_count_for_totals_only(cells, model):
    order = np.random.default_rng(1).permutation(N_GENES)
    expected, _, _ = read_expression(cells, model)
    shuffled, _, _ = read_expression(cells[:, order].copy(), model)
    np.testing.assert_allclose(shuffled.toarray(), expected.toarray(), rtol=1e-6)
    small = make_model(gene_names(cells[:, order[:8]]), smoothing="none")
    chosen, _, report = read_expression(cells, small)
    np.testing.assert_allclose(chosen.toarray(), expected.toarray()[:, order[:8]], rtol=1e-6)
    assert (report.n_matched, report.n_unseen) == (8, N_GENES - 8)


def test_missing_and_unseen_genes_are_aligned_and_reported(cells, model, tmp_path):
    other = cells[:, 2:].copy()
    other.var["ensembl_id"] = [*ensembl(N_GENES)[2:-1], "ENSG00000999999"]
    other.write_h5ad(tmp_path / "other.h5ad")
    expression, _, report = read_expression(tmp_path / "other.h5ad", model)
    absent = np.asarray(expression.sum(axis=0)).ravel() == 0
    assert absent[[0, 1, 12]].all()
    assert (report.n_matched, report.n_unseen) == (10, 1)
    for said in ("10 of the model's 13 genes found", "3 missing, read as 0", "1 unknown", "'ENSG00000999999'"):
        assert said in str(report)


def test_the_layer_s_own_genes_are_named_and_matched(cells, model, tmp_path):
    few = cells[:, :3].copy()
    few.raw = cells
    few.write_h5ad(tmp_path / "few.h5ad")
    assert gene_names(tmp_path / "few.h5ad").ids == tuple(ensembl(3))
    assert gene_names(tmp_path / "few.h5ad", layer="raw").ids == tuple(ensembl(N_GENES))
    assert expression_report(tmp_path / "few.h5ad", model).n_matched == 3
    assert expression_report(tmp_path / "few.h5ad", model, layer="raw").n_matched == N_GENES
    found, _, _ = read_expression(tmp_path / "few.h5ad", model, layer="raw")
    np.testing.assert_array_equal(found.toarray(), read_expression(cells, model)[0].toarray())


def test_symbols_serve_where_a_file_has_no_ids(cells, model):
    expected, _, _ = read_expression(cells, model)
    del cells.var["ensembl_id"]
    found, _, _ = read_expression(cells, model)
    np.testing.assert_array_equal(found.toarray(), expected.toarray())


def test_columns_of_one_gene_are_summed(cells, model):
    cells.var["ensembl_id"] = [*ensembl(N_GENES)[:-1], ensembl(N_GENES)[0]]
    expression, _, report = read_expression(cells, model)
    counts = cells.X.toarray()
    expected = np.log1p((counts[:, 0] + counts[:, -1]) * 10_000 / counts.sum(axis=1))
    np.testing.assert_allclose(expression[:, [0]].toarray().ravel(), expected, rtol=1e-6)
    assert report.n_collapsed == 1
    assert "summed" in str(report)


def test_blocks_and_chosen_cells_give_the_same_rows(cells, model):
    whole, _, _ = read_expression(cells, model)
    chosen = np.arange(len(cells.obs)) % 4 == 1
    parts = list(iter_expression(cells, model, cells=chosen, cells_per_block=5))
    assert np.concatenate([rows for rows, _ in parts]).tolist() == np.flatnonzero(chosen).tolist()
    found = np.concatenate([block.toarray() for _, block in parts])
    np.testing.assert_array_equal(found, whole[chosen].toarray())
    some, obs, report = read_expression(cells, model, cells=chosen)
    np.testing.assert_array_equal(some.toarray(), found)
    assert len(obs) == report.n_cells == chosen.sum()
    none, _, _ = read_expression(cells, model, cells=np.zeros(len(cells.obs), dtype=bool))
    assert none.shape == (0, N_GENES)


def test_cells_that_cannot_be_read_for_a_model_are_refused(cells, model):
    logged = cells.copy()
    logged.X = logged.X.log1p()
    with pytest.raises(ValueError, match="not an integer"):
        read_expression(logged, model)
    mouse = cells.copy()
    mouse.var["ensembl_id"] = [f"ENSMUSG{i:011d}" for i in range(N_GENES)]
    with pytest.raises(ValueError, match=r"none of its 13 genes .*'ENSMUSG00000000000'.*'ENSG00000000001'"):
        read_expression(mouse, model)
    with pytest.raises(ValueError, match="no gene_ids"):
        read_expression(cells, make_model(gene_names(cells), gene_ids=None))
    with pytest.raises(ValueError, match="target_sum=None"):
        read_expression(cells, make_model(gene_names(cells), target_sum=None))
    for chosen in (np.array([0, 3]), np.ones(5, dtype=bool)):
        for read in (read_expression, classify_expression):
            with pytest.raises(ValueError, match="expected cells as a boolean mask of its 29 cells"):
                read(cells, model, cells=chosen)


def test_cells_get_the_label_and_the_probability_of_their_logits(cells, model, capsys):
    import torch

    table = classify_expression(cells, model, progress=False)
    expression, _, report = read_expression(cells, model)
    with torch.no_grad():
        probabilities = model(torch.from_numpy(expression.toarray())).logits.softmax(dim=-1)
    assert table["cell_type_predicted"].tolist() == [LABELS[i] for i in probabilities.argmax(dim=-1)]
    np.testing.assert_allclose(table["cell_type_score"], probabilities.amax(dim=-1), rtol=1e-5)
    assert list(table.index) == list(cells.obs_names)
    assert str(report) in capsys.readouterr().out
    chosen = np.arange(len(cells.obs)) < 4
    assert classify_expression(cells, model, cells=chosen, progress=False).equals(table[:4])
    assert len(classify_expression(some_cells()[:0], model, progress=False)) == 0


def test_cells_with_unseen_and_without_some_genes_are_classified_and_it_is_said(cells, model, capsys):
    other = cells[:, :0:-1].copy()
    other.var["ensembl_id"] = ["ENSG00000999999", *other.var["ensembl_id"][1:]]
    table = classify_expression(other, model, progress=False)
    said = capsys.readouterr().out
    assert "11 of the model's 13 genes found; 2 missing, read as 0" in said
    assert "1 unknown to the model, left out (e.g. 'ENSG00000999999')" in said
    # As if the cells had the model's genes, those missing without counts; what is unknown counts for totals only.
    same = cells.copy()
    same.obs["n_counts"] = np.asarray(other.X.sum(axis=1)).ravel()
    same.X = same.X.multiply([0, *[1] * 11, 0]).tocsr()
    expected = classify_expression(same, model, progress=False)
    np.testing.assert_allclose(table["cell_type_score"], expected["cell_type_score"], rtol=1e-5)
