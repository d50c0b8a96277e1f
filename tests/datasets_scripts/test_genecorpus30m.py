"""Genecorpus-30M: the published tokens as they are, and any folder of cells tokenized in the same way."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from cellglot.datasets_scripts import corpus, genecorpus30m
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.dataset_card import write_card
from cellglot.datasets_scripts.genecorpus30m import ARROW, MEDIANS, STATE, TOKENS, Genecorpus30M

from ..conftest import ensembl, make_tokenizer, synthetic_cells

N_CELLS = 131


@pytest.fixture
def cells() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.permutation(np.arange(2, 97))[:n].tolist() for n in rng.integers(1, 90, size=N_CELLS)]


def publish(folder: Path, cells: list[list[int]], lengths: list[int] | None = None) -> None:
    """The folder of the Hub: one Arrow stream of int64 columns, as an early version of the library saved it."""
    lengths = [len(ids) for ids in cells] if lengths is None else lengths
    feature = {"input_ids": {"feature": {"dtype": "int64", "_type": "Value"}, "length": -1, "_type": "Sequence"}}
    info = {"info": {"features": {**feature, "length": {"dtype": "int64", "_type": "Value"}}}}
    table = pa.table({"input_ids": pa.array(cells, pa.list_(pa.int64())), "length": pa.array(lengths, pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    with pa.OSFile(str(folder / ARROW), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    state = {"_data_files": [{"filename": ARROW}], "_fingerprint": "1f8c", "_indices_data_files": [], "_split": None}
    (folder / STATE).write_text(json.dumps(state))


def build(tmp_path: Path, config: str = "default", **options) -> Path:
    builder = Genecorpus30M(cache_dir=str(tmp_path / "cache"), config_name=config, **options)
    builder.prepare(tmp_path / "genecorpus")
    return tmp_path / "genecorpus"


def loaded(folder: Path, config: str = "default", **options) -> Any:
    write_card(Genecorpus30M(config_name=config), folder)
    return load_dataset(str(folder), config, split="train", cache_dir=str(folder.parent / "loaded"), **options)


@pytest.mark.parametrize("rows_per_part", [23, 1000])
def test_published_tokens_come_out_as_they_are(file_server, tmp_path, monkeypatch, cells, rows_per_part):
    monkeypatch.setattr(corpus, "ROWS_PER_PART", rows_per_part)
    monkeypatch.setattr(genecorpus30m, "ROWS_PER_BLOCK", 7)
    publish(file_server.folder, cells)
    file_server.serve(Genecorpus30M)
    folder = build(tmp_path)
    assert sorted(file_server.downloads) == sorted([STATE, ARROW])
    rows = loaded(folder)
    assert rows["input_ids"][:] == cells
    assert rows["length"][:] == [len(ids) for ids in cells]
    assert rows.features["input_ids"].feature.dtype == rows.features["length"].dtype == "int32"
    assert list(loaded(folder, streaming=True)) == list(rows)
    lengths = np.load(folder / "default" / "lengths.npy", allow_pickle=False)
    assert (lengths.dtype, lengths.tolist()) == (np.int32, rows["length"][:])


def test_a_folder_saved_in_several_files_is_read_in_order(tmp_path, cells):
    tokens = Dataset.from_dict({"input_ids": cells, "length": [len(ids) for ids in cells]})
    tokens.save_to_disk(tmp_path / "saved.dataset", num_shards=3)
    rows = loaded(build(tmp_path, data_dir=str(tmp_path / "saved.dataset")))
    assert rows["input_ids"][:] == cells


def test_a_length_that_is_not_the_number_of_tokens_is_refused(file_server, tmp_path, cells):
    lengths = [len(ids) for ids in cells]
    lengths[70] += 1
    publish(file_server.folder, cells, lengths)
    file_server.serve(Genecorpus30M)
    with pytest.raises(CorpusError, match=rf"row 70 has {len(cells[70])} tokens, but its length is {lengths[70]}"):
        build(tmp_path)


def test_a_truncated_file_is_refused(file_server, tmp_path, cells):
    publish(file_server.folder, cells)
    path = file_server.folder / ARROW
    path.write_bytes(path.read_bytes()[:5_000])
    file_server.serve(Genecorpus30M)
    with pytest.raises(CorpusError, match="truncated or no Arrow file"):
        build(tmp_path)


def test_a_table_of_other_columns_is_refused(tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved.dataset")
    with pytest.raises(CorpusError, match=r"no column 'input_ids', 'length'; it has text"):
        build(tmp_path, data_dir=str(tmp_path / "saved.dataset"))


def test_a_state_that_is_none_is_refused(tmp_path):
    (tmp_path / STATE).write_text('{"files": []}')
    with pytest.raises(CorpusError, match=r"state\.json is not as Dataset\.save_to_disk writes it"):
        build(tmp_path, data_dir=str(tmp_path))


# ---- a folder of cells


def publish_dictionaries(folder: Path, n_genes: int) -> None:
    genes = ensembl(n_genes)
    tokens = {"<pad>": 0, "<mask>": 1, **{gene: i for i, gene in enumerate(genes, 2)}}
    (folder / TOKENS).write_bytes(pickle.dumps(tokens))
    (folder / MEDIANS).write_bytes(pickle.dumps({gene: 1.0 + i for i, gene in enumerate(genes)}))


def folder_of_cells(folder: Path) -> list[Any]:
    """Two .h5ad files and a .loom; the tenth cell of the first has no gene of the vocabulary."""
    folder.mkdir()
    parts = [synthetic_cells(n, 11, seed=n) for n in (31, 7, 13)]
    values = parts[0].X.toarray()
    values[9, :10] = 0
    values[9, 10] = 3
    parts[0].X = type(parts[0].X)(values)
    parts[0].write_h5ad(folder / "a.h5ad")
    parts[1].write_h5ad(folder / "b.h5ad")
    parts[2].obs["CellID"] = parts[2].obs_names
    parts[2].write_loom(folder / "c.loom")
    return parts


@pytest.mark.filterwarnings("ignore")
def test_cells_of_a_folder_are_tokenized_with_the_published_dictionaries(file_server, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS_PER_PART", 12)
    parts = folder_of_cells(tmp_path / "cells")
    publish_dictionaries(file_server.folder, 10)
    file_server.serve(Genecorpus30M)
    rows = loaded(build(tmp_path, "h5ad", data_dir=str(tmp_path / "cells")), "h5ad")
    assert sorted(file_server.downloads) == sorted([TOKENS, MEDIANS])
    tokenizer = make_tokenizer(10, medians=np.arange(1.0, 11.0))
    expected = [
        (ids, name, file)
        for file, part in zip(("a.h5ad", "b.h5ad", "c.loom"), parts, strict=True)
        for ids, name in zip(tokenizer.encode_anndata(part)["input_ids"], part.obs_names, strict=True)
        if ids
    ]
    assert list(zip(rows["input_ids"], rows["cell_name"], rows["source"], strict=True)) == expected
    assert ("cell9", "a.h5ad") not in {(name, file) for _, name, file in expected}
    assert rows["length"][:] == [len(ids) for ids, _, _ in expected]
    assert np.load(tmp_path / "genecorpus" / "h5ad" / "lengths.npy").tolist() == rows["length"][:]


def test_cells_of_a_folder_are_tokenized_with_another_tokenizer(tmp_path):
    (tmp_path / "cells").mkdir()
    cells = synthetic_cells(7, 11)
    cells.write_h5ad(tmp_path / "cells" / "a.h5ad")
    tokenizer = make_tokenizer(11, layout="v2")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = build(tmp_path, "h5ad", data_dir=str(tmp_path / "cells"), tokenizer=str(tmp_path / "tokenizer"))
    expected = tokenizer.encode_anndata(cells, empty_cells="drop")
    assert loaded(folder, "h5ad")["input_ids"][:] == expected["input_ids"][:]


def test_cells_of_a_user_are_not_published_under_the_corpus_s_licence():
    licences = {name: Genecorpus30M(config_name=name).CARD["license"] for name in ("h5ad", "default")}
    assert licences == {"h5ad": "other", "default": "apache-2.0"}


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"reads the \.h5ad and \.loom files of --data-dir; .* has none"):
        build(tmp_path, "h5ad", data_dir=str(tmp_path))


def test_a_dictionary_that_runs_code_is_refused(file_server, tmp_path):
    (tmp_path / "cells").mkdir()
    synthetic_cells(7, 11).write_h5ad(tmp_path / "cells" / "a.h5ad")
    publish_dictionaries(file_server.folder, 11)
    (file_server.folder / TOKENS).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    file_server.serve(Genecorpus30M)
    with pytest.raises(CorpusError, match=r"Refused 'os\.system'"):
        build(tmp_path, "h5ad", data_dir=str(tmp_path / "cells"))


def test_cells_with_other_genes_are_refused(file_server, tmp_path):
    (tmp_path / "cells").mkdir()
    cells = synthetic_cells(7, 11)
    cells.var_names = [f"GENE{i}" for i in range(11)]
    cells.write_h5ad(tmp_path / "cells" / "a.h5ad")
    publish_dictionaries(file_server.folder, 11)
    file_server.serve(Genecorpus30M)
    with pytest.raises(CorpusError, match=r"0 of 11 gene ids are in the vocabulary"):
        build(tmp_path, "h5ad", data_dir=str(tmp_path / "cells"))


@pytest.mark.realdata
def test_real_cells_of_the_corpus_come_out_as_they_are(real_data, file_server, tmp_path):
    sample = pq.read_table(real_data / "geneformer" / "genecorpus30m_sample_400cells.parquet")
    publish(file_server.folder, sample["input_ids"].to_pylist(), sample["length"].to_pylist())
    file_server.serve(Genecorpus30M)
    rows = loaded(build(tmp_path))
    assert len(rows) == 400
    assert rows["input_ids"][:] == sample["input_ids"].to_pylist()
    assert rows["length"][:] == sample["length"].to_pylist()


@pytest.mark.realdata
def test_real_cells_are_tokenized_as_by_the_original(real_data, tmp_path):
    """150 cells and Geneformer's own dictionaries against the tokens that its code gave: equal up to ties."""
    folder = tmp_path / "cells"
    folder.mkdir()
    for name in (TOKENS, MEDIANS):
        (folder / name).symlink_to(real_data / "geneformer" / name)
    (folder / "scmixology.h5ad").symlink_to(real_data / "golden" / "scmixology150_input.h5ad")
    rows = loaded(build(tmp_path, "h5ad", data_dir=str(folder)), "h5ad")
    official = pq.read_table(real_data / "golden" / "official_v1_tokens_scmixology150.parquet")
    assert rows["length"][:] == official["length"].to_pylist()
    same = [set(a) == set(b) for a, b in zip(rows["input_ids"], official["input_ids"].to_pylist(), strict=True)]
    # Genes of equal rank at the end of the context may be other ones.
    assert np.mean(same) > 0.9
