"""What was done to each nucleus of sci-Plex 3, from the tables of GEO or the obs of the suites' `.h5ad` files.

Doses come out in micromolar: GEO and the suites give nanomolar.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from cellglot.datasets_scripts.corpus_errors import CorpusError, require_columns
from cellglot.tokenization.count_matrix import CountMatrix
from cellglot.tokenization.gene_ids import canonical_id, examples

TREATMENT = {
    "cell_type": "string",
    "product_name": "string",
    "smiles": "string",
    "dose_um": "float32",
    "vehicle": "bool",
    "pathway": "string",
    "target": "string",
    "replicate": "string",
    "time_h": "float32",
}
# Column of pData -> column here; dose and vehicle are derived, structures joined.
PDATA = {
    "cell_type": "cell_type",
    "product_name": "product_name",
    "pathway": "pathway",
    "target": "target",
    "replicate": "replicate",
    "time_point": "time_h",
    "catalog_number": "catalog_number",
    "plate_oligo": "plate",
    "well_oligo": "well",
    "n.umi": "n_counts",
    "hash_umis_W": "hash_umis_well",
    "qval_W": "hash_qval_well",
    "top_to_second_best_ratio_W": "hash_ratio_well",
    "hash_umis_P": "hash_umis_plate",
    "qval_P": "hash_qval_plate",
    "top_to_second_best_ratio_P": "hash_ratio_plate",
}
NUMBERS = {"time_point", "n.umi", "dose", *(name for name in PDATA if name.endswith(("_W", "_P")))}
WELL_AND_HASHES = {
    name: "float32" if published in NUMBERS else "string" for published, name in PDATA.items() if name not in TREATMENT
}
# Column here -> names it may have in a suite's obs, the first one preferred
SUITE_NAMES = {
    "cell_type": ("cell_type", "cell_line"),
    "product_name": ("product_name", "condition", "perturbation"),
    "dose": ("dose", "dose_value"),
    "smiles": ("SMILES", "smiles"),
    "vehicle": ("vehicle", "control"),
    "pathway": ("pathway",),
    "target": ("target",),
    "replicate": ("replicate",),
    "time_h": ("time_point", "time"),
}
REQUIRED = ("cell_type", "product_name", "dose")
VEHICLES = ("vehicle", "control", "dmso")
MICROMOLAR = {"nm": 1e-3, "um": 1.0, "\N{MICRO SIGN}m": 1.0, "\N{GREEK SMALL LETTER MU}m": 1.0, "mm": 1e3, "m": 1e6}
# The largest dose given; where the largest one found is far below, it is not in nanomolar.
LARGEST_DOSE_NM = 10_000
TRUTH = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


# ---- GEO


def read_obs(cells: Path, pdata: Path, wells: Path) -> pa.Table:
    """Annotations of all nuclei in the order of the matrix: cell_name, TREATMENT, WELL_AND_HASHES; text is coded.

    Raises  CorpusError for a missing column, a nucleus without annotations, or a drug that the wells do not have
    """
    names = read_cells(cells)
    table = read_pdata(pdata)
    if not table["cell"].equals(names):
        table = table.take(_positions(names, table["cell"], cells, pdata))
    text = {name: table[name].combine_chunks() for name in PDATA if name not in NUMBERS}
    dose = table["dose"].to_numpy()
    treated, vehicle = ~np.isnan(dose), table["vehicle"].fill_null(False).to_numpy()
    structures = dict(read_wells(wells)[["catalog_number", "SMILES"]].to_numpy())
    drug = text["catalog_number"]
    given = np.unique(drug.indices.fill_null(-1).to_numpy()[treated & ~vehicle])
    unknown = sorted(set(drug.dictionary.take(pa.array(given[given >= 0])).to_pylist()) - set(structures))
    if unknown:
        raise CorpusError(f"{wells} has no row of the drugs {examples(unknown)} of {pdata}. Take both of one screen.")
    smiles = pa.array([structures.get(name) for name in drug.dictionary.to_pylist()], pa.string())
    columns = {PDATA[name]: _trimmed(column) for name, column in text.items()}
    columns |= {PDATA[name]: table[name].cast(pa.float32()) for name in PDATA if name in NUMBERS}
    columns |= {
        "cell_name": names,
        "smiles": pa.DictionaryArray.from_arrays(drug.indices, smiles),
        "dose_um": pa.array(dose * MICROMOLAR["nm"], pa.float32(), from_pandas=True),
        # pData says FALSE of a nucleus whose well is unknown.
        "vehicle": pa.array(vehicle, mask=~treated),
    }
    return pa.table({name: columns[name] for name in ("cell_name", *TREATMENT, *WELL_AND_HASHES)})


def _positions(names: pa.ChunkedArray, annotated: pa.ChunkedArray, cells: Path, pdata: Path) -> np.ndarray:
    """(names,) where each of them stands among the annotated ones."""
    index = pd.Index(annotated.to_pandas())
    positions = index.get_indexer(names.to_pandas()) if index.is_unique else np.full(len(names), -1)
    if (positions < 0).any():
        missing = pd.Index(names.to_pandas()).difference(index)
        raise CorpusError(
            f"{pdata} lacks {len(missing):,} of the {len(names):,} cells of {cells} "
            f"({examples(map(str, missing)) or 'none'}), or has some twice. Take both of the same screen."
        )
    return positions


def _trimmed(column: pa.DictionaryArray) -> pa.DictionaryArray:
    """Without blanks around the text."""
    values = pa.array([value.strip() for value in column.dictionary.to_pylist()], pa.string())
    return pa.DictionaryArray.from_arrays(column.indices, values)


def read_cells(path: Path) -> pa.ChunkedArray:
    """(cells,) names, in the order of the matrix: the first column of a table without header."""
    return _table(path, "\t", ["cell", "sample"], {"cell": pa.string()})["cell"]


def read_genes(path: Path) -> pd.DataFrame:
    """(genes,) gene_id (Ensembl, without version) and gene_symbol, in the order of the matrix."""
    header = _fields(path, " ")[0]
    wanted = ["id", "gene_short_name"]
    require_columns(header, wanted, path)
    table = _table(path, " ", header, dict.fromkeys(wanted, pa.string()), skip=1, missing=()).to_pandas()
    return pd.DataFrame({"gene_id": table["id"].map(canonical_id), "gene_symbol": table["gene_short_name"]})


def read_pdata(path: Path) -> pa.Table:
    """Annotations of nuclei; as R writes a table: quoted, a blank between fields, names of rows first."""
    header, first = _fields(path, " ", n_lines=2)
    wanted = ["cell", "dose", "vehicle", *PDATA]
    require_columns(header, wanted, path)
    text = pa.dictionary(pa.int32(), pa.string())
    kinds = {name: pa.float64() if name in NUMBERS else text for name in wanted}
    kinds |= {"cell": pa.string(), "vehicle": pa.bool_()}
    row_names = ["row name"] * (len(first) - len(header))
    return _table(path, " ", [*row_names, *header], kinds, skip=1).unify_dictionaries()


def read_wells(path: Path) -> pd.DataFrame:
    """(drugs,) catalog_number, name and SMILES, from the table of wells."""
    header = _fields(path, "\t")[0]
    wanted = ["catalog_number", "name", "SMILES"]
    require_columns(header, wanted, path)
    wells = _table(path, "\t", header, dict.fromkeys(wanted, pa.string()), skip=1).to_pandas()
    drugs = wells.dropna(subset=["SMILES"]).drop_duplicates("catalog_number")
    # ChemAxon's drawing hints follow a blank.
    return drugs.assign(SMILES=drugs["SMILES"].str.split().str[0])


def _fields(path: Path, delimiter: str, n_lines: int = 1) -> list[list[str]]:
    """The fields of the first lines of a text table, gzip-compressed or not."""
    try:
        with pa.input_stream(str(path)) as stream:
            lines = stream.read(1 << 16).decode().splitlines()[:n_lines]
    except OSError as error:
        raise CorpusError(f"{path}: {error}. The file is truncated or damaged; fetch it again.") from error
    if len(lines) < n_lines:
        raise CorpusError(f"{path} has {len(lines)} lines; expected a header and a line for each row.")
    return list(csv.reader(lines, delimiter=delimiter))


def _table(
    path: Path,
    delimiter: str,
    names: Sequence[str],
    kinds: Mapping[str, pa.DataType],
    *,
    skip: int = 0,
    missing: Sequence[str] = ("NA",),
) -> pa.Table:
    """The columns of `kinds` of a text table, gzip-compressed or not.

    Raises  CorpusError for a ragged line, a value of another type, or a damaged file
    """
    try:
        return pyarrow.csv.read_csv(
            path,
            # One thread, since only that tells the line of an error.
            pyarrow.csv.ReadOptions(column_names=list(names), skip_rows=skip, use_threads=False),
            pyarrow.csv.ParseOptions(delimiter=delimiter),
            pyarrow.csv.ConvertOptions(
                column_types=dict(kinds),
                include_columns=list(kinds),
                null_values=list(missing),
                strings_can_be_null=True,
            ),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{path}: {error}. The file is truncated or edited; fetch it again.") from error


# ---- suites


def check_suite(obs: pd.DataFrame, name: str) -> None:
    """Raises CorpusError if cell line, drug or dose is missing, or the unit of the dose is in doubt."""
    for wanted in REQUIRED:
        if _found(obs, wanted) is None:
            require_columns(obs, [" or ".join(SUITE_NAMES[wanted])], f"{name}: obs")
    if "dose_unit" in obs:
        units = set(_text(obs["dose_unit"].drop_duplicates()).str.casefold().dropna())
        if not units <= set(MICROMOLAR):
            raise CorpusError(f"{name}: obs['dose_unit'] has {examples(units)}; expected nM, uM, mM or M.")
        return
    doses = _required(obs, "dose").drop_duplicates()
    largest = _numbers(doses, name).max(skipna=True)
    if not largest >= LARGEST_DOSE_NM / 100:
        raise CorpusError(
            f"{name}: obs[{doses.name!r}] is {largest:g} at the most, but sci-Plex was dosed up to "
            f"{LARGEST_DOSE_NM:,} nM. Say in which unit it is, e.g. adata.obs['dose_unit'] = 'uM'."
        )


def suite_treatments(obs: pd.DataFrame, name: str, structures: Mapping[str, str]) -> pd.DataFrame:
    """cell_name and TREATMENT of cells of a suite's `.h5ad`; null where it has no such column.

    structures  `drug_key` of a drug -> SMILES, for files without
    Raises      CorpusError for doses that are no numbers, or flags that are neither true nor false
    """
    out = pd.DataFrame({"cell_name": obs.index.astype(str)})
    for column, kind in TREATMENT.items():
        found = _found(obs, column)
        if kind == "string":
            out[column] = pd.Series([pd.NA] * len(out), dtype="string") if found is None else _text(found)
    treated = out["product_name"].notna()
    vehicle = out["product_name"].str.casefold().isin(VEHICLES).fillna(False).astype(bool)
    marked = _found(obs, "vehicle")
    if marked is not None:
        vehicle |= _flags(marked, name)
    units = _text(obs["dose_unit"]).str.casefold().map(MICROMOLAR) if "dose_unit" in obs else MICROMOLAR["nm"]
    hours = _found(obs, "time_h")
    if _found(obs, "smiles") is None:
        out["smiles"] = out["product_name"].map(lambda drug: structures.get(drug_key(drug)), na_action="ignore")
    out["smiles"] = out["smiles"].mask(vehicle)
    out["dose_um"] = (_numbers(_required(obs, "dose"), name) * units).where(treated)
    out["vehicle"] = vehicle.astype("boolean").where(treated)
    out["time_h"] = np.nan if hours is None else _numbers(hours, name)
    return out[["cell_name", *TREATMENT]]


def suite_genes(matrix: CountMatrix) -> pd.DataFrame:
    """(genes,) gene_id and gene_symbol of a suite's `.h5ad`.

    Raises  CorpusError if each gene bears the name of the one before it
    """
    ids = [canonical_id(name) for name in matrix.gene_names("id" if "id" in matrix.var else None)]
    if ids and ids[0].startswith("id"):
        raise CorpusError(
            f"{matrix.name}: the first gene is {ids[0]!r}, the header of GEO's table, so each gene is named by the one "
            "before it, as in scPerturb before release 1.4. Take it from https://zenodo.org/records/13350497."
        )
    return pd.DataFrame({"gene_id": ids, "gene_symbol": matrix.var.index.astype(str)})


def drug_key(name: str) -> str:
    """The letters and digits of a drug's name: the tables differ in blanks and marks."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _found(obs: pd.DataFrame, column: str) -> Any:
    return next((obs[alias] for alias in SUITE_NAMES.get(column, ()) if alias in obs), None)


def _required(obs: pd.DataFrame, column: str) -> pd.Series:
    found = _found(obs, column)
    assert found is not None, "check_suite comes first"
    return found


def _text(column: pd.Series) -> pd.Series:
    """Text without blanks around it; missing where a suite says so in words."""
    text = column.astype("string").str.strip().reset_index(drop=True)
    return text.mask(text.isin(["", "nan", "None", "NA"]))


def _numbers(column: pd.Series, name: str) -> pd.Series:
    try:
        return pd.to_numeric(_text(column)).astype("Float64")
    except ValueError as error:
        raise CorpusError(f"{name}: obs[{column.name!r}] is to hold numbers: {error}.") from error


def _flags(column: pd.Series, name: str) -> pd.Series:
    """Booleans, also where they are written as 0 and 1, or as text."""
    text = _text(column).str.casefold()
    unknown = set(text.dropna()) - set(TRUTH)
    if unknown:
        raise CorpusError(f"{name}: obs[{column.name!r}] has {examples(unknown)}; expected true or false, or 1 and 0.")
    return text.map(TRUTH).fillna(False).astype(bool)
