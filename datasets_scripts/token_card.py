"""The dataset card of a tokenized corpus: front matter for `load_dataset`, statistics, a picture of the lengths."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from cellglot.publication import PLACEHOLDER

PICTURE = "lengths.png"
BINS = 60
# Files of the corpus that the card lists; statistics.json has them all
MAX_FILES = 30


def write_card(
    output: Path, statistics: dict[str, Any], schema: pa.Schema, cells_of_length: np.ndarray, parts: list[Path]
) -> None:
    """Writes README.md and its picture.

    cells_of_length  (longest length + 1,) number of cells
    parts            the Parquet files, wherever they are now: they will be `data/train-*.parquet`
    """
    metadata = [pq.read_metadata(part) for part in parts]
    n_bytes = sum(m.row_group(i).total_byte_size for m in metadata for i in range(m.num_row_groups))
    split = datasets.SplitInfo("train", n_bytes, sum(m.num_rows for m in metadata))
    info = datasets.DatasetInfo(
        features=datasets.Features.from_arrow_schema(schema),
        splits=datasets.SplitDict({"train": split}),
        dataset_size=n_bytes,
        download_size=sum(part.stat().st_size for part in parts),
    )
    front = DatasetCardData(pretty_name=f"{output.name}: cells as rank-value tokens", tags=["biology", "single-cell"])
    DatasetInfosDict({"default": info}).to_dataset_card_data(front)
    files = [{"split": "train", "path": "data/train-*.parquet"}]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(front)
    _draw(cells_of_length, output / PICTURE)
    text = f"---\n{front.to_yaml()}\n---\n\n{_text(output.name, statistics, cells_of_length)}"
    partial = output / "README.tmp"
    partial.write_text(text, encoding="utf-8")
    partial.replace(output / "README.md")


def _text(name: str, statistics: dict[str, Any], cells_of_length: np.ndarray) -> str:
    before = np.cumsum(cells_of_length)
    low, high = np.searchsorted(before, before[-1] * np.array([0.05, 0.95]))
    rows = {
        "cells": f"{statistics['n_cells']:,}",
        "tokens": f"{statistics['n_tokens']:,}",
        "tokens of a cell, median (5% to 95%)": f"{statistics['median_length']:,.0f} ({low:,} to {high:,})",
        "cells truncated": f"{statistics['n_truncated_cells']:,}",
        "cells without tokens": f"{statistics['n_empty_cells']:,}",
        "counts on genes of the vocabulary": f"{_share(statistics):.1%}",
    }
    shards = statistics["shards"]
    files = [
        (shard, f"{seen['n_cells']:,}", f"{seen['n_truncated_cells']:,}", f"{_share(seen):.1%}")
        for shard, seen in list(shards.items())[:MAX_FILES]
    ]
    lines = [
        f"# {name}",
        "",
        "Single cells as rank-value tokens (Theodoris et al., Nature 2023), one row a cell: `input_ids`, `length`, and",
        "columns of the annotation. Rows are in order of file and cell. `lengths.npy` holds all lengths, `tokenizer/`",
        "the vocabulary.",
        "",
        f'```python\nfrom datasets import load_dataset\n\ncells = load_dataset("{PLACEHOLDER}", split="train")\n```',
        "",
        f"![Tokens of a cell]({PICTURE})",
        "",
        *_table(("", ""), rows.items()),
        "",
        *_table(("file", "cells", "truncated", "counts on the vocabulary"), files),
    ]
    if len(shards) > MAX_FILES:
        lines += ["", f"{len(shards) - MAX_FILES:,} more files in `statistics.json`."]
    return "\n".join(lines) + "\n"


def _share(seen: dict[str, Any]) -> float:
    return seen["matched_counts"] / seen["total_counts"] if seen["total_counts"] else 1.0


def _table(headers: tuple[str, ...], rows: Any) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (headers, ("---",) * len(headers), *rows)]


def _draw(cells_of_length: np.ndarray, path: Path) -> None:
    """A histogram of the lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.add_subplot()
    ax.hist(np.arange(len(cells_of_length)), bins=min(BINS, len(cells_of_length)), weights=cells_of_length)
    ax.set(xlabel="tokens of a cell", ylabel="cells")
    ax.spines[["top", "right"]].set_visible(False)
    partial = path.with_suffix(".tmp")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
