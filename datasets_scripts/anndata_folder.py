"""Any count files as one corpus: a folder or a list of .h5ad, .loom, 10x .h5 and 10x .mtx folders.

    python datasets_scripts/anndata_folder.py FOLDER_OR_FILE ... --output data/mine [--layer counts] [--obs-columns ...]

Files may have different genes: genes.parquet has the union, by Ensembl id without version where a file has ids (columns
ensembl_id, gene_ids, gene_id, feature_id or Accession of var, else its index), in order of first appearance. Genes that
stand twice in a file are summed. Columns of obs that a file lacks are null there; the column `source` names the file.
"""

import argparse
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
from datasets.config import DATASET_INFO_FILENAME
from datasets.utils import tqdm

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, Source, command_line, n_bytes, row_parts
from cellglot.datasets_scripts.corpus_errors import CorpusError, require_columns
from cellglot.datasets_scripts.corpus_shares import corpus_files
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_columns, ragged_features
from cellglot.datasets_scripts.source_counts import source_counts
from cellglot.tokenization.count_matrix import CountMatrix, check_counts
from cellglot.tokenization.gene_ids import GENE_SYMBOL_COLUMNS, canonical_id, is_ensembl_id, is_named
from cellglot.tokenization.obs_columns import obs_column

# Columns of the schema; a column of obs of the same name gets "obs_" before its own.
RESERVED = ("cell_name", "gene_index", "count", "source")


@dataclass
class AnnDataFolderConfig(datasets.BuilderConfig):
    """What to read, and what of it.

    inputs            files and folders; absent: `data_dir`
    layer             where the counts are: None for X, "raw", or a name in `layers`
    gene_ids          column of var with the genes' ids; None: see the module's docstring
    obs_columns       columns to keep; None: all
    allow_normalized  takes values that are no integers
    """

    inputs: tuple[str, ...] | None = None
    layer: str | None = None
    gene_ids: str | None = None
    obs_columns: tuple[str, ...] | None = None
    allow_normalized: bool = False


class AnnDataFolder(CorpusBuilder):
    """Cells of one's own files."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = AnnDataFolderConfig
    SOURCES = {"default": []}
    CARD = {"pretty_name": "Cells of count files", "tags": ["biology", "single-cell"]}
    LABELS = ("cell_type", "source")

    # The library annotates its own class.
    config: AnnDataFolderConfig

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "inputs", nargs="*", metavar="FILE_OR_FOLDER", help="count files; absent: all of --data-dir"
        )
        parser.add_argument("--layer", help='where the counts are, if not in X: "raw" or the name of a layer')
        parser.add_argument("--gene-ids", metavar="COLUMN", help="column of var with the genes' ids")
        parser.add_argument("--obs-columns", nargs="+", metavar="COLUMN", help="columns of obs to keep; absent: all")
        parser.add_argument("--allow-normalized", action="store_true", help="take values that are no integers")

    def _info(self) -> datasets.DatasetInfo:
        config = self.config
        options = [
            f"layer {config.layer}" if config.layer else "X",
            f"genes by {config.gene_ids}" if config.gene_ids else "genes by Ensembl id or name",
            f"columns {', '.join(config.obs_columns)}" if config.obs_columns is not None else "all columns of obs",
            "any values" if config.allow_normalized else "raw counts only",
        ]
        # The features follow from the files, when they are read.
        return datasets.DatasetInfo(
            description=f"Cells of count files ({'; '.join(options)}).",
            features=ragged_features({"source": datasets.Value("string")}),
            license="That of the files.",
            citation="That of the files.",
        )

    @cached_property
    def _paths(self) -> dict[str, Path]:
        """Name of each source, relative to the folder that holds them all, and where it is."""
        given = self.config.inputs or ([self.config.data_dir] if self.config.data_dir else [])
        if not given:
            raise CorpusError("Expected files or folders with cells, found none. Name them, or pass --data-dir.")
        try:
            paths = [path.absolute() for one in given for path in corpus_files(Path(self.config.data_dir or "") / one)]
        except ValueError as error:
            raise CorpusError(str(error)) from error
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise CorpusError(f"{twice} is named twice. Its cells would stand in the corpus twice.")
        folder = os.path.commonpath([path.parent for path in paths])
        return {path.relative_to(folder).as_posix(): path for path in paths}

    def sources(self) -> list[Source]:
        return [Source(name) for name in self._paths]

    def _find(self, source: Source, dl_manager: Any) -> Path:
        return self._paths[source.file_name]

    def _refuse_other_contents(self, folder: Path) -> None:
        super()._refuse_other_contents(folder)
        if not (folder / DATASET_INFO_FILENAME).exists():
            return
        found = datasets.DatasetInfo.from_directory(str(folder))
        recorded = {name: size["num_bytes"] for name, size in (found.download_checksums or {}).items()}
        present = {name: n_bytes(path) for name, path in self._paths.items()}
        if (recorded, found.description) != (present, self._info().description):
            raise CorpusError(
                f"{folder} holds the cells of other files or of other options ({len(recorded):,} files; "
                f"{found.description}). Choose another --output, or delete that folder."
            )

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        self._index_of_gene: dict[str, int] = {}
        symbols: list[str | None] = []
        schema, parts, kinds = pa.schema([]), [], {}
        for name, path in tqdm(files.items(), desc="Genes and columns", unit=" files"):
            with source_counts(path, self.config.layer) as counts:
                parts += row_parts(name, counts.n_cells)
                genes = self._genes(counts)
                kinds[sum(map(is_ensembl_id, genes)) * 2 > len(genes)] = path
                for gene, symbol in zip(genes, _symbols(counts), strict=True):
                    if self._index_of_gene.setdefault(gene, len(symbols)) == len(symbols):
                        symbols.append(None)
                    index = self._index_of_gene[gene]
                    symbols[index] = symbols[index] or symbol
                schema = self._widened(schema, counts)
        if len(kinds) > 1:
            warnings.warn(
                f"{kinds[True]} names its genes by Ensembl ids and {kinds[False]} does not: the gene table has both, "
                "and no gene of the one is known to be one of the other. Pass --gene-ids, or map symbols first.",
                stacklevel=2,
            )
        self._symbols = symbols
        self._obs_schema = schema
        obs = datasets.Features.from_arrow_schema(schema)
        self.info.features = ragged_features({"source": datasets.Value("string"), **obs})
        return {"train": parts}

    def _genes(self, counts: CountMatrix) -> list[str]:
        """Ids of a file's genes; where one is empty, the name in the index."""
        names = zip(counts.gene_names(self.config.gene_ids), counts.var.index.astype(str), strict=True)
        return [canonical_id(name if is_named(name) else index) for name, index in names]

    def _widened(self, schema: pa.Schema, counts: CountMatrix) -> pa.Schema:
        """Types of columns of obs that hold those of the files before and of this one."""
        names = list(counts.obs if self.config.obs_columns is None else self.config.obs_columns)
        require_columns(counts.obs, names, f"{counts.name} (obs)")
        types = {_column_name(name): obs_column(counts.obs[name]).type for name in names}
        # A column without any value would be of no type.
        here = pa.schema([(name, pa.string() if pa.types.is_null(type_) else type_) for name, type_ in types.items()])
        try:
            return pa.unify_schemas([schema, here], promote_options="permissive")
        except pa.ArrowTypeError as error:
            raise CorpusError(
                f"{counts.name}: a column of obs has another type than in the files before ({error}). Convert it, or "
                "choose others with --obs-columns."
            ) from error

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        with source_counts(files[part.file], self.config.layer) as counts:
            columns = np.array([self._index_of_gene[gene] for gene in self._genes(counts)], dtype=np.int32)
            obs = {_column_name(name): values for name, values in counts.obs.items()}
            arrays = {name: obs_column(obs[name]) for name in self._obs_schema.names if name in obs}
            for start, stop in part.blocks():
                cells, block = counts.read_block(start, stop)
                check_counts(counts, cells, block, allow_normalized=self.config.allow_normalized)
                shape = (stop - start, len(self._index_of_gene))
                union = sp.csr_matrix((block.data, columns[block.indices], block.indptr), shape=shape)
                nulls = {field.name: pa.nulls(stop - start, field.type) for field in self._obs_schema}
                yield pa.table(
                    {
                        "cell_name": pa.array(counts.obs.index[start:stop].astype(str), type=pa.string()),
                        **ragged_columns(union),
                        "source": pa.array([part.file]).take(pa.array(np.zeros(stop - start, dtype=np.int8))),
                        **nulls,
                        **{name: array.slice(start, stop - start) for name, array in arrays.items()},
                    }
                )

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        genes = pd.DataFrame({"gene_id": list(self._index_of_gene)})
        if any(self._symbols):
            genes["gene_symbol"] = self._symbols
        return {GENE_TABLE: genes}


def _column_name(name: Any) -> str:
    return f"obs_{name}" if name in RESERVED else str(name)


def _symbols(counts: CountMatrix) -> list[str | None]:
    """Symbols of a file's genes where a column has them, else the names of the index, which may be ids."""
    column = next((name for name in GENE_SYMBOL_COLUMNS if name in counts.var), None)
    names = counts.var.index if column is None else counts.var[column]
    return [name if is_named(name) and not is_ensembl_id(name) else None for name in names.astype(str)]


if __name__ == "__main__":
    command_line(AnnDataFolder)
