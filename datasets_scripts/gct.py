"""Expression profiles out of `.gct` text, versions 1.2 and 1.3, by way of a `.gctx` file.

A line of `.gct` holds one gene in all profiles, so that a single profile stands in every line of the file. It is read
once, in stripes of as many genes as fit a bound, and each stripe is written to its place in a chunked `.gctx` file,
from which blocks of profiles come cheaply (`Gctx.blocks`). The stripe bounds memory; the disk holds the matrix once.

    #1.3
    <genes> <profiles> <annotations of genes> <annotations of profiles>
    id      <names of gene annotations>     <profile ids>
    <name of a profile annotation>  <filler>...     <its values>
    <gene id>       <annotations of the gene>...    <values>

Version 1.2 has two numbers in the second line, one annotation (`Description`) a gene, and none of profiles.
Source: https://clue.io/connectopedia/gct_format
"""

import errno
import gzip
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from tqdm.auto import tqdm

from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.gctx import ANNOTATIONS, MATRIX, require_unique

STRIPE_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20
_NUMBERS = pyarrow.csv.ConvertOptions(
    column_types={"value": pa.float32()}, null_values=["", "NA", "NaN", "nan", "N/A", "#N/A", "null"]
)


@dataclass(frozen=True)
class GctHeader:
    """The first lines of a `.gct` file.

    version              "1.2" or "1.3"
    n_genes              lines of values that follow
    profile_ids          (profiles,) in the order of the columns
    gene_annotations     names of the columns between gene id and values
    profile_annotations  name -> (profiles,) text
    n_lines              lines that the header takes
    """

    version: str
    n_genes: int
    profile_ids: np.ndarray
    gene_annotations: list[str]
    profile_annotations: dict[str, np.ndarray]
    n_lines: int


def gct_to_gctx(path: str | Path, gctx: str | Path, *, stripe_bytes: int = STRIPE_BYTES) -> None:
    """Writes the profiles and annotations of a `.gct` or `.gct.gz` file as a `.gctx` file, aside and renamed.

    Raises  CorpusError for another version, ragged lines, values that are no numbers, too few or too many genes,
            and truncated gzip, with the number of the line
            OSError (ENOSPC) if the disk cannot hold the matrix
    """
    path, gctx = Path(path), Path(gctx)
    partial = gctx.with_name(gctx.name + ".tmp")
    with _lines(path) as lines:
        header = read_gct_header(lines, path)
        # Beforehand, since HDF5 brings the process down when it closes a file that it could not write to the end.
        if shutil.disk_usage(gctx.parent).free < 4 * header.n_genes * len(header.profile_ids):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(gctx))
        with h5py.File(partial, "w") as file:
            _transpose(_genes(lines, header, path), header, file, path, stripe_bytes)
    partial.replace(gctx)


def _transpose(
    rows: Iterator[tuple[str, list[str], np.ndarray]], header: GctHeader, file: h5py.File, path: Path, stripe_bytes: int
) -> None:
    n_profiles = len(header.profile_ids)
    stripe = min(header.n_genes, max(1, stripe_bytes // (4 * n_profiles)))
    chunks = (min(n_profiles, max(1, CHUNK_BYTES // (4 * stripe))), stripe)
    genes, annotations = [], []
    matrix = file.create_dataset(MATRIX, (n_profiles, header.n_genes), np.float32, chunks=chunks)
    values_gn = np.empty((stripe, n_profiles), np.float32)
    with tqdm(total=header.n_genes, unit=" genes", desc=f"Transposing {path.name}") as bar:
        for gene, texts, values in rows:
            values_gn[len(genes) % stripe] = values
            genes.append(gene)
            annotations.append(texts)
            filled = len(genes) % stripe or stripe
            if filled == stripe or len(genes) == header.n_genes:
                matrix[:, len(genes) - filled : len(genes)] = values_gn[:filled].T
            bar.update()
    require_unique(pa.array(genes), "gene ids", path)
    columns = dict(zip(header.gene_annotations, zip(*annotations, strict=True), strict=True))
    file.attrs["version"] = np.bytes_("GCTX1.0")
    _write_annotations(file, "genes", {"id": genes, **columns})
    _write_annotations(file, "profiles", {"id": header.profile_ids, **header.profile_annotations})


def read_gct_header(lines: Iterator[bytes], path: Path) -> GctHeader:
    """The header; `lines` is left at the first gene."""
    version = next(lines, b"").decode().strip()
    if version not in ("#1.2", "#1.3"):
        raise CorpusError(
            f"{path}, line 1: expected '#1.2' or '#1.3', the version of the format, found {version[:50]!r}."
        )
    sizes = next(lines, b"").decode().split()
    wanted = 2 if version == "#1.2" else 4
    if len(sizes) != wanted or not all(size.isdigit() for size in sizes) or "0" in sizes[:2]:
        raise CorpusError(
            f"{path}, line 2: expected {wanted} numbers (genes, profiles, ...), found {' '.join(sizes)[:80]!r}."
        )
    n_genes, n_profiles, n_gene_annotations, n_profile_annotations = [int(size) for size in sizes] + [1, 0][
        : 4 - wanted
    ]
    width = 1 + n_gene_annotations + n_profiles

    def fields(number: int) -> list[str]:
        found = next(lines, b"").decode().rstrip("\r\n").split("\t")
        if len(found) != width:
            raise CorpusError(f"{path}, line {number}: expected {width:,} fields, found {len(found):,}.")
        return found

    names = fields(3)
    annotations = {}
    for k in range(n_profile_annotations):
        values = fields(4 + k)
        annotations[values[0]] = np.array(values[1 + n_gene_annotations :])
    profile_ids = np.array(names[1 + n_gene_annotations :])
    require_unique(pa.array(profile_ids), "profile ids", path)
    return GctHeader(
        version.lstrip("#"),
        n_genes,
        profile_ids,
        names[1 : 1 + n_gene_annotations],
        annotations,
        3 + n_profile_annotations,
    )


def _genes(lines: Iterator[bytes], header: GctHeader, path: Path) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """(id, annotations, (profiles,) values) of one gene after the other."""
    n_texts = 1 + len(header.gene_annotations)
    width = n_texts + len(header.profile_ids)
    n_genes = 0
    for number, line in enumerate(lines, header.n_lines + 1):
        line = line.rstrip(b"\r\n")
        if not line:
            continue
        found = line.count(b"\t") + 1
        if found != width:
            raise CorpusError(
                f"{path}, line {number}: expected {width:,} fields, found {found:,}. "
                "The file is truncated or edited; fetch it again."
            )
        *texts, numbers = line.split(b"\t", n_texts)
        if n_genes == header.n_genes:
            raise CorpusError(f"{path}, line {number}: more than the {n_genes:,} genes that line 2 announces.")
        gene, *annotations = [text.decode() for text in texts]
        yield gene, annotations, _values(numbers, gene, header.profile_ids, f"{path}, line {number}")
        n_genes += 1
    if n_genes != header.n_genes:
        raise CorpusError(
            f"{path} ends after {n_genes:,} of the {header.n_genes:,} genes that line 2 announces: "
            "it is truncated. Fetch it again."
        )


def _values(numbers: bytes, gene: str, profile_ids: np.ndarray, where: str) -> np.ndarray:
    """(profiles,) float32; missing values are NaN."""
    # One number a line is a table of one column, which Arrow parses many times faster than Python.
    column = pa.BufferReader(numbers.replace(b"\t", b"\n") + b"\n")
    try:
        table = pyarrow.csv.read_csv(
            column,
            pyarrow.csv.ReadOptions(column_names=["value"], use_threads=False),
            pyarrow.csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
            _NUMBERS,
        )
    except pa.ArrowInvalid as error:
        texts = numbers.decode(errors="replace").split("\t")
        k, text = next((k, text) for k, text in enumerate(texts) if not _is_number(text))
        raise CorpusError(f"{where}: {text!r} (gene {gene}, profile {profile_ids[k]}) is no number.") from error
    return pc.fill_null(table["value"].combine_chunks(), np.float32(np.nan)).to_numpy()


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return text in _NUMBERS.null_values
    return True


def _write_annotations(file: h5py.File, of: str, columns: dict) -> None:
    for name, values in columns.items():
        # HDF5 would take a slash for a group.
        dataset = f"{ANNOTATIONS[of]}/{name.replace('/', '_')}"
        file.create_dataset(dataset, data=np.char.encode(np.array(values, dtype=str), "utf-8"))


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[bytes]]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        lines = gzip.GzipFile(fileobj=file) if packed else file
        try:
            yield iter(lines)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CorpusError(f"{path} is truncated or damaged gzip ({error}). Fetch it again.") from error
