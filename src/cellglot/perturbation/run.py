"""A perturbation run: planned once, then streamed in parts that do not depend on one another.

A folder of results holds `part-00000.parquet`, ..., `perturbation.json`, which says what model, cells and options they
come from, and `states.parquet` where embeddings of states were computed. Every file is written aside and renamed, so
that it is whole or absent: a run that was killed goes on with what is missing, and a folder of another run is refused.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..cell_stream import evaluating
from ..embedding_files import replaced_when_complete
from .cells import Cells
from .effects import Effects, Measure, block_effects
from .gradient import block_estimates
from .states import read_states, write_states
from .targets import CELL, JOINER, Perturbation, PerturbationReport, PlannedEdit

logger = logging.getLogger(__name__)

Effect = Literal["cell", "gene"]
Method = Literal["exact", "gradient"]
RECORD = "perturbation.json"
STATES = "states.parquet"
# Rows of a table that is made at once
ROWS_PER_TABLE = 250_000
# Least rows of a row group of a part, but for the last: one for each block of few cells reads slowly and is large.
ROWS_PER_GROUP = 50_000
# Of the folder; an older one is refused once what it holds means something else.
FORMAT = 1


@dataclass(frozen=True)
class Part:
    """Cells whose results make one file."""

    cells: tuple[int, ...]
    n_edits: int


@dataclass(frozen=True)
class Run:
    """Everything that is needed to compute any part.

    vocabulary    names of tokens
    record        what the results depend on, model aside
    embed_states  computes the (states, width) embeddings of the states that are to be measured, where they are not in
                  `measure` yet
    """

    cells: Cells
    vocabulary: pa.StringArray
    perturbation: Perturbation
    measure: Measure
    parts: tuple[Part, ...]
    report: PerturbationReport
    record: dict[str, Any]
    embed_states: Callable[[], np.ndarray] | None = None

    @property
    def method(self) -> Method:
        return self.record["method"]

    @property
    def state_names(self) -> Sequence[str]:
        return self.record["states"] or ()

    def with_states(self, names: Sequence[str], states_sd: np.ndarray) -> "Run":
        """This run, which also measures shifts to states of given embeddings, (states, width); the start is the last.

        A run that was planned without states goes on to perturb cells of any state.
        """
        given = hashlib.blake2b(np.ascontiguousarray(states_sd).tobytes(), digest_size=16).hexdigest()
        record = self.record | {"states": list(names), "start": names[-1], "state_embeddings": given}
        return dataclasses.replace(self, record=record, measure=dataclasses.replace(self.measure, states_sd=states_sd))

    # ---- computing

    def tables(self, part: int, bar: Any) -> Iterator[pa.Table]:
        """The rows of a part, a block of cells at a time."""
        block: list[int] = []
        genes: list[np.ndarray] = []
        for cell in self.parts[part].cells:
            found = self.cells.genes(cell)
            if genes and sum(map(len, genes)) + len(found) > self.measure.max_tokens:
                yield from self._tables_of_block(block, genes, bar)
                block, genes = [], []
            block.append(cell)
            genes.append(found)
        yield from self._tables_of_block(block, genes, bar)

    def _tables_of_block(self, block: list[int], genes: list[np.ndarray], bar: Any) -> Iterator[pa.Table]:
        # What is left out was counted when the run was planned.
        planned = [self.perturbation.planned(g, PerturbationReport()) for g in genes]
        with evaluating(self.measure.encoder):
            if self.method == "gradient":
                effects = block_estimates(self.cells, block, genes, planned, self.measure, done=bar.update)
            else:
                effects = block_effects(self.cells, genes, planned, self.perturbation, self.measure, done=bar.update)
        edits = [(cell, g, p) for cell, g, of_cell in zip(block, genes, planned, strict=True) for p in of_cell]
        n_rows = [1 + len(similarity) for similarity in effects.by_gene] or [1] * len(edits)
        table = np.cumsum(n_rows) // ROWS_PER_TABLE
        for chosen in np.split(np.arange(len(edits)), np.flatnonzero(np.diff(table)) + 1):
            rows = slice(int(chosen[0]), int(chosen[-1]) + 1)
            part = Effects(effects.cosine_n[rows], effects.shift_ns[rows], effects.by_gene[rows])
            yield self._rows(edits[rows], part)

    def _rows(self, edits: list[tuple[int, np.ndarray, PlannedEdit]], effects: Effects) -> pa.Table:
        """One row an edit for the effect on the cell, followed by one for each other gene where genes are measured."""
        cells = np.array([cell for cell, _, _ in edits], dtype=np.int64)
        columns: dict[str, Any] = {"cell": cells}
        if self.cells.names is not None:
            columns["cell_name"] = pa.array([self.cells.names[cell] for cell in cells], pa.string())
        columns["gene"] = pa.array([self._label(p.tokens) for _, _, p in edits], pa.string())
        columns["position"] = np.array([p.position(self.perturbation.anchor) for _, _, p in edits], dtype=np.int32)
        if self.measure.genes:
            columns["affected"] = pa.array([CELL] * len(edits), pa.string())
        columns["cosine_similarity"] = effects.cosine_n
        columns |= {f"shift_to_{name}": effects.shift_ns[:, s] for s, name in enumerate(self.state_names)}
        table = pa.table(columns)
        return self._with_genes(table, edits, effects) if self.measure.genes else table

    def _with_genes(
        self, table: pa.Table, edits: list[tuple[int, np.ndarray, PlannedEdit]], effects: Effects
    ) -> pa.Table:
        """The rows of cells, each followed by the rows of the genes its edit affects."""
        n_genes = np.array([len(similarity) for similarity in effects.by_gene])
        tokens = np.concatenate([self._affected(genes, p) for _, genes, p in edits])
        of_genes = table.take(pa.array(np.repeat(np.arange(len(edits)), n_genes)))
        values: dict[str, Any] = {
            "affected": self.vocabulary.take(pa.array(tokens)),
            "cosine_similarity": pa.array(np.concatenate(effects.by_gene)),
        }
        # Shifts are to states of cells; a gene has none.
        values |= {f"shift_to_{name}": pa.nulls(len(tokens), pa.float32()) for name in self.state_names}
        for name, column in values.items():
            of_genes = of_genes.set_column(of_genes.column_names.index(name), name, column)
        is_cell = np.zeros(len(edits) + len(tokens), dtype=bool)
        is_cell[np.cumsum(n_genes + 1) - n_genes - 1] = True
        order = np.empty(len(is_cell), dtype=np.int64)
        order[is_cell], order[~is_cell] = np.arange(len(edits)), len(edits) + np.arange(len(tokens))
        return pa.concat_tables([table, of_genes]).combine_chunks().take(pa.array(order))

    def _affected(self, genes: np.ndarray, planned: PlannedEdit) -> np.ndarray:
        """Tokens of the genes whose embeddings are compared, by rank."""
        others = genes[~np.isin(genes, planned.tokens)]
        n_inserted = sum(p < 0 for p in planned.positions)
        return others[: len(others) - max(len(genes) + n_inserted - self.perturbation.max_genes, 0)]

    def _label(self, tokens: tuple[int, ...]) -> str:
        return JOINER.join(self.vocabulary[token].as_py() for token in tokens)

    def _with_embedded_states(self, folder: Path | None) -> "Run":
        """This run with the embeddings of its states, those kept in the folder if there are any."""
        if self.embed_states is None:
            return self
        path = None if folder is None else folder / STATES
        if path is not None and path.exists():
            kept = read_states(path)
            states_sd = np.stack([kept[name] for name in self.state_names])
        else:
            states_sd = self.embed_states()
            if path is not None:
                write_states(path, self.state_names, states_sd)
        measure = dataclasses.replace(self.measure, states_sd=states_sd)
        return dataclasses.replace(self, measure=measure, embed_states=None)

    def table(self, *, progress: bool) -> pa.Table:
        """All rows, in memory."""
        run = self._with_embedded_states(None)
        with self._bar(progress) as bar:
            return pa.concat_tables([t for i in range(len(self.parts)) for t in run.tables(i, bar)])

    # ---- writing

    def begun(self, output: Path) -> "Run":
        """This run with `output` claimed as its folder, and then with the embeddings of its states, kept there.

        Raises  FileExistsError for a folder of something else, before anything is computed
        """
        self._claim(output)
        return self._with_embedded_states(output)

    def write_parts(self, output: Path, *, progress: bool) -> None:
        """Computes the parts that the folder lacks, of a run that has `begun` there."""
        missing = [i for i in range(len(self.parts)) if not (output / part_name(i)).exists()]
        if len(missing) < len(self.parts):
            logger.info("%s: %d of %d parts are there already", output, len(self.parts) - len(missing), len(self.parts))
        with self._bar(progress) as bar:
            for i in range(len(self.parts)):
                if i not in missing:
                    bar.update(self.parts[i].n_edits)
                    continue
                self._write_part(output / part_name(i), i, bar)

    def _write_part(self, path: Path, part: int, bar: Any) -> None:
        with replaced_when_complete(path) as partial, open(partial, "wb") as file:
            writer = None
            for table in _row_groups(self.tables(part, bar)):
                writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                writer.write_table(table)
            assert writer is not None
            writer.close()

    def _claim(self, output: Path) -> None:
        # Only a folder needs to know the weights; hashing them takes as long as a small run.
        record = {"model": _model_hash(self.measure.encoder), **self.record}
        output.mkdir(parents=True, exist_ok=True)
        path = output / RECORD
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            different = [name for name in record if there.get(name) != record[name]]
            if different:
                what = "; ".join(f"{n}: {_short(there.get(n))} there, {_short(record[n])} now" for n in different)
                raise FileExistsError(
                    f"{output} holds the results of another run ({what}). Choose another folder, or remove this one; "
                    "nothing was changed."
                )
            return
        found = sorted(p.name for p in output.iterdir() if not p.match(f".{RECORD}.*.tmp"))
        if found:
            raise FileExistsError(
                f"{output} is not empty (it holds {found[0]!r}) and has no {RECORD}: it is no folder of a perturbation "
                "run. Choose another one; nothing was changed."
            )
        record |= {"report": dataclasses.asdict(self.report), "n_parts": len(self.parts)}
        with replaced_when_complete(path) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _bar(self, progress: bool) -> Any:
        return tqdm(total=self.report.n_edits, desc=self.perturbation.kind, unit="edit", disable=not progress)


def part_name(i: int) -> str:
    return f"part-{i:05d}.parquet"


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, in tables of ROWS_PER_GROUP and more where there are as many."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(t.num_rows for t in waiting) >= ROWS_PER_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def read_record(folder: Path) -> dict[str, Any]:
    """What a folder's results come from. Raises FileNotFoundError for a folder of something else."""
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"{folder} has no {RECORD}: it is no folder of a perturbation run.")
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def finished_parts(folder: Path) -> list[Path]:
    """The parts of a finished run's folder, in order. Raises FileNotFoundError if any is missing."""
    paths = [folder / part_name(i) for i in range(read_record(folder)["n_parts"])]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing):,} of {len(paths):,} parts (e.g. {missing[0]}): the run has not finished. "
            "Start it again with the same arguments; it goes on where it stopped."
        )
    return paths


def read_run(folder: Path, *, only_cells: bool = False) -> pa.Table:
    """All rows of a finished run's folder, or those of effects on cells.

    Raises  FileNotFoundError if parts are missing
    """
    paths = finished_parts(folder)
    only_cells = only_cells and "affected" in pq.read_schema(paths[0]).names
    filters = [("affected", "=", CELL)] if only_cells else None
    return pa.concat_tables([pq.read_table(path, filters=filters) for path in paths])


def _model_hash(encoder: Any) -> str:
    """Of what determines the hidden states: weights, their precision, and the shape of the computation."""
    digest = hashlib.blake2b(digest_size=16)
    fields = ("num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
    digest.update(json.dumps([str(getattr(encoder.config, name)) for name in fields]).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
