"""Drug responses from the files they come in: L1000 profiles and single cells, whole or block by block.

A layout says which columns hold drug, cell line, dose and control; `LAYOUTS` has those of published files.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from cellglot.datasets_scripts.sciplex3_annotations import check_suite, suite_treatments
from cellglot.drug_response.data import ResponseData, concatenate
from cellglot.tokenization.count_matrix import CELLS_PER_BLOCK
from cellglot.tokenization.drug_conditions import MICROMOLAR, micromolar
from cellglot.tokenization.expression_features import expression_blocks
from cellglot.tokenization.gene_identifiers import gene_identifiers, gene_positions, identifier_kind
from cellglot.tokenization.gene_ids import examples
from cellglot.tokenization.log_expression import open_cells

logger = logging.getLogger(__name__)

# Counts that a cell is scaled to before log(1 + x)
TARGET_SUM = 1e4
GENE_TABLE, PERTURBAGEN_TABLE = "genes.parquet", "perturbagens.parquet"
# What the Connectivity Map writes for a missing dose
MISSING_DOSE = -666


@dataclass(frozen=True)
class ResponseLayout:
    """Which columns of obs hold what.

    control          column that tells controls, by `control_values` (compared in lower case)
    treated_values   values of that column that tell treated profiles; profiles that are neither are left out.
                     None: all that are no controls
    dose             column, or None where all treated profiles had one dose of no known concentration: it counts as 1
    dose_unit        unit of the column, where the file states none
    unit_column      column with the unit of each dose
    smiles           column with structures
    pair_by          further columns in which controls agree with the treated, of those that the file has
    counts           whether values are raw counts, to be turned into log(1 + counts per 10,000)
    """

    drug: str
    cell_line: str
    control: str
    control_values: tuple[str, ...] = ("true", "1", "1.0")
    treated_values: tuple[str, ...] | None = None
    dose: str | None = None
    dose_unit: str | None = None
    unit_column: str | None = None
    smiles: str | None = None
    pair_by: tuple[str, ...] = ()
    counts: bool = False

    @property
    def columns(self) -> list[str]:
        """Columns that a file of this layout must have."""
        wanted = (self.drug, self.cell_line, self.control, self.dose, self.unit_column)
        return [column for column in wanted if column is not None]


# Compounds of L1000: test compounds and positive controls. Other perturbations (trt_sh, ...) are no drugs.
_COMPOUNDS: dict[str, Any] = {
    "control": "pert_type",
    "control_values": ("ctl_vehicle",),
    "treated_values": ("trt_cp", "trt_poscon"),
    "pair_by": ("rna_plate", "det_plate"),
}
LAYOUTS = {
    # What `ResponseData.to_anndata` and `predict_response` write
    "cellglot": ResponseLayout(
        "drug", "cell_line", "is_control", dose="dose_um", dose_unit="uM", smiles="smiles", pair_by=("donor",)
    ),
    # .gctx and .gct of the Connectivity Map, rows of datasets_scripts/lincs_l1000.py
    "lincs": ResponseLayout("pert_iname", "cell_id", dose="pert_dose", unit_column="pert_dose_unit", **_COMPOUNDS),
    # PRnet's files of LINCS phase I (level 3), whose doses are those of LINCS in uM
    "prnet": ResponseLayout(
        "pert_iname", "cell_id", dose="dose", dose_unit="uM", smiles="canonical_smiles", **_COMPOUNDS
    ),
    # Rows of datasets_scripts/sciplex3.py
    "sciplex3": ResponseLayout(
        "product_name",
        "cell_type",
        "vehicle",
        dose="dose_um",
        dose_unit="uM",
        smiles="smiles",
        pair_by=("replicate",),
        counts=True,
    ),
    # Kang et al. 2018: one dose of interferon-beta, cells of lupus patients
    "interferon": ResponseLayout(
        "condition", "cell_type", "condition", control_values=("ctrl",), pair_by=("donor",), counts=True
    ),
}
# chemCPA's and scPerturb's .h5ad files of sci-Plex 3, whose columns go by several names
SUITE = "sciplex3_suite"


def read_responses(source: Any, **options: Any) -> ResponseData:
    """All profiles of a file as one `ResponseData`; arguments as of `iter_responses`, which see for what is too large.

    Raises  ValueError as `iter_responses`, or if no profile is left
    """
    parts = [part for part in iter_responses(source, **options) if len(part)]
    if not parts:
        raise ValueError(f"{_name(source)}: no profile is a control or was given a drug at a known dose.")
    return concatenate(parts)


def iter_responses(
    source: Any,
    *,
    layout: str | ResponseLayout | None = None,
    genes: Sequence[str] | None = None,
    keep: Callable[[pd.DataFrame], np.ndarray] | None = None,
    layer: str | None = None,
    counts: bool | None = None,
    profiles_per_block: int = CELLS_PER_BLOCK,
) -> Iterator[ResponseData]:
    """Profiles block by block, in the order of the file; memory is bounded by the block.

    source   AnnData; path of an `.h5ad`, `.loom`, `.gctx`, `.gct` or `.gct.gz`; folder of Parquet files that
             datasets_scripts/lincs_l1000.py or sciplex3.py wrote
    layout   name in LAYOUTS, "sciplex3_suite", or columns of your own; None: the first of LAYOUTS that fits
    genes    identifiers (Entrez, Ensembl or symbols) of the genes wanted, in that order; None: all
    keep     called with the obs of a block, treatments included: (profiles,) bool, which to keep
    layer    of an AnnData, in place of X
    counts   whether values are raw counts; None: as the layout says
    Raises   ValueError for a file of no known layout, doses without a unit or negative, genes that are not there, and
             counts that are none. Treated profiles whose dose is missing or no concentration are left out, and counted
             in a warning
    """
    name, left_out = _name(source), 0
    for block in _blocks(source, layout, genes, layer, counts, profiles_per_block):
        kept = block.obs["is_control"].notna().to_numpy()
        left_out += int((~kept).sum())
        if keep is not None:
            kept &= np.asarray(keep(block.obs), dtype=bool)
        obs = block.obs.loc[kept].astype({"is_control": bool})
        named = obs.drop_duplicates("drug")
        smiles = {drug: block.smiles[drug] for drug in named["drug"] if drug in block.smiles}
        pair_by = ("cell_line", *(column for column in block.layout.pair_by if column in obs))
        yield ResponseData(block.expression[kept], obs, block.genes, smiles, pair_by, name, block.target_sum)
    if left_out:
        logger.warning(
            "%s: %s profiles are neither controls nor given a drug at a known dose: left out.", name, f"{left_out:,}"
        )


@dataclass(frozen=True)
class _Block:
    """Consecutive profiles; is_control is missing where a profile is neither control nor treated."""

    obs: pd.DataFrame
    genes: pd.DataFrame
    expression: np.ndarray
    smiles: dict[str, str]
    layout: ResponseLayout
    target_sum: float | None = None


def _name(source: Any) -> str:
    return Path(source).name if isinstance(source, str | Path) else type(source).__name__


def _blocks(
    source: Any,
    layout: str | ResponseLayout | None,
    genes: Sequence[str] | None,
    layer: str | None,
    counts: bool | None,
    size: int,
) -> Iterator[_Block]:
    path = _corpus_folder(Path(source)) if isinstance(source, str | Path) else None
    columns = _parquet_columns(path) if path is not None and path.is_dir() else []
    if path is not None and path.name.endswith((".gctx", ".gct", ".gct.gz")):
        yield from _gctx_blocks(path, layout, genes, size)
    elif columns and "gene_index" not in columns:
        yield from _row_blocks(path, columns, layout, genes, size)
    else:
        if columns and "count" not in columns and counts is None:
            counts = False
        yield from _matrix_blocks(source if path is None else path, layout, genes, layer, counts, size)


def _corpus_folder(path: Path) -> Path:
    """The folder of a corpus that holds its Parquet files: itself, or that of the one configuration it was built in."""
    if not path.is_dir() or (path / GENE_TABLE).exists():
        return path
    inside = [folder for folder in sorted(path.iterdir()) if (folder / GENE_TABLE).exists()]
    if len(inside) > 1:
        raise ValueError(f"{path} holds several corpora: pass one of {', '.join(map(str, inside))}.")
    return inside[0] if inside else path


def _matrix_blocks(source: Any, layout: Any, genes: Any, layer: str | None, counts: bool | None, size: int) -> Any:
    """Blocks of an AnnData, of a file that holds one, or of a Parquet corpus of counts."""
    name = _name(source)
    with open_cells(source, layer=layer) as matrix:
        all_obs = matrix.obs
        if layout == SUITE:
            check_suite(all_obs, name)
            all_obs, layout = suite_treatments(all_obs, name, {}).set_index("cell_name"), "sciplex3"
        columns = _columns(all_obs, layout, name)
        table, places = _chosen_genes(matrix.var, genes, name)
        target_sum = TARGET_SUM if (columns.counts if counts is None else counts) else None
        start = 0
        for values in expression_blocks(matrix, target_sum, size):
            obs, smiles = _treatments(all_obs.iloc[start : start + values.shape[0]], columns, name)
            yield _Block(obs, table, values[:, places].toarray(), smiles, columns, target_sum)
            start += values.shape[0]


def _gctx_blocks(path: Path, layout: Any, genes: Any, size: int) -> Iterator[_Block]:
    from cellglot.datasets_scripts.gct import gct_to_gctx
    from cellglot.datasets_scripts.gctx import Gctx

    with TemporaryDirectory() as folder:
        binary = path
        if path.suffix != ".gctx":
            binary = Path(folder) / "profiles.gctx"
            gct_to_gctx(path, binary)
        with Gctx(binary) as gctx:
            all_obs = gctx.annotations("profiles")
            columns = _columns(all_obs, layout, path.name)
            table, places = _chosen_genes(gctx.annotations("genes"), genes, path.name)
            for start in range(0, gctx.n_profiles, size):
                stop = min(start + size, gctx.n_profiles)
                parts = [values for _, _, values in gctx.blocks(start, stop, places)]
                obs, smiles = _treatments(all_obs.iloc[start:stop], columns, path.name)
                yield _Block(obs, table, np.concatenate(parts), smiles, columns)


def _parquet_columns(folder: Path) -> list[str]:
    """Columns of the Parquet files of a folder, none where it holds no such files."""
    import pyarrow.parquet as pq

    files = _parquet_files(folder)
    return pq.read_schema(files[0]).names if files else []


def _parquet_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.parquet")) if path.name not in (GENE_TABLE, PERTURBAGEN_TABLE)]


def _row_blocks(folder: Any, names: Sequence[str], layout: Any, genes: Any, size: int) -> Iterator[_Block]:
    """Blocks of the rows of datasets_scripts/lincs_l1000.py."""
    import pyarrow.parquet as pq

    value = next((name for name in ("expression", "z_score") if name in names), None)
    if value is None:
        raise ValueError(f"{folder}: expected a column expression or z_score, found {', '.join(names)}.")
    gene_table = pd.read_parquet(folder / GENE_TABLE)
    table, places = _chosen_genes(gene_table.set_index("gene_id", drop=False), genes, folder.name)
    structures: dict[str, str] = {}
    if (folder / PERTURBAGEN_TABLE).exists():
        known = pd.read_parquet(folder / PERTURBAGEN_TABLE).dropna(subset=["canonical_smiles"])
        structures = dict(zip(known["pert_id"], known["canonical_smiles"], strict=True))
    for path in _parquet_files(folder):
        for batch in pq.ParquetFile(path).iter_batches(size):
            values = batch.column(value).flatten().to_numpy().reshape(len(batch), -1)
            obs = batch.drop_columns([value]).to_pandas()
            columns = _columns(obs, layout, folder.name)
            obs, _ = _treatments(obs, columns, folder.name)
            drugs = obs.drop_duplicates("drug")
            smiles = {d: structures[i] for d, i in zip(drugs["drug"], drugs["pert_id"], strict=True) if i in structures}
            yield _Block(obs, table, values[:, places].astype(np.float32), smiles, columns)


# ---- columns


def _columns(obs: pd.DataFrame, layout: str | ResponseLayout | None, name: str) -> ResponseLayout:
    """The layout of a file.

    Raises  ValueError if it is unknown, or its columns are not there
    """
    if isinstance(layout, ResponseLayout):
        chosen = layout
    elif layout is None:
        fitting = [known for known in LAYOUTS.values() if set(known.columns) <= set(obs)]
        if not fitting:
            raise ValueError(
                f"{name}: obs has the columns {', '.join(map(str, obs))}, of no known layout (they are "
                f"{', '.join((*LAYOUTS, SUITE))}). Say which hold what: layout=ResponseLayout(drug=..., cell_line=..., "
                "control=..., dose=..., dose_unit=...)."
            )
        return fitting[0]
    elif layout in LAYOUTS:
        chosen = LAYOUTS[layout]
    else:
        raise ValueError(f"Expected a layout among {', '.join((*LAYOUTS, SUITE))}, found {layout!r}.")
    absent = [column for column in chosen.columns if column not in obs]
    if absent:
        raise ValueError(f"{name}: obs lacks {', '.join(absent)}; it has {', '.join(map(str, obs))}.")
    return chosen


def _treatments(obs: pd.DataFrame, layout: ResponseLayout, name: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """(obs with drug, cell_line, dose in micromolar and is_control, structures by drug).

    is_control is missing where a profile is neither control nor given a drug at a known dose.
    """
    marks = obs[layout.control].astype(str).str.lower()
    control = marks.isin(layout.control_values).to_numpy()
    treated = ~control & obs[layout.drug].notna().to_numpy() & obs[layout.cell_line].notna().to_numpy()
    if layout.treated_values is not None:
        treated &= marks.isin(layout.treated_values).to_numpy()
    dose = np.where(treated, 1.0, np.nan)
    if layout.dose is not None:
        dose = pd.to_numeric(obs[layout.dose], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        dose = np.where(treated & (dose != MISSING_DOSE), dose, np.nan)
        if layout.unit_column is None:
            known = ~np.isnan(dose)
            dose[known] = _checked_doses(dose[known], layout.dose_unit, name)
        else:
            units = obs[layout.unit_column].astype(str).str.strip().str.lower().to_numpy()
            dose[~np.isin(units, list(MICROMOLAR))] = np.nan
            for unit in sorted(set(units[~np.isnan(dose)])):
                of_unit = (units == unit) & ~np.isnan(dose)
                dose[of_unit] = _checked_doses(dose[of_unit], unit, name)
    treated &= ~np.isnan(dose)
    found = obs.assign(
        drug=obs[layout.drug].astype(str),
        cell_line=obs[layout.cell_line].astype(str),
        dose=np.where(treated, dose, 0.0),
        is_control=pd.array(control, dtype="boolean"),
    )
    found.loc[~control & ~treated, "is_control"] = pd.NA
    smiles: dict[str, str] = {}
    if layout.smiles is not None and layout.smiles in obs:
        known = found.drop_duplicates("drug").dropna(subset=[layout.smiles])
        smiles = dict(zip(known["drug"], known[layout.smiles].astype(str), strict=True))
    return found, smiles


def _checked_doses(doses: np.ndarray, unit: str | None, name: str) -> np.ndarray:
    try:
        return micromolar(doses, unit) if len(doses) else doses
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _chosen_genes(var: pd.DataFrame, genes: Sequence[str] | None, name: str) -> tuple[pd.DataFrame, np.ndarray]:
    """(identifiers of the genes wanted, their places in the matrix).

    Raises  ValueError if one is not there
    """
    found = gene_identifiers(var)
    table = pd.DataFrame(found, index=[str(gene) for gene in var.index])
    if genes is None:
        return table, np.arange(len(table))
    wanted = [str(gene) for gene in genes]
    places, _ = gene_positions({identifier_kind(wanted): wanted}, found)
    if (places < 0).any():
        absent = [gene for gene, place in zip(wanted, places, strict=True) if place < 0]
        raise ValueError(
            f"{name} lacks {len(absent):,} of the {len(wanted):,} genes wanted (e.g. {examples(absent)}); it holds "
            f"e.g. {examples(table.index)}."
        )
    return table.iloc[places], places
