"""The base of the corpus builders: what arrives is checked, what is built is kept, what is half-built is never seen."""

import errno
import gzip
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part, Source, command_line, row_parts
from cellglot.datasets_scripts.corpus_errors import CorpusError, require_columns
from cellglot.datasets_scripts.ragged_counts import (
    GENE_TABLE,
    ragged_features,
    ragged_table,
    read_ragged,
)

from ..conftest import ROOT, synthetic_cells


class Table(CorpusBuilder):
    """Cells of a text table, three a part; config `packed` has it gzip-compressed."""

    VERSION = datasets.Version("1.0.0")
    SOURCES = {"plain": [Source("cells.tsv", "")], "packed": [Source("cells.tsv.gz", "", unpack=True)]}

    def _info(self) -> datasets.DatasetInfo:
        features = ragged_features({"cell_type": datasets.Value("string")})
        return datasets.DatasetInfo(features=features, homepage="https://example.org")

    def _read(self, files: dict[str, Path]) -> pd.DataFrame:
        return pd.read_csv(next(iter(files.values())), sep="\t", index_col=0)

    def splits(self, files: dict[str, Path]) -> dict[str, list[Part]]:
        return {"train": row_parts(next(iter(files)), len(self._read(files)), rows_per_part=3)}

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        cells = self._read(files)
        for start, stop in part.blocks(2):
            block = cells.iloc[start:stop]
            yield ragged_table(sp.csr_matrix(block.drop(columns="cell_type").to_numpy()), block[["cell_type"]])

    def side_tables(self, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
        return {GENE_TABLE: pd.DataFrame({"gene_id": self._read(files).columns.drop("cell_type")})}


class Named(Table):
    """Its configs are made beforehand, and the processes that build its second part are killed."""

    BUILDER_CONFIGS = [datasets.BuilderConfig(name="plain"), datasets.BuilderConfig(name="packed")]
    DEFAULT_CONFIG_NAME = "plain"

    def tables(self, files: dict[str, Path], part: Part) -> Iterator[pa.Table]:
        if part.start == 3 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().tables(files, part)


@pytest.fixture
def cells():
    return synthetic_cells(7, 5)


@pytest.fixture
def publisher(file_server, cells):
    table = cells.to_df().assign(cell_type=cells.obs["cell_type"])
    for name in ("cells.tsv", "cells.tsv.gz"):
        table.to_csv(file_server.folder / name, sep="\t")
    file_server.serve(Table)
    return file_server


def built(tmp_path: Path, config: str = "plain", **options) -> Path:
    return Table(cache_dir=str(tmp_path / "cache"), config_name=config).prepare(tmp_path / "out", **options)


def equal(folder: Path, cells) -> None:
    found = read_ragged(folder, "train")
    np.testing.assert_array_equal(found.X.toarray(), cells.X.toarray())
    assert found.obs_names.tolist() == cells.obs_names.tolist()
    assert found.var_names.tolist() == cells.var_names.tolist()
    assert found.obs["cell_type"].tolist() == cells.obs["cell_type"].tolist()


@pytest.mark.parametrize(("config", "num_proc"), [("plain", 1), ("packed", 1), ("packed", 2)])
def test_what_is_downloaded_is_what_comes_out(publisher, cells, tmp_path, config, num_proc):
    folder = built(tmp_path, config, num_proc=num_proc)
    equal(folder, cells)
    names = {f"test_corpus-train-{i:05d}-of-00003.parquet" for i in range(3)}
    assert {path.name for path in folder.iterdir()} == {*names, GENE_TABLE, "dataset_info.json"}


def test_files_on_disk_are_not_downloaded(publisher, cells, tmp_path):
    builder = Table(cache_dir=str(tmp_path / "cache"), config_name="packed", data_dir=str(publisher.folder))
    equal(builder.prepare(tmp_path / "out"), cells)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    (publisher.folder / "cells.tsv").rename(unpacked / "cells.tsv")
    builder = Table(cache_dir=str(tmp_path / "cache"), config_name="packed", data_dir=str(unpacked))
    equal(builder.prepare(tmp_path / "out2"), cells)
    assert publisher.downloads == []


def test_a_corpus_is_downloaded_and_built_once(publisher, cells, tmp_path, monkeypatch):
    equal(built(tmp_path), cells)
    monkeypatch.setattr(Table, "tables", None)
    equal(built(tmp_path), cells)
    assert publisher.downloads == ["cells.tsv"]


def test_a_download_cut_short_leaves_nothing_and_the_next_run_mends_it(publisher, cells, tmp_path):
    publisher.cut_short.add("cells.tsv")
    with pytest.raises(
        CorpusError, match=r"/cells\.tsv could not be downloaded whole .* fetch cells\.tsv by other means"
    ):
        built(tmp_path)
    assert not (tmp_path / "out" / "plain").exists()
    publisher.cut_short.clear()
    equal(built(tmp_path), cells)


def test_a_packed_file_that_is_truncated_is_named_and_fetched_anew(publisher, cells, tmp_path):
    whole = (publisher.folder / "cells.tsv.gz").read_bytes()
    (publisher.folder / "cells.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"cells\.tsv\.gz .*is truncated or no gzip file .*was deleted"):
        built(tmp_path, "packed")
    (publisher.folder / "cells.tsv.gz").write_bytes(whole)
    equal(built(tmp_path, "packed"), cells)


@pytest.mark.parametrize("algorithm", ["sha256", "md5", "sha512"])
def test_a_wrong_checksum_is_refused_and_the_file_fetched_anew(publisher, cells, tmp_path, algorithm):
    digest = hashlib.new(algorithm, (publisher.folder / "cells.tsv").read_bytes()).hexdigest()
    publisher.serve(Table, {"cells.tsv": f"{algorithm}:{'0' * len(digest)}"})
    with pytest.raises(
        CorpusError, match=rf"\(cells\.tsv, [\d,]+ bytes\) has {algorithm} {digest}, expected 0+: trunc.*It was deleted"
    ):
        built(tmp_path)
    assert not (tmp_path / "out" / "plain").exists()
    publisher.serve(Table, {"cells.tsv": f"{algorithm}:{digest}"})
    equal(built(tmp_path), cells)
    assert publisher.downloads == ["cells.tsv", "cells.tsv"]


def test_a_wrong_checksum_of_a_file_on_disk_is_refused_and_the_file_kept(publisher, tmp_path):
    publisher.serve(Table, {"cells.tsv": "sha256:" + "0" * 64})
    builder = Table(cache_dir=str(tmp_path / "cache"), data_dir=str(publisher.folder))
    with pytest.raises(CorpusError, match="Fetch it again"):
        builder.prepare(tmp_path / "out")
    assert (publisher.folder / "cells.tsv").exists()


def test_a_file_that_nobody_serves_is_named(publisher, tmp_path):
    (publisher.folder / "cells.tsv").unlink()
    with pytest.raises(CorpusError, match=r"cells\.tsv could not be downloaded whole \(FileNotFoundError"):
        built(tmp_path)


def fail_at(monkeypatch, part: int, error: BaseException) -> list[int]:
    """Makes the builder fail within a part, after its first block; returns the starts of the parts that it began."""
    begun = []
    tables = Table.tables

    def failing(self, files, one):
        begun.append(one.start)
        for i, table in enumerate(tables(self, files, one)):
            if i == 1 and one.start == 3 * part:
                raise error
            yield table

    monkeypatch.setattr(Table, "tables", failing)
    return begun


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CorpusError, "The disk is full: writing to .*parts failed"),
        (OSError("truncated or corrupt"), CorpusError, r"truncated or corrupt \(Downloads.*cells\.tsv is .*downloads"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_after_a_failure_only_what_is_missing_is_built(publisher, cells, tmp_path, monkeypatch, error, raised, message):
    with monkeypatch.context() as patch:
        assert fail_at(patch, 1, error) == []
        with pytest.raises(raised, match=message):
            built(tmp_path)
    assert not (tmp_path / "out" / "plain").exists()
    assert not list((tmp_path / "out").rglob("*.parquet"))
    with monkeypatch.context() as patch:
        begun = fail_at(patch, 99, error)
        equal(built(tmp_path), cells)
    assert begun == [3, 6]
    assert publisher.downloads == ["cells.tsv"]
    assert not (tmp_path / "out" / "plain.parts").exists()


@pytest.mark.parametrize("where", ["datasets.utils.file_utils.fsspec_get", "cellglot.datasets_scripts.corpus._link"])
def test_a_disk_that_is_full_is_said_so_wherever_it_happens(publisher, cells, tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(CorpusError, match="The disk is full"):
            built(tmp_path)
    assert not (tmp_path / "out" / "plain").exists()
    equal(built(tmp_path), cells)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_write_that_the_system_refuses_keeps_the_parts_before(publisher, cells, tmp_path, num_proc):
    parts = tmp_path / "out" / "plain.parts"
    parts.mkdir(parents=True)
    (parts / "train-00002.tmp").symlink_to("/dev/full")
    with pytest.raises(
        CorpusError, match=r"The disk is full: writing to .*plain\.parts failed \(No space left on device"
    ):
        built(tmp_path, num_proc=num_proc)
    assert sorted(path.name for path in parts.glob("*.part")) == ["train-00000.part", "train-00001.part"]
    (parts / "train-00002.tmp").unlink()
    equal(built(tmp_path), cells)


def test_parts_of_another_source_are_not_taken_over(publisher, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            Table(data_dir=str(publisher.folder), cache_dir=str(tmp_path / "cache")).prepare(tmp_path / "out")
    others = synthetic_cells(7, 5, seed=1)
    others.to_df().assign(cell_type=others.obs["cell_type"]).to_csv(publisher.folder / "cells.tsv", sep="\t")
    equal(Table(data_dir=str(publisher.folder), cache_dir=str(tmp_path / "cache")).prepare(tmp_path / "out"), others)


@pytest.mark.slow
def test_a_killed_build_continues_where_it_was(publisher, cells, tmp_path):
    """The library cleans up after an exception, but not after a kill."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from tests.datasets_scripts import test_corpus\n"
        "def killed(self, files, part, tables=test_corpus.Table.tables):\n"
        "    if part.start == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    yield from tables(self, files, part)\n"
        "test_corpus.Table.tables = killed\n"
        "test_corpus.Table(data_dir=sys.argv[1], cache_dir=sys.argv[2]).prepare(sys.argv[3])\n"
    )
    arguments = [publisher.folder, tmp_path / "cache", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "plain").exists()
    assert not list((tmp_path / "out").rglob("*train*.parquet"))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "plain.parts").glob("*.part")}
    assert sorted(kept) == ["train-00000.part", "train-00001.part"]
    folder = Table(data_dir=str(publisher.folder), cache_dir=str(tmp_path / "cache")).prepare(tmp_path / "out")
    equal(folder, cells)
    assert {path.stat().st_mtime_ns for path in folder.glob("*.parquet")} >= set(kept.values())


def test_a_folder_with_other_contents_is_left_alone(publisher, tmp_path):
    mine = tmp_path / "out" / "plain" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(CorpusError, match="has files of other origin in it"):
        built(tmp_path)
    assert mine.read_text() == "mine"


def test_another_version_in_the_folder_is_refused(publisher, tmp_path, monkeypatch):
    built(tmp_path)
    monkeypatch.setattr(Table, "VERSION", datasets.Version("1.1.0"))
    with pytest.raises(CorpusError, match=r"'plain', '1\.0\.0'\), not \('test_corpus', 'plain', '1\.1\.0'\)"):
        built(tmp_path)


@pytest.mark.parametrize("config", ["plain", "packed"])
def test_configs_made_beforehand_are_of_the_builder_s_version(publisher, cells, tmp_path, config):
    publisher.serve(Named)
    builder = Named(cache_dir=str(tmp_path / "cache"), config_name=config)
    assert str(builder.config.version) == str(builder.info.version) == "1.0.0"
    folder = builder.prepare(tmp_path / "out")
    equal(folder, cells)
    assert str(datasets.DatasetInfo.from_directory(str(folder)).version) == "1.0.0"


def test_a_process_that_is_killed_is_said_to_be_and_a_rerun_continues(publisher, cells, tmp_path):
    publisher.serve(Named)
    with pytest.raises(CorpusError, match=r"was killed, most often for want of memory.*smaller --num-proc"):
        Named(cache_dir=str(tmp_path / "cache")).prepare(tmp_path / "out", num_proc=2)
    assert not (tmp_path / "out" / "plain").exists()
    equal(Named(cache_dir=str(tmp_path / "cache")).prepare(tmp_path / "out"), cells)


def test_a_file_without_address_has_to_be_on_disk(publisher, tmp_path, monkeypatch):
    monkeypatch.setattr(Table, "SOURCES", {"plain": [Source("cells.tsv")]})
    with pytest.raises(CorpusError, match=r"cells\.tsv is not in a folder given with --data-dir.*https://example\.org"):
        built(tmp_path)


def test_a_data_folder_that_is_not_there_is_no_reason_to_download(publisher, tmp_path):
    with pytest.raises(CorpusError, match=r"--data-dir .*absent is no folder"):
        Table(data_dir=str(tmp_path / "absent"), cache_dir=str(tmp_path / "cache")).prepare(tmp_path / "out")
    assert publisher.downloads == []


def test_the_missing_column_is_named_with_what_is_there():
    with pytest.raises(CorpusError, match=r"metadata\.csv has no column 'class_label'; it has sample_name, region"):
        require_columns(["sample_name", "region"], ["sample_name", "class_label"], "metadata.csv")
    with pytest.raises(CorpusError, match=r"it has 0, 1, .*, 19, \.\.\. \(31 in all\)"):
        require_columns(range(31), ["x"], "t")


def test_the_library_leaves_the_scripts_file_functions_alone(publisher, tmp_path):
    """For streaming, it would put its own in the place of `open`, `Path` and others of a builder's module."""
    from cellglot.datasets_scripts import corpus

    Table(cache_dir=str(tmp_path))
    assert corpus.Path is Path
    assert corpus.gzip.open is gzip.open


def test_the_library_s_other_formats_work_too(publisher, cells, tmp_path):
    builder = Table(cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    rows = builder.as_dataset("train")
    assert rows["cell_name"][:] == cells.obs_names.tolist()
    assert rows[2]["count"] == [x for x in cells.X.toarray()[2].tolist() if x]


def test_the_command_line_builds_and_says_what_is_wrong(publisher, cells, tmp_path, capsys):
    arguments = ["--config", "packed", "--data-dir", str(publisher.folder), "--output", str(tmp_path / "out")]
    equal(command_line(Table, arguments), cells)
    rows = datasets.load_dataset(str(tmp_path / "out"), "packed", split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["cell_name"][:] == cells.obs_names.tolist()
    (publisher.folder / "cells.tsv").write_text("x")
    publisher.serve(Table, {"cells.tsv": "md5:00"})
    with pytest.raises(SystemExit) as exit_:
        command_line(Table, ["--data-dir", str(publisher.folder), "--output", str(tmp_path / "other")])
    assert exit_.value.code == 1
    assert "has md5 9dd4e461268c8034f5c8564e155c67a6, expected 00" in capsys.readouterr().err
    for wrong, message in (
        (["--push-to-hub", "org/name"], "needs --output"),
        (["--private"], "needs --push-to-hub"),
        (["--num-proc", "0"], "has to be 1 at least, not 0"),
    ):
        with pytest.raises(SystemExit):
            command_line(Table, wrong)
        assert message in capsys.readouterr().err
