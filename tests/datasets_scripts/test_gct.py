"""`.gct` text becomes the `.gctx` file that holds the same numbers, in one pass and bounded memory."""

import errno
import gzip
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.gct import gct_to_gctx
from cellglot.datasets_scripts.gctx import Gctx

from .test_gctx import N_GENES, N_PROFILES, all_of, some_profiles


def gct_text(profiles: pd.DataFrame, genes: pd.DataFrame, obs: pd.DataFrame | None = None) -> str:
    """Version 1.2 without `obs`, 1.3 with it; `profiles` is profiles x genes."""
    version = "1.2" if obs is None else "1.3"
    obs = pd.DataFrame(index=profiles.index) if obs is None else obs
    sizes = [profiles.shape[1], profiles.shape[0]] + ([genes.shape[1], obs.shape[1]] if version == "1.3" else [])
    first = "NAME" if version == "1.2" else "id"
    rows = [[f"#{version}"], sizes, [first, *genes.columns, *profiles.index]]
    rows += [[name, *["na"] * genes.shape[1], *column] for name, column in obs.items()]
    for gene, annotations in zip(profiles.columns, genes.to_numpy(), strict=True):
        rows.append(
            [gene, *annotations, *(np.format_float_positional(v, unique=True) for v in profiles[gene].to_numpy())]
        )
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


@pytest.fixture
def profiles() -> pd.DataFrame:
    return some_profiles()


@pytest.fixture
def genes(profiles) -> pd.DataFrame:
    return pd.DataFrame({"Description": [f"gene {g}" for g in profiles]}, index=profiles.columns)


@pytest.fixture
def obs(profiles) -> pd.DataFrame:
    dose = np.where(np.arange(N_PROFILES) % 3, "10.0", "-666")
    return pd.DataFrame({"cell_id": "A375", "pert_dose": dose}, index=profiles.index)


def converted(text: str, tmp_path: Path, packed: bool = False, **options) -> Path:
    path = tmp_path / ("a.gct.gz" if packed else "a.gct")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    gct_to_gctx(path, tmp_path / "a.gctx", **options)
    return tmp_path / "a.gctx"


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stripe_genes", [1, 4, N_GENES, 100])
def test_values_and_annotations_come_back(profiles, genes, obs, tmp_path, version, packed, stripe_genes):
    text = gct_text(profiles, genes, obs if version == "1.3" else None)
    path = converted(text, tmp_path, packed, stripe_bytes=stripe_genes * N_PROFILES * 4)
    with Gctx(path) as gctx:
        np.testing.assert_array_equal(all_of(gctx, np.arange(N_GENES), 0, N_PROFILES), profiles.to_numpy())
        assert gctx.gene_ids.to_pylist() == profiles.columns.tolist()
        assert gctx.profile_ids().to_pylist() == profiles.index.tolist()
        pd.testing.assert_frame_equal(gctx.annotations("genes"), genes, check_names=False, check_index_type=False)
        if version == "1.3":
            found = gctx.annotations("profiles")[["cell_id", "pert_dose"]]
            expected = obs.mask(obs == "-666")
            pd.testing.assert_frame_equal(found, expected, check_names=False)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_missing_values_are_nan(profiles, genes, tmp_path, line_end):
    profiles.iloc[3, 2] = profiles.iloc[0, 0] = profiles.iloc[N_PROFILES - 1, 5] = np.nan
    lines = gct_text(profiles, genes).replace("\tnan", "\t", 2).replace("\n", line_end)
    with Gctx(converted(lines, tmp_path)) as gctx:
        np.testing.assert_array_equal(all_of(gctx, np.arange(N_GENES), 0, N_PROFILES), profiles.to_numpy())


@pytest.mark.filterwarnings("ignore:errors='ignore' is deprecated:FutureWarning")
def test_equals_cmappy(profiles, genes, obs, tmp_path):
    parse_gct = pytest.importorskip("cmapPy.pandasGEXpress.parse_gct")
    path = converted(gct_text(profiles, genes, obs), tmp_path)
    theirs = parse_gct.parse(str(tmp_path / "a.gct")).data_df
    with Gctx(path) as gctx:
        np.testing.assert_array_equal(all_of(gctx, np.arange(N_GENES), 0, N_PROFILES), theirs.to_numpy().T)


@pytest.mark.realdata
def test_real_l1000_plate_comes_back(real_data, tmp_path):
    cells = ad.read_h5ad(real_data / "drug" / "l1000_cmappy_test_377x978.h5ad")
    assert isinstance(cells.obs, pd.DataFrame)
    assert isinstance(cells.var, pd.DataFrame)
    text = gct_text(cells.to_df(), cells.var.astype(str), cells.obs.astype(str))
    path = converted(text, tmp_path, packed=True)
    with Gctx(path) as gctx:
        np.testing.assert_array_equal(all_of(gctx, np.arange(cells.n_vars), 0, cells.n_obs), cells.X)
        assert gctx.gene_ids.to_pylist() == cells.var_names.tolist()
        assert gctx.annotations("profiles")["pert_iname"].fillna("-666").tolist() == cells.obs["pert_iname"].tolist()


def edited(text: str, line: int, change) -> str:
    lines = text.split("\n")
    lines[line - 1] = change(lines[line - 1])
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (1, lambda _: "#1.1", "line 1: expected '#1.2' or '#1.3'.*'#1.1'"),
        (2, lambda _: "11\t23\t1", "line 2: expected 4 numbers"),
        (2, lambda _: "0\t23\t1\t2", "line 2: expected 4 numbers"),
        (2, lambda line: line.replace("11", "12"), "ends after 11 of the 12 genes"),
        (2, lambda line: line.replace("11", "10"), "line 16: more than the 10 genes"),
        (3, lambda line: line + "\textra", "line 3: expected 25 fields, found 26"),
        (3, lambda line: line.replace("P001_A375_24H:A01", "P000_A375_24H:A00"), "profile ids.*more than once"),
        (9, lambda line: line.rsplit("\t", 1)[0], "line 9: expected 25 fields, found 24"),
        (9, lambda line: line.rsplit("\t", 1)[0] + "\tabc", "line 9: 'abc' .gene 1021, profile P022.* is no number"),
        (9, lambda line: line.replace("1021", "1014", 1), "gene ids.*more than once.*'1014'"),
    ],
)
def test_a_bad_file_is_refused_by_line_and_leaves_nothing(profiles, genes, obs, tmp_path, line, change, message):
    with pytest.raises(CorpusError, match=message):
        converted(edited(gct_text(profiles, genes, obs), line, change), tmp_path)
    assert not (tmp_path / "a.gctx").exists()


def test_truncated_gzip_is_said_to_be(profiles, genes, tmp_path):
    path = tmp_path / "a.gct.gz"
    path.write_bytes(gzip.compress(gct_text(profiles, genes).encode())[:-50])
    with pytest.raises(CorpusError, match="truncated or damaged gzip"):
        gct_to_gctx(path, tmp_path / "a.gctx")


def test_a_disk_too_small_is_found_before_it_is_full(profiles, genes, tmp_path, monkeypatch):
    free = 4 * N_GENES * N_PROFILES
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free - 1))
    with pytest.raises(OSError, match="No space left") as caught:
        converted(gct_text(profiles, genes), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("*.gctx*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    assert converted(gct_text(profiles, genes), tmp_path).exists()
