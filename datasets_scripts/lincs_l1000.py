"""LINCS L1000, phases I and II: expression of human cell lines after a drug, a knock-down or a ligand.

Level 3 are normalized log2 expression profiles, one a well; level 5 are signatures, the moderated z-scores of a
treatment against its plate over replicates. 978 landmark genes were measured; `_all_genes` adds the 11,350 that were
inferred from them.

    python datasets_scripts/lincs_l1000.py --config phase2_level5 --output data/lincs_l1000
    python datasets_scripts/lincs_l1000.py --config phase1_level3 --data-dir downloads --output data/lincs_l1000

`--data-dir` may hold the files as published, unpacked, or the matrix as `.gct` or `.gct.gz` of the same name.
Phase II is the release of March 2017, whose rows are genes; those of 2015 (22,268 probe sets, no tables) are not read.
Row i of `genes.parquet` is value i of a profile; `perturbagens.parquet` holds structures (SMILES) by `pert_id`.
Subramanian et al., "A Next Generation Connectivity Map", Cell 2017, doi:10.1016/j.cell.2017.10.049.
"""

import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, Source, command_line, parts_folder, row_parts
from cellglot.datasets_scripts.corpus_errors import CorpusError, require_columns
from cellglot.datasets_scripts.gct import gct_to_gctx
from cellglot.datasets_scripts.gctx import MISSING, Gctx, examples, positions_in, require_unique
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE

PERTURBAGEN_TABLE = "perturbagens.parquet"
GEO = "https://ftp.ncbi.nlm.nih.gov/geo/series/{series}nnn/{accession}/suppl/{name}"
# One Parquet file each: about 250 MB of values
VALUES_PER_PART = 64_000_000
# Published column -> type. Doses and times are numbers in a unit of their own column.
TREATMENT = {
    "pert_id": "string",
    "pert_iname": "string",
    "pert_type": "string",
    "cell_id": "string",
    "pert_dose": "float64",
    "pert_dose_unit": "string",
    "pert_time": "float64",
    "pert_time_unit": "string",
}


@dataclass(frozen=True)
class Release:
    """Names of the files of one phase at one level.

    matrix       the `.gctx.gz`
    annotations  inst_info of profiles, sig_info of signatures; their first column is `key`
    context      further columns: where a profile was measured, or of which profiles a signature was made
    """

    accession: str
    matrix: str
    annotations: str
    key: str
    genes: str
    perturbagens: str
    context: tuple[str, ...]
    description: str

    @property
    def checksums(self) -> str:
        return f"{self.accession}_SHA512SUMS.txt.gz"


def _phase1(level: int) -> Release:
    name = "GSE92742_Broad_LINCS_{}".format
    return Release(
        accession="GSE92742",
        matrix=name(
            "Level3_INF_mlr12k_n1319138x12328.gctx.gz" if level == 3 else "Level5_COMPZ.MODZ_n473647x12328.gctx.gz"
        ),
        annotations=name("inst_info.txt.gz" if level == 3 else "sig_info.txt.gz"),
        key="inst_id" if level == 3 else "sig_id",
        genes=name("gene_info.txt.gz"),
        perturbagens=name("pert_info.txt.gz"),
        context=("rna_plate", "rna_well") if level == 3 else ("distil_id",),
        description="1,319,138 profiles (level 3), 473,647 signatures (level 5)",
    )


def _phase2(level: int) -> Release:
    name = "GSE70138_Broad_LINCS_{}".format
    return Release(
        accession="GSE70138",
        matrix=name(
            "Level3_INF_mlr12k_n345976x12328_2017-03-06.gctx.gz"
            if level == 3
            else "Level5_COMPZ_n118050x12328_2017-03-06.gctx.gz"
        ),
        annotations=name("inst_info_2017-03-06.txt.gz" if level == 3 else "sig_info_2017-03-06.txt.gz"),
        key="inst_id" if level == 3 else "sig_id",
        genes=name("gene_info_2017-03-06.txt.gz"),
        perturbagens=name("pert_info_2017-03-06.txt.gz"),
        context=("det_plate", "det_well") if level == 3 else ("distil_id",),
        description="345,976 profiles (level 3), 118,050 signatures (level 5)",
    )


@dataclass
class L1000Config(datasets.BuilderConfig):
    """One phase at one level; landmark genes only, or with those inferred from them."""

    phase: int = 2
    level: int = 5
    all_genes: bool = False

    @property
    def release(self) -> Release:
        return (_phase1 if self.phase == 1 else _phase2)(self.level)

    @property
    def value(self) -> str:
        """Column of the values."""
        return "expression" if self.level == 3 else "z_score"


# The smallest download comes first, and is the default.
CONFIGS = [
    L1000Config(
        name=f"phase{phase}_level{level}{'_all_genes' * all_genes}",
        phase=phase,
        level=level,
        all_genes=all_genes,
    )
    for phase in (2, 1)
    for level in (5, 3)
    for all_genes in (False, True)
]


def _sources(release: Release) -> list[Source]:
    names = (release.matrix, release.annotations, release.genes, release.perturbagens)
    series = release.accession[:-3]

    def url(name: str) -> str:
        return GEO.format(series=series, accession=release.accession, name=name)

    # The list comes first: the others are verified by it.
    return [
        Source(release.checksums, url(release.checksums)),
        *(Source(name, url(name), unpack=True) for name in names),
    ]


class LincsL1000(CorpusBuilder):
    """Profiles or signatures: id, treatment, context, values of the genes of `genes.parquet`."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = L1000Config
    BUILDER_CONFIGS = CONFIGS
    DEFAULT_CONFIG_NAME = "phase2_level5"
    SOURCES: ClassVar[Mapping[str, Sequence[Source]]] = {config.name: _sources(config.release) for config in CONFIGS}
    LABELS = ("pert_type", "cell_id")
    MEASURE = "pert_time"
    ROWS = "profiles"
    CARD: ClassVar[Mapping[str, Any]] = {
        "license": "other",
        "license_name": "nih-lincs-data-release-policy",
        "license_link": "https://lincsproject.org/LINCS/data/release-policy",
        "pretty_name": "LINCS L1000, phases I and II",
        "tags": ["biology", "transcriptomics", "l1000", "drug-response"],
    }

    config: L1000Config
    # Of the files of this config, once their list is read
    _checksums: Mapping[str, str] = {}

    def _info(self) -> datasets.DatasetInfo:
        release = self.config.release
        columns = TREATMENT | dict.fromkeys(release.context, "string")
        features: dict[str, Any] = {release.key: datasets.Value("string")}
        features |= {name: datasets.Value(kind) for name, kind in columns.items()}
        features[self.config.value] = datasets.List(datasets.Value("float32"))
        return datasets.DatasetInfo(
            description=(
                f"{(__doc__ or '').splitlines()[0]} GEO {release.accession}: {release.description}. "
                f"Row i of `{GENE_TABLE}` is value i of a row; `{PERTURBAGEN_TABLE}` holds structures by `pert_id`."
            ),
            features=datasets.Features(features),
            homepage=f"https://www.ncbi.nlm.nih.gov/geo/query/acc.cgi?acc={release.accession}",
            license="NIH LINCS data release policy, https://lincsproject.org/LINCS/data/release-policy",
            citation="Subramanian et al., Cell 171, 1437-1452 (2017), doi:10.1016/j.cell.2017.10.049",
        )

    def sources(self) -> Sequence[Source]:
        checksums = self.config.release.checksums
        # Who brings the files need not bring the list of their checksums.
        absent = self.config.data_dir is not None and not (Path(self.config.data_dir) / checksums).exists()
        return [
            replace(source, checksum=self._checksums.get(source.file_name))
            for source in super().sources()
            if not (absent and source.file_name == checksums)
        ]

    def _find(self, source: Source, dl_manager: Any) -> Path:
        """As the base does; verified by the list of checksums that GEO publishes, converted if the matrix is text."""
        release = self.config.release
        if source.file_name == release.checksums:
            path = super()._find(source, dl_manager)
            self._checksums = read_checksums(path)
            return path
        if self.config.data_dir is not None and source.file_name == release.matrix:
            text = _text_matrix(Path(self.config.data_dir), source)
            if text is not None:
                return self._converted(text, source.unpacked_name)
        return super()._find(replace(source, checksum=self._checksums.get(source.file_name)), dl_manager)

    def _converted(self, text: Path, name: str) -> Path:
        gctx = parts_folder(self._output_dir) / "sources" / name
        if not gctx.exists() or gctx.stat().st_mtime_ns < text.stat().st_mtime_ns:
            gct_to_gctx(text, gctx)
        return gctx

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        release = self.config.release
        with Gctx(files[release.matrix]) as gctx:
            genes = self._genes(files)
            gctx.gene_positions(pa.array(genes["gene_id"]))
            unknown = set(gctx.gene_ids.to_pylist()) - set(self._all_genes(files)["gene_id"])
            if unknown:
                raise CorpusError(
                    f"{gctx.path}: {len(unknown):,} of {len(gctx.gene_ids):,} row ids do not match the gene table "
                    f"{files[release.genes]} ({examples(pa.array(sorted(unknown)))}). Take both of the same release."
                )
            require_unique(gctx.profile_ids(), "profile ids", gctx.path)
            parts = row_parts(release.matrix, gctx.n_profiles, max(1, VALUES_PER_PART // len(genes)))
            described = self._treatments(files)[release.key].chunk(0)
            for part in parts:
                ids = gctx.profile_ids(part.start, part.stop)
                missing = ids.filter(pa.array(rows_of(ids, described) < 0))
                if len(missing):
                    raise CorpusError(
                        f"{files[release.annotations]} lacks {len(missing):,} of profiles {part.start:,} to "
                        f"{part.stop:,} of {gctx.path} ({examples(missing)}). Take both of the same release."
                    )
            return {"train": parts}

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        key = self.config.release.key
        treatments = self._treatments(files)
        features = self.info.features
        assert features is not None
        schema = pa.schema([features.arrow_schema.field(name) for name in treatments.column_names])
        with Gctx(files[part.file]) as gctx:
            genes = gctx.gene_positions(pa.array(self._genes(files)["gene_id"]))
            rows = rows_of(gctx.profile_ids(part.start, part.stop), treatments[key].chunk(0))
            for start, stop, values in gctx.blocks(part.start, part.stop, genes):
                table = treatments.take(rows[start - part.start : stop - part.start]).cast(schema)
                edges = np.arange(0, values.size + 1, len(genes), dtype=np.int32)
                yield table.append_column(
                    self.config.value, pa.ListArray.from_arrays(pa.array(edges), pa.array(values.ravel()))
                )

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        optional = ["pert_iname", "pert_type", "inchi_key", "pubchem_cid", "is_touchstone"]
        wanted = ["pert_id", "canonical_smiles"]
        perturbagens = read_table(files[self.config.release.perturbagens], wanted, optional)
        return {GENE_TABLE: self._genes(files), PERTURBAGEN_TABLE: _decoded(perturbagens)}

    def _treatments(self, files: dict[str, Path]) -> pa.Table:
        release = self.config.release
        return read_treatments(files[release.annotations], release.key, release.context)

    def _all_genes(self, files: dict[str, Path]) -> pd.DataFrame:
        columns = ["pr_gene_id", "pr_gene_symbol", "pr_gene_title", "pr_is_lm", "pr_is_bing"]
        table = _decoded(read_table(files[self.config.release.genes], columns))
        table.columns = ["gene_id", "gene_symbol", "gene_title", "is_landmark", "is_best_inferred"]
        flags = ["is_landmark", "is_best_inferred"]
        table[flags] = table[flags] == "1"
        return table

    def _genes(self, files: dict[str, Path]) -> pd.DataFrame:
        """(genes,) gene_id (Entrez), gene_symbol, ...; in the order of the values."""
        genes = self._all_genes(files)
        return genes if self.config.all_genes else genes[genes["is_landmark"]].reset_index(drop=True)


def _text_matrix(folder: Path, source: Source) -> Path | None:
    """The matrix as text, if it lies there only so."""
    if any((folder / name).exists() for name in (source.file_name, source.unpacked_name)):
        return None
    stem = source.unpacked_name.removesuffix(".gctx")
    return next((path for path in (folder / f"{stem}.gct", folder / f"{stem}.gct.gz") if path.exists()), None)


def read_checksums(path: Path) -> dict[str, str]:
    """File name -> checksum as of a `Source`, from a list as `sha512sum` writes it, gzip-compressed."""
    with gzip.open(path, "rt") as lines:
        pairs = [line.split() for line in lines if line.strip()]
    return {name.lstrip("*"): f"sha512:{digest}" for digest, name in pairs}


def read_table(path: Path, wanted: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """The wanted columns of a tab-separated table of the release, and the optional ones that are there.

    All are text, but for the first one coded, since their values repeat; -666 is missing.
    Raises  CorpusError if a wanted column is missing or a line is ragged
    """
    with path.open(encoding="utf-8") as lines:
        header = lines.readline().rstrip("\r\n").split("\t")
    require_columns(header, wanted, path)
    columns = [*wanted, *(name for name in optional if name in header)]
    convert = pyarrow.csv.ConvertOptions(
        column_types={**dict.fromkeys(columns, pa.dictionary(pa.int32(), pa.string())), columns[0]: pa.string()},
        include_columns=columns,
        null_values=["", *MISSING],
        strings_can_be_null=True,
    )
    parse = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False)
    try:
        # One thread, since only that tells the line of an error.
        table = pyarrow.csv.open_csv(path, pyarrow.csv.ReadOptions(use_threads=False), parse, convert).read_all()
    except pa.ArrowInvalid as error:
        raise CorpusError(f"{path}: {error}. The file is truncated or edited; fetch it again.") from error
    return table.combine_chunks()


def _decoded(table: pa.Table) -> pd.DataFrame:
    return table.cast(pa.schema([(name, pa.string()) for name in table.column_names])).to_pandas()


def rows_of(ids: pa.Array, keys: pa.Array) -> np.ndarray:
    """(len(ids),) the place in `keys` of each id, -1 for those that are not there; both without repeats.

    A few ids are looked up among very many: only they go into a hash table.
    """
    places = positions_in(keys, ids)
    rows = np.full(len(ids), -1)
    rows[places.drop_null().to_numpy()] = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
    return rows


def read_treatments(path: Path, key: str, context: tuple[str, ...]) -> pa.Table:
    """Annotations of profiles or signatures: key, the columns of TREATMENT, those of `context`; texts are coded.

    Phase II writes dose and time of its signatures as text with the unit (`pert_idose` "10.0 um", `pert_itime` "24 h"):
    they are taken apart.
    Raises  CorpusError if a column is missing, an id stands twice, or a dose or time is no number
    """
    plain = ["pert_id", "pert_iname", "pert_type", "cell_id"]
    quantities = {name: f"pert_i{name.removeprefix('pert_')}" for name in ("pert_dose", "pert_time")}
    optional = [column for name, text in quantities.items() for column in (name, f"{name}_unit", text)]
    table = read_table(path, [key, *plain, *context], optional)
    published = {name: table[name].chunk(0) for name in table.column_names}
    require_unique(published[key], "ids", path)
    columns = {name: published[name] for name in (key, *plain)}
    for name, text in quantities.items():
        if name in published:
            require_columns(published, [f"{name}_unit"], path)
            numbers, units = published[name], published[f"{name}_unit"]
        else:
            require_columns(published, [text], path)
            numbers, units = _mapped(published[text], _first_word), _mapped(published[text], _second_word)
        try:
            columns[name] = _mapped(numbers, _number, pa.float64()).dictionary_decode()
        except ValueError as error:
            raise CorpusError(f"{path}: {name} is no number ({error}). Check that it is the published file.") from error
        columns[f"{name}_unit"] = _mapped(units, _agreed)
    columns |= {name: published[name] for name in context}
    return pa.table(columns)


def _mapped(column: pa.DictionaryArray, function: Any, kind: pa.DataType | None = None) -> pa.DictionaryArray:
    """`function` of each value, called once for each that differs; missing stays missing."""
    values = [None if value is None else function(value) for value in column.dictionary.to_pylist()]
    return pa.DictionaryArray.from_arrays(column.indices, pa.array(values, kind or pa.string()))


def _agreed(text: str) -> str | None:
    """What the replicates, joined by "|", agree on; None if they do not, or if it is missing."""
    values = set(text.split("|"))
    return values.pop() if len(values) == 1 and not values & {*MISSING} else None


def _number(text: str) -> float | None:
    """The number on which replicates agree ("300.0|300.000000" occurs); None if they do not, or if it is missing."""
    numbers = {float(value) for value in text.split("|")}
    return numbers.pop() if len(numbers) == 1 and -666 not in numbers else None


def _first_word(text: str) -> str:
    return "|".join(value.split()[0] for value in text.split("|"))


def _second_word(text: str) -> str | None:
    return "|".join(value.partition(" ")[2] for value in text.split("|")) or None


if __name__ == "__main__":
    command_line(LincsL1000)
