"""In silico perturbation: which genes, removed or moved in a cell's ranking, change it most or bring it to a state.

In Python: `perturb_cells`, `write_perturbations`. On the command line: `python -m cellglot.perturb --help`.

Source: Theodoris et al., Nature 2023, Methods, "In silico perturbation".
"""

import sys
from pathlib import Path
from typing import Any

from .perturbation.plan import plan_run
from .perturbation.run import Effect, Method, read_record, read_run
from .perturbation.states import CellStates
from .perturbation.targets import PerturbationReport

__all__ = ["CellStates", "perturb_cells", "read_perturbations", "write_perturbations"]


def perturb_cells(
    tokens_or_adata: Any,
    model: Any,
    tokenizer: Any,
    *,
    kind: str = "delete",
    method: Method = "exact",
    genes: Any = "all",
    layer: int = -1,
    anchor: str | None = None,
    rank_shift: int | None = None,
    effect: Effect = "cell",
    states: CellStates | None = None,
    output: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Effects of perturbing genes of cells, one row for each perturbed gene of each cell.

    tokens_or_adata  AnnData or a file of counts; a datasets.Dataset with column input_ids (or its saved folder); or a
                     list of token arrays. Cells must fit the model's context; counts are encoded to fit, into a
                     temporary file
    model            a GeneformerModel, or a Geneformer with a head; runs where its weights are
    kind             "delete" drops a gene; "overexpress" moves it to the front, or inserts it there and cuts the tail
                     at the context; "activate" and "inhibit" move it up or down by `rank_shift` quartiles of the cell's
                     ranking, to the middle of that quartile, or to the front or bottom beyond it
    method           "exact": a forward pass for each edit. "gradient": first-order estimates, to find the genes worth
                     computing. All deletions of single genes of a cell take one forward pass, and a backward pass
                     for each state; or 16 of them for cosine similarities without states (with states these are NaN)
    genes            "all": each gene of each cell. Or names (Ensembl ids, with version or not, other names): those in a
                     list one at a time, those in a list within the list together: ["GATA4", ["GATA4", "TBX5"]].
                     All kinds but "overexpress" perturb the cells that hold the genes of a group, and only those
    layer            -1 second-to-last (as in the paper), 0 last; -2, -3 ... further down
    anchor           a gene that is perturbed together with each of the genes
    rank_shift       1 (if absent), 2 or 3 quartiles, for "activate" and "inhibit"
    effect           "cell": effects on cells. "gene": also on every other gene of the cell, a row each
    states           measures shifts to cell states; only cells of the start state are perturbed
    output           folder to stream results to, and to go on from if it has some of them. All rows are read back
                     for the table returned: where they may not fit in memory, as of effect="gene" with many genes,
                     use `write_perturbations` and `mean_effects(folder)`
    options          pooling: "mean" over genes or "cls"; by default "cls" in the V2 layout.
                     max_cells, seed: perturbs a random sample of that many cells.
                     max_tokens: padded tokens of one forward pass; by default what suits the device.
                     counts_layer and options of `RankValueTokenizer.encode_anndata`, for counts
    Returns          DataFrame, cells in the order given and genes by rank (or as listed), with columns
                     cell               number of the cell, from 0
                     cell_name          its name, where cells have one
                     gene               perturbed gene; "A+B" for genes perturbed together
                     position           rank of the gene in the cell from 0, -1 if inserted; of a group its first gene,
                                        with an anchor the anchor's partner
                     affected           with effect="gene": "cell" for the effect on the cell, else the affected gene
                     cosine_similarity  before and after; of a cell with "mean" pooling the mean over its genes that
                                        were not perturbed, with "cls" that of <cls>
                     shift_to_<state>   with states: cos(perturbed cell, state) - cos(cell, state), of cell embeddings
                     `attrs["report"]` says what was perturbed and left out, `attrs["method"]` whether values are exact
                     or estimates, `attrs["start"]` the start state.
    Raises           ValueError for what cannot be done, FileExistsError for an output folder of something else
    """
    request = {"kind": kind, "genes": genes, "layer": layer, "anchor": anchor, "rank_shift": rank_shift}
    measured = {"method": method, "effect": effect, "states": states}
    run = plan_run(tokens_or_adata, model, tokenizer, **request, **measured, **options)
    if output is None:
        return _frame(run.table(progress=progress), run.record, run.report)
    run.begun(Path(output)).write_parts(Path(output), progress=progress)
    return read_perturbations(output)


def write_perturbations(
    tokens_or_adata: Any, model: Any, tokenizer: Any, output: str | Path, *, progress: bool = True, **options: Any
) -> Path:
    """The folder `output`, with the rows of `perturb_cells` as Parquet parts; memory stays bounded by a batch.

    A run that was interrupted goes on where it stopped, to the same result, when it is started again with the same
    model, cells (their names too) and options; `max_tokens` may differ. `states.parquet` keeps embeddings of states.
    options  as of `perturb_cells`, and part_tokens: tokens of edited cells in a part, about
    Raises   FileExistsError for a folder that holds anything else; it is left as it is
    """
    folder = Path(output)
    plan_run(tokens_or_adata, model, tokenizer, **options).begun(folder).write_parts(folder, progress=progress)
    return folder


def read_perturbations(folder: str | Path, *, only_cells: bool = False) -> Any:
    """DataFrame of a folder that `write_perturbations` finished, as `perturb_cells` returns it.

    only_cells  leaves out the effects on genes, which may be many
    Raises      FileNotFoundError if parts are missing
    """
    folder = Path(folder)
    record = read_record(folder)
    return _frame(read_run(folder, only_cells=only_cells), record, PerturbationReport(**record["report"]))


def _frame(table: Any, record: dict[str, Any], report: PerturbationReport) -> Any:
    frame = table.to_pandas()
    # Text, which survives to_parquet
    frame.attrs["report"] = str(report)
    frame.attrs["method"] = record["method"]
    if record.get("start") is not None:
        frame.attrs["start"] = record["start"]
    return frame


if __name__ == "__main__":
    from .perturbation.command_line import main

    sys.exit(main())
