"""Networks of genes as edge tables: STRING, BioGRID, and orthologs of human and mouse after Ensembl and after MGI.

    python datasets_scripts/gene_networks.py --config string --output data/gene_networks
    python datasets_scripts/gene_networks.py --config biogrid --data-dir downloads --output data/gene_networks

string              functional association of proteins, human: `combined_score` is a probability times 1,000, an integer
                    in 0..1000; every edge stands twice, once in either direction, as published
biogrid             curated physical and genetic interactions, human: one row an experiment, so that edges repeat
orthologs_ensembl   human gene, mouse gene, kind of homology after Ensembl's gene trees
orthologs_mgi       the same after the homology classes of Mouse Genome Informatics
"""

import fnmatch
import gzip
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar
from urllib.parse import quote

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, Source, command_line
from cellglot.datasets_scripts.corpus_errors import CorpusError, require_columns
from cellglot.datasets_scripts.gctx import examples, positions_in

STRING_VERSION = "12.0"
BIOGRID_VERSION = "4.4.241"
# Release 113 of Ensembl: archives keep their releases, www.ensembl.org does not.
BIOMART = "https://oct2024.archive.ensembl.org/biomart/martservice?query="
# Written as the last line only if the table is complete, since it is asked for
BIOMART_END = "[success]"
HUMAN, MOUSE = 9606, 10090
BLOCK_BYTES = 8 << 20

_STRING = "https://stringdb-downloads.org/download/protein.{kind}.v{version}/{name}".format
STRING_LINKS = f"{HUMAN}.protein.links.v{STRING_VERSION}.txt.gz"
STRING_INFO = f"{HUMAN}.protein.info.v{STRING_VERSION}.txt.gz"
ZIP_MEMBER = "*BIOGRID-ORGANISM-Homo_sapiens-*.tab3.txt"
BIOGRID_ZIP = f"BIOGRID-ORGANISM-{BIOGRID_VERSION}.tab3.zip"
ENSEMBL_TABLE = "mart_export.txt"
MGI_TABLE = "HOM_MouseHumanSequence.rpt"

# Published column -> (ours, type); "-" is missing
BIOGRID_COLUMNS = {
    "#BioGRID Interaction ID": ("interaction_id", pa.int64()),
    "Official Symbol Interactor A": ("gene_a", pa.string()),
    "Official Symbol Interactor B": ("gene_b", pa.string()),
    "Entrez Gene Interactor A": ("entrez_a", pa.int64()),
    "Entrez Gene Interactor B": ("entrez_b", pa.int64()),
    "Organism ID Interactor A": ("taxon_a", pa.int64()),
    "Organism ID Interactor B": ("taxon_b", pa.int64()),
    "Experimental System": ("experimental_system", pa.string()),
    "Experimental System Type": ("experimental_system_type", pa.string()),
    "Publication Source": ("publication", pa.string()),
    "Throughput": ("throughput", pa.string()),
    "Score": ("score", pa.float64()),
}
# Published column, attribute of the query -> ours
ENSEMBL_COLUMNS = {
    "Gene stable ID": ("ensembl_gene_id", "human_gene_id"),
    "Gene name": ("external_gene_name", "human_symbol"),
    "Mouse gene stable ID": ("mmusculus_homolog_ensembl_gene", "mouse_gene_id"),
    "Mouse gene name": ("mmusculus_homolog_associated_gene_name", "mouse_symbol"),
    "Mouse homology type": ("mmusculus_homolog_orthology_type", "homology_type"),
    "Mouse orthology confidence [0 low, 1 high]": ("mmusculus_homolog_orthology_confidence", "high_confidence"),
}
MGI_COLUMNS = ["NCBI Taxon ID", "Symbol", "EntrezGene ID", "Mouse MGI ID", "HGNC ID"]
# Older files name the class after HomoloGene, and STRING 11.0 calls its proteins otherwise.
MGI_CLASSES = ("DB Class Key", "HomoloGene ID")
STRING_PROTEINS = ("#string_protein_id", "protein_external_id")


def biomart_query() -> str:
    """Address of the table of orthologs."""
    attributes = "".join(f'<Attribute name="{attribute}"/>' for attribute, _ in ENSEMBL_COLUMNS.values())
    query = (
        '<?xml version="1.0" encoding="UTF-8"?><!DOCTYPE Query><Query virtualSchemaName="default" formatter="TSV" '
        'header="1" uniqueRows="1" count="" datasetConfigVersion="0.6" completionStamp="1">'
        '<Dataset name="hsapiens_gene_ensembl" interface="default"><Filter name="with_mmusculus_homolog" excluded="0"/>'
        f"{attributes}</Dataset></Query>"
    )
    return BIOMART + quote(query)


FEATURES = {
    "string": {
        **dict.fromkeys(("protein_a", "protein_b", "gene_a", "gene_b"), "string"),
        "combined_score": "int32",
    },
    "biogrid": {name: str(kind).replace("double", "float64") for name, kind in BIOGRID_COLUMNS.values()},
    "orthologs_ensembl": {
        **dict.fromkeys(("human_gene_id", "human_symbol", "mouse_gene_id", "mouse_symbol", "homology_type"), "string"),
        "high_confidence": "bool",
        "one_to_one": "bool",
    },
    "orthologs_mgi": {
        "homology_class": "int64",
        **dict.fromkeys(("human_symbol", "mouse_symbol", "hgnc_id", "mgi_id"), "string"),
        **dict.fromkeys(("human_entrez", "mouse_entrez"), "int64"),
        "one_to_one": "bool",
    },
}
# Homepage, licence, citation
ABOUT = {
    "string": (
        "https://string-db.org",
        "STRING: CC BY 4.0, https://string-db.org",
        "Szklarczyk et al., Nucleic Acids Research 51, D638-D646 (2023), doi:10.1093/nar/gkac1000",
    ),
    "biogrid": (
        "https://thebiogrid.org",
        "BioGRID: MIT, https://wiki.thebiogrid.org/doku.php/terms_and_conditions",
        "Oughtred et al., Protein Science 30, 187-200 (2021), doi:10.1002/pro.3978",
    ),
    "orthologs_ensembl": (
        "https://www.ensembl.org/info/genome/compara/homology_method.html",
        "Ensembl: no restrictions of its own, https://www.ensembl.org/info/about/legal/disclaimer.html",
        "Herrero et al., Database 2016, bav096, doi:10.1093/database/bav096",
    ),
    "orthologs_mgi": (
        "https://www.informatics.jax.org/homology.shtml",
        "MGI: CC BY 4.0, https://www.informatics.jax.org/mgihome/other/copyright.shtml",
        "Blake et al., Nucleic Acids Research 49, D981-D987 (2021), doi:10.1093/nar/gkaa1083",
    ),
}

# Source -> names of other releases, or of the same table out of its archive
PATTERNS = {
    STRING_LINKS: (f"{HUMAN}.protein.links.v*.txt*",),
    STRING_INFO: (f"{HUMAN}.protein.info.v*.txt*",),
    BIOGRID_ZIP: ("BIOGRID-ORGANISM-Homo_sapiens-*.tab3.txt", "BIOGRID-ORGANISM-*.tab3.zip"),
}


class GeneNetworks(CorpusBuilder):
    """Edge tables: one row an edge, the two genes and what is known of it."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIGS = [datasets.BuilderConfig(name=name) for name in FEATURES]
    DEFAULT_CONFIG_NAME = "string"
    SOURCES: ClassVar[Mapping[str, Sequence[Source]]] = {
        "string": [
            Source(STRING_LINKS, _STRING(kind="links", version=STRING_VERSION, name=STRING_LINKS)),
            Source(STRING_INFO, _STRING(kind="info", version=STRING_VERSION, name=STRING_INFO)),
        ],
        "biogrid": [
            Source(
                BIOGRID_ZIP,
                "https://downloads.thebiogrid.org/Download/BioGRID/Release-Archive/"
                f"BIOGRID-{BIOGRID_VERSION}/{BIOGRID_ZIP}",
            )
        ],
        "orthologs_ensembl": [Source(ENSEMBL_TABLE, biomart_query())],
        "orthologs_mgi": [Source(MGI_TABLE, f"https://www.informatics.jax.org/downloads/reports/{MGI_TABLE}")],
    }
    LABELS = ("experimental_system", "homology_type", "one_to_one")
    MEASURE = "combined_score"
    ROWS = "edges"
    CARD: ClassVar[Mapping[str, Any]] = {
        "license": "other",
        "pretty_name": "Networks of genes: STRING, BioGRID, orthologs",
        "tags": ["biology", "graph", "gene-network", "protein-protein-interaction", "orthologs"],
    }

    def _info(self) -> datasets.DatasetInfo:
        # One card serves all configs of a folder, and has to credit all of them.
        _, licences, citations = zip(*ABOUT.values(), strict=True)
        return datasets.DatasetInfo(
            description=(__doc__ or "").splitlines()[0],
            features=datasets.Features({name: datasets.Value(t) for name, t in FEATURES[self.config.name].items()}),
            homepage=ABOUT[self.config.name][0],
            license="; ".join(licences),
            citation="\n\n".join(citations),
        )

    def _find(self, source: Source, dl_manager: Any) -> Path:
        """As the base does; another release of the same kind in the data folder will do as well."""
        folder = None if self.config.data_dir is None else Path(self.config.data_dir)
        if folder is not None and not (folder / source.file_name).exists():
            found = sorted(path for pattern in PATTERNS.get(source.file_name, ()) for path in folder.glob(pattern))
            if len(found) > 1:
                raise CorpusError(f"{folder} holds {', '.join(path.name for path in found)}: leave one of them there.")
            if found:
                return found[0]
        path = super()._find(source, dl_manager)
        if source.file_name == ENSEMBL_TABLE and (folder is None or path.parent != folder):
            _require_stamp(path)
        return path

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        name = self.sources()[0].file_name
        return {"train": [Part(name, 0, files[name].stat().st_size)]}

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        path = files[part.file]
        match self.config.name:
            case "string":
                yield from string_edges(path, files[STRING_INFO])
            case "biogrid":
                yield from biogrid_edges(path)
            case "orthologs_ensembl":
                yield ensembl_orthologs(path)
            case "orthologs_mgi":
                yield mgi_orthologs(path)


def string_edges(links: Path, info: Path) -> Iterator[pa.Table]:
    """Blocks of `protein1 protein2 combined_score`, with the genes' names from `protein.info`.

    Raises  CorpusError for scores outside 0..1000, and for proteins without a name
    """
    columns = {_named_column(info, STRING_PROTEINS): pa.string(), "preferred_name": pa.string()}
    names = pa.Table.from_batches(_blocks(info, columns)).combine_chunks()
    proteins, genes = (names[name].chunk(0) for name in columns)
    columns = {"protein1": pa.string(), "protein2": pa.string(), "combined_score": pa.int32()}
    for block in _blocks(links, columns, delimiter=" "):
        first, second, scores = block.columns
        bad = scores.filter(pa.array((scores.to_numpy() < 0) | (scores.to_numpy() > 1000)))
        if len(bad):
            raise CorpusError(f"{links}: combined_score {bad[0]}; expected integers in 0..1000. Fetch it again.")
        yield pa.table(
            {
                "protein_a": _without_taxon(first, links),
                "protein_b": _without_taxon(second, links),
                "gene_a": _named(first, proteins, genes, info),
                "gene_b": _named(second, proteins, genes, info),
                "combined_score": scores,
            }
        )


def _named(ids: pa.Array, proteins: pa.Array, genes: pa.Array, info: Path) -> pa.Array:
    positions = positions_in(ids, proteins)
    if positions.null_count:
        absent = ids.filter(positions.is_null()).unique()
        raise CorpusError(
            f"{info} has no name for {len(absent):,} proteins ({examples(absent)}). "
            "Take links and info of the same version."
        )
    return genes.take(positions)


def _without_taxon(ids: pa.Array, path: Path) -> pa.Array:
    """9606.ENSP00000000233 -> ENSP00000000233"""
    prefix = f"{HUMAN}."
    human = pc.call_function("starts_with", [ids], pc.MatchSubstringOptions(prefix))
    if human.false_count:
        other = ids.filter(pa.array(~human.to_numpy(zero_copy_only=False)))
        raise CorpusError(f"{path}: {examples(other)} are no human proteins; expected the prefix {prefix!r}.")
    return pc.call_function("utf8_slice_codeunits", [ids], pc.SliceOptions(len(prefix)))


def biogrid_edges(path: Path) -> Iterator[pa.Table]:
    """Blocks of a `.tab3.txt` file, or of the human one in the `.zip` of all organisms."""
    columns = {name: kind for name, (_, kind) in BIOGRID_COLUMNS.items()}
    names = [name for name, _ in BIOGRID_COLUMNS.values()]
    for block in _blocks(path, columns, missing=("", "-")):
        yield pa.Table.from_batches([block]).rename_columns(names)


def _require_stamp(path: Path) -> None:
    """Raises CorpusError, and forgets the download, if BioMart did not send all of the table."""
    answer = path.read_text(encoding="utf-8")
    if answer.rstrip("\n").endswith(BIOMART_END):
        return
    # Or the cache would give it back for ever.
    path.unlink()
    raise CorpusError(
        f"BioMart's table does not end with {BIOMART_END}: it is incomplete, or an error (it begins with "
        f"{answer[:200]!r}). It was deleted; run the same command again, or export it by hand as {ENSEMBL_TABLE}."
    )


def ensembl_orthologs(path: Path) -> pa.Table:
    """Pairs of a table exported from BioMart; symbols are needed, the other columns may be absent and are null then.

    Without the kind of homology, a pair is one to one if neither of its genes stands in another.
    Raises  CorpusError for missing columns
    """
    header = _header(path, "\t")
    require_columns(header, ["Gene name", "Mouse gene name"], path)
    wanted = {name: pa.string() for name in ENSEMBL_COLUMNS if name in header}
    table = pa.Table.from_batches(_blocks(path, wanted, last_line=BIOMART_END)).to_pandas()
    pairs = table.rename(columns={name: ours for name, (_, ours) in ENSEMBL_COLUMNS.items()})
    pairs = pairs.reindex(columns=[ours for _, ours in ENSEMBL_COLUMNS.values()])
    human, mouse = (pairs[f"{species}_gene_id"].fillna(pairs[f"{species}_symbol"]) for species in ("human", "mouse"))
    # BioMart lists genes without a counterpart as well.
    known = human.notna() & mouse.notna()
    pairs, human, mouse = pairs[known], human[known], mouse[known]
    if "Mouse homology type" in header:
        alone = pairs["homology_type"] == "ortholog_one2one"
    else:
        alone = ~(human.duplicated(keep=False) | mouse.duplicated(keep=False))
    confident = pairs["high_confidence"].map({"1": True, "0": False})
    return _table(pairs.assign(high_confidence=confident, one_to_one=alone), "orthologs_ensembl")


def mgi_orthologs(path: Path) -> pa.Table:
    """Every human gene of a homology class with every mouse gene of it, from a file with one line a gene."""
    key = _named_column(path, MGI_CLASSES)
    columns = {key: pa.int64(), **dict.fromkeys(MGI_COLUMNS, pa.string())}
    genes = pa.Table.from_batches(_blocks(path, columns)).to_pandas()
    genes = genes.rename(columns={key: "homology_class", "Symbol": "symbol", "EntrezGene ID": "entrez"})
    human, mouse = (genes[genes["NCBI Taxon ID"] == str(taxon)] for taxon in (HUMAN, MOUSE))
    pairs = human.merge(mouse, on="homology_class", suffixes=("_human", "_mouse"))
    members = [pairs["homology_class"].map(part["homology_class"].value_counts()) for part in (human, mouse)]
    renamed = {
        f"{what}_{species}": f"{species}_{what}" for what in ("symbol", "entrez") for species in ("human", "mouse")
    }
    renamed |= {"HGNC ID_human": "hgnc_id", "Mouse MGI ID_mouse": "mgi_id"}
    pairs = pairs.rename(columns=renamed).assign(one_to_one=(members[0] == 1) & (members[1] == 1))
    pairs[["human_entrez", "mouse_entrez"]] = pairs[["human_entrez", "mouse_entrez"]].astype("Int64")
    return _table(pairs, "orthologs_mgi")


def _table(pairs: pd.DataFrame, config: str) -> pa.Table:
    features = datasets.Features({name: datasets.Value(kind) for name, kind in FEATURES[config].items()})
    return pa.Table.from_pandas(pairs, schema=features.arrow_schema, preserve_index=False)


def _blocks(
    path: Path,
    columns: Mapping[str, pa.DataType],
    *,
    delimiter: str = "\t",
    missing: Sequence[str] = ("",),
    last_line: str | None = None,
) -> Iterator[pa.RecordBatch]:
    """Blocks of the wanted columns of a text table, plain, gzip-compressed or in a zip archive.

    last_line  what may stand in the last line in the place of a row
    Raises     CorpusError for a missing column, a ragged line, a value of another type, a truncated archive
    """

    def ragged(row: pyarrow.csv.InvalidRow) -> str:
        return "skip" if row.text == last_line else "error"

    convert = pyarrow.csv.ConvertOptions(
        column_types=columns, include_columns=list(columns), null_values=missing, strings_can_be_null=True
    )
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char=False, invalid_row_handler=ragged)
    # One thread, since only that tells the line of an error.
    read = pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    require_columns(_header(path, delimiter), list(columns), path)
    with _opened(path) as file:
        yield from pyarrow.csv.open_csv(file, read, parse, convert)


def _header(path: Path, delimiter: str) -> list[str]:
    with _opened(path) as file:
        return file.readline().decode(errors="replace").rstrip("\r\n").split(delimiter)


def _named_column(path: Path, names: Sequence[str]) -> str:
    """The first of these names that a tab-separated table has; if it has none, the first, for a message to miss."""
    header = _header(path, "\t")
    return next((name for name in names if name in header), names[0])


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A text table for reading, whatever it is packed in."""
    try:
        with path.open("rb") as file:
            magic = file.read(2)
            file.seek(0)
            if magic == b"\x1f\x8b":
                yield gzip.GzipFile(fileobj=file)  # type: ignore[misc]
            elif magic == b"PK":
                with zipfile.ZipFile(file) as archive:
                    members = fnmatch.filter(archive.namelist(), ZIP_MEMBER)
                    if len(members) != 1:
                        raise CorpusError(
                            f"{path}: expected one file {ZIP_MEMBER} in it, found {len(members)} "
                            f"({', '.join(archive.namelist()[:3])})."
                        )
                    with archive.open(members[0]) as member:
                        yield member
            else:
                yield file
    except (pa.ArrowInvalid, EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise CorpusError(f"{path}: {error}. The file is truncated or edited; fetch it again.") from error


if __name__ == "__main__":
    command_line(GeneNetworks)
