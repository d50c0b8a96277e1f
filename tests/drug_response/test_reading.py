"""Responses come out the same from every layout and file, doses in micromolar, whole or in blocks."""

import gzip
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellglot.datasets_scripts.lincs_l1000 import LincsL1000
from cellglot.drug_response.reading import LAYOUTS, SUITE, ResponseLayout, iter_responses, read_responses
from cellglot.drug_response.splits import hold_out_drugs

from ..datasets_scripts import test_lincs_l1000 as lincs
from ..datasets_scripts import test_sciplex3 as sciplex
from ..datasets_scripts.test_gctx import write_gctx


@pytest.fixture
def counts():
    return sp.csr_matrix(np.random.default_rng(1).poisson(0.8, (sciplex.N_CELLS, sciplex.N_GENES)))


def log_normalized(counts, totals=None):
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1) if totals is None else totals[:, None]
    return np.log1p(counts / totals * 1e4).astype(np.float32)


def l1000(n=11, **columns) -> Any:
    """An AnnData with the columns of the Connectivity Map: controls, compounds, one knock-down, one without a dose."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "pert_iname": ["DMSO"] * 3 + ["a", "b"] * ((n - 5) // 2) + ["gene", "a"],
            "cell_id": "A375",
            "pert_type": ["ctl_vehicle"] * 3 + ["trt_cp"] * (n - 5) + ["trt_sh", "trt_cp"],
            "pert_dose": [-666.0] * 3 + [500.0] * (n - 5) + [1.5, -666.0],
            "pert_dose_unit": ["-666"] * 3 + ["nM"] * (n - 5) + ["ng", "um"],
            "rna_plate": "P",
        },
        index=[f"w{i}" for i in range(n)],
    ).assign(**columns)
    var = pd.DataFrame({"pr_gene_symbol": ["AAA", "BBB", "CCC"]}, index=["780", "7849", "2978"])
    return ad.AnnData(rng.normal(8, 1, (n, 3)).astype(np.float32), obs=obs, var=var)


def test_doses_are_micromolar_and_what_is_neither_control_nor_dosed_compound_is_left_out(caplog):
    cells = l1000()
    data = read_responses(cells)
    assert data.is_control.tolist() == [True] * 3 + [False] * 6
    np.testing.assert_allclose(data.dose, [0] * 3 + [0.5] * 6)
    np.testing.assert_array_equal(data.expression, cells.X[:9])
    assert data.genes.columns.tolist() == ["entrez_id", "gene_symbol"]
    assert data.pair_by == ("cell_line", "rna_plate")
    assert "2 profiles are neither controls nor given a drug at a known dose" in caplog.text


def test_blocks_are_the_whole_and_genes_come_in_the_order_asked_for():
    cells = l1000(31)
    whole = read_responses(cells)
    parts = list(iter_responses(cells, profiles_per_block=7))
    assert [len(part) for part in parts] == [7, 7, 7, 7, 1]
    np.testing.assert_array_equal(np.concatenate([part.expression for part in parts]), whole.expression)
    chosen = read_responses(cells, genes=["CCC", "AAA"])
    np.testing.assert_array_equal(chosen.expression, whole.expression[:, [2, 0]])
    assert read_responses(cells, genes=["2978"]).gene_ids == ["2978"]
    kept = read_responses(cells, keep=lambda obs: obs["drug"] != "b")
    assert kept.drugs == ["a"]
    with pytest.raises(ValueError, match=r"lacks 1 of the 2 genes wanted \(e.g. 'ZZZ'\)"):
        read_responses(cells, genes=["AAA", "ZZZ"])


@pytest.mark.parametrize("kind", ["gctx", "gct", "gct.gz"])
def test_gctx_and_gct_are_read_as_the_same_profiles(tmp_path, kind):
    cells = l1000()
    path = tmp_path / f"profiles.{kind}"
    values = pd.DataFrame(cells.X, index=cells.obs_names, columns=cells.var_names)
    if kind == "gctx":
        write_gctx(path, values, annotations={"COL": cells.obs.astype(str), "ROW": cells.var})
    else:
        lines = ["#1.3", f"3\t11\t1\t{cells.obs.shape[1]}", "\t".join(["id", "pr_gene_symbol", *cells.obs_names])]
        lines += ["\t".join([name, "na", *cells.obs[name].astype(str)]) for name in cells.obs]
        for gene, symbol in cells.var["pr_gene_symbol"].items():
            lines.append("\t".join([gene, symbol, *(f"{value:.9g}" for value in values[gene])]))
        text = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(text) if kind == "gct.gz" else text)
    found, expected = read_responses(path), read_responses(cells)
    np.testing.assert_allclose(found.expression, expected.expression, rtol=1e-6)
    assert found.obs.index.tolist() == expected.obs.index.tolist()
    for name in ("drug", "cell_line", "dose", "is_control"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_rows_of_the_lincs_builder_stream_with_structures_and_landmark_genes(file_server, tmp_path):
    file_server.serve(LincsL1000)
    profiles = lincs.some_profiles(lincs.N_PROFILES, lincs.N_GENES)
    config, genes = "phase2_level3", lincs.gene_info()
    lincs.publish(file_server.folder, config, profiles, genes, lincs.annotations(config, profiles.index))
    folder = lincs.built(tmp_path, config)
    parts = list(iter_responses(folder, profiles_per_block=5))
    assert max(len(part) for part in parts) <= 5
    data = read_responses(folder)
    landmark = genes.loc[genes["pr_is_lm"] == 1, "pr_gene_id"].tolist()
    obs = lincs.expected_obs(config, profiles.index)
    np.testing.assert_array_equal(data.expression, profiles[landmark].to_numpy())
    np.testing.assert_array_equal(data.is_control, obs["pert_type"] == "ctl_vehicle")
    np.testing.assert_allclose(data.dose, obs["pert_dose"].fillna(0))
    assert data.genes["entrez_id"].tolist() == landmark
    assert dict(data.smiles) == {"drug 1": "CCO"}


@pytest.mark.filterwarnings("ignore:.*written without encoding metadata")
def test_rows_of_the_sciplex_builder_come_out_log_normalized_with_the_nuclei_that_were_called(
    file_server, tmp_path, counts
):
    file_server.serve(sciplex.SciPlex3)
    sciplex.publish(file_server.folder, counts)
    data = read_responses(sciplex.build(tmp_path))
    nuclei = sciplex.nuclei()
    called = nuclei["dose"].notna().to_numpy()
    # Of the molecules of all genes, as pData has them
    expected = log_normalized(counts.toarray(), nuclei["n.umi"].to_numpy())[called]
    np.testing.assert_allclose(data.expression, expected, rtol=1e-5)
    np.testing.assert_allclose(data.dose, nuclei.loc[called, "dose"].astype(float) / 1000, rtol=1e-6)
    np.testing.assert_array_equal(data.is_control, nuclei.loc[called, "vehicle"].astype(bool))
    assert data.pair_by == ("cell_line", "replicate")
    assert data.target_sum == 1e4
    assert data.smiles["Navitoclax (ABT-263)"] == "CC1(CCC(=C1)C)C"


@pytest.mark.filterwarnings("ignore:.*written without encoding metadata")
def test_expression_of_chemcpa_is_taken_as_it_is_and_suites_are_read_without_the_builder(file_server, tmp_path, counts):
    cells = sciplex.chemcpa(counts)
    cells.write_h5ad(file_server.folder / sciplex.CHEMCPA)
    file_server.serve(sciplex.SciPlex3)
    built = read_responses(sciplex.build(tmp_path, "chemcpa"))
    direct = read_responses(cells, layout=SUITE, counts=False)
    for data in (built, direct):
        np.testing.assert_array_equal(data.expression, cells.X.toarray())
        assert data.target_sum is None
    np.testing.assert_allclose(built.dose, direct.dose, rtol=1e-6)
    raw = read_responses(sciplex.scperturb(counts), layout=SUITE)
    called = sciplex.nuclei()["dose"].notna().to_numpy()
    np.testing.assert_allclose(raw.expression, log_normalized(counts.toarray())[called], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pert_dose": -2.0}, "Expected doses of 0 nm or more"),
        ({"pert_type": "trt_sh"}, "no profile is a control or was given a drug"),
    ],
)
def test_profiles_that_cannot_be_meant_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_responses(l1000(**change))


def test_a_dose_without_a_unit_and_an_unknown_layout_are_refused():
    without = replace(LAYOUTS["lincs"], unit_column=None)
    with pytest.raises(ValueError, match=r"doses with a unit, one of .*; found no unit"):
        read_responses(l1000(), layout=without)
    with pytest.raises(ValueError, match=r"of no known layout .* layout=ResponseLayout"):
        read_responses(ad.AnnData(np.ones((2, 2), np.float32)))
    with pytest.raises(ValueError, match="obs lacks treatment"):
        read_responses(l1000(), layout=ResponseLayout("treatment", "cell_id", "pert_type"))
    with pytest.raises(ValueError, match="Expected a layout among cellglot"):
        read_responses(l1000(), layout="LINCS")


@pytest.mark.realdata
def test_real_files_are_read_by_their_columns(real_data):
    wells = read_responses(real_data / "drug" / "l1000_level3_HT115_681x978.h5ad")
    assert (len(wells), len(wells.drugs), int(wells.is_control.sum())) == (681, 349, 20)
    assert len(wells.smiles) == 350
    assert int(hold_out_drugs(wells, 70).test.sum()) == 134
    plate = read_responses(real_data / "drug" / "l1000_cmappy_test_377x978.h5ad")
    assert (len(plate.drugs), sorted(set(plate.genes.columns))) == (59, ["entrez_id", "gene_symbol"])
    cells = read_responses(real_data / "cells" / "kang2018_ifnb_1556x1267.h5ad")
    assert (cells.drugs, cells.pair_by, int(cells.is_control.sum())) == (["stim"], ("cell_line", "donor"), 750)
    assert cells.target_sum == 1e4
