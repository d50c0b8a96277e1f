"""Gene embeddings in context: a gene as the mean of its embeddings over the cells that hold it.

Source: the original's `EmbExtractor` with `emb_mode="gene"`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .cell_stream import check_encode_options, check_model, encoded_blocks, evaluating, padded_batches
from .embedding import layers_to_run
from .tokenization.count_matrix import open_counts
from .tokenization.gene_ids import examples


def embed_genes(
    adata_or_path: Any,
    model: Any,
    tokenizer: Any,
    *,
    layer: int = -1,
    genes: Sequence[str] | None = None,
    counts_layer: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
    **encode_options: Any,
) -> Any:
    """Embedding of each gene in context, its mean over the cells that hold it.

    adata_or_path   as of `embed_cells`, likewise read block by block; obs["filter_pass"] or `cells` select cells
    layer           -1 second-to-last (as in the paper), 0 last; -2, -3 ... further down
    genes           ids, symbols or other names the tokenizer knows, or special tokens such as "<cls>"; by default every
                    gene that some cell holds. Cells without any of these genes are not run through the model
    encode_options  further ones of `RankValueTokenizer.iter_encoded`
    Returns         DataFrame with `gene` as index (as named in `genes`, else Ensembl ids in order of token id), columns
                    n_cells, embedding_0, embedding_1, ... (float32; NaN for a gene that no cell holds)
    Raises          ValueError for genes that are not in the vocabulary, and as `embed_cells`
    """
    encoder = check_model(model, tokenizer)
    check_encode_options(encode_options)
    chosen = tokenizer.gene_token_ids if genes is None else _token_ids(genes, tokenizer)
    sums = _TokenSums(encoder, tokenizer, layers_to_run(encoder, layer), np.unique(chosen))
    with open_counts(adata_or_path, layer=counts_layer) as matrix:
        selected = matrix.passing_cells(encode_options.get("cells"))
        n_cells = matrix.n_cells if selected is None else int(selected.sum())
        with tqdm(total=n_cells, desc="embed genes", unit="cell", disable=not progress) as bar:
            for cells in encoded_blocks(matrix, encoder, tokenizer, encode_options):
                sums.add(cells, max_tokens, bar)
    return _frame(chosen, genes, sums, tokenizer)


class _TokenSums:
    """Sums of the embeddings of some tokens over cells, in float64, and in how many cells each was."""

    def __init__(self, encoder: Any, tokenizer: Any, n_layers: int, token_ids: np.ndarray):
        self.encoder, self.tokenizer, self.n_layers = encoder, tokenizer, n_layers
        self.token_ids = token_ids
        # Row of each token in the sums; what nobody asked for goes to one row more, at the end
        self.row_of_token = np.full(len(tokenizer), len(token_ids))
        self.row_of_token[token_ids] = np.arange(len(token_ids))
        device = next(encoder.parameters()).device
        # Apple's GPUs have no float64.
        self.device = "cpu" if device.type == "mps" else device
        size = (len(token_ids) + 1, encoder.config.hidden_size)
        self.sums = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.n_cells = np.zeros(len(token_ids) + 1, dtype=np.int64)

    @torch.inference_mode()
    def add(self, cells: Sequence[np.ndarray], max_tokens: int | None, bar: Any) -> None:
        asked = [cell for cell in cells if (self.row_of_token[cell] < len(self.token_ids)).any()]
        row_of_token = torch.from_numpy(self.row_of_token).to(self.device)
        with evaluating(self.encoder) as device:
            for chosen, input_ids, mask in padded_batches(asked, self.tokenizer, max_tokens, device):
                x = self.encoder(input_ids, attention_mask=mask, num_layers=self.n_layers).last_hidden_state
                real = mask.bool()
                rows = row_of_token[input_ids[real].to(self.device)]
                self.sums.index_add_(0, rows, x[real].to(self.device).double())
                # A token is in a cell once at the most.
                self.n_cells += np.bincount(rows.cpu().numpy(), minlength=len(self.n_cells))
                bar.update(len(chosen))
        bar.update(len(cells) - len(asked))


def _token_ids(genes: Sequence[str], tokenizer: Any) -> np.ndarray:
    """Token id of each name.

    Raises  ValueError for no names, or names that are not in the vocabulary
    """
    if isinstance(genes, str) or not len(genes):
        raise ValueError(f"Expected genes as a list of names, found {genes!r}.")
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    found = tokenizer.resolver.match([str(gene) for gene in genes]).index_g
    ids = np.where(found >= 0, tokenizer.gene_token_ids[found], -1)
    ids = np.array([special.get(str(gene), token) for gene, token in zip(genes, ids, strict=True)])
    if (ids < 0).any():
        unknown = [str(gene) for gene, token in zip(genes, ids, strict=True) if token < 0]
        raise ValueError(
            f"{len(unknown):,} of {len(genes):,} genes are not in the vocabulary, e.g. {examples(unknown)}; it holds "
            f"e.g. {examples(tokenizer.gene_medians)}. Pass Ensembl ids, or names among the tokenizer's aliases."
        )
    return ids


def _frame(chosen: np.ndarray, names: Sequence[str] | None, sums: _TokenSums, tokenizer: Any) -> Any:
    import pandas as pd

    rows = sums.row_of_token[chosen]
    if names is None:
        chosen = chosen[sums.n_cells[rows] > 0]
        rows = sums.row_of_token[chosen]
    index = tokenizer.convert_ids_to_tokens(chosen.tolist()) if names is None else [str(name) for name in names]
    n_cells = sums.n_cells[rows]
    with np.errstate(invalid="ignore"):
        means = (sums.sums.cpu().numpy()[rows] / n_cells[:, None]).astype(np.float32)
    frame = pd.DataFrame(means, index=pd.Index(index, name="gene"))
    frame.columns = [f"embedding_{i}" for i in range(means.shape[1])]
    frame.insert(0, "n_cells", n_cells)
    return frame
