"""In silico perturbation: which genes, removed or moved in a cell's ranking, change it most or bring it to a state.

In Python: `perturb_cells`, `write_perturbations`. On the command line: `python -m cellglot.perturb --help`.

Source: Theodoris et al., Nature 2023, Methods, "In silico perturbation".
"""

import sys
from pathlib import Path
from typing import Any

from .perturbation.plan import plan_run
from .perturbation.run import Effect, read_run
from .perturbation.states import CellStates

__all__ = ["CellStates", "perturb_cells", "read_perturbations", "write_perturbations"]


def perturb_cells(
    tokens_or_adata: Any,
    model: Any,
    tokenizer: Any,
    *,
    kind: str = "delete",
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
                     list of token arrays. Cells must fit the model's context; counts are encoded to fit
    model            a GeneformerModel, or a Geneformer with a head; runs where its weights are
    kind             "delete" drops a gene; "overexpress" moves it to the front, or inserts it there and cuts the tail
                     at the context; "activate" and "inhibit" move it up or down by `rank_shift` quartiles of the cell's
                     ranking, to the middle of that quartile, or to the front or bottom beyond it
    genes            "all": each gene of each cell. Or names (Ensembl ids, with version or not, other names): those in a
                     list one at a time, those in a list within the list together: ["GATA4", ["GATA4", "TBX5"]].
                     All kinds but "overexpress" perturb the cells that hold the genes of a group, and only those
    layer            -1 second-to-last (as in the paper), 0 last; -2, -3 ... further down
    anchor           a gene that is perturbed together with each of the genes
    rank_shift       1 (if absent), 2 or 3 quartiles, for "activate" and "inhibit"
    effect           "cell": effects on cells. "gene": also on every other gene of the cell, a row each
    states           measures shifts to cell states; only cells of the start state are perturbed
    output           folder to stream results to, and to go on from if it has some of them (`write_perturbations`)
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
                     `attrs["report"]` counts what was perturbed and left out.
    Raises           ValueError for what cannot be done, FileExistsError for an output folder of something else
    """
    request = {"kind": kind, "genes": genes, "layer": layer, "anchor": anchor, "rank_shift": rank_shift}
    run = plan_run(tokens_or_adata, model, tokenizer, **request, effect=effect, states=states, **options)
    if output is None:
        table = run.table(progress=progress)
    else:
        run.write(Path(output), progress=progress)
        table = read_run(output)
    frame = table.to_pandas()
    frame.attrs["report"] = run.report
    return frame


def write_perturbations(
    tokens_or_adata: Any, model: Any, tokenizer: Any, output: str | Path, *, progress: bool = True, **options: Any
) -> Path:
    """The folder `output`, with the rows of `perturb_cells` as Parquet parts; memory stays bounded by a batch.

    A run that was interrupted goes on where it stopped, to the same result, when it is started again with the same
    model, cells and options; `max_tokens` may differ.
    options  as of `perturb_cells`, and part_tokens: tokens of edited cells in a part, about
    Raises   FileExistsError for a folder that holds anything else; it is left as it is
    """
    plan_run(tokens_or_adata, model, tokenizer, **options).write(Path(output), progress=progress)
    return Path(output)


def read_perturbations(folder: str | Path, *, only_cells: bool = False) -> Any:
    """DataFrame of a folder that `write_perturbations` finished.

    only_cells  leaves out the effects on genes, which may be many
    Raises      FileNotFoundError if parts are missing
    """
    return read_run(folder, only_cells=only_cells).to_pandas()


if __name__ == "__main__":
    from .perturbation.command_line import main

    sys.exit(main())
