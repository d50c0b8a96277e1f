"""Tables and figures of a finished run's folder, written beside its results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..embedding_files import replaced_when_complete
from ..figures import save_figure
from ..tokenization.count_matrix import open_counts
from ..tokenization.gene_ids import GENE_SYMBOL_COLUMNS
from . import figures, statistics
from .run import read_run
from .states import CellStates


def summarize(output: Path, states: CellStates | None, null: Path | None, labels: dict[str, str]) -> None:
    """Writes tables of statistics and figures beside the results, and prints the first rows.

    states  which shifts were measured to
    null    folder of the same perturbation of a null set of cells
    labels  gene -> symbol
    """
    effects = read_run(output, only_cells=True).to_pandas()
    written = []
    for name, content in _results(output, effects, states, null, labels):
        if name.endswith(".png"):
            save_figure(content, output / name)
        else:
            content = _with_symbols(content, labels)
            if name == "statistics.csv":
                print(content.head(10).to_string(index=False))
            with replaced_when_complete(output / name) as partial:
                content.to_csv(partial, index=False)
        written.append(name)
    print(f"written to {output}: {', '.join(written)}, and the effects in each cell as part-*.parquet")


def _results(
    output: Path, effects: Any, states: CellStates | None, null: Path | None, labels: dict[str, str]
) -> Iterator[tuple[str, Any]]:
    """File names, with a table or axes each; what takes long comes last."""
    table = _statistics(effects, states)
    yield "statistics.csv", table
    yield "shift_ranking.png", figures.plot_shift_ranking(table, labels=labels)
    if "p_value" in table:
        yield "volcano.png", figures.plot_volcano(table, labels=labels)
    if null is not None:
        value = "cosine_similarity" if states is None else f"shift_to_{states.goal}"
        table = statistics.versus_null(effects, read_run(null, only_cells=True).to_pandas(), value)
        print(f"compared with the null cells by {value}: {table['significant'].sum():,} genes differ")
        yield "versus_null.csv", table
        yield "volcano_versus_null.png", figures.plot_volcano(table, labels=labels)
    if "affected" in effects:
        yield "gene_effects.csv", statistics.mean_effects(output)


def _statistics(effects: Any, states: CellStates | None) -> Any:
    """The richest statistics that the effects allow."""
    n_genes = effects["gene"].nunique()
    if states is not None and n_genes > 1:
        return statistics.shifts_to_states(effects, [state for state in states.names if state != states.start])
    means = statistics.mean_effects(effects.drop(columns="affected", errors="ignore"))
    if states is None and n_genes >= statistics.MIN_GENES and means["mean"].nunique() > 1:
        return statistics.impact_mixture(effects)
    return means


def _with_symbols(table: Any, labels: dict[str, str]) -> Any:
    symbol_of = {gene: figures.gene_label(gene, labels) for gene in table["gene"].unique()}
    table = table.copy(deep=False)
    table.insert(int(table.columns.get_loc("gene")) + 1, "symbol", table["gene"].map(symbol_of))
    return table


def gene_labels(cells: Path, tokenizer: Any, counts_layer: str | None, gene_ids: str | None) -> dict[str, str]:
    """Vocabulary gene -> symbol, as the file names its genes; empty for files of tokens."""
    if (cells / "dataset_info.json").is_file():
        return {}
    with open_counts(cells, layer=counts_layer) as matrix:
        index_g = tokenizer.match_genes(matrix, gene_ids).index_g
        column = next((name for name in GENE_SYMBOL_COLUMNS if name in matrix.var), None)
        symbols = matrix.var.index if column is None else matrix.var[column]
        genes = tokenizer.resolver.vocabulary
        return {genes[g]: str(symbol) for g, symbol in zip(index_g, symbols, strict=True) if g >= 0}
