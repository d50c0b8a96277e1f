"""sci-Plex 3: nuclei as GEO and the suites publish them, doses in micromolar, drugs with their structures."""

import gzip
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from datasets import load_dataset

from cellglot.datasets_scripts import corpus
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.dataset_card import write_card
from cellglot.datasets_scripts.sciplex3 import (
    CELLS,
    CHEMCPA,
    GENES,
    MATRIX,
    PDATA,
    SCPERTURB,
    SHA256,
    WELLS,
    SciPlex3,
)
from cellglot.datasets_scripts.sciplex3_annotations import drug_key, read_wells

N_CELLS, N_GENES = 113, 19
DRUGS = {
    "S1001": ("Navitoclax (ABT-263)", "CC1(CCC(=C1)C)C"),
    "S2718": ("TAK-901 ", "CCO |c:13,21,t:1|"),
    "S1143": ("AG-490 (Tyrphostin B42)", "N#CC"),
}


def wells() -> Any:
    """The table of wells: each drug at four doses in each line, and vehicle."""
    rows = []
    for line in ("A549", "K562", "MCF7"):
        for number, (drug, (name, smiles)) in enumerate(DRUGS.items()):
            for pattern, dose in enumerate((10_000, 1_000, 100, 10), 1):
                rows.append((f"plate2_C{number}{pattern}", f"plate4{line[-1]}", line, drug, False, dose, name, smiles))
        rows.append(("plate2_H12", f"plate4{line[-1]}", line, "S0000", True, 0, None, None))
    names = ["well_oligo", "plate_oligo", "cell_type", "catalog_number", "vehicle", "dose", "name", "SMILES"]
    table = pd.DataFrame(rows, columns=names)
    table["Combo"] = table["well_oligo"] + table["plate_oligo"]
    table["replicate"], table["time_point"] = "rep1", 24
    return table


def nuclei() -> Any:
    """pData: the wells' columns by nucleus, the last seven without a called well."""
    rng = np.random.default_rng(0)
    table = wells()
    called = table.iloc[rng.integers(len(table), size=N_CELLS)].reset_index(drop=True)
    called["product_name"] = called["name"].fillna("Vehicle")
    called["pathway"] = np.where(called["vehicle"], "Vehicle", "Apoptosis")
    called["target"] = np.where(called["vehicle"], "Vehicle", "Bcl-2")
    unknown = called.columns.drop("vehicle")
    called[unknown] = called[unknown].astype(object)
    called.loc[N_CELLS - 7 :, unknown] = np.nan
    called.loc[N_CELLS - 7 :, "vehicle"] = False
    called.insert(0, "cell", [f"A01_E09_RT_BC_{i}_Lig_BC_{i % 7}" for i in range(N_CELLS)])
    for name in ("n.umi", "hash_umis_W", "qval_W", "top_to_second_best_ratio_W"):
        called[name] = rng.integers(1, 900, size=N_CELLS)
    for name in ("hash_umis_P", "qval_P", "top_to_second_best_ratio_P"):
        called[name] = rng.random(N_CELLS)
    return called.drop(columns=["name", "SMILES"])


@pytest.fixture
def counts() -> Any:
    matrix = sp.lil_matrix(np.random.default_rng(1).poisson(0.3, (N_CELLS, N_GENES)))
    matrix[[0, 40, N_CELLS - 1]] = 0
    return matrix.tocsr()


def gene_lines() -> list[str]:
    return [f"ENS{'MUS' * (i > 11)}G{i:011d}.{i} GENE{i}" for i in range(N_GENES)]


def gene_symbols() -> pd.Index:
    return pd.Index([line.split()[1] for line in gene_lines()])


def r_table(table: pd.DataFrame) -> str:
    """As R's write.table: text and names quoted, names of rows before the first column, TRUE, FALSE and NA."""

    def field(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).upper()
        return "NA" if pd.isna(value) else f'"{value}"' if isinstance(value, str) else str(value)

    lines = [" ".join(f'"{name}"' for name in table)]
    lines += [" ".join(map(field, [row[0], *row])) for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def publish(folder: Path, counts: Any, pdata: Any = None, by: str = "cell") -> None:
    """The five files of GSM4150378; the matrix ordered by cell, as published, or by gene."""
    pdata = nuclei() if pdata is None else pdata
    entries = (counts if by == "cell" else counts.tocsc()).tocoo()
    triplets = zip(entries.col + 1, entries.row + 1, entries.data, strict=True)
    texts = {
        MATRIX: "".join(f"{gene}\t{cell}\t{count}\n" for gene, cell, count in triplets),
        CELLS: "".join(f"{cell}\tChem3_Screen2\n" for cell in nuclei()["cell"]),
        GENES: "id gene_short_name\n" + "\n".join(gene_lines()) + "\n",
        PDATA: r_table(pdata),
        WELLS: wells().to_csv(sep="\t", index=False, na_rep="NA"),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(gzip.compress(text.encode()))


def build(tmp_path: Path, config: str = "default", **options) -> Path:
    builder = SciPlex3(cache_dir=str(tmp_path / "cache"), config_name=config, **options)
    builder.prepare(tmp_path / "sciplex3")
    return tmp_path / "sciplex3"


def loaded(folder: Path, config: str = "default", **options) -> Any:
    builder = SciPlex3(config_name=config)
    write_card(builder, folder)
    return load_dataset(str(folder), config, split="train", cache_dir=str(folder.parent / "loaded"), **options)


def values_of(rows: Any, column: str = "count") -> np.ndarray:
    matrix = np.zeros((len(rows), N_GENES))
    for i, row in enumerate(rows):
        assert list(row["gene_index"]) == sorted(set(row["gene_index"]))
        matrix[i, row["gene_index"]] = row[column]
    return matrix


@pytest.mark.parametrize("by", ["cell", "gene"])
def test_nuclei_of_geo_come_out_with_counts_and_treatments(file_server, tmp_path, monkeypatch, counts, by):
    monkeypatch.setattr(corpus, "ROWS_PER_PART", 41)
    publish(file_server.folder, counts, by=by)
    file_server.serve(SciPlex3)
    folder = build(tmp_path)
    assert sorted(file_server.downloads) == sorted([MATRIX, CELLS, GENES, PDATA, WELLS])
    rows = loaded(folder)
    assert len(list((folder / "default").glob("sciplex3-train-*.parquet"))) == 3
    np.testing.assert_array_equal(values_of(rows), counts.toarray())
    expected = nuclei()
    found = rows.to_pandas()
    assert found["cell_name"].tolist() == expected["cell"].tolist()
    np.testing.assert_array_equal(found["n_counts"], expected["n.umi"])
    np.testing.assert_allclose(found["hash_ratio_plate"], expected["top_to_second_best_ratio_P"], rtol=1e-6)
    called = expected["dose"].notna()
    np.testing.assert_allclose(found["dose_um"][called], expected["dose"][called].astype(float) / 1000, rtol=1e-6)
    assert found["vehicle"][called].tolist() == expected["vehicle"][called].tolist()
    for name in ("cell_type", "pathway", "target", "replicate", "catalog_number"):
        assert found[name][called].tolist() == expected[name][called].tolist()
    assert found["well"][called].tolist() == expected["well_oligo"][called].tolist()
    treatments = ["cell_type", "product_name", "smiles", "dose_um", "vehicle", "time_h", "well"]
    assert found.loc[~called, treatments].isna().all(axis=None)
    assert list(loaded(folder, streaming=True)) == list(rows)


def test_drugs_have_their_structures_and_vehicle_has_none(file_server, tmp_path, counts):
    publish(file_server.folder, counts)
    file_server.serve(SciPlex3)
    found = loaded(build(tmp_path)).to_pandas()
    smiles = {drug: text.split()[0] for drug, (_, text) in DRUGS.items()} | {"S0000": None}
    named = found.dropna(subset=["catalog_number"])
    assert named["smiles"].tolist() == [smiles[drug] for drug in named["catalog_number"]]
    assert set(named["product_name"]) == {"Vehicle", *(name.strip() for name, _ in DRUGS.values())}


def test_genes_are_without_version_and_in_the_order_of_the_matrix(file_server, tmp_path, counts):
    publish(file_server.folder, counts)
    file_server.serve(SciPlex3)
    genes = pd.read_parquet(build(tmp_path) / "default" / "genes.parquet")
    assert genes["gene_id"].tolist() == [line.split(".")[0] for line in gene_lines()]
    assert genes["gene_symbol"].tolist() == gene_symbols().tolist()


def test_annotations_in_another_order_are_matched_by_name(file_server, tmp_path, counts):
    publish(file_server.folder, counts, nuclei().sample(frac=1, random_state=0))
    file_server.serve(SciPlex3)
    found = loaded(build(tmp_path)).to_pandas()
    assert found["cell_name"].tolist() == nuclei()["cell"].tolist()
    np.testing.assert_array_equal(found["n_counts"], nuclei()["n.umi"])


def rewrite(path: Path, edit) -> None:
    path.write_bytes(gzip.compress(edit(gzip.decompress(path.read_bytes()).decode()).encode()))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (PDATA, lambda t: t.replace('"dose"', '"dosage"'), r"no column 'dose'; it has cell, "),
        (PDATA, lambda t: "\n".join(t.split("\n")[:-4]) + "\n", r"lacks 3 of the 113 cells of .*A01_E09_RT_BC_110"),
        (PDATA, lambda t: t[:-40], r"Row #\d+: Expected \d+ columns, got \d+"),
        (PDATA, lambda t: t.replace("10000", "much", 1), r"much.*truncated or edited"),
        (WELLS, lambda t: t.replace("S1143", "S9999"), r"has no row of the drugs 'S1143' of"),
        (WELLS, lambda t: t.replace("SMILES", "structure"), r"no column 'SMILES'; it has well_oligo"),
        (GENES, lambda t: t.split("\n", 1)[1], r"no column 'id', 'gene_short_name'; it has ENSG00000000000\.0, GENE0"),
        (GENES, lambda t: "\n".join(t.split("\n")[:-3]) + "\n", r"has gene 1[89], expected 1 to 17"),
        (CELLS, lambda t: "\n".join(t.split("\n")[:-9]) + "\n", r"has cell \d+, expected 1 to 105"),
        (MATRIX, lambda t: t + "3\t113\t1.5\n", r"three whole numbers.*1\.5"),
        (MATRIX, lambda t: t.replace("\t", ","), r"three whole numbers"),
    ],
)
def test_a_file_of_another_layout_is_refused(file_server, tmp_path, counts, name, edit, message):
    publish(file_server.folder, counts)
    rewrite(file_server.folder / name, edit)
    file_server.serve(SciPlex3)
    with pytest.raises(CorpusError, match=message):
        build(tmp_path)
    assert not (tmp_path / "sciplex3" / "default").exists()


@pytest.mark.parametrize("name", [MATRIX, PDATA])
def test_a_truncated_file_is_refused(file_server, tmp_path, counts, name):
    publish(file_server.folder, counts)
    path = file_server.folder / name
    path.write_bytes(path.read_bytes()[:-200])
    file_server.serve(SciPlex3)
    with pytest.raises(CorpusError, match=r"truncated"):
        build(tmp_path)


def test_published_checksums_are_asked_for(file_server, tmp_path, counts):
    publish(file_server.folder, counts)
    file_server.serve(SciPlex3, {PDATA: f"sha256:{SHA256[PDATA]}"})
    with pytest.raises(CorpusError, match=rf"{PDATA}, .* expected 860ba5c2"):
        build(tmp_path)


# ---- suites


def scperturb(counts: Any) -> Any:
    """As scPerturb harmonizes the screen: no structures, no flag of vehicle, the unit in a column."""
    obs = nuclei()
    obs["perturbation"] = obs["product_name"].replace("Vehicle", "control")
    renamed = {"cell_type": "cell_line", "time_point": "time", "dose": "dose_value", "n.umi": "ncounts"}
    obs = obs.rename(columns=renamed).set_index("cell")
    obs["dose_unit"] = "nM"
    kept = ["ncounts", "replicate", "time", "dose_value", "dose_unit", "perturbation", "target", "pathway", "cell_line"]
    obs = obs[kept].infer_objects()
    for name in ("replicate", "perturbation", "target", "pathway", "cell_line"):
        obs[name] = obs[name].astype("category")
    var = pd.DataFrame({"ensembl_id": [line.split(".")[0] for line in gene_lines()]}, index=gene_symbols())
    return ad.AnnData(counts.astype(np.float32), obs=obs, var=var)


def chemcpa(counts: Any) -> Any:
    """As chemCPA prepares it: called nuclei, log-normalized X, cleaned names, 0 and 1 for vehicle."""
    called = nuclei()["dose"].notna().to_numpy()
    obs = nuclei()[called].set_index("cell")
    obs["product_name"] = obs["product_name"].str.strip().str.split(" ").str[0].replace("Vehicle", "control")
    obs["condition"] = obs["product_name"]
    smiles = {name.split(" ")[0]: text.split()[0] for name, text in DRUGS.values()} | {"control": "CS(C)=O"}
    obs["SMILES"] = obs["product_name"].map(smiles).astype("category")
    obs["vehicle"] = obs["control"] = obs["vehicle"].astype(int)
    obs["dose"] = obs["dose"].astype(float)
    text = ["cell_type", "replicate", "pathway", "target", "product_name", "condition"]
    obs = obs[[*text, "dose", "vehicle", "control", "SMILES"]].astype(dict.fromkeys(text, str))
    expression = counts[called].astype(np.float32)
    expression.data = np.log1p(expression.data * 0.7).astype(np.float32)
    var = pd.DataFrame({"id": [line.split()[0] for line in gene_lines()]}, index=gene_symbols())
    return ad.AnnData(expression, obs=obs, var=var)


def as_anndata_0_7(path: Path) -> None:
    """Rewrites a file's categories as AnnData 0.7 had them, which wrote chemCPA's: codes, and labels to one side."""
    with h5py.File(path, "r+") as file:
        obs: Any = file["obs"]
        labels = obs.create_group("__categories")
        for name in [name for name in obs if obs[name].attrs.get("encoding-type") == "categorical"]:
            labels[name], codes = obs[name]["categories"][:], obs[name]["codes"][:]
            del obs[name]
            obs[name] = codes
            obs[name].attrs["categories"] = labels[name].ref
        obs.attrs["encoding-version"] = "0.1.0"


def assert_treatments(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    called = expected["dose"].notna().to_numpy()
    expected = expected[called]
    assert found.loc[~called, ["product_name", "dose_um", "vehicle", "smiles"]].isna().all(axis=None)
    found = found[called]
    np.testing.assert_allclose(found["dose_um"], expected["dose"].astype(float) / 1000, rtol=1e-6)
    assert found["vehicle"].tolist() == expected["vehicle"].tolist()
    for name in ("cell_type", "replicate", "pathway", "target"):
        assert found[name].tolist() == expected[name].tolist()
    smiles = {drug: text.split()[0] for drug, (_, text) in DRUGS.items()} | {"S0000": None}
    assert found["smiles"].tolist() == [smiles[drug] for drug in expected["catalog_number"]]


def test_scperturb_s_file_comes_out_with_structures_joined_by_name(file_server, tmp_path, monkeypatch, counts):
    monkeypatch.setattr(corpus, "ROWS_PER_PART", 41)
    publish(file_server.folder, counts)
    scperturb(counts).write_h5ad(file_server.folder / SCPERTURB)
    file_server.serve(SciPlex3)
    folder = build(tmp_path, "scperturb")
    assert sorted(file_server.downloads) == sorted([SCPERTURB, WELLS])
    rows = loaded(folder, "scperturb")
    np.testing.assert_array_equal(values_of(rows), counts.toarray())
    assert_treatments(rows.to_pandas(), nuclei())
    assert pd.read_parquet(folder / "scperturb" / "genes.parquet")["gene_id"][3] == "ENSG00000000003"


@pytest.mark.filterwarnings("ignore:.*written without encoding metadata")
def test_chemcpa_s_file_comes_out_as_expression_not_as_counts(file_server, tmp_path, counts):
    cells = chemcpa(counts)
    cells.write_h5ad(file_server.folder / CHEMCPA)
    as_anndata_0_7(file_server.folder / CHEMCPA)
    file_server.serve(SciPlex3)
    rows = loaded(build(tmp_path, "chemcpa"), "chemcpa")
    assert "count" not in rows.column_names
    np.testing.assert_array_equal(values_of(rows, "expression"), cells.X.toarray())
    assert_treatments(rows.to_pandas(), nuclei().dropna(subset=["dose"]))


def test_files_of_a_folder_are_read_one_after_another(tmp_path, counts):
    cells = scperturb(counts)
    cells.X = cells.X.copy()
    cells.layers["counts"] = cells.X.copy()
    cells.X.data = np.log1p(cells.X.data)
    cells[:60].copy().write_h5ad(tmp_path / "a.h5ad")
    cells[60:].copy().write_h5ad(tmp_path / "b.h5ad")
    rows = loaded(build(tmp_path, "h5ad", data_dir=str(tmp_path)), "h5ad")
    np.testing.assert_array_equal(values_of(rows), counts.toarray())
    assert rows["cell_name"][:] == nuclei()["cell"].tolist()
    assert set(rows["smiles"][:]) == {None}


def in_micromolar(cells):
    cells.obs["dose_value"] /= 1000
    cells.obs["dose_unit"] = "uM"


def test_doses_in_another_unit_come_out_the_same(tmp_path, counts):
    cells = scperturb(counts)
    in_micromolar(cells)
    cells.write_h5ad(tmp_path / "screen.h5ad")
    found = loaded(build(tmp_path, "h5ad", data_dir=str(tmp_path)), "h5ad").to_pandas()
    expected = nuclei()["dose"].astype(float) / 1000
    np.testing.assert_allclose(found["dose_um"], expected, rtol=1e-6)


def without_a_dose(cells):
    del cells.obs["dose_value"]


def with_relative_doses(cells):
    del cells.obs["dose_unit"]
    cells.obs["dose_value"] /= 10_000


def with_doses_in_words(cells):
    cells.obs["dose_value"] = "high"
    del cells.obs["dose_unit"]


def with_an_unknown_unit(cells):
    cells.obs["dose_unit"] = "mg/ml"


def with_a_doubtful_vehicle(cells):
    cells.obs["vehicle"] = "perhaps"


def normalized(cells):
    cells.X = cells.X * 0.7


def with_shifted_genes(cells):
    cells.var["ensembl_id"] = ["id gene_short_name", *cells.var["ensembl_id"][:-1]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_a_dose, r"no column 'dose or dose_value'; it has ncounts, replicate"),
        (with_relative_doses, r"obs\['dose_value'\] is 1 at the most, but sci-Plex was dosed up to 10,000 nM"),
        (with_doses_in_words, r"obs\['dose_value'\] is to hold numbers"),
        (with_an_unknown_unit, r"dose_unit'\] has 'mg/ml'; expected nM, uM, mM or M"),
        (with_a_doubtful_vehicle, r"obs\['vehicle'\] has 'perhaps'; expected true or false"),
        (normalized, r"not an integer: this looks normalized"),
        (with_shifted_genes, r"the first gene is 'id gene_short_name'.*scPerturb before release 1\.4"),
    ],
)
def test_a_suite_s_file_of_another_layout_is_refused(tmp_path, counts, edit, message):
    cells = scperturb(counts)
    edit(cells)
    cells.write_h5ad(tmp_path / "screen.h5ad")
    with pytest.raises(CorpusError, match=message):
        build(tmp_path, "h5ad", data_dir=str(tmp_path))


def test_files_with_different_genes_are_not_one_corpus(tmp_path, counts):
    cells = scperturb(counts)
    cells.write_h5ad(tmp_path / "a.h5ad")
    cells[:, ::-1].write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(CorpusError, match=r"'b\.h5ad' have other genes than a\.h5ad"):
        build(tmp_path, "h5ad", data_dir=str(tmp_path))


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"reads the \.h5ad files of --data-dir; .* has none"):
        build(tmp_path, "h5ad", data_dir=str(tmp_path))


@pytest.mark.realdata
def test_the_real_table_of_wells_gives_each_drug_one_structure(real_data):
    drugs = read_wells(real_data / "drug" / "sciplex3_supp_table3.tsv.gz")
    assert len(drugs) == 188
    assert drugs["name"].map(drug_key).is_unique
    assert not drugs["SMILES"].str.contains(r"[\s|]").any()
    # chemCPA's independent list names the same compounds, cleaned in its own way.
    listed = pd.read_csv(real_data / "drug" / "sciplex3_trapnell_drugs_smiles.csv.gz", header=None)[0]
    keys = set(drugs["name"].map(drug_key)) | {drug_key(name.split(" ")[0]) for name in drugs["name"]}
    assert sum(drug_key(name) in keys for name in listed) >= 180


@pytest.mark.realdata
def test_real_wells_are_the_treatments_of_nuclei(real_data, file_server, tmp_path, counts):
    """Nuclei dealt to the real 4,992 wells: doses, structures and controls against the table read plainly."""
    real = pd.read_csv(real_data / "drug" / "sciplex3_supp_table3.tsv.gz", sep="\t")
    chosen = real.sample(N_CELLS, random_state=0).reset_index(drop=True)
    pdata = nuclei()
    shared = ["well_oligo", "plate_oligo", "Combo", "cell_type", "replicate", "time_point"]
    shared += ["catalog_number", "vehicle", "dose"]
    pdata[shared] = chosen[shared]
    pdata["product_name"] = chosen["name"].fillna("Vehicle")
    publish(file_server.folder, counts, pdata)
    (file_server.folder / WELLS).write_bytes((real_data / "drug" / "sciplex3_supp_table3.tsv.gz").read_bytes())
    file_server.serve(SciPlex3)
    found = loaded(build(tmp_path)).to_pandas()
    np.testing.assert_allclose(found["dose_um"], chosen["dose"] / 1000, rtol=1e-6)
    assert found["smiles"].fillna("").tolist() == chosen["SMILES"].fillna(" ").str.split(" ").str[0].tolist()
    assert found["vehicle"].tolist() == chosen["vehicle"].tolist()
    assert found["time_h"].tolist() == chosen["time_point"].tolist()
