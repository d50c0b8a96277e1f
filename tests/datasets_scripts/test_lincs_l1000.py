"""LINCS L1000 from files of GEO's layout: what the matrix and its tables say is what comes out."""

import gzip
import hashlib
from pathlib import Path

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pytest

from cellglot.datasets_scripts.corpus import command_line
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.lincs_l1000 import CONFIGS, LincsL1000, Release, read_treatments

from .test_gct import gct_text
from .test_gctx import some_profiles, write_gctx

N_PROFILES, N_GENES, N_LANDMARKS = 23, 11, 7
CONFIG = {config.name: config for config in CONFIGS}


def gene_info(n_genes: int = N_GENES, n_landmarks: int = N_LANDMARKS) -> pd.DataFrame:
    """Landmarks are spread over the table."""
    landmark = np.random.default_rng(1).permutation(np.arange(n_genes) < n_landmarks).astype(int)
    ids = [str(1000 + 7 * i) for i in range(n_genes)]
    return pd.DataFrame(
        {
            "pr_gene_id": ids,
            "pr_gene_symbol": [f"SYM{i}" for i in ids],
            "pr_gene_title": [f'gene "{i}"' for i in ids],
            "pr_is_lm": landmark,
            "pr_is_bing": 1,
        }
    )


def annotations(config: str, ids: pd.Index) -> pd.DataFrame:
    """Columns of inst_info and sig_info as published, in another order of rows than the matrix."""
    n = np.arange(len(ids))
    treated = n % 3 > 0
    common = {
        "pert_id": np.where(treated, [f"BRD-K{i:08d}" for i in n % 5], "DMSO"),
        "pert_iname": np.where(treated, [f"drug {i}" for i in n % 5], "DMSO"),
        "pert_type": np.where(treated, "trt_cp", "ctl_vehicle"),
        "cell_id": np.array(["A375", "MCF7"])[n % 2],
    }
    dose = np.where(treated, [f"{0.04 * 3 ** (i % 4):.6g}" for i in n], "-666")
    hours = np.where(n % 2, "6", "24")
    quantities = {
        "pert_dose": np.where(treated, dose, np.where(n % 2, "-666.0", "-666.0|-666.000000")),
        "pert_dose_unit": np.where(treated, "um", "-666"),
        "pert_time": np.where(n % 2, "6.0", "24"),
        "pert_time_unit": "h",
    }
    texts = {
        "pert_idose": np.where(treated, [f"{d} um" for d in dose], "-666"),
        "pert_itime": [f"{h} h" for h in hours],
    }
    table = {
        "phase1_level3": {"inst_id": ids, "rna_plate": "P", "rna_well": "A01", **common, **quantities},
        "phase1_level5": {"sig_id": ids, **common, **quantities, **texts, "distil_id": "P:A01|P:A02"},
        "phase2_level3": {
            "inst_id": ids,
            "det_plate": "P",
            "det_well": "A01",
            "pert_mfc_id": "x",
            **common,
            **quantities,
        },
        "phase2_level5": {"sig_id": ids, **common, **texts, "distil_id": "P:A01|P:A02"},
    }[config.removesuffix("_all_genes")]
    return pd.DataFrame(table).sample(frac=1, random_state=0)


def expected_obs(config: str, ids: pd.Index) -> pd.DataFrame:
    table = annotations(config, ids).set_index(release(config).key).loc[ids]
    source = table.get("pert_dose", table.get("pert_idose", pd.Series()).str.split().str[0])
    table["pert_dose"] = pd.to_numeric(source.str.split("|").str[0]).replace(-666, np.nan)
    table["pert_dose_unit"] = np.where(table["pert_dose"].isna(), None, "um")  # type: ignore[arg-type]
    table["pert_time"] = np.where(np.arange(len(ids)) % 2, 6.0, 24.0)
    table["pert_time_unit"] = "h"
    return table


def release(config: str) -> Release:
    return CONFIG[config].release


def publish(
    folder: Path, config: str, profiles: pd.DataFrame, genes: pd.DataFrame, obs: pd.DataFrame, **options
) -> None:
    """The files of one release, gzip-compressed, with their list of checksums."""
    files = release(config)
    matrix = write_gctx(folder / "matrix.tmp", profiles, **options)
    (folder / files.matrix).write_bytes(gzip.compress(matrix.read_bytes()))
    matrix.unlink()
    perturbagens = pd.DataFrame({"pert_id": ["DMSO", "BRD-K00000001"], "canonical_smiles": ["-666", "CCO"]})
    for name, table in ((files.annotations, obs), (files.genes, genes), (files.perturbagens, perturbagens)):
        table.to_csv(folder / name, sep="\t", index=False, quoting=3)
    list_checksums(folder, files)


def list_checksums(folder: Path, files: Release) -> None:
    names = (files.matrix, files.annotations, files.genes, files.perturbagens)
    lines = [f"{hashlib.sha512((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / files.checksums).write_bytes(gzip.compress("".join(lines).encode()))


@pytest.fixture
def profiles() -> pd.DataFrame:
    """Genes in another order than in the gene table."""
    return some_profiles(N_PROFILES, N_GENES).sample(frac=1, axis=1, random_state=3)


@pytest.fixture
def publisher(file_server):
    file_server.serve(LincsL1000)
    return file_server


def built(tmp_path: Path, config: str, data_dir: Path | None = None, **options) -> Path:
    builder = LincsL1000(cache_dir=str(tmp_path / "cache"), config_name=config, data_dir=data_dir and str(data_dir))
    return builder.prepare(tmp_path / "out", **options)


def assert_equals_source(folder: Path, config: str, profiles: pd.DataFrame, genes: pd.DataFrame) -> None:
    genes = genes if config.endswith("all_genes") else genes[genes["pr_is_lm"] == 1]
    stored = pd.read_parquet(folder / "genes.parquet")
    assert stored["gene_id"].tolist() == genes["pr_gene_id"].tolist()
    assert stored["gene_title"].tolist() == genes["pr_gene_title"].tolist()
    assert stored["is_landmark"].tolist() == (genes["pr_is_lm"] == 1).tolist()
    rows = datasets.load_dataset(str(folder), split="train").with_format("numpy")
    value = CONFIG[config].value
    np.testing.assert_array_equal(np.stack(rows[value][:]), profiles[genes["pr_gene_id"]].to_numpy())
    found = rows.to_pandas().set_index(release(config).key)  # type: ignore[union-attr]
    assert found.index.tolist() == profiles.index.tolist()
    expected = expected_obs(config, profiles.index)
    columns = [name for name in found.columns if name != value]
    pd.testing.assert_frame_equal(found[columns], expected[columns], check_index_type=False, check_names=False)


@pytest.mark.parametrize("config", CONFIG)
def test_what_is_published_is_what_comes_out(publisher, profiles, tmp_path, config):
    genes = gene_info()
    publish(publisher.folder, config, profiles, genes, annotations(config, profiles.index), chunks=(5, 3))
    folder = built(tmp_path, config)
    assert_equals_source(folder, config, profiles, genes)
    perturbagens = pd.read_parquet(folder / "perturbagens.parquet").set_index("pert_id")
    assert perturbagens["canonical_smiles"].to_dict() == {"DMSO": None, "BRD-K00000001": "CCO"}


def test_many_parts_by_many_processes_are_the_same_rows(publisher, profiles, tmp_path, monkeypatch):
    config, genes = "phase1_level3", gene_info()
    publish(publisher.folder, config, profiles, genes, annotations(config, profiles.index))
    monkeypatch.setattr("cellglot.datasets_scripts.lincs_l1000.VALUES_PER_PART", 5 * N_LANDMARKS)
    folder = built(tmp_path, config, num_proc=2)
    assert len(list(folder.glob("*.parquet"))) == 5 + 2
    assert_equals_source(folder, config, profiles, genes)
    streamed = datasets.load_dataset(str(folder), split="train", streaming=True)
    assert [row["inst_id"] for row in streamed] == profiles.index.tolist()  # type: ignore[index]


@pytest.mark.parametrize("suffix", [".gctx", ".gctx.gz", ".gct", ".gct.gz"])
def test_files_on_disk_are_used_packed_unpacked_or_as_text(publisher, profiles, tmp_path, suffix):
    config, genes, folder = "phase2_level3", gene_info(), tmp_path / "mine"
    folder.mkdir()
    publish(folder, config, profiles, genes, annotations(config, profiles.index))
    files = release(config)
    stem = files.matrix.removesuffix(".gctx.gz")
    content = gzip.decompress((folder / files.matrix).read_bytes())
    if suffix.startswith(".gct."):
        content = gct_text(profiles, pd.DataFrame({"Description": "na"}, index=profiles.columns)).encode()
    elif suffix == ".gct":
        content = gct_text(profiles, pd.DataFrame(index=profiles.columns), pd.DataFrame(index=profiles.index)).encode()
    (folder / files.matrix).unlink()
    (folder / f"{stem}{suffix}").write_bytes(gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content)
    if suffix == ".gctx.gz":
        list_checksums(folder, files)
    else:
        # Nor need the list of checksums be there, or anything be packed.
        (folder / files.checksums).unlink()
        (folder / files.genes.removesuffix(".gz")).write_bytes(gzip.decompress((folder / files.genes).read_bytes()))
        (folder / files.genes).unlink()
    assert_equals_source(built(tmp_path, config, folder), config, profiles, genes)
    assert publisher.downloads == []


@pytest.mark.realdata
@pytest.mark.parametrize("suffix", [".gctx.gz", ".gct"])
def test_real_l1000_profiles_come_back(publisher, real_data, tmp_path, suffix):
    cells = ad.read_h5ad(real_data / "drug" / "l1000_level3_HT115_681x978.h5ad")
    table = pd.read_csv(real_data / "drug" / "l1000_landmark_978.csv", dtype=str)
    # The gene table holds current symbols, the profiles those of 2017: genes are named by their place in the file.
    profiles = cells.to_df().set_axis(table["gene_id"].to_numpy(str), axis=1)
    genes = pd.DataFrame(
        {
            "pr_gene_id": table["gene_id"],
            "pr_gene_symbol": cells.var_names,
            "pr_gene_title": cells.var["pr_gene_title"].to_numpy(str),
            "pr_is_lm": 1,
            "pr_is_bing": 1,
        }
    )
    real = cells.obs
    assert isinstance(real, pd.DataFrame)
    names = ["pert_id", "pert_iname", "pert_type", "cell_id", "rna_plate", "rna_well"]
    obs = (
        real[names]
        .astype(str)
        .assign(
            inst_id=cells.obs_names,
            pert_dose=real["pert_dose"].fillna(-666).astype(str),
            pert_dose_unit="um",
            pert_time=real["pert_time"].astype(str),
            pert_time_unit="h",
        )
    )
    config = "phase1_level3"
    publish(publisher.folder, config, profiles, genes, obs, chunks=(262, 978))
    data_dir = None
    if suffix == ".gct":
        data_dir = publisher.folder
        (data_dir / release(config).matrix).unlink()
        text = gct_text(profiles, genes.set_index("pr_gene_id"), obs[["pert_iname"]])
        (data_dir / release(config).matrix.replace(".gctx.gz", ".gct")).write_text(text)
    rows = datasets.load_dataset(str(built(tmp_path, config, data_dir)), split="train").to_pandas()
    assert isinstance(rows, pd.DataFrame)
    np.testing.assert_array_equal(np.stack(list(rows["expression"])), cells.X)
    assert rows["inst_id"].tolist() == cells.obs_names.tolist()
    for name in names:
        assert rows[name].tolist() == obs[name].tolist()
    np.testing.assert_array_equal(rows["pert_dose"], real["pert_dose"].replace(-666, np.nan))
    np.testing.assert_array_equal(rows["pert_time"], real["pert_time"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("300.0|300.000000", 300.0),
        ("-666.0|-666.000000", None),
        ("0.1|10", None),
        ("1e-3", 0.001),
        ("-666.000000", None),
    ],
)
def test_numbers_that_replicates_agree_on(tmp_path, text, number):
    table = annotations("phase1_level5", pd.Index(["A"])).assign(pert_dose=text)
    table.to_csv(tmp_path / "sig_info.txt", sep="\t", index=False)
    found = read_treatments(tmp_path / "sig_info.txt", "sig_id", ("distil_id",))
    assert found["pert_dose"].to_pylist() == [number]


def without(column: str):
    return lambda _, obs, genes: (
        obs.drop(columns=column, errors="ignore"),
        genes.drop(columns=column, errors="ignore"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("pert_iname"), r"inst_info\.txt has no column 'pert_iname'; it has inst_id, rna_plate"),
        (without("pr_is_lm"), r"gene_info\.txt has no column 'pr_is_lm'; it has pr_gene_id"),
        (without("pert_dose"), r"has no column 'pert_idose'"),
        (lambda _, obs, genes: (obs.assign(pert_time="6 h"), genes), r"pert_time is no number .*'6 h'"),
        (lambda _, obs, genes: (obs.iloc[2:], genes), r"lacks 2 of profiles 0 to 23 of .*e\.g\. 'P\d"),
        (lambda _, obs, genes: (pd.concat([obs, obs.iloc[:1]]), genes), r"1 ids stand there more than once"),
        (
            lambda _, obs, genes: (obs, genes.assign(pr_gene_id=[f"X{i}" for i in genes["pr_gene_id"]])),
            r"lacks 7 of 7 genes of the gene table \(e\.g\. 'X",
        ),
        (
            lambda _, obs, genes: (obs, genes.drop(index=genes.index[genes["pr_is_lm"] == 0][0])),
            r"1 of 11 row ids do not match the gene table .*gene_info\.txt \(e\.g\. '10",
        ),
    ],
)
def test_files_that_do_not_match_are_refused(publisher, profiles, tmp_path, change, message):
    config, genes = "phase1_level3", gene_info()
    obs, genes = change(config, annotations(config, profiles.index), genes)
    publish(publisher.folder, config, profiles, genes, obs)
    with pytest.raises(CorpusError, match=message):
        built(tmp_path, config)
    assert not (tmp_path / "out" / config).exists()


def test_a_ragged_table_is_refused_by_line(publisher, profiles, tmp_path):
    config = "phase1_level3"
    publish(publisher.folder, config, profiles, gene_info(), annotations(config, profiles.index))
    path = publisher.folder / release(config).annotations
    lines = gzip.decompress(path.read_bytes()).split(b"\n")
    lines[4] = lines[4].rsplit(b"\t", 2)[0]
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    list_checksums(publisher.folder, release(config))
    with pytest.raises(CorpusError, match=r"inst_info\.txt: .*Row #5: Expected 11 columns, got 9"):
        built(tmp_path, config)


def test_a_list_of_checksums_beside_the_files_is_used(publisher, profiles, tmp_path):
    config, folder = "phase2_level5", tmp_path / "mine"
    folder.mkdir()
    publish(folder, config, profiles, gene_info(), annotations(config, profiles.index))
    path = folder / release(config).genes
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=7))
    with pytest.raises(CorpusError, match=r"gene_info_2017-03-06\.txt\.gz.*has sha512"):
        built(tmp_path, config, folder)


def test_the_published_checksum_is_verified_and_a_rerun_continues(publisher, profiles, tmp_path):
    config = "phase1_level3"
    publish(publisher.folder, config, profiles, gene_info(), annotations(config, profiles.index))
    matrix = publisher.folder / release(config).matrix
    whole = matrix.read_bytes()
    matrix.write_bytes(whole[:-9] + b"\0" + whole[-8:])
    with pytest.raises(CorpusError, match=r"Level3.*has sha512 [0-9a-f]{128}, expected"):
        built(tmp_path, config)
    matrix.write_bytes(whole)
    assert_equals_source(built(tmp_path, config), config, profiles, gene_info())


def test_command_line_writes_a_card_that_loads_every_config(publisher, profiles, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    genes, output = gene_info(), tmp_path / "out"
    for config in ("phase2_level5", "phase1_level3"):
        publish(publisher.folder, config, profiles, genes, annotations(config, profiles.index))
        command_line(LincsL1000, ["--config", config, "--output", str(output)])
    card = (output / "README.md").read_text()
    assert "Version 1.0.0 of" in card
    assert "| phase1_level3/train | 23 |" in card
    assert "| trt_cp |" in card
    assert card.count("sha512:") == 8
    for config, column in (("phase2_level5", "z_score"), ("phase1_level3", "expression")):
        rows = datasets.load_dataset(str(output), config, split="train")
        assert rows[0][column] == profiles.loc[profiles.index[0], genes.query("pr_is_lm == 1")["pr_gene_id"]].tolist()


@pytest.mark.realdata
def test_real_z_scores_come_back_under_their_entrez_ids(publisher, real_data, tmp_path):
    drug, config = real_data / "drug", "phase2_level5"
    profiles = pd.read_csv(drug / "lincs_consensus_zscores_drugbank_1170x978.tsv.gz", sep="\t", index_col=0)
    table = pd.read_csv(drug / "lincs_consensus_genes.tsv.gz", sep="\t", dtype=str, keep_default_na=False)
    genes = pd.DataFrame(
        {
            "pr_gene_id": table["entrez_gene_id"],
            "pr_gene_symbol": table["symbol"],
            "pr_gene_title": table["description"],
            "pr_is_lm": table["entrez_gene_id"].isin(profiles.columns).astype(int),
            "pr_is_bing": 0,
        }
    )
    publish(publisher.folder, config, profiles, genes, annotations(config, profiles.index))
    assert_equals_source(built(tmp_path, config), config, profiles.astype(np.float32), genes)
    symbols = pd.read_parquet(tmp_path / "out" / config / "genes.parquet").set_index("gene_id")["gene_symbol"]
    assert len(symbols) == 978
    assert symbols["7157"] == "TP53"
