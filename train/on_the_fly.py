"""Training cells that are encoded from their count files while the model trains, in place of tokens on disk.

Files are read in blocks of neighbouring cells, the only way that is fast in a compressed file. An epoch takes the
blocks in random order and mixes the cells of `WINDOW` blocks at any time (see `EpochPlan`), so that a process reads
each block about once an epoch. Every process does, of a data loader or of a distributed run, whichever cells it takes.
"""

import contextlib
import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellglot.tokenization.count_matrix import CELLS_PER_BLOCK, open_counts
from cellglot.tokenization.ordered_map import available_threads, ordered_map
from cellglot.tokenization.rank_value import RankValueTokenizer, TokenizationReport

from .batches import MEGABATCH_STEPS, WINDOW

# Files held open at once: systems allow a process some hundreds.
OPEN_FILES = 128


def measure_lengths(
    tokenizer: RankValueTokenizer, source: Any, cells: np.ndarray, file: Path, **options: Any
) -> TokenizationReport:
    """Encodes the marked cells once, checks them, and keeps the number of tokens of each, 8 bytes a cell.

    file    .npy to write: (2, cells with a gene of the vocabulary) int32, their positions and lengths
    Raises  ValueError for a file that cannot be read in any order of cells
    """
    report = TokenizationReport()
    lengths = np.zeros(len(cells), dtype=np.int32)
    start = 0
    with open_counts(source, layer=options.get("layer")) as matrix:
        if str(source).endswith(".h5ad") and not matrix.concurrent:
            raise ValueError(
                f"{matrix.name}: on_the_fly reads cells in random order, but counts are stored by gene (CSC), where "
                "each block of cells costs a pass over the file. Write them as CSR (adata.X = adata.X.tocsr()), or "
                "leave on_the_fly out."
            )
        passing = matrix.passing_cells(cells)
        assert passing is not None
        chosen = np.flatnonzero(passing)
        for batch in tokenizer.iter_encoded(matrix, cells=cells, gene_ids=options.get("gene_ids"), report=report):
            lengths[chosen[start : start + batch.num_rows]] = batch.column("length").to_numpy()
            start += batch.num_rows
    filled = np.flatnonzero(lengths)
    np.save(file, np.stack([filled.astype(np.int32), lengths[filled]]), allow_pickle=False)
    return report


class OnTheFlyCells:
    """Cells of count files as the training loop takes them, `cells[i]["input_ids"]`; blocks are kept while in use.

    sources     (source, options) of each file
    files       what `measure_lengths` wrote for each
    batch_size  cells of an optimizer step
    """

    def __init__(
        self,
        tokenizer: RankValueTokenizer,
        sources: Sequence[tuple[Any, dict[str, Any]]],
        files: Sequence[Path],
        batch_size: int,
    ):
        self.tokenizer, self.sources = tokenizer, list(sources)
        rows, lengths = zip(*(np.load(file, allow_pickle=False) for file in files), strict=True)
        n_examples = [len(r) for r in rows]
        self.first_example = np.concatenate([[0], np.cumsum(n_examples)])
        self.row_of_example, self.lengths = np.concatenate(rows), np.concatenate(lengths)
        # Blocks numbered through all files
        n_blocks = [int(r[-1]) // CELLS_PER_BLOCK + 1 if len(r) else 0 for r in rows]
        self.first_block = np.concatenate([[0], np.cumsum(n_blocks)])
        self.block_of_example = self.row_of_example // CELLS_PER_BLOCK + np.repeat(self.first_block[:-1], n_examples)
        # Those whose cells an epoch mixes, and those that sorting by length brings in besides: more where files are
        # small or few of their cells train.
        n_filled = len(np.unique(self.block_of_example))
        self.n_kept = 2 * WINDOW + -(-MEGABATCH_STEPS * batch_size * n_filled // max(len(self.lengths), 1))
        # Blocks that no example was taken of yet, in the order of their turns
        self._ahead: dict[int, None] = {}
        self._kept: OrderedDict[int, dict[int, np.ndarray]] = OrderedDict()
        self._opened: OrderedDict[int, tuple[Any, np.ndarray, Any, contextlib.ExitStack]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, key: Any) -> Any:
        """The column "length", or the example of a position."""
        return self.lengths if key == "length" else self.__getitems__([key])[0]

    def follow(self, order: np.ndarray) -> None:
        """Announces examples in the order they will be taken in, so that every thread has a block to read."""
        blocks, first = np.unique(self.block_of_example[order], return_index=True)
        self._ahead = dict.fromkeys(blocks[np.argsort(first)].tolist())

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        blocks = self.block_of_example[indices].tolist()
        for block in blocks:
            if block in self._kept:
                self._kept.move_to_end(block)
        missing = sorted(set(blocks) - set(self._kept))
        for block in blocks:
            self._ahead.pop(block, None)
        # Mostly one block is missing, which is work for one thread: the next ones are read beside it.
        coming = (block for block in self._ahead if block not in self._kept)
        missing += itertools.islice(coming, -len(missing) % available_threads())
        for start in range(0, len(missing), OPEN_FILES):
            part = missing[start : start + OPEN_FILES]
            jobs = [(block, *self._open(self._source(block))) for block in part]
            threads = available_threads() if all(matrix.concurrent for _, matrix, *_ in jobs) else 1
            for block, cells in zip(part, ordered_map(self._encoded, jobs, threads=threads), strict=True):
                self._kept[block] = cells
        found = [
            {"input_ids": self._kept[block][int(self.row_of_example[i])]}
            for i, block in zip(indices, blocks, strict=True)
        ]
        while len(self._kept) > self.n_kept:
            self._kept.popitem(last=False)
        return found

    def select(self, indices: np.ndarray) -> dict[str, list[np.ndarray]]:
        """The column input_ids of some examples."""
        order = np.argsort(self.block_of_example[indices], kind="stable")
        found: list[Any] = [None] * len(indices)
        for i in order.tolist():
            found[i] = self.__getitems__([int(indices[i])])[0]["input_ids"]
        return {"input_ids": found}

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and blocks: each process of a data loader has its own."""
        return self.__dict__ | {"_kept": OrderedDict(), "_opened": OrderedDict()}

    def _source(self, block: int) -> int:
        return int(np.searchsorted(self.first_block, block, side="right")) - 1

    def _open(self, source: int) -> tuple[Any, np.ndarray, Any]:
        """(matrix, mask of the cells that train, block encoder) of a file."""
        if source not in self._opened:
            while len(self._opened) >= OPEN_FILES:
                self._opened.popitem(last=False)[1][-1].close()
            adata_or_path, options = self.sources[source]
            stack = contextlib.ExitStack()
            matrix = stack.enter_context(open_counts(adata_or_path, layer=options.get("layer")))
            match = self.tokenizer.match_genes(matrix, options.get("gene_ids"))
            # Names and annotations of millions of cells are not needed, only the totals of their counts.
            totals = [name for name in ("n_counts",) if name in matrix.obs]
            matrix = dataclasses.replace(matrix, obs=matrix.obs[totals].reset_index(drop=True))
            cells = np.zeros(matrix.n_cells, dtype=bool)
            cells[self.row_of_example[self.first_example[source] : self.first_example[source + 1]]] = True
            self._opened[source] = matrix, cells, self.tokenizer.block_encoder(matrix, match), stack
        self._opened.move_to_end(source)
        matrix, cells, encode, _ = self._opened[source]
        return matrix, cells, encode

    def _encoded(self, job: tuple[int, Any, np.ndarray, Any]) -> dict[int, np.ndarray]:
        """Row in its file -> tokens, of the cells of a block that train."""
        block, matrix, wanted, encode = job
        start = (block - int(self.first_block[self._source(block)])) * CELLS_PER_BLOCK
        encoded = encode(*matrix.read_block(start, min(start + CELLS_PER_BLOCK, matrix.n_cells), wanted))
        cells = np.split(encoded.tokens, encoded.offsets[1:-1])
        return dict(zip(encoded.rows.tolist(), cells, strict=True))
