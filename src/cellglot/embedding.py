"""Cell embeddings: a cell as the mean of its genes' embeddings in context.

Source: Theodoris et al., Nature 2023, Methods, "Geneformer cell embeddings": the second-to-last layer generalizes
better than the last, which is closest to the pre-training objective.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from .cell_stream import (
    annotated_copy,
    check_model,
    encoded_blocks,
    evaluating,
    is_path,
    open_every_cell,
    padded_batches,
)
from .embedding_files import embedding_writer


def embed_cells(
    adata_or_path: Any,
    model: Any,
    tokenizer: Any,
    *,
    layer: int = -1,
    pooling: Literal["mean", "cls"] = "mean",
    output: str | os.PathLike | None = None,
    key: str = "X_geneformer",
    overwrite: bool = False,
    counts_layer: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    **encode_options: Any,
) -> Any:
    """Cell embeddings of an AnnData or a file, computed block by block.

    adata_or_path   AnnData (in memory or backed), or path of an `.h5ad`, `.loom`, 10x `.h5` or 10x `.mtx` folder
    model           a GeneformerModel, or a Geneformer with a head; runs where its weights are
    layer           -1 second-to-last (as in the paper), 0 last; -2, -3 ... further down
    pooling         "mean" over the gene tokens, or "cls" (V2 layout)
    output          file to stream the embeddings to, so that memory stays bounded by the block: a `.parquet` (columns
                    cell and `key`), or an `.h5ad`, a copy of the `.h5ad` in with obsm[key]; the same path writes into
                    it. Files are written aside and renamed when complete
    key             name in obsm, and of the column in Parquet
    overwrite       replaces an output file, or an obsm[key] in it, that is there already
    counts_layer    None for X, "raw" for `raw`, else the name of the layer with raw counts
    max_tokens      padded tokens of one forward pass; by default what suits the device
    encode_options  further ones of `RankValueTokenizer.iter_encoded`, e.g. cells_per_block; max_length is by default
                    what both tokenizer and model can read
    Returns         an AnnData: a copy with obsm[key], (cells, width) float32; a path: that array; with `output`: its
                    path. A cell without a gene of the vocabulary gets NaN.
    Raises          ValueError for a layer that is not there, "cls" without such a token, a model or tokenizer that do
                    not fit; FileExistsError for an output that is there
    """
    encoder = check_model(model, tokenizer)
    width = encoder.config.hidden_size
    n_layers = layers_to_run(encoder, layer)
    _check_pooling(pooling, tokenizer)

    def embedded_blocks(matrix: Any) -> Iterator[np.ndarray]:
        with tqdm(total=matrix.n_cells, desc="embed", unit="cell", disable=not progress) as bar:
            for cells in encoded_blocks(matrix, encoder, tokenizer, encode_options):
                yield _embed(cells, encoder, tokenizer, n_layers, pooling, max_tokens, bar)

    opened = open_every_cell(adata_or_path, counts_layer, encode_options)
    if output is not None:
        source = Path(adata_or_path) if is_path(adata_or_path) else None
        with embedding_writer(Path(output), source, key, width, overwrite) as write, opened as matrix:
            start = 0
            for rows in embedded_blocks(matrix):
                write(matrix.obs.index[start : start + len(rows)], rows)
                start += len(rows)
        return Path(output)
    with opened as matrix:
        embeddings = np.empty((matrix.n_cells, width), dtype=np.float32)
        start = 0
        for rows in embedded_blocks(matrix):
            embeddings[start : start + len(rows)] = rows
            start += len(rows)
    if is_path(adata_or_path):
        return embeddings
    annotated = annotated_copy(adata_or_path)
    annotated.obsm[key] = embeddings
    return annotated


def embed_tokens(
    cells: Sequence[np.ndarray],
    model: Any,
    tokenizer: Any,
    *,
    layer: int = -1,
    pooling: Literal["mean", "cls"] = "mean",
    max_tokens: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Embeddings of tokenized cells, (cells, width) float32, in the order given. Arguments as of `embed_cells`."""
    encoder = check_model(model, tokenizer)
    n_layers = layers_to_run(encoder, layer)
    _check_pooling(pooling, tokenizer)
    with tqdm(total=len(cells), desc="embed", unit="cell", disable=not progress) as bar:
        return _embed(cells, encoder, tokenizer, n_layers, pooling, max_tokens, bar)


def layers_to_run(encoder: Any, layer: int) -> int:
    """Number of the encoder's first layers whose output is `layer`.

    Raises  ValueError for a layer that is not there
    """
    n_layers = encoder.config.num_hidden_layers + layer
    if layer > 0 or n_layers < 0:
        raise ValueError(f"Expected layer 0 (last) to {-encoder.config.num_hidden_layers} (input), found {layer}.")
    return n_layers


def _check_pooling(pooling: str, tokenizer: Any) -> None:
    if pooling not in ("mean", "cls"):
        raise ValueError(f"Expected pooling 'mean' or 'cls', found {pooling!r}.")
    if pooling == "cls" and tokenizer.cls_token_id is None:
        raise ValueError("This tokenizer's layout has no <cls>; use pooling='mean'.")


@torch.inference_mode()
def _embed(
    cells: Sequence[np.ndarray],
    encoder: Any,
    tokenizer: Any,
    n_layers: int,
    pooling: str,
    max_tokens: int | None,
    bar: Any,
) -> np.ndarray:
    """(cells, width) float32; NaN for a cell without tokens."""
    out = np.full((len(cells), encoder.config.hidden_size), np.nan, dtype=np.float32)
    first_gene = int(tokenizer.gene_token_ids[0])
    n_done = 0
    with evaluating(encoder) as device:
        for chosen, input_ids, mask in padded_batches(cells, tokenizer, max_tokens, device):
            # Layers above the one asked for would be computed only to be thrown away.
            x = encoder(input_ids, attention_mask=mask, num_layers=n_layers).last_hidden_state.float()
            if pooling == "cls":
                pooled = x[:, 0]
            else:
                genes = (input_ids >= first_gene).unsqueeze(-1)
                pooled = (x * genes).sum(dim=1) / genes.sum(dim=1)
            out[chosen] = pooled.cpu().numpy()
            n_done += len(chosen)
            bar.update(len(chosen))
    bar.update(len(cells) - n_done)
    return out
