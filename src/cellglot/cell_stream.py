"""Cells through a model, a block at a time: what embeddings of cells, of genes, and classifications share.

Blocks are read a few ahead, tokenized, run through the model and dropped, so memory is bounded by the
block (`cells_per_block`) and never by the file. Within a block, cells are batched by length: little padding, and at
most `max_tokens` padded tokens a batch.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .onednn import OneDNNLinear
from .tokenization.count_matrix import CountMatrix, open_counts


def default_max_tokens(device: Any) -> int:
    """Padded tokens of a forward pass: what stays in a CPU's caches, or keeps a GPU busy within a few GiB."""
    return 2048 if torch.device(device).type == "cpu" else 32_768


def check_model(model: Any, tokenizer: Any) -> Any:
    """The encoder of a Geneformer, with or without a head, that reads what the tokenizer writes.

    Raises  ValueError for another architecture, or another vocabulary
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "geneformer":
        raise ValueError(
            f"Expected a Geneformer, found {type(model).__name__}. GeneformerModel.from_pretrained(path) loads one, "
            "also from the original's checkpoints, which are BERT models."
        )
    if not hasattr(tokenizer, "iter_encoded"):
        raise ValueError(
            f"Expected a RankValueTokenizer, found {type(tokenizer).__name__}. Load one with "
            "RankValueTokenizer.from_pretrained(path); AutoTokenizer finds it only after `import cellglot`."
        )
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"The model knows {config.vocab_size:,} tokens, the tokenizer {len(tokenizer):,}: they do not belong "
            "together. Load both from the same directory, or build the tokenizer from the model's vocabulary."
        )
    return getattr(model, model.base_model_prefix, model)


def open_every_cell(
    adata_or_path: Any, counts_layer: str | None, encode_options: dict[str, Any]
) -> contextlib.AbstractContextManager[CountMatrix]:
    """`open_counts` for results of one row a cell.

    Raises  ValueError for options or an obs["filter_pass"] that would leave cells out
    """
    if encode_options.get("empty_cells", "keep") == "drop" or encode_options.get("cells") is not None:
        raise ValueError("Results are one row a cell: select cells before, not with empty_cells= or cells=.")

    check_encode_options(encode_options)

    @contextlib.contextmanager
    def opened() -> Iterator[CountMatrix]:
        with open_counts(adata_or_path, layer=counts_layer) as matrix:
            passed = matrix.passing_cells()
            if passed is not None and not passed.all():
                raise ValueError(
                    f"{matrix.name}: obs['filter_pass'] selects {int(passed.sum()):,} of {matrix.n_cells:,} cells: "
                    "subset them first."
                )
            yield matrix

    return opened()


def check_encode_options(encode_options: dict[str, Any]) -> None:
    """Raises ValueError for options that `RankValueTokenizer.iter_encoded` does not have."""
    from .tokenization.rank_value import RankValueTokenizer

    parameters = inspect.signature(RankValueTokenizer.iter_encoded).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    unknown = [name for name in encode_options if name not in known]
    if unknown:
        raise ValueError(f"There is no option {unknown[0]!r}; those of tokenization are {', '.join(known)}.")


def encoded_blocks(
    matrix: CountMatrix, model: Any, tokenizer: Any, encode_options: dict[str, Any]
) -> Iterator[list[np.ndarray]]:
    """Token ids of the cells of each block, in file order, cut to what the model can read."""
    context = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    for batch in tokenizer.iter_encoded(matrix, **{"max_length": context, **encode_options}):
        column = batch.column("input_ids")
        tokens, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        yield [tokens[a:b] for a, b in pairwise(offsets)]


def padded_batches(
    cells: Sequence[np.ndarray], tokenizer: Any, max_tokens: int | None, device: Any
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """(positions in `cells`, input_ids, attention_mask) of the cells that hold a gene, longest first.

    A batch has at most max_tokens padded tokens (by default what suits the device), or one cell.
    """
    max_tokens = default_max_tokens(device) if max_tokens is None else max_tokens
    lengths = np.array([len(cell) for cell in cells])
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        chosen = order[start : start + max(max_tokens // longest, 1)]
        ids = np.full((len(chosen), longest), tokenizer.pad_token_id, dtype=np.int64)
        for row, cell in zip(ids, chosen, strict=True):
            row[: lengths[cell]] = cells[cell]
        if ids.max() >= len(tokenizer) or ids.min() < 0:
            # A GPU would only say that an assertion failed, and be of no more use to this process.
            bad = ids[(ids >= len(tokenizer)) | (ids < 0)][0]
            raise ValueError(
                f"A cell has the token {bad:,}, but the vocabulary has {len(tokenizer):,}: it was encoded by another "
                "tokenizer."
            )
        input_ids = torch.from_numpy(ids).to(device)
        yield chosen, input_ids, (input_ids != tokenizer.pad_token_id).long()
        start += len(chosen)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """The model without dropout, on a CPU with oneDNN's linear layers, and its device.

    Afterwards every module is in the mode it was in, which need not be the same for all.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        with OneDNNLinear() if device.type == "cpu" else contextlib.nullcontext():
            yield device
    finally:
        for module, training in modes:
            module.training = training


def is_path(source: Any) -> bool:
    """Whether cells are given as a file (or folder) and not as an AnnData."""
    return isinstance(source, str | Path)


def annotated_copy(adata: Any) -> Any:
    """A copy to write results into. A backed AnnData stays backed by its file; a view of one is loaded."""
    if not adata.isbacked:
        return adata.copy()
    if adata.is_view:
        return adata.to_memory()
    import anndata

    tables: dict[str, Any] = {name: dict(getattr(adata, name)) for name in ("obsm", "varm", "obsp", "varp", "layers")}
    return anndata.AnnData(
        obs=adata.obs.copy(),
        var=adata.var.copy(),
        uns=adata.uns.copy(),
        raw={} if adata.raw is None else {"var": adata.raw.var, "varm": dict(adata.raw.varm)},
        filename=adata.filename,
        filemode=adata.file._file.mode,
        **tables,
    )
