"""Cell embeddings: a cell as the mean of its genes' embeddings in context.

Source: Theodoris et al., Nature 2023, Methods, "Geneformer cell embeddings": the second-to-last layer generalizes
better than the last, which is closest to the pre-training objective.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from .tokenization.count_matrix import open_counts

# Padded tokens of one forward pass at the most
MAX_TOKENS = 16_384


def embed_cells(
    adata_or_path: Any,
    model: Any,
    tokenizer: Any,
    *,
    layer: int = -1,
    pooling: Literal["mean", "cls"] = "mean",
    counts_layer: str | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = True,
    **encode_options: Any,
) -> Any:
    """Cell embeddings of an AnnData or a file.

    model           a GeneformerModel, or a Geneformer with a head; runs where its weights are
    layer           -1 second-to-last (as in the paper), 0 last; -2, -3 ... further down
    pooling         "mean" over the gene tokens, or "cls" (V2 layout)
    counts_layer    None for X, "raw" for `raw`, else the name of the layer with raw counts
    max_tokens      padded tokens of one forward pass
    encode_options  further ones of `RankValueTokenizer.encode_anndata`
    Returns         an AnnData: a copy with obsm["X_geneformer"], (cells, width) float32; a path: that array.
                    A cell without a gene of the vocabulary gets NaN.
    Raises          ValueError for a layer that is not there, or "cls" without such a token
    """
    if encode_options.get("empty_cells", "keep") != "keep" or encode_options.get("cells") is not None:
        raise ValueError("Embeddings are one row a cell: select cells before, not with empty_cells= or cells=.")
    with open_counts(adata_or_path, layer=counts_layer) as matrix:
        n_cells = matrix.n_cells
    encoded = tokenizer.encode_anndata(adata_or_path, layer=counts_layer, **encode_options)
    if len(encoded) != n_cells:
        raise ValueError(f"obs['filter_pass'] selects {len(encoded):,} of {n_cells:,} cells: subset them first.")
    embeddings = embed_tokens(
        encoded.with_format("numpy")["input_ids"][:],
        model,
        tokenizer,
        layer=layer,
        pooling=pooling,
        max_tokens=max_tokens,
        progress=progress,
    )
    if isinstance(adata_or_path, str | Path):
        return embeddings
    annotated = adata_or_path.copy()
    annotated.obsm["X_geneformer"] = embeddings
    return annotated


@torch.inference_mode()
def embed_tokens(
    cells: Sequence[np.ndarray],
    model: Any,
    tokenizer: Any,
    *,
    layer: int = -1,
    pooling: Literal["mean", "cls"] = "mean",
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> np.ndarray:
    """Embeddings of tokenized cells, (cells, width) float32, in the order given. Arguments as of `embed_cells`."""
    encoder = getattr(model, model.base_model_prefix, model)
    n_layers = encoder.config.num_hidden_layers + layer
    if layer > 0 or n_layers < 0:
        raise ValueError(f"Expected layer 0 (last) to {-encoder.config.num_hidden_layers} (input), found {layer}.")
    if pooling == "cls" and tokenizer.cls_token_id is None:
        raise ValueError("This tokenizer's layout has no <cls>; use pooling='mean'.")
    device = next(encoder.parameters()).device
    lengths = np.array([len(cell) for cell in cells])
    out = np.full((len(cells), encoder.config.hidden_size), np.nan, dtype=np.float32)
    was_training = encoder.training
    encoder.eval()
    with tqdm(total=len(cells), desc="embed", unit="cell", disable=not progress) as bar:
        bar.update(int((lengths == 0).sum()))
        for chosen in _length_sorted_batches(lengths, max_tokens):
            ids = np.full((len(chosen), lengths[chosen[0]]), tokenizer.pad_token_id, dtype=np.int64)
            for row, cell in zip(ids, chosen, strict=True):
                row[: lengths[cell]] = cells[cell]
            input_ids = torch.from_numpy(ids).to(device)
            mask = (input_ids != tokenizer.pad_token_id).long()
            # Layers above the one asked for would be computed only to be thrown away.
            x = encoder(input_ids, attention_mask=mask, num_layers=n_layers).last_hidden_state.float()
            if pooling == "cls":
                pooled = x[:, 0]
            else:
                genes = (input_ids >= int(tokenizer.gene_token_ids[0])).unsqueeze(-1)
                pooled = (x * genes).sum(dim=1) / genes.sum(dim=1)
            out[chosen] = pooled.cpu().numpy()
            bar.update(len(chosen))
    encoder.train(was_training)
    return out


def _length_sorted_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Non-empty cells, longest first, in batches of at most max_tokens padded tokens (or of one cell)."""
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches, start = [], 0
    while start < len(order):
        stop = start + max(max_tokens // int(lengths[order[start]]), 1)
        batches.append(order[start:stop])
        start = stop
    return batches
