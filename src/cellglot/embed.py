"""Embeddings of the cells (or genes) of a file, from the command line: `python -m cellglot.embed --help`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

# Cells that a UMAP figure shows at the most, drawn at random: more take hours and hide each other
UMAP_CELLS = 50_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after a message about what is wrong with the input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _refuse_combinations(parser, options)

    import torch

    try:
        run(options)
    except torch.OutOfMemoryError as error:
        print(f"error: {error}\nPass a lower --max-tokens (by default 32,768 on a GPU).", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Embeds as the options say, and prints what was written.

    Raises  ValueError, OSError, ImportError for what a user can mend
    """
    import transformers

    from .embedding import embed_cells
    from .loading import find_tokenizer, load_encoder

    if options.quiet:
        transformers.utils.logging.disable_progress_bar()
    missing = [name for name in ("umap", "matplotlib") if options.umap and find_spec(name) is None]
    if missing:
        # Said before the work, not after it.
        raise ImportError(f"--umap needs {' and '.join(missing)}: pip install 'cellglot[train]'")
    labels = _column(options.cells, options.color) if options.color else None
    tokenizer = find_tokenizer(options.tokenizer or options.model)
    model = load_encoder(options.model, options.device)
    shared = {
        "layer": options.layer,
        "counts_layer": options.counts_layer,
        "gene_ids": options.gene_ids,
        "max_tokens": options.max_tokens,
        "progress": not options.quiet,
    }
    if options.genes is not None:
        _embed_genes(options, model, tokenizer, shared)
        return
    output = options.cells if options.into_file else options.output
    embed_cells(
        options.cells,
        model,
        tokenizer,
        output=output,
        pooling=options.pooling,
        key=options.key,
        overwrite=options.overwrite,
        **shared,
    )
    print(f"cell embeddings: {f'obsm[{options.key!r}] of ' if output.suffix == '.h5ad' else ''}{output}")
    if options.umap:
        n_cells = _draw_umap(output, options.key, labels, options.umap)
        print(f"UMAP of {n_cells:,} cells: {options.umap}")


def _embed_genes(options: argparse.Namespace, model: Any, tokenizer: Any, shared: dict[str, Any]) -> None:
    from .embedding_files import replaced_when_complete
    from .gene_embeddings import embed_genes

    if options.output.exists() and not options.overwrite:
        raise FileExistsError(f"{options.output} exists: choose another name, or pass --overwrite.")
    frame = embed_genes(options.cells, model, tokenizer, genes=options.genes or None, **shared)
    with replaced_when_complete(options.output) as partial:
        frame.to_parquet(partial)
    print(f"embeddings of {len(frame):,} genes: {options.output}")


def _column(cells: Path, name: str) -> np.ndarray:
    """A column of obs as text."""
    from .tokenization.count_matrix import open_counts

    with open_counts(cells) as matrix:
        if name not in matrix.obs:
            raise ValueError(
                f"{cells}: obs has no column {name!r} to colour by; it has {', '.join(map(str, matrix.obs)) or 'none'}."
            )
        return matrix.obs[name].astype(str).to_numpy()


def _draw_umap(embedded: Path, key: str, labels: np.ndarray | None, figure: Path) -> int:
    """Draws the cells that have an embedding, and returns how many they are."""
    from .embedding_files import count_embeddings, read_embeddings
    from .figures import plot_umap, save_figure, umap_coordinates

    n = count_embeddings(embedded, key)
    cells = np.sort(np.random.default_rng(0).permutation(n)[:UMAP_CELLS])
    embeddings = read_embeddings(embedded, key, cells)[1]
    filled = ~np.isnan(embeddings[:, 0])
    cells, embeddings = cells[filled], embeddings[filled]
    if len(cells) < 4:
        raise ValueError(f"A UMAP needs 4 cells with genes of the vocabulary at least, found {len(cells)}.")
    coordinates = umap_coordinates(embeddings)
    save_figure(plot_umap(coordinates, None if labels is None else labels[cells].tolist()), figure)
    return len(cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cellglot.embed",
        description="Embeds the cells of a file with a Geneformer, block by block, so that memory stays bounded.",
        epilog="Messages name the arguments of the Python functions; the options here are called alike.",
    )
    add = parser.add_argument
    add("cells", type=Path, help=".h5ad, .loom, 10x .h5 file or 10x .mtx folder with raw counts")
    add("--model", required=True, help="model directory or repository")
    add("--tokenizer", help="directory of the tokenizer, if it is not beside the model")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, help="file to write: .parquet, or .h5ad, an annotated copy of the input")
    where.add_argument("--into-file", action="store_true", help="write into the .h5ad itself, replaced when complete")
    add("--overwrite", action="store_true", help="replace an output, or embeddings in the file, that are there already")
    add("--layer", type=int, default=-1, help="-1 second-to-last (default), 0 last, -2 ... further down")
    add("--pooling", choices=["mean", "cls"], default="mean", help="mean over genes (default), or <cls> (V2)")
    add("--key", default="X_geneformer", help="name in obsm, and of the column in Parquet (default X_geneformer)")
    add("--genes", nargs="*", metavar="GENE", help="embed genes in context, not cells: those named, or all")
    add("--counts-layer", help="layer with raw counts, or 'raw'; X by default")
    add("--gene-ids", help="column of var with gene ids; found by itself where possible")
    add("--umap", type=Path, metavar="FIGURE.png", help=f"draw a UMAP (of {UMAP_CELLS:,} random cells at the most)")
    add("--color", metavar="COLUMN", help="column of obs that colours the UMAP")
    add("--max-tokens", type=int, help="padded tokens of a batch; by default what suits the device")
    add("--device", help="e.g. cpu, cuda:1; a GPU by default where there is one")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _refuse_combinations(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.color and not options.umap:
        parser.error("--color colours the UMAP: pass --umap too")
    if options.genes is not None:
        if options.into_file or options.output.suffix != ".parquet":
            parser.error("--genes writes a table: pass --output FILE.parquet")
        if options.umap or options.pooling != "mean" or options.key != "X_geneformer":
            parser.error("--umap, --pooling and --key are for cells, not for --genes")


if __name__ == "__main__":
    sys.exit(main())
