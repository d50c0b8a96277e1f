"""The dataset card: figures that are those of the rows, a picture, and front matter that makes the folder loadable."""

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import datasets
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from huggingface_hub import DatasetCard
from matplotlib.patches import Rectangle

from cellglot.datasets_scripts.corpus import CorpusBuilder, Part
from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.dataset_card import (
    PICTURE,
    draw_statistics,
    split_statistics,
    write_card,
)
from cellglot.datasets_scripts.ragged_counts import GENE_TABLE, ragged_features, ragged_table

from ..conftest import ROOT, ensembl, synthetic_cells
from ..hub_stub import STRANGER, running_hub


class Cells(CorpusBuilder):
    """Synthetic cells, some without any gene; the first config lacks a label, the second one has two splits."""

    VERSION = datasets.Version("1.2.3")
    SOURCES = {"one": [], "two": []}
    CARD = {"license": "cc-by-4.0", "pretty_name": "Synthetic cells", "tags": ["single-cell"]}
    LABELS = ("cell_type", "donor")

    def _info(self):
        features = ragged_features({name: datasets.Value("string") for name in labels_of(self.config.name)})
        return datasets.DatasetInfo(
            f"Cells of {self.config.name}.",
            features=features,
            citation="Nobody 2026",
            license="CC BY 4.0",
            homepage="https://example.org",
        )

    def splits(self, files):
        splits = {"one": ["train"], "two": ["train", "test"]}[self.config.name]
        return {split: [Part(split, 0, 11, 11), Part(split, 11, 23, 12)] for split in splits}

    def tables(self, files, part):
        cells = cells_of(part.file)[part.start : part.stop]
        yield ragged_table(cells.X, cells.obs[labels_of(self.config.name)])

    def side_tables(self, files):
        return {GENE_TABLE: pd.DataFrame({"gene_id": ensembl(19)})}


def labels_of(config):
    return {"one": ["donor"], "two": ["cell_type", "donor"]}[config]


def cells_of(split):
    cells = synthetic_cells(23, 19, seed=len(split))
    dense = cells.X.toarray()
    dense[[0, 7, 22]] = 0
    cells.X = sp.csr_matrix(dense)
    cells.obs.iloc[5, 0] = None
    return cells


@pytest.fixture
def output(tmp_path):
    for config in Cells.SOURCES:
        builder = Cells(cache_dir=str(tmp_path / "cache"), config_name=config)
        builder.prepare(tmp_path / "out")
        write_card(builder, tmp_path / "out")
    return tmp_path / "out"


def test_statistics_are_those_of_the_cells(output, tmp_path):
    builder = Cells(cache_dir=str(tmp_path / "cache"), config_name="two")
    files = sorted((output / "two").glob("*-test-*.parquet"))
    assert len(files) == 2
    found, cells = split_statistics(files, builder), cells_of("test")
    assert found.n_rows == 23
    np.testing.assert_array_equal(found.measures["gene_index"], (cells.X > 0).sum(axis=1).A1)
    np.testing.assert_array_equal(found.totals, cells.X.sum(axis=1).A1)
    expected = {name: dict(cells.obs[name].fillna("(none)").value_counts()) for name in ("cell_type", "donor")}
    assert found.labels == expected


def test_the_card_says_what_there_is(output):
    text = (output / "README.md").read_text()
    cells = cells_of("train")
    detected = (cells.X > 0).sum(axis=1).A1
    low, middle, high = np.percentile(detected, [5, 50, 95])
    assert f"| one/train | 23 | {middle:.3g} ({low:.3g} to {high:.3g}) |" in text
    for label, count in cells.obs["donor"].value_counts().items():
        assert re.search(rf"\| {label} \| {count} \| {count} \| \d+ \|", text)
    # Splits without the label do not stand there with zeros.
    assert "| `cell_type` | two/train | two/test |" in text
    assert "| (none) | 1 | 1 |" in text
    assert "- `one`: Cells of one.\n- `two`: Cells of two." in text
    for part in ("# Synthetic cells", "Nobody 2026", "CC BY 4.0", "Version 1.2.3", "list of int32", f"({PICTURE})"):
        assert part in text
    metadata = DatasetCard(text).data.to_dict()
    assert (metadata["license"], metadata["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    assert [config["config_name"] for config in metadata["configs"]] == ["one", "two"]
    assert not list(output.glob(".*"))


def test_every_config_and_split_loads_and_streams_from_the_folder(output, tmp_path):
    for config, splits in (("one", ["train"]), ("two", ["train", "test"])):
        loaded = datasets.load_dataset(str(output), config, cache_dir=str(tmp_path / "cache"))
        assert list(loaded) == splits
        for split in splits:
            stream = datasets.load_dataset(str(output), config, split=split, streaming=True)
            rows = list(stream)
            assert rows == loaded[split].to_list()
            assert [len(row["gene_index"]) for row in rows] == (cells_of(split).X > 0).sum(axis=1).A1.tolist()
    default = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert list(default) == ["train"]


@pytest.mark.parametrize(
    ("configs", "labels", "title", "shown"),
    [
        (["two"], ("cell_type", "donor"), "cell type", ["train", "test"]),
        # The first config has no cell_type.
        (["one", "two"], ("cell_type", "donor"), "two, cell type", ["train", "test"]),
        # Both have donors, of the same cells in part: each is counted once.
        (["one", "two"], ("donor",), "one, donor", ["train"]),
    ],
)
def test_the_picture_shows_every_cell_and_label_once(output, tmp_path, monkeypatch, configs, labels, title, shown):
    monkeypatch.setattr(Cells, "LABELS", labels)
    builder = Cells(cache_dir=str(tmp_path / "cache"), config_name="two")
    statistics = {
        config: {
            split: split_statistics(sorted((output / config).glob(f"*-{split}-*.parquet")), builder)
            for split in (["train", "test"] if config == "two" else ["train"])
        }
        for config in configs
    }
    left, right = draw_statistics(statistics, builder).axes
    assert left.get_xlabel() == "detected genes"
    assert len(left.patches) == sum(map(len, statistics.values()))
    assert right.get_title() == title
    widths: Any = [bar.get_bbox().width for bar in cast(list[Rectangle], right.patches)]
    bars = {label.get_text(): width for label, width in zip(right.get_yticklabels(), widths, strict=True)}
    expected = pd.concat([cells_of(split).obs[labels[0]] for split in shown]).fillna("(none)")
    assert bars == expected.value_counts().to_dict()


def test_the_picture_is_drawn(output):
    pixels = matplotlib.image.imread(output / PICTURE)
    assert pixels.shape[0] > 300 < pixels.shape[1]
    assert pixels.std() > 0.05


def test_a_label_without_values_leaves_the_picture_to_the_next(output, tmp_path):
    builder = Cells(cache_dir=str(tmp_path / "cache"), config_name="two")
    split = split_statistics(sorted((output / "two").glob("*-test-*.parquet")), builder)
    split.labels["cell_type"] = collections.Counter({"(none)": split.n_rows})
    assert draw_statistics({"two": {"test": split}}, builder).axes[1].get_title() == "donor"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("partial", [f".{PICTURE}", ".README.md"])
def test_a_disk_that_is_full_leaves_the_card_as_it_was(output, tmp_path, partial):
    before = (output / "README.md").read_text()
    (output / partial).symlink_to("/dev/full")
    with pytest.raises(CorpusError, match=r"The disk is full: writing to .*out failed"):
        write_card(Cells(cache_dir=str(tmp_path / "cache")), output)
    assert (output / "README.md").read_text() == before


def test_a_folder_without_the_corpus_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no built config of test_dataset_card"):
        write_card(Cells(cache_dir=str(tmp_path / "cache")), tmp_path)


LOAD = """
import json, sys
from datasets import load_dataset
loaded = load_dataset("org/pbmc", "default")
stream = load_dataset("org/pbmc", split="validation", streaming=True)
rows = list(stream)
assert rows == loaded["validation"].to_list()
print(json.dumps({"train": loaded["train"].num_rows, "names": [row["cell_name"] for row in rows]}))
"""


@pytest.mark.slow
def test_a_corpus_that_is_pushed_loads_from_the_hub(tmp_path):
    with running_hub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        script = ROOT / "datasets_scripts" / "pbmc.py"
        push = [script, "--output", tmp_path / "pbmc", "--push-to-hub", "org/pbmc", "--private"]
        subprocess.run([sys.executable, *push], env=environment, check=True, timeout=60)
        repository = hub.repositories["org/pbmc"]
        assert (repository.kind, repository.private) == ("dataset", True)
        assert repository.files.keys() == {
            "README.md",
            PICTURE,
            "default/LICENSE",
            "default/dataset_info.json",
            "default/genes.parquet",
            "default/pbmc-train.parquet",
            "default/pbmc-validation.parquet",
        }
        assert b'load_dataset("org/pbmc", "default"' in repository.files["README.md"]
        load = [sys.executable, "-c", LOAD]
        done = subprocess.run(load, env=environment, check=True, capture_output=True, text=True, timeout=60)
        # A token that may not write is found out before anything is built.
        push = [script, "--output", tmp_path / "other", "--push-to-hub", "org/other"]
        environment |= {"HF_TOKEN": STRANGER}
        refused = subprocess.run([sys.executable, *push], env=environment, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "org/other cannot be published to: the token may not write there" in refused.stderr
    assert not (tmp_path / "other").exists()
    found = json.loads(done.stdout)
    names = pd.read_parquet(tmp_path / "pbmc" / "default" / "pbmc-validation.parquet")["cell_name"]
    assert found == {"train": 595, "names": names.tolist()}
