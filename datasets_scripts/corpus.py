"""The base of the corpus builders: published files in, Parquet shards out, restarted where it stopped.

A corpus says where its files are, into which parts they divide, and what tables a part becomes:

    class MouseBrain(CorpusBuilder):
        VERSION = datasets.Version("1.0.0")
        SOURCES = {"default": [Source("l5_all.loom", "https://host/l5_all.loom", "sha256:0a1b...")]}
        LABELS = ("Class",)
        CARD = {"license": "cc-by-4.0", "tags": ["biology", "single-cell"]}

        def _info(self) -> datasets.DatasetInfo:
            features = ragged_features({"Class": datasets.Value("string")})
            return datasets.DatasetInfo(features=features, description=..., license=..., citation=..., homepage=...)

        def splits(self, files):
            with source_counts(files["l5_all.loom"]) as counts:
                return {"train": row_parts("l5_all.loom", counts.n_cells)}

        def tables(self, files, part):
            with source_counts(files[part.file]) as counts:
                require_columns(counts.obs, ["Class"], files[part.file])
                for start, stop in part.blocks():
                    yield ragged_table(counts.read_block(start, stop)[1], counts.obs.iloc[start:stop])

        def side_tables(self, files):
            return {GENE_TABLE: pd.DataFrame({"gene_id": ...})}

    if __name__ == "__main__":
        command_line(MouseBrain)

`MouseBrain(data_dir=..., cache_dir=...).prepare(output)` builds `output/<config>/` with one Parquet file a part. Parts
are written aside and renamed in `output/<config>.parts`, which outlives a crash, and move into place together at the
end: a second run builds only what is missing. Downloads are the library's: cached by address, kept between runs.
"""

import argparse
import gzip
import hashlib
import inspect
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.arrow_writer import ParquetWriter
from datasets.config import DATASET_INFO_FILENAME
from datasets.utils import tqdm
from huggingface_hub.utils import httpx

from cellglot.datasets_scripts.corpus_errors import CorpusError, disk_full

# One Parquet file each: some hundred MB of counts before compression, as in the library's own shards
ROWS_PER_PART = 20_000
ROWS_PER_BLOCK = 512
BYTES_PER_READ = 1 << 20


@dataclass(frozen=True)
class Source:
    """A published file.

    file_name  as published; what is looked for in `--data-dir`, and the key of `files`
    url        where it is downloaded from (https, or hf://datasets/org/name@revision/path); None: only in `--data-dir`
    checksum   "<algorithm>:<hex digest>" with an algorithm of hashlib, as published; None where none is
    unpack     gunzip it before use; `files` then leads to the unpacked file, which `--data-dir` may hold as well
    """

    file_name: str
    url: str | None = None
    checksum: str | None = None
    unpack: bool = False

    @property
    def unpacked_name(self) -> str:
        return self.file_name.removesuffix(".gz") if self.unpack else self.file_name


@dataclass(frozen=True)
class Part:
    """What becomes one Parquet file: `start` to before `stop` of a file, in what its reader counts (rows, or bytes).

    n_rows  rows it will give, where known beforehand: the length of the progress bar
    """

    file: str
    start: int
    stop: int
    n_rows: int | None = None

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive blocks of `size`, or of ROWS_PER_BLOCK."""
        size = size or ROWS_PER_BLOCK
        for start in range(self.start, self.stop, size):
            yield start, min(start + size, self.stop)


def row_parts(file: str, n_rows: int, rows_per_part: int | None = None) -> list[Part]:
    """The rows of a file in parts of equal size (ROWS_PER_PART if none is given), the last one smaller."""
    rows_per_part = rows_per_part or ROWS_PER_PART
    starts = range(0, n_rows, rows_per_part)
    return [Part(file, a, min(a + rows_per_part, n_rows), min(rows_per_part, n_rows - a)) for a in starts]


def _keep_own_file_functions(module: str) -> None:
    """Says that a module is ready for streaming, so that the library leaves its `open`, `Path`, `gzip` and `pd` alone.

    It would put functions of its own there, for remote files. Sources are local here; what streams is the output.
    """
    sys.modules[module]._patched_for_streaming = True  # type: ignore[attr-defined]


_keep_own_file_functions(__name__)


class CorpusBuilder(datasets.ArrowBasedBuilder):
    """A corpus of published files; subclasses define `_info`, `splits`, `tables` and, mostly, `side_tables`.

    SOURCES  config name -> its files; the first config is the default, unless DEFAULT_CONFIG_NAME is set
    CARD     front matter of the dataset card: license (an identifier of the Hub), pretty_name, tags
    ROWS     what a row is, in the plural
    LABELS   columns whose values the dataset card counts, the first one in its picture
    MEASURE  numeric column, or list column whose length is taken, that the picture shows the distribution of
    """

    SOURCES: ClassVar[Mapping[str, Sequence[Source]]] = {}
    CARD: ClassVar[Mapping[str, Any]] = {}
    ROWS: ClassVar[str] = "cells"
    LABELS: ClassVar[Sequence[str]] = ()
    MEASURE: ClassVar[str] = "gene_index"

    # The library sets it before it builds anything.
    _output_dir: str

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        _keep_own_file_functions(cls.__module__)

    def __init__(self, *args: Any, **kwargs: Any):
        # Not the module's name, which is __main__ for a script that is run.
        name = Path(inspect.getfile(type(self))).stem
        super().__init__(*args, **{"dataset_name": name, "config_name": self.configs()[0], **kwargs})
        self.name = self.info.builder_name = name
        self._downloads: dict[str, Path] = {}

    def _create_builder_config(self, *args: Any, **kwargs: Any) -> tuple[datasets.BuilderConfig, str]:
        config, config_id = super()._create_builder_config(*args, **kwargs)
        # The library gives it to configs that it makes itself; those of BUILDER_CONFIGS would be of version 0.0.0.
        return replace(config, version=self.VERSION), config_id

    @classmethod
    def configs(cls) -> list[str]:
        """Names of the configs, the default first."""
        first = cls.DEFAULT_CONFIG_NAME
        return list(cls.SOURCES) if first is None else [first, *(name for name in cls.SOURCES if name != first)]

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Adds the options of this corpus alone; each becomes a field of its config (`BUILDER_CONFIG_CLASS`)."""

    def sources(self) -> Sequence[Source]:
        """The files of this config."""
        return self.SOURCES[self.config.name]

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        """Split name -> its parts, in order. `files` maps the sources' names to where they are."""
        raise NotImplementedError

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        """Blocks of rows of one part, with the columns of `_info().features`. May run in another process."""
        raise NotImplementedError

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        """File name -> table that belongs to the data, such as genes.parquet: row i is gene_index i."""
        return {}

    def prepare(self, output: str | Path | None = None, num_proc: int | None = None) -> Path:
        """The folder of this config, `output`/<config>, built as Parquet unless it is there already.

        output    None: the library's cache
        num_proc  processes that build parts
        Raises    CorpusError for bad sources, a full disk, or a folder with something else in it
        """
        folder = Path(self._cache_dir) if output is None else Path(output).absolute() / self.config.name
        if self.config.data_dir is not None and not Path(self.config.data_dir).is_dir():
            # Or all would be downloaded.
            raise CorpusError(
                f"--data-dir {self.config.data_dir} is no folder. Correct it, or leave it out to download."
            )
        self._refuse_other_contents(folder)
        try:
            self.download_and_prepare(output_dir=str(folder), file_format="parquet", num_proc=num_proc)
        except OSError as error:
            raise self._explained(error, folder) from error
        shutil.rmtree(parts_folder(folder), ignore_errors=True)
        return folder

    def _explained(self, error: OSError, folder: Path) -> CorpusError:
        """A file that cannot be read or written, with what to do about it."""
        full = disk_full(error, folder)
        if full is not None:
            return full
        downloads = ", ".join(f"{name} is {path}" for name, path in self._downloads.items())
        hint = f" (Downloads, to be deleted if they are at fault: {downloads}.)" if downloads else ""
        return CorpusError(f"{error}{hint}")

    def _refuse_other_contents(self, folder: Path) -> None:
        # The library would take another corpus or version for this one, and delete what is no corpus.
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not (folder / DATASET_INFO_FILENAME).exists():
            raise CorpusError(f"{folder} has files of other origin in it. Choose another --output, or empty it.")
        found = datasets.DatasetInfo.from_directory(str(folder))
        ours, theirs = ((i.builder_name, i.config_name, str(i.version)) for i in (self.info, found))
        if ours != theirs:
            raise CorpusError(
                f"{folder} holds {theirs}, not {ours} (corpus, config, version). "
                "Choose another --output, or delete that folder."
            )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        folder = parts_folder(self._output_dir) / "sources"
        folder.mkdir(parents=True, exist_ok=True)
        found = {source.file_name: self._find(source, dl_manager) for source in self.sources()}
        self.info.download_checksums = {
            source.file_name: {"num_bytes": n_bytes(found[source.file_name]), "checksum": source.checksum}
            for source in self.sources()
        }
        files = {source.file_name: self._place(found[source.file_name], source, folder) for source in self.sources()}
        splits = self.splits(files)
        for name, parts in splits.items():
            if not parts:
                raise CorpusError(f"{', '.join(map(str, files.values()))} give no rows for split {name!r}.")
        self._forget_other_parts(found, splits)
        # `_output_dir` is a temporary folder here; the library renames it when all of it is written.
        for name, table in self.side_tables(files).items():
            table.to_parquet(Path(self._output_dir) / name, index=False)
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"files": files, "parts": parts})
            for name, parts in splits.items()
        ]

    def _find(self, source: Source, dl_manager: Any) -> Path:
        """Where a source is on disk: in the data folder, else downloaded; its checksum verified."""
        if self.config.data_dir is not None:
            for name in dict.fromkeys((source.file_name, source.unpacked_name)):
                path = Path(self.config.data_dir) / name
                if path.exists():
                    # The published checksum is that of the packed file.
                    if name == source.file_name:
                        _verify(path, source, "Fetch it again")
                    return path
        if source.url is None:
            raise CorpusError(
                f"{source.file_name} is not in {self.config.data_dir or 'a folder given with --data-dir'}, "
                f"and cannot be downloaded without asking its owner. See {self.info.homepage}."
            )
        # Slow to import, and needed for downloads only
        from aiohttp import ClientError

        try:
            path = Path(dl_manager.download(source.url))
        except (OSError, ClientError, httpx.HTTPError) as error:
            full = isinstance(error, OSError) and disk_full(error, dl_manager.download_config.cache_dir)
            raise full or CorpusError(
                f"{source.url} could not be downloaded whole ({type(error).__name__}: {error}). Run the same command "
                f"again (files that did arrive are kept), or fetch {source.file_name} by other means into a --data-dir."
            ) from error
        try:
            _verify(path, source, "It was deleted; run the same command again")
        except CorpusError:
            # Or the cache would give it back for ever.
            path.unlink()
            raise
        self._downloads[source.file_name] = path
        return path

    def _place(self, path: Path, source: Source, folder: Path) -> Path:
        """A source under its own name (the download cache knows none), unpacked if it is to be."""
        if source.unpack and path.name != source.unpacked_name:
            try:
                return _unpacked(path, folder / source.unpacked_name)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                mend = "Fetch it again"
                if source.file_name in self._downloads:
                    path.unlink()
                    mend = "It was deleted; run the same command again"
                raise CorpusError(
                    f"{source.file_name} ({path}) is truncated or no gzip file ({error}). {mend}."
                ) from error
        if path.name in (Path(source.file_name).name, source.unpacked_name):
            return path
        _link(path, folder / source.file_name, symbolic=True)
        return folder / source.file_name

    def _forget_other_parts(self, found: Mapping[str, Path], splits: Mapping[str, Sequence[Part]]) -> None:
        """Deletes parts that another version, other options or other source files left."""
        state = {
            name: [(file.stat().st_size, file.stat().st_mtime_ns) for file in _files_of(path)]
            for name, path in found.items()
        }
        parts = {name: [asdict(part) for part in split] for name, split in splits.items()}
        key = json.dumps([self.name, str(self.config.version), self.config_id, state, parts])
        folder = parts_folder(self._output_dir)
        recorded = folder / "parts.json"
        if not recorded.exists() or recorded.read_text() != key:
            for shard in folder.glob("*.part"):
                shard.unlink()
            partial = recorded.with_suffix(".tmp")
            partial.write_text(key)
            partial.replace(recorded)

    def _generate_tables(self, files: dict[str, Path], parts: list[Part]) -> Iterator[tuple[Any, pa.Table]]:  # type: ignore[override]
        for i, part in enumerate(parts):
            for k, table in enumerate(self.tables(files, part)):
                yield datasets.builder.Key(i, k), table

    def _prepare_split(
        self,
        split_generator: datasets.SplitGenerator,
        file_format: str = "arrow",
        num_proc: int | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        if file_format != "parquet" or max_shard_size is not None:
            super()._prepare_split(split_generator, file_format, num_proc, max_shard_size)
            return
        split, files, parts = split_generator.name, *split_generator.gen_kwargs.values()
        folder = parts_folder(self._output_dir)
        shards = [folder / f"{split}-{i:05d}.part" for i in range(len(parts))]
        missing = [i for i, shard in enumerate(shards) if not shard.exists()]
        jobs = [(shards[i], files, parts[i]) for i in missing]
        known = [part.n_rows for part in parts]
        total = None if None in known else sum(n for n in known if n is not None)
        with tqdm(total=total, unit=f" {self.ROWS}", desc=f"{self.dataset_name} {split}") as bar:
            bar.update(sum(pq.read_metadata(shard).num_rows for shard in shards if shard.exists()))
            try:
                if (num_proc or 1) > 1 and len(jobs) > 1:
                    workers = min(num_proc or 1, len(jobs))
                    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                        for n_rows in pool.map(self._write_part, *zip(*jobs, strict=True)):
                            bar.update(n_rows)
                else:
                    for job in jobs:
                        self._write_part(*job, progress=bar.update)
            except OSError as error:
                # Here, since the library turns every OSError of a split into "Cannot find data file".
                raise self._explained(error, folder) from error
            except BrokenProcessPool as error:
                raise CorpusError(
                    "A process that built parts was killed, most often for want of memory. Run the same command again "
                    "with a smaller --num-proc: it continues with what is done."
                ) from error
        written = [pq.read_metadata(shard) for shard in shards]
        info = split_generator.split_info
        info.shard_lengths = [shard.num_rows for shard in written]
        info.num_examples = sum(info.shard_lengths)
        info.num_bytes = sum(s.row_group(k).total_byte_size for s in written for k in range(s.num_row_groups))
        n = len(shards)
        for i, shard in enumerate(shards):
            # The library's own names
            numbered = "" if n == 1 else f"-{i:05d}-of-{n:05d}"
            _link(shard, Path(self._output_dir) / f"{self.dataset_name}-{split}{numbered}.parquet")

    def _write_part(
        self, shard: Path, files: dict[str, Path], part: Part, progress: Callable[[int], Any] | None = None
    ) -> int:
        """Writes one part aside and renames it; returns its rows."""
        partial = shard.with_suffix(".tmp")
        n_rows = 0
        with ParquetWriter(features=self.info.features, path=str(partial)) as writer:
            for table in self.tables(files, part):
                writer.write_table(table)
                n_rows += len(table)
                if progress is not None:
                    progress(len(table))
            writer.finalize()
        partial.replace(shard)
        return n_rows


def parts_folder(folder: str | Path) -> Path:
    """Where the finished parts of a folder wait; no name in it ends like a data file, so nobody loads half a corpus."""
    return Path(str(folder).removesuffix(".incomplete") + ".parts")


def _files_of(path: Path) -> list[Path]:
    """A file, or those of a folder that is one source (10x .mtx)."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def n_bytes(path: Path) -> int:
    """Size of a source."""
    return sum(file.stat().st_size for file in _files_of(path))


def _verify(path: Path, source: Source, how_to_mend: str) -> None:
    """Raises CorpusError if a file's checksum is not the published one."""
    if source.checksum is None:
        return
    algorithm, expected = source.checksum.split(":")
    digest = hashlib.new(algorithm)
    with path.open("rb") as file, _bytes_bar("Verifying", source.file_name, path.stat().st_size) as bar:
        while block := file.read(BYTES_PER_READ):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected.lower():
        raise CorpusError(
            f"{path} ({source.file_name}, {path.stat().st_size:,} bytes) has {algorithm} {digest.hexdigest()}, "
            f"expected {expected}: truncated, damaged or another version. {how_to_mend}."
        )


def _bytes_bar(verb: str, name: str, total: int | None = None) -> Any:
    return tqdm(total=total, unit="B", unit_scale=True, desc=f"{verb} {name}")


def _unpacked(packed: Path, path: Path) -> Path:
    """`packed` gunzipped to `path`, aside and renamed, unless that was done before."""
    if path.exists() and path.stat().st_mtime_ns >= packed.stat().st_mtime_ns:
        return path
    partial = path.with_name(path.name + ".tmp")
    with gzip.open(packed) as source, partial.open("wb") as target, _bytes_bar("Unpacking", path.name) as bar:
        while block := source.read(BYTES_PER_READ):
            target.write(block)
            bar.update(len(block))
    partial.replace(path)
    return path


def _link(path: Path, link: Path, *, symbolic: bool = False) -> None:
    """`path` under another name, without a copy where the file system can."""
    link.unlink(missing_ok=True)
    try:
        if symbolic:
            link.symlink_to(path.absolute())
        else:
            os.link(path, link)
    except OSError:
        shutil.copyfile(path, link)


def command_line(builder_class: type[CorpusBuilder], arguments: Sequence[str] | None = None) -> Path:
    """Builds a corpus and its dataset card as the command line says; returns the folder of the config."""
    # First, since what it draws with may not be installed
    from cellglot.datasets_scripts.dataset_card import write_card
    from cellglot.hub import HubError, create_repository
    from cellglot.publication import find_publication, publish

    parser = argparse.ArgumentParser(
        description=inspect.getdoc(inspect.getmodule(builder_class)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    configs = builder_class.configs()
    parser.add_argument(
        "--config", dest="config_name", choices=configs, default=configs[0], help=f"absent: {configs[0]}"
    )
    parser.add_argument("--data-dir", help="folder with the published files that are on disk already")
    parser.add_argument(
        "--output", help="folder for Parquet files and dataset card; absent: the datasets cache, no card"
    )
    parser.add_argument("--num-proc", type=int, default=1, help="processes that build parts")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="uploads the output folder; needs --output")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: a private repository")
    builder_class.add_arguments(parser)
    options = vars(parser.parse_args(arguments))
    output, num_proc, repository, private = (
        options.pop(name) for name in ("output", "num_proc", "push_to_hub", "private")
    )
    if num_proc < 1:
        parser.error(f"--num-proc has to be 1 at least, not {num_proc}.")
    if private and not repository:
        parser.error("--private needs --push-to-hub.")
    if repository and output is None:
        parser.error("--push-to-hub needs --output, the folder that it uploads.")
    try:
        if repository:
            # Before hours of building: a wrong name or token shows at once.
            create_repository(repository, "dataset", private=private)
        builder = builder_class(**options)
        folder = builder.prepare(output, num_proc)
        if output is not None:
            # Pyright knows this module by two names, through the link in the package.
            print(write_card(builder, output))  # type: ignore[arg-type]
            if repository:
                print(publish(find_publication(output, repository), private=private))
    except (CorpusError, HubError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(folder)
    return folder
