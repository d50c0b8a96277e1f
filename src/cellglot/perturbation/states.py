"""Cell states as positions in embedding space: where perturbed cells may shift to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..embedding import embed_tokens
from ..embedding_files import replaced_when_complete
from ..tokenization.gene_ids import examples
from .cells import Cells

# Cells that are embedded at once while the mean is summed up
CELLS_PER_SUM = 4096


@dataclass(frozen=True)
class CellStates:
    """Which cells are perturbed, and the states their shift is measured to.

    column        column of `obs`, or of the dataset, with the state of each cell
    start         state of the cells that are perturbed
    goal          state they should come closer to
    alternatives  further states to measure the shift to
    summary       a state's embedding is the mean of its cells' embeddings, or the (lower) median of each
                  coordinate
    embeddings    state -> (width,) embedding, computed elsewhere (other cells, say); from all cells given if None
    """

    column: str
    start: str
    goal: str
    alternatives: Sequence[str] = ()
    summary: Literal["mean", "median"] = "mean"
    embeddings: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.alternatives, str):
            raise ValueError(f"Expected alternatives as a list of states, found {self.alternatives!r}.")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"Start, goal and alternative states must differ, found {examples(self.names, 9)}.")
        if self.summary not in ("mean", "median"):
            raise ValueError(f"Expected summary 'mean' or 'median', found {self.summary!r}.")

    @property
    def names(self) -> list[str]:
        """States that shifts are measured to, the goal first, as in tables and figures, and the start last."""
        return [self.goal, *self.alternatives, self.start]

    def check_labels(self, labels: np.ndarray) -> None:
        """Raises ValueError for a state that no cell is in, where cells of it are needed."""
        found = sorted({label for label in labels if label is not None})
        needed = self.names if self.embeddings is None else [self.start]
        for state in needed:
            if state not in found:
                raise ValueError(f"No cell has {self.column} {state!r}; the column holds {examples(found, 9)}.")

    def check_filled(self, labels: np.ndarray, n_genes: np.ndarray) -> None:
        """Raises ValueError for a state that has no embedding, as all its cells are empty.

        n_genes  (cells,) of the vocabulary
        """
        for state in self.names if self.embeddings is None else []:
            if not n_genes[labels == state].any():
                raise ValueError(f"All {(labels == state).sum():,} cells of state {state!r} are empty.")

    def given_embeddings(self, width: int) -> np.ndarray:
        """(states, width) the embeddings that were passed in, checked."""
        assert self.embeddings is not None
        missing = [state for state in self.names if state not in self.embeddings]
        if missing:
            raise ValueError(f"No embedding of state {examples(missing)}; there are {examples(self.embeddings, 9)}.")
        out = np.stack([np.asarray(self.embeddings[state], dtype=np.float32).ravel() for state in self.names])
        if out.shape[1] != width or not np.isfinite(out).all():
            raise ValueError(
                f"Expected finite embeddings of the model's width {width}, found width {out.shape[1]}"
                f"{'' if np.isfinite(out).all() else ' and values that are not finite'}."
            )
        return out


def embed_states(
    cells: Cells,
    states: Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    layer: int,
    pooling: Literal["mean", "cls"],
    summary: Literal["mean", "median"],
    max_tokens: int,
) -> np.ndarray:
    """(states, width) float32 exact mean, or (lower) median of each coordinate, of the embeddings of states' cells.

    The mean is summed up in float64 and needs memory for some cells only; the median holds one state's embeddings.
    Cells without a gene count for nothing.
    """
    assert cells.labels is not None
    out = []
    for state in states:
        chosen = np.flatnonzero(cells.labels == state)
        blocks = []
        for start in range(0, len(chosen), CELLS_PER_SUM):
            tokens = [cells.tokens(i) for i in chosen[start : start + CELLS_PER_SUM]]
            block = embed_tokens(tokens, model, tokenizer, layer=layer, pooling=pooling, max_tokens=max_tokens)
            block = block[[len(t) > len(cells.wrapping) for t in tokens]]
            blocks.append(block if summary == "median" else _Sum(block))
        assert sum(len(block) for block in blocks), f"{state!r} has no cells with genes"
        if summary == "median":
            # Of an even number of cells the lower one in the middle, as torch.median in the original
            out.append(np.quantile(np.concatenate(blocks), 0.5, axis=0, method="lower"))
        else:
            out.append(sum(block.total for block in blocks) / sum(len(block) for block in blocks))
    return np.stack(out).astype(np.float32)


def write_states(path: Path, names: Sequence[str], states_sd: np.ndarray) -> None:
    """Keeps the embeddings of states in a Parquet file with columns state and embedding."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.FixedSizeListArray.from_arrays(pa.array(states_sd.ravel()), states_sd.shape[1])
    with replaced_when_complete(path) as partial:
        pq.write_table(pa.table({"state": pa.array(names, pa.string()), "embedding": rows}), partial)


def read_states(path: Path) -> dict[str, np.ndarray]:
    """State -> (width,) float32 embedding, of a file that `write_states` wrote."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return dict(zip(table["state"].to_pylist(), table["embedding"].to_pandas(), strict=True))


class _Sum:
    """Sum of some cells' embeddings, and how many they were."""

    def __init__(self, embeddings: np.ndarray):
        self.total, self._n = embeddings.sum(axis=0, dtype=np.float64), len(embeddings)

    def __len__(self) -> int:
        return self._n
