"""Non-zero medians of a corpus of any size, as a vocabulary table, in tasks that run anywhere and survive being killed.

    python datasets_scripts/compute_medians.py FOLDER --output OUT --layout v2 --workers 8
    python datasets_scripts/tokenize_corpus.py FOLDER --vocabulary OUT/vocabulary.tsv --layout v2 --output TOKENS

The medians are exact up to `--max-exact-values` stored values. Beyond that each task counts its values in bins, which
add up, and `--sketch-error` bounds the relative error of every median. `OUT/medians.json` says which it was. The result
does not depend on the number of tasks.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from tqdm.auto import tqdm

from cellglot.datasets_scripts.corpus_errors import CorpusError
from cellglot.datasets_scripts.corpus_tasks import CorpusTask, TaskRun
from cellglot.datasets_scripts.task_executors import add_execution_options, carry_out
from cellglot.tokenization.gene_tables import read_aliases
from cellglot.tokenization.medians import MAX_EXACT_VALUES, NonzeroMedians, add_cells, vocabulary_table
from cellglot.tokenization.rank_value import SPECIAL_TOKENS
from cellglot.train.config import write_json
from cellglot.train.fingerprint import fingerprint

ALIASES = "aliases.json"


class AccumulateShares(CorpusTask):
    """Pipeline block: what the cells of a task say of the medians, as a saved `NonzeroMedians`."""

    name = "non-zero medians"

    def write_part(self, run: TaskRun, rank: int, path: Path) -> int:
        gene_ids = run.record["options"]["gene_ids"]
        aliases = json.loads((run.folder / ALIASES).read_text())
        total = _accumulator(run)
        for share in run.plan.tasks[rank]:
            with run.open_share(share) as (matrix, cells):
                add_cells(total, matrix, gene_ids=gene_ids, aliases=aliases, cells=cells)
        total.save(path)
        return total.n_cells


def _accumulator(run: TaskRun) -> NonzeroMedians:
    """An empty one, which does not begin to keep single values where the corpus as a whole has too many."""
    limit, error = (run.record["options"][name] for name in ("max_exact_values", "sketch_error"))
    return NonzeroMedians(max_exact_values=limit if run.plan.n_values <= limit else 0, sketch_error=error)


def merge(run: TaskRun) -> None:
    """Writes vocabulary.tsv and medians.json.

    Raises  ValueError if no gene was detected
    """
    table_file, facts_file = run.output / "vocabulary.tsv", run.output / "medians.json"
    if not run.merged:
        total = _accumulator(run)
        for rank in tqdm(range(run.n_tasks), "merging", unit="part"):
            total.merge(NonzeroMedians.load(run.part(rank)))
        table = vocabulary_table(total, SPECIAL_TOKENS[run.record["options"]["layout"]])
        partial = table_file.with_suffix(".tmp")
        table.to_csv(partial, sep="\t", index=False)
        os.replace(partial, table_file)
        facts = {
            "n_genes": int(table["nonzero_median"].notna().sum()),
            "n_cells": total.n_cells,
            "relative_error": total.relative_error,
        }
        write_json(facts_file, facts)
        run.end_merge()
    shutil.rmtree(run.folder / "merged", ignore_errors=True)
    facts = json.loads(facts_file.read_text())
    error = f"within {facts['relative_error']:.2%}" if facts["relative_error"] else "exact"
    print(f"{facts['n_genes']:,} genes of {facts['n_cells']:,} cells, medians {error}\n{table_file}")


def begin(arguments: argparse.Namespace) -> TaskRun:
    """The run that the command line asks for."""
    if arguments.corpus is None:
        raise CorpusError("Expected FOLDER.")
    if not 0 < arguments.sketch_error < 1:
        raise CorpusError(f"--sketch-error must lie between 0 and 1, found {arguments.sketch_error}.")
    aliases = read_aliases(arguments.aliases)
    options = {
        "script": "compute_medians",
        "aliases": fingerprint((), (), aliases),
        **{name: getattr(arguments, name) for name in ("layout", "layer", "gene_ids")},
        **{name: getattr(arguments, name) for name in ("max_exact_values", "sketch_error")},
    }
    return TaskRun.begin(
        arguments.output,
        arguments.corpus,
        options,
        n_tasks=arguments.tasks,
        prepare=lambda folder: write_json(folder / ALIASES, aliases),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="FOLDER", nargs="?", help=".h5ad, .loom, 10x .h5 or .mtx; or one file")
    parser.add_argument("--output", required=True, help="folder of the table; an interrupted run in it goes on")
    parser.add_argument("--layout", choices=tuple(SPECIAL_TOKENS), default="v1", help="special tokens before the genes")
    parser.add_argument("--layer", help="layer with the raw counts, or raw; absent: X")
    parser.add_argument("--gene-ids", help="column of var with gene ids; absent: found")
    parser.add_argument("--aliases", metavar="TABLE", help="table of alias, ensembl_id")
    parser.add_argument("--max-exact-values", type=int, default=MAX_EXACT_VALUES, help="stored values; more are binned")
    parser.add_argument("--sketch-error", type=float, default=0.005, help="bound on the relative error, binned")
    parser.add_argument("--tasks", type=int, help="shares of the corpus, at the most; absent: by its size")
    add_execution_options(parser)
    arguments = parser.parse_args(argv)
    block = AccumulateShares(str(Path(arguments.output).absolute()))
    try:
        carry_out(arguments, block, begin=lambda: begin(arguments), finish=merge)
    except (ValueError, OSError) as error:
        sys.exit(f"compute_medians.py: {error}")


if __name__ == "__main__":
    # Under its own name, by which other processes find the block
    from cellglot.datasets_scripts.compute_medians import main as main_of_module

    main_of_module()
