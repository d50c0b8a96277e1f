"""Attention analysis from the command line: `python -m cellglot.attention --help`.

    python -m cellglot.attention cells.h5ad --model DIR --gene-set transcription_factors.txt --output attention
    python -m cellglot.attention cells.h5ad --model DIR --gene-set n1_network.tsv --where cell_type=endothelial \\
        --random-control --output centrality

Writes tables (CSV) and figures (PNG) into a folder, once all of them are made.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..tokenization.gene_ids import examples
from .gene_sets import read_gene_sets, resolve_genes

OUTPUTS = (
    "attention_by_gene.csv.gz",
    "attention_by_rank.csv",
    "heads.csv",
    "heads.png",
    "heads_random_weights.csv",
    "rank_diversity.csv",
    "ranks.png",
    "sets.png",
    "settings.json",
    "summary.csv",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a message about what is wrong with the input."""
    options = _parser().parse_args(arguments)
    import torch

    try:
        run(options)
    except torch.OutOfMemoryError as error:
        print(
            f"error: {error}\nA cell at a time is all there is: encode the cells shorter, or use --device cpu.",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Analyses as the options say, and prints what was found and written.

    Raises  ValueError, OSError, ImportError for what a user can mend
    """
    if find_spec("matplotlib") is None:
        # Said before the work, not after it.
        raise ImportError("The figures need matplotlib: pip install 'cellglot[train]'")
    import matplotlib
    import pandas as pd
    import torch

    from ..loading import find_tokenizer, load_encoder
    from ..modeling.geneformer import GeneformerModel
    from .collection import collect_attention
    from .comparison import compare_gene_sets, rank_diversity, summarize_heads

    matplotlib.use("Agg")
    output = _checked_output(options.output, options.overwrite)
    tokenizer = find_tokenizer(options.tokenizer or options.model)
    gene_sets = _gene_sets(options, tokenizer)
    (set_name, set_genes), *others = gene_sets.items()
    background = others[0][1] if others else None
    cells, encode_options = _cells(options)
    model = load_encoder(options.model, options.device)
    runs = {"model": model}
    if options.random_control:
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            random_model: Any = GeneformerModel(model.config)
        runs["random weights"] = random_model.to(model.device)

    comparisons, summaries = {}, []
    statistics: Any = None
    for name, network in runs.items():
        collected = collect_attention(
            cells,
            network,
            tokenizer,
            max_cells=options.max_cells,
            seed=options.seed,
            progress=not options.quiet,
            **encode_options,
        )
        statistics = statistics or collected
        comparisons[name] = compare_gene_sets(collected.by_gene(), set_genes, background)
        summaries.append({"weights": name, **summarize_heads(comparisons[name])})
    table, by_rank = statistics.by_gene(), statistics.by_rank(min(32, int((statistics.n_cells_t > 0).sum())))
    if background is None:
        gene_sets["other genes"] = sorted(set(table["gene"]) - set(set_genes))

    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        diversity, summary = rank_diversity(by_rank), pd.DataFrame(summaries)
        table.to_csv(partial / "attention_by_gene.csv.gz", index=False, float_format="%.6g")
        comparisons["model"].to_csv(partial / "heads.csv", index=False)
        if options.random_control:
            comparisons["random weights"].to_csv(partial / "heads_random_weights.csv", index=False)
        summary.to_csv(partial / "summary.csv", index=False)
        by_rank.to_csv(partial / "attention_by_rank.csv", index=False)
        diversity.to_csv(partial / "rank_diversity.csv", index=False)
        _figures(partial, comparisons["model"], table, by_rank, diversity, gene_sets)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        settings |= {"n_cells": statistics.n_cells, "n_skipped_cells": statistics.n_skipped}
        (partial / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        # Again: others may have put files there in the meantime.
        _publish(partial, _checked_output(options.output, options.overwrite))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _print_summary(options, statistics, comparisons["model"], summaries, set_name, others)


def _publish(partial: Path, output: Path) -> None:
    """Moves the files of an analysis to their place, and removes those that an earlier one left."""
    output.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        if (partial / name).exists():
            os.replace(partial / name, output / name)
        else:
            (output / name).unlink(missing_ok=True)


def _print_summary(
    options: argparse.Namespace,
    statistics: Any,
    comparison: Any,
    summaries: Sequence[dict[str, Any]],
    set_name: str,
    others: Sequence[tuple[str, Any]],
) -> None:
    n_set, n_background = comparison.loc[0, ["n_set", "n_background"]].astype(int)
    print(
        f"{statistics.n_cells:,} cells ({statistics.n_skipped:,} with fewer than two genes left out); "
        f"{n_set:,} genes of {set_name} against {n_background:,} {others[0][0] if others else 'other genes'}"
    )
    for row in summaries:
        print(
            f"{row['weights']}: {row['share_more']:.0%} of {row['n_heads']} heads attend to {set_name} more, "
            f"{row['share_less']:.0%} less; matched by rank and number of cells {row['share_more_matched']:.0%} more, "
            f"{row['share_less_matched']:.0%} less (FDR 0.05)"
        )
    print(f"wrote {options.output}")


def _figures(folder: Path, comparison: Any, table: Any, by_rank: Any, diversity: Any, gene_sets: Any) -> None:
    import matplotlib.pyplot as plt

    from ..figures import save_figure
    from .figures import plot_attention_by_rank, plot_head_effects, plot_rank_diversity, plot_sets_by_layer

    names = list(gene_sets)
    layers, heads = comparison["layer"].nunique(), comparison["head"].nunique()
    figure, axes = plt.subplots(1, 2, figsize=(max(6.4, 2 * (1.9 + 0.42 * heads)) + 4, 1.6 + 0.36 * layers))
    for ax, matched in zip(axes, (False, True), strict=True):
        plot_head_effects(comparison, ax, matched=matched, title=f"{names[0]} against {names[1]}")
    figure.tight_layout()
    save_figure(axes[0], folder / "heads.png")

    figure, axes = plt.subplots(
        1, 2, figsize=(12, float(np.clip(1.2 + 0.1 * layers * heads, 3.8, 14))), width_ratios=(1.7, 1)
    )
    plot_attention_by_rank(by_rank, axes[0])
    plot_rank_diversity(diversity, axes[1])
    figure.tight_layout()
    save_figure(axes[0], folder / "ranks.png")

    save_figure(plot_sets_by_layer(table, gene_sets), folder / "sets.png")


def _checked_output(path: Path, overwrite: bool) -> Path:
    """Raises FileExistsError if the folder is in use, by other files or by an earlier analysis that is to be kept."""
    output = path.resolve()
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{path} is a file; expected the name of a folder.")
    present = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    foreign = [name for name in present if name not in OUTPUTS]
    if foreign:
        raise FileExistsError(f"{path} holds other files, e.g. {examples(foreign)}. Choose another folder.")
    if present and not overwrite:
        raise FileExistsError(f"{path} holds an analysis already. Pass --overwrite to replace it.")
    return output


def _gene_sets(options: argparse.Namespace, tokenizer: Any) -> dict[str, list[str]]:
    """One or two sets as the vocabulary names their genes: the set asked about, and its background if one is given."""
    labelled = read_gene_sets(options.gene_set)
    name = options.label or next(iter(labelled))
    if name not in labelled:
        raise ValueError(f"{options.gene_set} has no label {name!r}; it has {', '.join(labelled)}.")
    names = {name: labelled.pop(name)}
    if options.background is not None:
        label = options.background.stem
        label = f"{label} (background)" if label in names else label
        names[label] = [gene for genes in read_gene_sets(options.background).values() for gene in genes]
    elif labelled:
        names[", ".join(labelled)] = [gene for genes in labelled.values() for gene in genes]
    resolved = {}
    for label, genes in names.items():
        resolved[label], unknown = resolve_genes(genes, tokenizer)
        if unknown:
            count = f"{len(unknown):,} of {len(genes):,}"
            print(f"{label}: {count} genes are not in the vocabulary, e.g. {examples(unknown)}")
    if len(resolved) == 2:
        first, second = resolved.values()
        both = set(first) & set(second)
        if both:
            print(f"{len(both):,} genes stand on both sides and are left out, e.g. {examples(sorted(both))}")
            resolved = {label: [gene for gene in genes if gene not in both] for label, genes in resolved.items()}
    return resolved


def _cells(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Cells and further options for `collect_attention`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ..tokenization.count_matrix import open_counts

    saved = (options.cells / "dataset_info.json").is_file()
    if saved or options.cells.suffix == ".parquet":
        if options.where or options.counts_layer or options.gene_ids:
            raise ValueError("--where, --counts-layer and --gene-ids apply to counts, not to token ids.")
        if saved:
            import datasets

            dataset: Any = datasets.load_from_disk(str(options.cells))
            return list(dataset.with_format("numpy")["input_ids"][:]), {}
        try:
            schema = pq.read_schema(options.cells)
            if "input_ids" not in schema.names:
                raise ValueError(f"{options.cells}: expected a column input_ids, found {', '.join(schema.names)}.")
            column = pq.read_table(options.cells, columns=["input_ids"])["input_ids"]
        except pa.ArrowException as error:
            raise ValueError(f"{options.cells} cannot be read as Parquet: {error}") from error
        return [np.asarray(ids.values) for chunk in column.chunks for ids in chunk], {}
    encode_options = {"counts_layer": options.counts_layer, "gene_ids": options.gene_ids}
    if options.where:
        name, separator, value = options.where.partition("=")
        if not separator:
            raise ValueError(f"Expected --where COLUMN=VALUE, found {options.where!r}.")
        with open_counts(options.cells, layer=options.counts_layer) as matrix:
            if name not in matrix.obs:
                columns = ", ".join(map(str, matrix.obs)) or "none"
                raise ValueError(f"{options.cells}: obs has no column {name!r}; it has {columns}.")
            values = matrix.obs[name].astype(str)
        mask = (values == value).to_numpy()
        if not mask.any():
            raise ValueError(f"No cell has {name} {value!r}; there are e.g. {examples(values.unique())}.")
        encode_options["cells"] = mask
    return options.cells, encode_options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cellglot.attention",
        description="Attention of a Geneformer's heads to a set of genes, and to ranks: tables and figures.",
    )
    add = parser.add_argument
    add(
        "cells",
        type=Path,
        help="counts (.h5ad, .loom, 10x .h5 or .mtx folder), a .parquet or a saved dataset with a column input_ids",
    )
    add("--model", required=True, metavar="DIR", help="model directory, of cellglot or of the original Geneformer")
    add("--tokenizer", metavar="DIR", help="tokenizer directory, if it is not the model's")
    add("--gene-set", type=Path, required=True, metavar="FILE", help="one gene a line, or a TSV of gene_id and label")
    add("--label", help="the set of the file to ask about (the first); its others are the background")
    add("--background", type=Path, metavar="FILE", help="genes to compare with, in place of all others")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for tables and figures")
    add("--overwrite", action="store_true", help="replace an earlier analysis there")
    add("--max-cells", type=int, metavar="N", help="draw N cells at random")
    add("--where", metavar="COLUMN=VALUE", help="only cells with that value in obs, such as cell_type=endothelial")
    add("--counts-layer", metavar="NAME", help="layer with raw counts, or 'raw'; X if absent")
    add("--gene-ids", metavar="COLUMN", help="column of var with gene identifiers")
    add("--random-control", action="store_true", help="the same with random weights, for comparison")
    add("--seed", type=int, default=0, help="of the cells drawn and of random weights (default 0)")
    add("--device", help="cpu, cuda, ...; by default cuda where there is one")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
