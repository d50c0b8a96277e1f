"""Perturbs the cells of a file from the command line: `python -m cellglot.perturb --help`."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .edits import KINDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a message about what is wrong with the input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _refuse_combinations(parser, options)

    import torch

    try:
        run(options)
    except torch.OutOfMemoryError as error:
        print(f"error: {error}\nLower --max-tokens, and start again: what is done stays.", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Perturbs as the options say, and prints what was written.

    Raises  ValueError, OSError, ImportError for what a user can mend
    """
    _check_extras()
    from ..loading import find_tokenizer, load_encoder
    from ..perturb import CellStates
    from .plan import plan_run
    from .summary import gene_labels, summarize

    tokenizer = find_tokenizer(options.tokenizer or options.model)
    model = load_encoder(options.model, options.device)
    shared: dict[str, Any] = {
        "kind": options.kind,
        "method": options.method,
        "genes": _genes(options.genes, options.joint),
        "anchor": options.anchor,
        "rank_shift": options.rank_shift,
        "layer": options.layer,
        "pooling": options.pooling,
        "max_cells": options.max_cells,
        "seed": options.seed,
        "max_tokens": options.max_tokens,
    }
    of_counts = {
        name: value
        for name, value in (("counts_layer", options.counts_layer), ("gene_ids", options.gene_ids))
        if value is not None
    }
    states = None
    if options.goal is not None:
        names = (options.state_column, options.start, options.goal, tuple(options.alt))
        states = CellStates(*names, summary=options.state_summary)
    planned = plan_run(options.cells, model, tokenizer, **shared, **of_counts, states=states, effect=options.effect)
    print(planned.report)
    if planned.method == "gradient":
        print("Values are first-order estimates: compute the genes that come first again, with --method exact --genes.")
    # Cells of a null set are compared as they are, whatever their state. Planned first: mistakes show before the work.
    of_null = None if options.null is None else plan_run(options.null, model, tokenizer, **shared, **of_counts)
    planned = planned.begun(options.output)
    null_folder = options.output / "null"
    if of_null is not None:
        print(f"null cells: {of_null.report}")
        if states is not None and planned.measure.states_sd is not None:
            of_null = of_null.with_states(states.names, planned.measure.states_sd)
        of_null = of_null.begun(null_folder)
    planned.write_parts(options.output, progress=not options.quiet)
    if of_null is not None:
        of_null.write_parts(null_folder, progress=not options.quiet)
    labels = gene_labels(options.cells, tokenizer, options.counts_layer, options.gene_ids)
    summarize(options.output, states, None if of_null is None else null_folder, labels)


def _check_extras() -> None:
    """Raises ImportError for what tables and figures need: hours of computing come before them."""
    needed = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"Tables and figures need {' and '.join(missing)}, not installed here: pip install 'cellglot[train]'. "
            "In Python, write_perturbations does without."
        )


def _genes(text: str, joint: bool) -> Any:
    """ "all", or names at commas one at a time and at plus signs together."""
    if text == "all":
        return "all"
    groups = [[name.strip() for name in group.split("+") if name.strip()] for group in text.split(",") if group.strip()]
    return [[name for group in groups for name in group]] if joint else groups


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cellglot.perturb",
        description="Perturbs genes of cells in silico with a Geneformer, and ranks them by their effect. Results "
        "stream to the output folder; the same command goes on where an interrupted one stopped.",
    )
    add = parser.add_argument
    add("cells", type=Path, help=".h5ad, .loom, 10x .h5 file or 10x .mtx folder with raw counts; or a saved dataset")
    add("--model", required=True, help="model directory or repository")
    add("--tokenizer", help="directory of the tokenizer, if it is not beside the model")
    add("--output", type=Path, required=True, help="folder for results, new or of the same run")
    add("--kind", choices=KINDS, default="delete", help="what is done to a gene (default delete)")
    add(
        "--method",
        choices=["exact", "gradient"],
        default="exact",
        help="exact (default), or gradient: first-order estimates of deletions, to find the genes worth computing",
    )
    add(
        "--genes", default="all", metavar="A,B,C+D", help="all (default); or genes one at a time, those at a + together"
    )
    add("--joint", action="store_true", help="perturb all --genes together")
    add("--anchor", metavar="GENE", help="perturb this gene together with each of the others")
    add("--rank-shift", type=int, metavar="QUARTILES", help="for inhibit and activate: 1 (default), 2 or 3")
    add("--layer", type=int, default=-1, help="-1 second-to-last (default), 0 last, -2 ... further down")
    add("--effect", choices=["cell", "gene"], default="cell", help="on cells (default), or also on every other gene")
    add("--pooling", choices=["mean", "cls"], help="a cell is the mean over its genes, or <cls> (default for V2)")
    add("--state-column", metavar="COLUMN", help="column of obs with cell states")
    add("--start", metavar="STATE", help="perturb cells of this state only")
    add("--goal", metavar="STATE", help="measure shifts to this state")
    add("--alt", metavar="STATE", nargs="+", default=[], help="further states to measure shifts to")
    add("--state-summary", choices=["mean", "median"], default="mean", help="of the embeddings of a state's cells")
    add(
        "--null", type=Path, metavar="CELLS", help="cells of any state to compare with, by the shift to --goal if given"
    )
    add("--max-cells", type=int, help="perturb a random sample of this many cells")
    add("--seed", type=int, default=0, help="of that sample")
    add("--counts-layer", help="layer with raw counts, or 'raw'; X by default")
    add("--gene-ids", help="column of var with gene ids; found by itself where possible")
    add("--max-tokens", type=int, help="padded tokens of a batch; by default what suits the device")
    add("--device", help="e.g. cpu, cuda:1; a GPU by default where there is one")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _refuse_combinations(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    given = [options.state_column, options.start, options.goal]
    if any(value is None for value in given) and (options.alt or any(value is not None for value in given)):
        parser.error("cell states need --state-column, --start and --goal")
    if options.joint and options.genes == "all":
        parser.error("--joint perturbs listed genes together: pass --genes A,B,...")
