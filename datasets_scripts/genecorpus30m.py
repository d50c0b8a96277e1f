"""Genecorpus-30M, the corpus that Geneformer was pre-trained on: cells as rank-value tokens.

29.9 million human cells of 561 data sets, of which 27.4 million passed the paper's quality filters, as `input_ids`, at
most 2,048 token ids of genes, most distinctive first, and their `length`. `lengths.npy` beside the rows holds all
lengths (int32), which a length-grouped sampler needs; the publisher's is a pickle, and is not read.

    python datasets_scripts/genecorpus30m.py --output data/genecorpus30m                        # 122 GB from the Hub
    python datasets_scripts/genecorpus30m.py --data-dir genecorpus_30M_2048.dataset --output data/genecorpus30m
    python datasets_scripts/genecorpus30m.py --config h5ad --data-dir FOLDER --output data/mine

default  the tokens as published: `--data-dir` is the folder that `save_to_disk` wrote (state.json and *.arrow)
h5ad     the cells of every .h5ad and .loom in --data-dir, with Ensembl ids and raw counts, tokenized in the same way:
         by Geneformer's V1 vocabulary and medians, or by --tokenizer; with `cell_name` and `source`, the file. Cells
         without a gene of the vocabulary are left out, and those whose obs["filter_pass"] is not 1. For more than one
         machine there is `tokenize_corpus.py`.

There is one split, `train`: cells of one donor or study stand side by side, and the published rows do not say which.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, Source, command_line, parts_folder, row_parts
from cellglot.datasets_scripts.corpus_errors import CorpusError, require_columns
from cellglot.datasets_scripts.source_counts import source_counts
from cellglot.tokenization.convert_original import convert_original
from cellglot.tokenization.rank_value import RankValueTokenizer

HUB = "https://huggingface.co/{}/resolve/main/{}"
STATE = "state.json"
ARROW = "dataset.arrow"
TOKENS = "token_dictionary_gc30M.pkl"
MEDIANS = "gene_median_dictionary_gc30M.pkl"
# Made here of the two dictionaries, or given by --tokenizer
TOKENIZER = "tokenizer"
LENGTHS = "lengths.npy"
COUNT_FILES = (".h5ad", ".loom")
# Tokens are int64 as published: 16 MB a block of cells of full length
ROWS_PER_BLOCK = 1_000


def _tokens(name: str) -> Source:
    return Source(name, HUB.format("datasets/ctheodoris/Genecorpus-30M", f"genecorpus_30M_2048.dataset/{name}"))


def _dictionary(name: str) -> Source:
    return Source(name, HUB.format("ctheodoris/Geneformer", f"geneformer/gene_dictionaries_30m/{name}"))


@dataclass
class GenecorpusConfig(datasets.BuilderConfig):
    """tokenizer: folder of a rank-value tokenizer for config h5ad; absent: Geneformer's V1 dictionaries."""

    tokenizer: str | None = None


class Genecorpus30M(CorpusBuilder):
    """Rows of tokens, and all their lengths beside them."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = GenecorpusConfig
    SOURCES = {"default": [_tokens(STATE), _tokens(ARROW)], "h5ad": [_dictionary(TOKENS), _dictionary(MEDIANS)]}
    MEASURE = "length"
    CARD = {"license": "apache-2.0", "pretty_name": "Genecorpus-30M", "tags": ["biology", "single-cell", "geneformer"]}

    config: GenecorpusConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.config.name == "h5ad":
            # The cells are the user's own.
            own = {"license": "other", "pretty_name": "Cells as tokens of Genecorpus-30M"}
            self.CARD = {**self.CARD, **own}  # type: ignore[misc]

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tokenizer", help="config h5ad: folder of a tokenizer; absent: Geneformer's V1")

    def _info(self) -> datasets.DatasetInfo:
        features = {"input_ids": datasets.List(datasets.Value("int32")), "length": datasets.Value("int32")}
        if self.config.name == "h5ad":
            features |= {"cell_name": datasets.Value("string"), "source": datasets.Value("string")}
        return datasets.DatasetInfo(
            description=__doc__ or "",
            features=datasets.Features(features),
            homepage="https://huggingface.co/datasets/ctheodoris/Genecorpus-30M",
            license="Apache-2.0" if self.config.name == "default" else "that of the files",
            citation="Theodoris et al., Transfer learning enables predictions in network biology, "
            "Nature 618, 616-624 (2023), doi:10.1038/s41586-023-06139-9",
        )

    def sources(self) -> Sequence[Source]:
        folder = None if self.config.data_dir is None else Path(self.config.data_dir)
        published = super().sources()
        if self.config.name == "h5ad":
            names = sorted(p.name for p in folder.iterdir() if p.suffix in COUNT_FILES) if folder else []
            if not names:
                given = folder or "a folder not given"
                raise CorpusError(f"Config h5ad reads the .h5ad and .loom files of --data-dir; {given} has none.")
            return [*([] if self.config.tokenizer else published), *map(Source, names)]
        if folder is None or not (folder / STATE).exists():
            return published
        # Newer versions of the library save in several files.
        return [Source(STATE), *map(Source, _arrow_files(folder / STATE))]

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        parts: list[Part] = []
        if self.config.name == "h5ad":
            files[TOKENIZER] = self._tokenizer(files)
            for name in files:
                if name.endswith(COUNT_FILES):
                    with source_counts(files[name]) as matrix:
                        ranges = row_parts(name, matrix.n_cells)
                    # How many of them have tokens is not known yet.
                    parts += [Part(name, part.start, part.stop) for part in ranges]
            return {"train": parts}
        for name in _arrow_files(files[STATE]):
            if name not in files:
                raise CorpusError(
                    f"{files[STATE]} names {name}, which this script does not know; it was published anew."
                )
            parts += row_parts(name, len(_rows(files[name])))
        return {"train": parts}

    def _tokenizer(self, files: dict[str, Path]) -> Path:
        if self.config.tokenizer is not None:
            return Path(self.config.tokenizer)
        folder = parts_folder(self._output_dir) / "sources" / TOKENIZER
        try:
            convert_original(files[TOKENS], files[MEDIANS]).save_pretrained(folder)
        except ValueError as error:
            raise CorpusError(str(error)) from error
        return folder

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        if self.config.name == "h5ad":
            yield from self._tokenized(files, part)
            return
        rows = _rows(files[part.file])
        for start, stop in part.blocks(ROWS_PER_BLOCK):
            block = rows.slice(start, stop - start).combine_chunks()
            input_ids, lengths = (block[name].chunk(0) for name in ("input_ids", "length"))
            n_tokens = input_ids.value_lengths().to_numpy()
            different = np.flatnonzero(n_tokens != lengths.to_numpy())
            if len(different):
                row = int(different[0])
                raise CorpusError(
                    f"{files[part.file]}: row {start + row:,} has {n_tokens[row]} tokens, but its length is "
                    f"{lengths[row]}. Fetch the file again."
                )
            yield pa.table({"input_ids": input_ids.cast(pa.list_(pa.int32())), "length": lengths.cast(pa.int32())})

    def _tokenized(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        tokenizer = RankValueTokenizer.from_pretrained(files[TOKENIZER])
        with source_counts(files[part.file]) as matrix:
            matrix.obs = matrix.obs.assign(cell_name=matrix.obs.index.astype(str))
            cells = np.zeros(matrix.n_cells, dtype=bool)
            cells[part.start : part.stop] = True
            for batch in tokenizer.iter_encoded(matrix, cells=cells, obs_columns=["cell_name"], empty_cells="drop"):
                source = pa.array([part.file] * batch.num_rows)
                yield pa.Table.from_batches([batch]).append_column("source", source)

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        super()._download_and_prepare(*args, **kwargs)
        # `_output_dir` is a temporary folder here; the library renames it when all of it is written.
        folder = Path(self._output_dir)
        shards = sorted(folder.glob(f"{self.dataset_name}-train*.parquet"))
        np.save(
            folder / LENGTHS,
            np.concatenate([pq.read_table(shard, columns=["length"])["length"].to_numpy() for shard in shards]),
        )


def _arrow_files(state: Path) -> list[str]:
    """Names of the Arrow files of a folder that `datasets.Dataset.save_to_disk` wrote, in order."""
    try:
        content = json.loads(state.read_text())
        names = [file["filename"] for file in content["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{state} is not as Dataset.save_to_disk writes it ({error!r}). Fetch it again.") from error
    if content.get("_indices_data_files"):
        raise CorpusError(f"{state} selects rows by a table of indices. Save dataset.flatten_indices() instead.")
    return names


def _rows(path: Path) -> pa.Table:
    """The rows of an Arrow file of `datasets`, memory-mapped.

    Raises  CorpusError if it is truncated, or lacks a column
    """
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path} is truncated or no Arrow file of `datasets` ({error}). Fetch it again.") from error
    require_columns(table.column_names, ["input_ids", "length"], path)
    return table


if __name__ == "__main__":
    command_line(Genecorpus30M)
