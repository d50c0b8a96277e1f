"""Profiles come out over the model's genes, whatever names and order they have, and conditions as numbers."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from cellglot import ExpressionFeatureExtractor
from cellglot.tokenization.expression_features import ExpressionReport
from cellglot.tokenization.gene_identifiers import gene_identifiers

from ..conftest import ensembl, synthetic_cells
from ..drug_response.responses import GENES, SMILES, responses

IDENTIFIERS = {
    "entrez_id": [str(100 + 3 * i) for i in range(7)],
    "ensembl_id": ensembl(7),
    "gene_symbol": [f"SYM{i}" for i in range(7)],
}


def profiles(names, n=5, seed=0):
    values = np.random.default_rng(seed).uniform(4, 15, (n, len(names))).astype(np.float32)
    return ad.AnnData(values, var=pd.DataFrame(index=pd.Index(names)))


@pytest.mark.parametrize("kind", IDENTIFIERS)
def test_genes_are_found_by_each_kind_of_identifier_in_any_order(kind):
    extractor = ExpressionFeatureExtractor.from_genes(IDENTIFIERS)
    cells = profiles(IDENTIFIERS[kind])
    order = [4, 2, 0, 6, 5, 1, 3]
    report = ExpressionReport()
    found = extractor(cells[:, order], report=report)["expression"]
    np.testing.assert_array_equal(found, cells.X)
    assert (report.identifier, report.n_matched, report.n_missing) == (kind, 7, 0)


def test_versions_letter_case_and_numbers_as_text_do_not_matter():
    extractor = ExpressionFeatureExtractor.from_genes(IDENTIFIERS)
    for names in (
        [f"{name}.12" for name in IDENTIFIERS["ensembl_id"]],
        [name.lower() for name in IDENTIFIERS["gene_symbol"]],
        [f"{name}.0" for name in IDENTIFIERS["entrez_id"]],
    ):
        cells = profiles(names)
        np.testing.assert_array_equal(extractor(cells)["expression"], cells.X)


def test_identifiers_in_columns_are_used_when_the_index_says_nothing():
    cells = profiles([str(i) for i in range(7)])
    cells.var["pr_gene_id"] = [int(name) for name in IDENTIFIERS["entrez_id"]]
    assert gene_identifiers(cells.var) == {"entrez_id": IDENTIFIERS["entrez_id"]}
    extractor = ExpressionFeatureExtractor.from_genes(IDENTIFIERS)
    np.testing.assert_array_equal(extractor(cells)["expression"], cells.X)


def test_missing_genes_get_the_training_mean_and_are_told(caplog):
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data, scaling="standardize")
    kept = [i for i in range(GENES) if i not in (2, 11)]
    report = ExpressionReport()
    part = replace(data, expression=data.expression[:, kept], genes=data.genes.iloc[kept])
    found = extractor(part, report=report)["expression"]
    np.testing.assert_array_equal(found[:, kept], extractor(data)["expression"][:, kept])
    np.testing.assert_allclose(found[:, [2, 11]], 0, atol=1e-6)
    assert report.missing == ("GENE2", "GENE11")
    assert "lacks 2 of the model's 13 genes (e.g. 'GENE2', 'GENE11')" in caplog.text


def test_no_gene_in_common_says_what_was_expected_and_found():
    extractor = ExpressionFeatureExtractor.from_genes({"entrez_id": ["1", "2"]})
    with pytest.raises(ValueError, match=r"none of its 2 genes .* Expected entrez_id e.g. '1', '2'; found gene_symbol"):
        extractor(profiles(["AAA", "BBB"]))


@pytest.mark.parametrize("scaling", ["none", "center", "standardize"])
def test_scaling_is_that_of_the_treated_training_profiles_and_is_undone(scaling):
    data = responses()
    train = np.arange(len(data)) % 3 > 0
    extractor = ExpressionFeatureExtractor.fit(data, train, scaling=scaling)
    found = extractor(data)["expression"]
    treated = data.expression[train & ~data.is_control].astype(np.float64)
    spread = treated.std(0) if scaling == "standardize" else np.sqrt((treated.std(0) ** 2).mean())
    expected = data.expression if scaling == "none" else (data.expression - treated.mean(0)) / spread
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(extractor.inverse(torch.from_numpy(found)), data.expression, rtol=1e-5)
    np.testing.assert_array_equal(extractor.scale(data.expression), found)


def test_counts_are_log_normalized_by_all_genes_of_the_file_and_logarithms_are_not_done_twice():
    cells = synthetic_cells(23, 29)
    extractor = ExpressionFeatureExtractor.from_genes(list(cells.var_names[:11]), target_sum=1e4)
    totals = np.asarray(cells.X.sum(1))
    expected = np.log1p(cells.X.toarray() / totals * 1e4)[:, :11]
    np.testing.assert_allclose(extractor(cells)["expression"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="expected raw counts, found"):
        extractor(np.log1p(cells.X.toarray()), gene_ids=list(cells.var_names))
    plain = ExpressionFeatureExtractor.from_genes(list(cells.var_names))
    cells.X.data[0] = 31
    with pytest.raises(ValueError, match="expected logarithmic expression, as the model was trained on, found 31"):
        plain(cells)


def test_data_on_another_scale_and_names_of_other_columns_are_refused():
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data)
    with pytest.raises(ValueError, match=r"wells: expected values as they are, .* found log\(1 \+ counts per 10,000\)"):
        extractor(replace(data, target_sum=1e4))
    with pytest.raises(ValueError, match="has 13 genes, but gene_ids names 12"):
        extractor(ad.AnnData(data.expression), gene_ids=data.gene_ids[1:])
    with pytest.raises(ValueError, match=r"Expected an array \(profiles, 13 genes\), found \(72, 12\)"):
        extractor(data.expression[:, 1:])


def test_an_array_of_the_models_genes_needs_no_names():
    genes = {kind: list(names) for kind, names in IDENTIFIERS.items()}
    # No symbol is known of one gene, and no Ensembl id of another.
    genes["gene_symbol"][2] = genes["ensembl_id"][5] = ""
    extractor = ExpressionFeatureExtractor.from_genes(genes)
    values = profiles(IDENTIFIERS["entrez_id"]).X
    np.testing.assert_array_equal(extractor(values)["expression"], values)


def test_blocks_are_the_whole():
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data)
    blocks = list(extractor.iter_expression(data, profiles_per_block=7))
    assert max(map(len, blocks)) == 7
    np.testing.assert_array_equal(np.concatenate(blocks), extractor(data)["expression"])


def test_landmark_genes_are_read_from_a_table(tmp_path):
    table = pd.DataFrame({"gene_id": IDENTIFIERS["entrez_id"], "gene_symbol": IDENTIFIERS["gene_symbol"]})
    table["is_landmark"] = [True] * 5 + [False] * 2
    table.to_parquet(tmp_path / "genes.parquet")
    table.to_csv(tmp_path / "genes.csv", index=False)
    table.to_csv(tmp_path / "genes.tsv.gz", index=False, sep="\t")
    for name in ("genes.parquet", "genes.csv", "genes.tsv.gz"):
        extractor = ExpressionFeatureExtractor.landmark(tmp_path / name)
        assert extractor.genes["entrez_id"] == IDENTIFIERS["entrez_id"][:5]
        assert extractor.gene_ids == IDENTIFIERS["gene_symbol"][:5]


def test_conditions_are_numbers_fingerprints_and_logarithms_of_micromolar():
    data = responses()
    by_id = ExpressionFeatureExtractor.fit(data)
    asked = {"drug": ["urea", "ethanol"], "cell_line": ["MCF7", "A549"], "dose": [100, 10_000], "dose_unit": "nM"}
    found = by_id.conditions(**asked)
    assert found["drug"].tolist() == [sorted(SMILES).index("urea"), sorted(SMILES).index("ethanol")]
    assert found["cell_line"].tolist() == [1, 0]
    np.testing.assert_allclose(found["dose"], [-1, 1], atol=1e-6)
    by_structure = ExpressionFeatureExtractor.fit(data, drug_encoder="fingerprint", fingerprint_size=64)
    prints = by_structure.conditions(**asked)["fingerprint"]
    assert prints.shape == (2, 64)
    new = by_structure.conditions(["mine"], ["A549"], 1, "uM", smiles={"mine": "OCC"})["fingerprint"]
    np.testing.assert_array_equal(new[0], prints[1])


def test_a_line_that_was_not_trained_on_has_a_number_of_its_own(caplog):
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data)
    assert extractor.conditions(["urea"], ["HeLa"], 1, "uM")["cell_line"].tolist() == [2]
    assert "predicted from controls alone: 'HeLa'" in caplog.text
    # A line with controls only was not trained on either: nothing would have learnt its embedding.
    controls_only = ExpressionFeatureExtractor.fit(data, data.is_control | (data.cell_line == "MCF7"))
    assert controls_only.cell_lines == ["MCF7"]
    assert controls_only.conditions(["urea"], ["A549"], 1, "uM")["cell_line"].tolist() == [1]


@pytest.mark.parametrize(
    ("encoder", "asked", "message"),
    [
        ("id", ("lsd", 1, "uM"), r"'lsd'.*knows the 5 drugs .*drug_encoder=\"fingerprint\" can do any drug"),
        ("fingerprint", ("lsd", 1, "uM"), r"No structure is known of 1 drugs \(e.g. 'lsd'\)"),
        ("id", ("urea", 1, None), "with a unit"),
        ("id", ("urea", -1, "uM"), "Expected doses of 0 uM or more"),
        ("id", ("urea", 0, "uM"), "1 of 1 doses are 0: these are controls"),
    ],
)
def test_conditions_that_cannot_be_meant_are_refused(encoder, asked, message):
    extractor = ExpressionFeatureExtractor.fit(responses(), drug_encoder=encoder, fingerprint_size=64)
    drug, dose, unit = asked
    with pytest.raises(ValueError, match=message):
        extractor.conditions([drug], ["A549"], dose, unit)


def test_all_of_it_is_saved(tmp_path):
    data = responses()
    extractor = ExpressionFeatureExtractor.fit(data, scaling="standardize", drug_encoder="fingerprint")
    extractor.save_pretrained(tmp_path)
    found = ExpressionFeatureExtractor.from_pretrained(tmp_path)
    np.testing.assert_array_equal(found(data)["expression"], extractor(data)["expression"])
    asked = (["urea"], ["A549"], 1, "uM")
    np.testing.assert_array_equal(found.conditions(*asked)["fingerprint"], extractor.conditions(*asked)["fingerprint"])
    assert found.to_dict() == extractor.to_dict()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs the mean and spread"):
        ExpressionFeatureExtractor.from_genes(["AAA"], scaling="center")
    with pytest.raises(ValueError, match="each gene once; 1 stand there again"):
        ExpressionFeatureExtractor.from_genes(["AAA", "BBB", "AAA"])
    with pytest.raises(ValueError, match="found none"):
        ExpressionFeatureExtractor.from_genes([])
    with pytest.raises(ValueError, match="found none"):
        ExpressionFeatureExtractor.fit(responses(), np.zeros(len(responses()), dtype=bool))


@pytest.mark.realdata
def test_real_l1000_files_match_the_landmark_table_by_what_they_have(real_data):
    extractor = ExpressionFeatureExtractor.landmark(real_data / "drug" / "l1000_landmark_978.csv")
    for name, kind, n_matched in (("HT115_681", "gene_symbol", 959), ("cmappy_test_377", "entrez_id", 978)):
        path = next((real_data / "drug").glob(f"l1000_*{name}x978.h5ad"))
        report = ExpressionReport()
        assert extractor(path, report=report)["expression"].shape[1] == 978
        assert (report.identifier, report.n_matched) == (kind, n_matched)
