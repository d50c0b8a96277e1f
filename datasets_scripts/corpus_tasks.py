"""A run of tasks over the shares of a corpus, and the pipeline block that does one task.

All that a run knows lies in `OUTPUT/.run`, so that it goes on after any interruption, on any machine that sees it:

run.json      what was asked, the files as they were, the shares of each task
parts/        what the tasks wrote; each is written in partial/ and renamed, and then marked in completions/
failures/     why a task ended without a part
logs/, stats/ of datatrove
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

try:
    from datatrove.data import DocumentsPipeline
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError("Tasks over a corpus need datatrove: pip install 'cellglot[scale-out]'") from error

from cellglot.datasets_scripts.corpus_errors import CorpusError, disk_full
from cellglot.datasets_scripts.corpus_shares import Plan, Share, corpus_files, make_plan, shard_digest, shard_path
from cellglot.tokenization.count_matrix import CountMatrix, open_counts
from cellglot.train.config import write_json

FAILURES_TOLD = 10
# What the tokenizer advises -> what that is on the command line
OPTIONS = {"gene_ids=": "--gene-ids ", "layer='": "--layer '", "min_matched_counts=": "--min-matched-counts "}


class TaskRun:
    """The run in an output folder: `begin` starts it or goes on with it, `TaskRun(output)` joins it."""

    def __init__(self, output: str | Path):
        self.output = Path(output).absolute()
        self.folder = self.output / ".run"
        self._record = self.folder / "run.json"
        if not self._record.exists():
            raise CorpusError(f"{self.output} holds no run: {self._record} does not exist.")

    @classmethod
    def begin(
        cls,
        output: str | Path,
        corpus: str | Path,
        options: Mapping[str, Any],
        *,
        n_tasks: int | None,
        prepare: Callable[[Path], None] | None = None,
    ) -> "TaskRun":
        """A new run in an empty folder, or the one that is there, if it is of the same options and files.

        options  all that decides what the tasks write, as JSON can hold it: `layer` and, for rows, `obs_columns` too
        n_tasks  None: as before, or by the size of the corpus
        prepare  called with the run's folder when a new run begins, to put there what the tasks need
        Raises   CorpusError if the folder holds something else, or a run of other options or files
        """
        output, corpus = Path(output).absolute(), Path(corpus).absolute()
        folder = output / ".run"
        if (folder / "run.json").exists():
            run = cls(output)
            run._refuse_other_options(dict(options) | {"tasks": n_tasks or run.record["options"]["tasks"]})
            run._refuse_other_files(corpus)
            return run
        if output.exists() and any(path != folder for path in output.iterdir()):
            raise CorpusError(f"{output} has files of other origin in it. Choose another --output, or empty it.")
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("parts", "partial", "completions", "failures"):
            (folder / name).mkdir(parents=True)
        try:
            if prepare is not None:
                prepare(folder)
            columns = options.get("obs_columns", ())
            plan = make_plan(corpus, n_tasks=n_tasks, layer=options["layer"], obs_columns=columns)
        except BaseException:
            shutil.rmtree(folder)
            raise
        record = {"corpus": str(corpus), "options": dict(options) | {"tasks": n_tasks}, **plan.to_json()}
        write_json(folder / "run.json", record)
        return cls(output)

    @cached_property
    def record(self) -> dict[str, Any]:
        return json.loads(self._record.read_text())

    @cached_property
    def plan(self) -> Plan:
        return Plan.from_json(self.record)

    @property
    def n_tasks(self) -> int:
        return len(self.plan.tasks)

    @property
    def merged(self) -> bool:
        """Whether all of the output but the parts themselves is written: `parts/` is called `merged/` then, or gone."""
        return not (self.folder / "parts").exists()

    def end_merge(self) -> None:
        """Marks the run as merged, in one rename."""
        shutil.rmtree(self.folder / "partial", ignore_errors=True)
        os.replace(self.folder / "parts", self.folder / "merged")

    def part(self, rank: int) -> Path:
        # No ending of a data file: nobody shall load half a corpus.
        return self.folder / "parts" / f"{rank:05d}"

    def failure(self, rank: int) -> Path:
        return self.folder / "failures" / f"{rank:05d}"

    def unfinished(self) -> list[int]:
        """Tasks that are not complete, or whose part is gone, which are no longer marked then."""
        ranks = []
        for rank in range(self.n_tasks):
            mark = self.folder / "completions" / f"{rank:05d}"
            if mark.exists() and not self.part(rank).exists():
                mark.unlink()
            if not mark.exists():
                ranks.append(rank)
        return ranks

    def explain_failures(self) -> str:
        """What to tell the user of the tasks that are not complete: task, shard, error."""
        ranks = self.unfinished()
        lines = [f"{len(ranks)} of {self.n_tasks} tasks failed:"]
        for rank in ranks[:FAILURES_TOLD]:
            failure = self.failure(rank)
            lines.append(f"  task {rank}: {failure.read_text() if failure.exists() else 'did not run to its end'}")
        if len(ranks) > FAILURES_TOLD:
            lines.append(f"  and {len(ranks) - FAILURES_TOLD} more, see {self.folder / 'failures'}")
        lines.append(
            "Mend what they name and run the same command again: the other tasks are done. "
            f"Logs are in {self.folder / 'logs'}."
        )
        return "\n".join(lines)

    @contextlib.contextmanager
    def open_share(self, share: Share) -> Iterator[tuple[CountMatrix, np.ndarray]]:
        """The count matrix of a share and the mask of its cells; an error inside names the shard.

        Raises  CorpusError for a file that changed or cannot be read, for cells that cannot be used, for a full disk
        """
        path = shard_path(Path(self.record["corpus"]), share.shard)
        try:
            digest = next(shard.digest for shard in self.plan.shards if shard.name == share.shard)
            if shard_digest(path) != digest:
                raise ValueError("it has changed since the run began")
            with open_counts(path, layer=self.record["options"]["layer"]) as matrix:
                yield matrix, share.cells(matrix)
        except Exception as error:
            if isinstance(error, OSError) and (full := disk_full(error, self.folder)):
                raise full from error
            told = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
            told = told.replace(str(path), share.shard).removeprefix(f"{share.shard}: ")
            for argument, option in OPTIONS.items():
                told = told.replace(argument, option)
            raise CorpusError(told if told.startswith(share.shard) else f"{share.shard}: {told}") from error

    def _refuse_other_options(self, options: dict[str, Any]) -> None:
        recorded = self.record["options"]
        other = [name for name in {**recorded, **options} if recorded.get(name) != options.get(name)]
        if other:
            differences = "; ".join(f"{name} {recorded.get(name)!r}, now {options.get(name)!r}" for name in other)
            raise CorpusError(
                f"{self.output} was begun with other options: {differences}. Pass the same, or another --output."
            )

    def _refuse_other_files(self, corpus: Path) -> None:
        """Files may have moved together, and one that some task has not read yet may have been replaced."""
        names = [path.name if path == corpus else str(path.relative_to(corpus)) for path in corpus_files(corpus)]
        recorded = {shard.name: shard for shard in self.plan.shards}
        problems = [f"{name} is new" for name in names if name not in recorded]
        problems += [f"{name} is gone" for name in recorded if name not in names]
        digests = {name: shard_digest(shard_path(corpus, name)) for name in names}
        changed = [name for name in names if name in recorded and digests[name] != recorded[name].digest]
        unfinished = set() if self.merged else set(self.unfinished())
        readers = {
            name: {k for k, shares in enumerate(self.plan.tasks) if name in (share.shard for share in shares)}
            for name in changed
        }
        for name in changed:
            if not readers[name] & unfinished:
                problems.append(f"{name} has changed since it was read")
            elif recorded[name].n_cells is not None:
                with open_counts(shard_path(corpus, name), layer=self.record["options"]["layer"]) as matrix:
                    if matrix.n_cells != recorded[name].n_cells:
                        problems.append(f"{name} has {matrix.n_cells:,} cells, before {recorded[name].n_cells:,}")
        if problems:
            more = f", ... ({len(problems):,} in all)" if len(problems) > 3 else ""
            raise CorpusError(
                f"{self.output} was begun with other files: {'; '.join(problems[:3])}{more}. Restore them, or choose "
                "another --output."
            )
        for rank in set().union(*readers.values()):
            (self.folder / "completions" / f"{rank:05d}").unlink(missing_ok=True)
        if changed or self.record["corpus"] != str(corpus):
            shards = [shard | {"digest": digests[shard["name"]]} for shard in self.record["shards"]]
            write_json(self._record, self.record | {"corpus": str(corpus), "shards": shards})
            del self.record, self.plan


class CorpusTask(PipelineStep):
    """Pipeline block: reads the shares of its task and writes its part, in one piece or not at all.

    PRELOADED  modules that its tasks import as they go, which processes of this machine may find imported
    """

    type = "Corpus"
    PRELOADED: tuple[str, ...] = ()

    def __init__(self, output: str):
        super().__init__()
        self.output = output

    def command_options(self) -> list[str]:
        """Options from which a Slurm job makes the same block: what the run's record does not hold."""
        return []

    def write_part(self, run: TaskRun, rank: int, path: Path) -> int:
        """Writes the part of a task to `path`; returns its number of cells."""
        raise NotImplementedError

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:  # type: ignore[assignment]
        run = TaskRun(self.output)
        # Of its own name: a task that was thought dead may still be writing.
        partial = run.folder / "partial" / f"{rank:05d}-{uuid.uuid4().hex}"
        try:
            with self.track_time("task"):
                self.stat_update("cells", value=self.write_part(run, rank, partial), unit="task")
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, run.part(rank))
        except Exception as error:
            full = disk_full(error, run.folder) if isinstance(error, OSError) else None
            with contextlib.suppress(OSError):
                run.failure(rank).write_text(str(full or error))
            raise
        finally:
            partial.unlink(missing_ok=True)
        return None  # type: ignore[return-value]
