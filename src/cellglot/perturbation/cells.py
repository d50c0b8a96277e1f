"""Cells to perturb, from whatever they come in, checked."""

import contextlib
import hashlib
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..tokenization.count_matrix import open_counts
from ..tokenization.gene_ids import examples

# Rows of a dataset that are read at once
ROWS_PER_READ = 1000


class Cells:
    """Tokenized cells: their genes without special tokens, names and a column of labels.

    Build one with `open_cells`. Reads tokens when asked for; a dataset on disk stays there.
    """

    def __init__(self, tokens: Any, names: Sequence[str] | None, labels: np.ndarray | None, wrapping: tuple[int, ...]):
        self._tokens = tokens
        self.names = names
        self.labels = labels
        self.wrapping = wrapping  # () or (<cls>, <eos>)

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, i: int) -> np.ndarray:
        """(t,) int64 tokens of a cell as they came."""
        row = self._tokens[i]
        return np.asarray(row["input_ids"] if isinstance(row, dict) else row, dtype=np.int64)

    def genes(self, i: int) -> np.ndarray:
        """(genes,) int64 tokens of a cell's genes, most distinctive first."""
        return self.unwrapped(self.tokens(i))

    def iter_tokens(self) -> Iterator[np.ndarray]:
        """(t,) int64 tokens of each cell, read some rows at once."""
        for start in range(0, len(self), ROWS_PER_READ):
            rows = self._tokens[start : start + ROWS_PER_READ]
            for tokens in rows["input_ids"] if isinstance(rows, dict) else rows:
                yield np.asarray(tokens, dtype=np.int64)

    def unwrapped(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens without the layout's special ones."""
        return tokens[1:-1] if self.wrapping else tokens

    def wrapped(self, genes: np.ndarray) -> np.ndarray:
        """Tokens as the model reads them: with special tokens where the layout has them."""
        return np.concatenate([self.wrapping[:1], genes, self.wrapping[1:]]) if self.wrapping else genes


def open_cells(
    source: Any,
    tokenizer: Any,
    *,
    label_column: str | None = None,
    max_length: int,
    counts_layer: str | None = None,
    **encode_options: Any,
) -> Cells:
    """Cells of an AnnData, a file that `encode_anndata` reads, a datasets.Dataset (or its saved folder), or a list.

    Counts become a file of tokens in a temporary directory (that of TMPDIR), which is read a piece at a time and goes
    when the cells go; or at cache_file, where one is given, which stays.

    label_column    column of `obs` or of the dataset to carry along
    max_length      tokens the model reads at the most
    encode_options  further ones of `RankValueTokenizer.encode_anndata`, for counts
    """
    wrapping = (tokenizer.cls_token_id, tokenizer.eos_token_id) if tokenizer.layout == "v2" else ()
    source = _saved_dataset(source)
    columns = getattr(source, "column_names", None)
    if isinstance(source, str | Path) or hasattr(source, "obs_names"):
        options = {"max_length": max_length, "layer": counts_layer, **encode_options}
        return _encoded_cells(source, tokenizer, wrapping, label_column, options)
    if encode_options or counts_layer is not None:
        given = examples([*encode_options, *(["counts_layer"] if counts_layer else [])])
        raise ValueError(f"These cells are tokens already; {given} would say how to make tokens from counts.")
    if columns is None:
        if label_column is not None:
            raise ValueError(
                f"Expected a dataset or an AnnData with a column {label_column!r}, found a list of token arrays. Make "
                f'one: datasets.Dataset.from_dict({{"input_ids": cells, {label_column!r}: labels}}).'
            )
        return Cells(list(source), None, None, wrapping)
    for column in ("input_ids", *([label_column] if label_column else [])):
        if column not in columns:
            raise ValueError(f"The dataset has no column {column!r}; it has {examples(columns, 9)}.")
    return Cells(source.with_format("numpy"), None, _labels(source, label_column), wrapping)


def _encoded_cells(
    source: Any, tokenizer: Any, wrapping: tuple[int, ...], label_column: str | None, options: dict[str, Any]
) -> Cells:
    """Cells of counts. `options` as of `encode_anndata`."""
    if label_column is not None:
        options["obs_columns"] = [label_column]
    if options.get("cells") is not None or options.get("empty_cells", "keep") != "keep":
        raise ValueError("Cells are numbered as they come: select them before, not with cells= or empty_cells=.")
    with contextlib.ExitStack() as stack:
        if options.get("cache_file") is None:
            # Some systems remove no file that is mapped still.
            folder = tempfile.TemporaryDirectory(prefix="cellglot-", ignore_cleanup_errors=True)
            options["cache_file"] = Path(stack.enter_context(folder)) / "tokens.arrow"
        dataset = tokenizer.encode_anndata(source, **options)
        with open_counts(source, layer=options["layer"]) as matrix:
            passing = matrix.passing_cells()
            names = [str(name) for name in (matrix.obs.index if passing is None else matrix.obs.index[passing])]
        cells = Cells(dataset.with_format("numpy"), names, _labels(dataset, label_column), wrapping)
        weakref.finalize(cells, stack.pop_all().close)
    return cells


def _saved_dataset(source: Any) -> Any:
    if isinstance(source, str | Path) and (Path(source) / "dataset_info.json").is_file():
        import datasets

        return datasets.load_from_disk(str(source))
    return source


def _labels(dataset: Any, column: str | None) -> np.ndarray | None:
    """(cells,) labels as strings; None where a cell has none."""
    if column is None:
        return None
    # Not by pandas, which makes 1.0 of an integer where another is missing.
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    return np.array([None if v is None or v != v else str(v) for v in values], dtype=object)


def check_cells(cells: Cells, tokenizer: Any, max_genes: int) -> str:
    """Raises ValueError for what no tokenizer of this vocabulary can have made; returns a hash of all tokens."""
    digest = hashlib.blake2b(digest_size=16)
    first = int(tokenizer.gene_token_ids[0])
    n_special = len(cells.wrapping)
    for i, tokens in enumerate(cells.iter_tokens()):
        digest.update(len(tokens).to_bytes(4, "little") + tokens.astype("<i4").tobytes())
        if len(tokens) and cells.wrapping and (len(tokens) < 2 or (tokens[0], tokens[-1]) != cells.wrapping):
            raise ValueError(
                f"Cell {i} does not start with <cls> and end with <eos>, as cells of this tokenizer's layout do (it "
                f"starts with token {tokens[0]}). Encode it with this tokenizer, without padding."
            )
        genes = cells.unwrapped(tokens)
        if len(genes) == 0:
            continue
        if genes.min() < first or genes.max() >= len(tokenizer):
            bad = genes[(genes < first) | (genes >= len(tokenizer))][0]
            raise ValueError(
                f"Cell {i} has the token {bad}, no gene of this vocabulary ({first} to {len(tokenizer) - 1:,}). "
                "Encode the cells with the model's own tokenizer, without padding."
            )
        if len(genes) > max_genes:
            raise ValueError(
                f"Cell {i} has {len(genes) + n_special:,} tokens, but model and tokenizer read "
                f"{max_genes + n_special:,} at the most. Encode the cells with max_length={max_genes + n_special}."
            )
        if len(np.unique(genes)) < len(genes):
            raise ValueError(f"Cell {i} holds a gene more than once; a ranking has each gene once.")
    return digest.hexdigest()
