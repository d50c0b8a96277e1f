"""Edges of gene networks, read from the files in which they are published.

STRING (`protein.links` with `protein.info`), BioGRID (`.tab3.txt` or its zip), the Parquet folders that
`datasets_scripts/gene_networks.py` writes, and plain tables of two or three columns (gene, gene, score).
"""

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from cellglot.datasets_scripts.gene_networks import biogrid_edges, string_edges

HUMAN = 9606
# How files without a score column name the two genes; other first lines of two names are an edge
HEADER_NAMES = {
    *("a", "b", "from", "to", "source", "target", "tf", "node1", "node2", "gene1", "gene2", "gene_a", "gene_b"),
    *("protein1", "protein2", "protein_a", "protein_b", "symbol_a", "symbol_b", "interactor_a", "interactor_b"),
}


@dataclass(frozen=True)
class EdgeTable:
    """Edges as a file lists them: maybe repeated, in both directions, or of a gene with itself.

    name      of the file
    genes     (names,) what it calls its genes, each once
    a, b      (edges,) positions in `genes`
    scores    (edges,) float32, or None where the file has none
    left_out  what was not read, and how many: reason -> rows
    Raises    ValueError for scores that are NaN, infinite or negative, and for a table without edges
    """

    name: str
    genes: np.ndarray
    a: np.ndarray
    b: np.ndarray
    scores: np.ndarray | None
    left_out: dict[str, int]

    def __post_init__(self) -> None:
        if not len(self.a):
            why = "".join(f"; {n:,} rows {reason}" for reason, n in self.left_out.items())
            raise ValueError(f"{self.name} has no edges{why}.")
        if self.scores is not None:
            bad = np.flatnonzero(~(np.isfinite(self.scores) & (self.scores >= 0)))
            if len(bad):
                k = bad[0]
                raise ValueError(
                    f"{self.name}: {len(bad):,} of {len(self.a):,} edges have a score that is NaN, infinite or "
                    f"negative, e.g. {self.scores[k]:g} for {self.genes[self.a[k]]!r} and {self.genes[self.b[k]]!r}. "
                    "Drop these edges, or the column."
                )


def read_edges(
    path: str | Path,
    *,
    info: str | Path | None = None,
    columns: Sequence[str] | None = None,
    score: str | None = None,
    taxon: int = HUMAN,
) -> EdgeTable:
    """Edges of a network, whatever its layout.

    path     STRING links, BioGRID `.tab3.txt` or `.zip`, a `.parquet` file or folder of edges, or a table (tab, comma,
             semicolon or space; .gz too) of two columns of genes and maybe one of scores
    info     STRING's `protein.info` of the same version, with the genes' names
    columns  the two columns of genes, for a table (or Parquet) that has more
    score    the column of scores, for such a table; with `columns` alone edges have no scores
    taxon    BioGRID: interactions of other species, or across species, are left out. Its scores are too: they are of
             many kinds
    Raises   FileNotFoundError; ValueError for a table of another layout, scores that are no numbers or below 0, and
             arguments that files of this layout have no use for
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if columns is not None and len(columns) != 2:
        raise ValueError(f"Expected the names of the two columns of genes, found columns={tuple(columns)}.")
    if path.is_dir() or path.suffix == ".parquet":
        _check_unused(path, "a Parquet table", info=info)
        return _of_blocks(path.name, _parquet_blocks(path, columns, score), taxon)
    first = _first_line(path)
    if path.suffix == ".zip" or first.startswith("#BioGRID"):
        _check_unused(path, "BioGRID's", info=info, columns=columns, score=score)
        return _of_blocks(path.name, biogrid_edges(path), taxon)
    if first.split()[:3] == ["protein1", "protein2", "combined_score"]:
        _check_unused(path, "STRING's", columns=columns, score=score)
        if info is None:
            raise ValueError(
                f"{path} names STRING's proteins: pass info=, the path of {HUMAN}.protein.info.v*.txt.gz of the same "
                "version, which has the genes' names."
            )
        return _of_blocks(path.name, string_edges(path, Path(info)), taxon)
    _check_unused(path, "a table of edges", info=info)
    if score is not None and columns is None:
        raise ValueError(f"{path}: score={score!r} needs columns=, the names of the two columns of genes.")
    return _of_text(path, first, columns, score)


def _check_unused(path: Path, layout: str, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{path} is {layout}, which has no use for {', '.join(given)}: leave it out.")


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rt", encoding="utf-8") if compressed else path.open(encoding="utf-8") as file:
            return file.readline().rstrip("\r\n")
    except UnicodeDecodeError:
        # A zip archive, or no text at all
        return ""


def _parquet_blocks(path: Path, columns: Sequence[str] | None, score: str | None) -> Iterable[pa.Table]:
    """Blocks with gene_a, gene_b and maybe combined_score, taxon_a, taxon_b."""
    import pyarrow.dataset as ds

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} is a folder without Parquet files; run datasets_scripts/gene_networks.py first.")
    data = ds.dataset([str(file) for file in files], format="parquet")
    present = data.schema.names
    if columns is None and score is None and "combined_score" in present:
        score = "combined_score"
    renamed = dict(zip(columns or ("gene_a", "gene_b"), ("gene_a", "gene_b"), strict=True))
    renamed |= {} if score is None else {score: "combined_score"}
    missing = [name for name in renamed if name not in present]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(present)}.")
    wanted = [*renamed, *(name for name in ("taxon_a", "taxon_b") if name in present)]
    for batch in data.to_batches(columns=wanted):
        yield pa.Table.from_batches([batch]).rename_columns([renamed.get(name, name) for name in wanted])


def _of_blocks(name: str, blocks: Iterable[pa.Table], taxon: int) -> EdgeTable:
    """Edges of tables with gene_a, gene_b, maybe combined_score, taxon_a, taxon_b."""
    position: dict[str, int] = {}
    parts: list[tuple[np.ndarray, ...]] = []
    left_out: dict[str, int] = {}
    for block in blocks:
        kept = np.ones(block.num_rows, dtype=bool)
        if "taxon_a" in block.column_names:
            kept &= (block["taxon_a"].to_numpy() == taxon) & (block["taxon_b"].to_numpy() == taxon)
            _count(left_out, f"not of taxon {taxon}", ~kept)
        a, b = (_positions(block[column], position) for column in ("gene_a", "gene_b"))
        unnamed = kept & ((a < 0) | (b < 0))
        _count(left_out, "without a gene's name", unnamed)
        kept &= ~unnamed
        scored = "combined_score" in block.column_names
        part = (a[kept], b[kept], *([block["combined_score"].to_numpy().astype(np.float32)[kept]] if scored else []))
        parts.append(part)
    arrays = [np.concatenate(columns) for columns in zip(*parts, strict=True)] or [np.empty(0, np.int32)] * 2
    genes = np.array(list(position), dtype=object)
    return EdgeTable(name, genes, arrays[0], arrays[1], arrays[2] if len(arrays) == 3 else None, left_out)


def _positions(column: pa.ChunkedArray, position: dict[str, int]) -> np.ndarray:
    """(rows,) int32 place of each name among all seen so far, which grows by the new ones; -1 for a missing name."""
    encoded = pa.array(column.combine_chunks()).dictionary_encode()
    places = [position.setdefault(str(name), len(position)) for name in encoded.dictionary.to_pylist()]
    lookup = np.array([*places, -1], dtype=np.int32)
    return lookup[encoded.indices.fill_null(len(places)).to_numpy()]


def _count(left_out: dict[str, int], reason: str, rows: np.ndarray) -> None:
    if rows.any():
        left_out[reason] = left_out.get(reason, 0) + int(rows.sum())


def _of_text(path: Path, first: str, columns: Sequence[str] | None, score: str | None) -> EdgeTable:
    separator = next((mark for mark in ("\t", ",", ";", " ") if mark in first), None)
    if separator is None:
        raise ValueError(
            f"{path}: expected a table of edges, two columns of genes and maybe one of scores; its first line is "
            f"{first[:80]!r}."
        )
    fields = [field.strip().strip('"') for field in first.split(separator)]
    header = columns is not None or _is_header(fields)
    # A gene may be called NA.
    table = pd.read_csv(path, sep=separator, header=0 if header else None, dtype=str, keep_default_na=False)
    if columns is None:
        if not 2 <= len(fields) <= 3:
            raise ValueError(
                f"{path} has {len(fields)} columns ({', '.join(fields[:6])}): name those of the genes, "
                'e.g. columns=("tf", "target"), and maybe score=.'
            )
        genes, values = table.iloc[:, :2], table.iloc[:, 2] if len(fields) == 3 else None
    else:
        missing = [name for name in (*columns, *([score] if score else [])) if name not in table]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(map(str, table))}.")
        genes, values = table[list(columns)], table[score] if score else None
    named = (genes.to_numpy() != "").all(axis=1)
    left_out: dict[str, int] = {}
    _count(left_out, "without a gene's name", ~named)
    places, names = pd.factorize(genes[named].to_numpy().ravel())
    a, b = places.reshape(-1, 2).astype(np.int32).T
    scores = None if values is None else _numbers(values[named], path)
    return EdgeTable(path.name, np.asarray(names, dtype=object), a, b, scores, left_out)


def _is_header(fields: list[str]) -> bool:
    if len(fields) > 2:
        return not _is_number(fields[2])
    return all(field.lower() in HEADER_NAMES for field in fields)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(values: Any, path: Path) -> np.ndarray:
    numbers = pd.to_numeric(values, errors="coerce")
    bad = numbers.isna() & (values.str.strip().str.lower() != "nan")
    if bad.any():
        raise ValueError(
            f"{path}: {int(bad.sum()):,} scores are no numbers, e.g. {values[bad].iloc[0]!r}. Drop these edges, or the "
            "column of scores."
        )
    return numbers.to_numpy(np.float32)
