"""Cell embeddings of real cells: cellglot against the original's way, V1-6L with random weights, float32.

    python benchmarks/embedding.py --json benchmarks/results/embedding.json

By default a sample of 12,261 blood cells (Kang et al. 2018), under the folder CELLGLOT_DATA. Contenders, each in a
process of its own, with the same weights and the same tokens:

  original  the original's way, re-implemented from its published source: cells sorted by length, the longest first,
            batches of 100 padded to their longest, through `BertForMaskedLM`, which returns all hidden states and the
            logits of the whole vocabulary; the mean of the second-to-last layer over what is not padding
  cellglot  `embed_tokens`
  file      `embed_cells`, which reads and tokenizes the sample's counts too

The limit is that of the layers' matrix products (`matrix_products.py`) at the pace of the best float32 product here.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from matrix_products import operations, product_gflops
from measure import answer_as_contender, interleaved, machine, median, print_table, save_results, worst

CONTENDERS = ("original", "cellglot", "file", "product")
DATA = Path(os.environ.get("CELLGLOT_DATA", "../shared/data"))


def _tokens(folder: str) -> list[np.ndarray]:
    cells = np.load(f"{folder}/tokens.npz")
    return np.split(cells["tokens"].astype(np.int64), np.cumsum(cells["lengths"])[:-1])


def cellglot(folder: str, forward_batch_size: int) -> dict[str, Any]:
    from cellglot import GeneformerModel, RankValueTokenizer
    from cellglot.embedding import embed_tokens

    model, tokenizer = GeneformerModel.from_pretrained(folder), RankValueTokenizer.from_pretrained(folder)
    cells = _tokens(folder)
    embed_tokens([cells[0][:5]], model, tokenizer)
    start = time.perf_counter()
    embeddings = embed_tokens(cells, model, tokenizer)
    seconds = time.perf_counter() - start
    np.save(f"{folder}/cellglot.npy", embeddings)
    return {"seconds": seconds}


def file(folder: str, forward_batch_size: int) -> dict[str, Any]:
    from cellglot import GeneformerModel, RankValueTokenizer, embed_cells
    from cellglot.embedding import embed_tokens

    model, tokenizer = GeneformerModel.from_pretrained(folder), RankValueTokenizer.from_pretrained(folder)
    embed_tokens([_tokens(folder)[0][:5]], model, tokenizer)
    start = time.perf_counter()
    embed_cells(f"{folder}/cells.h5ad", model, tokenizer, progress=False)
    return {"seconds": time.perf_counter() - start}


def original(folder: str, forward_batch_size: int) -> dict[str, Any]:
    import torch
    from transformers import BertForMaskedLM

    bert: Any = BertForMaskedLM.from_pretrained(f"{folder}/bert", output_hidden_states=True).eval()
    layer = bert.config.num_hidden_layers - 1
    cells = _tokens(folder)

    def run(cells: list[np.ndarray]) -> torch.Tensor:
        order = np.argsort([-len(cell) for cell in cells], kind="stable")
        out = torch.empty(len(cells), bert.config.hidden_size)
        with torch.no_grad():
            for start in range(0, len(cells), forward_batch_size):
                chosen = order[start : start + forward_batch_size]
                batch = [torch.from_numpy(cells[i]) for i in chosen]
                ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
                lengths = torch.tensor([len(cell) for cell in batch])
                mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
                x = bert(ids, attention_mask=mask).hidden_states[layer]
                out[torch.from_numpy(chosen)] = (x * mask[..., None]).sum(dim=1) / lengths[:, None]
        return out

    run([cells[0][:5]])
    start = time.perf_counter()
    embeddings = run(cells)
    seconds = time.perf_counter() - start
    np.save(f"{folder}/original.npy", embeddings.numpy())
    return {"seconds": seconds}


def product(folder: str, forward_batch_size: int) -> dict[str, Any]:
    from cellglot import GeneformerConfig

    config = GeneformerConfig.from_pretrained(folder)
    return product_gflops(config.hidden_size, config.intermediate_size)


def prepare(folder: str, options: argparse.Namespace) -> np.ndarray:
    """Model, tokenizer, a sample of the cells and its tokens; returns the lengths of the cells."""
    import anndata
    import torch

    from cellglot import GeneformerConfig, GeneformerForMaskedLM, RankValueTokenizer

    torch.manual_seed(options.seed)
    model = GeneformerForMaskedLM(GeneformerConfig.from_preset("v1-6l"))
    model.save_pretrained(folder)
    model.export_to_bert(Path(folder) / "bert")
    tokenizer = RankValueTokenizer.from_vocabulary(options.vocabulary, layout="v1", aliases=options.aliases)
    tokenizer.save_pretrained(folder)
    adata = anndata.read_h5ad(options.cells)
    rows = np.random.default_rng(options.seed).choice(adata.n_obs, min(options.n_cells, adata.n_obs), replace=False)
    adata = adata[np.sort(rows)].copy()
    adata.write_h5ad(f"{folder}/cells.h5ad")
    cells = tokenizer.encode_anndata(adata, empty_cells="drop")["input_ids"]
    lengths = np.array([len(cell) for cell in cells])
    np.savez(f"{folder}/tokens.npz", tokens=np.concatenate([np.asarray(cell) for cell in cells]), lengths=lengths)
    return lengths


def main() -> None:
    answer_as_contender({name: globals()[name] for name in CONTENDERS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=DATA / "cells/kang2018_pbmc_12261x1287.h5ad", help="counts")
    parser.add_argument("--vocabulary", type=Path, default=DATA / "geneformer/vocabulary_v1.tsv.gz")
    parser.add_argument("--aliases", type=Path, default=DATA / "geneformer/gene_aliases_v1.tsv.gz")
    parser.add_argument("--n-cells", type=int, default=300, help="cells of the sample")
    parser.add_argument("--forward-batch-size", type=int, default=100, help="the original's option")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        lengths = prepare(folder, options)
        shared = {"folder": folder, "forward_batch_size": options.forward_batch_size}
        answers = interleaved(__file__, CONTENDERS, shared, repeats=options.repeats)
        found, expected = (np.load(f"{folder}/{name}.npy") for name in ("cellglot", "original"))

    from cellglot import GeneformerConfig

    config = GeneformerConfig.from_preset("v1-6l")
    n_cells, n_tokens = len(lengths), int(lengths.sum())
    results: dict[str, Any] = {"cells_file": options.cells.name, "cells": n_cells, "tokens": n_tokens}
    results["tokens_per_cell"] = n_tokens / n_cells
    for name, key in (("original", "reference_"), ("cellglot", ""), ("file", "file_")):
        results[f"{key}seconds"] = median(answers[name], "seconds")
        results[f"{key}cells_per_second"] = n_cells / results[f"{key}seconds"]
        results[f"{key}tokens_per_second"] = n_tokens / results[f"{key}seconds"]
        results[f"{key}peak_rss_mb"] = worst(answers[name], "peak_rss_mb")
    results["ratio"] = results["reference_seconds"] / results["seconds"]
    results["max_difference"] = float(np.abs(found - expected).max())
    results["product_gflops"] = median(answers["product"], "onednn")
    results["product_gflops_of_torch_linear"] = median(answers["product"], "default")
    best = max(results["product_gflops"], results["product_gflops_of_torch_linear"])
    results["limit_seconds"] = operations(config, lengths, config.num_hidden_layers - 1) / best / 1e9
    results["share_of_limit"] = results["limit_seconds"] / results["seconds"]
    figures = ("seconds", "cells_per_second", "tokens_per_second", "peak_rss_mb")
    rows = [
        [name, *(results[f"{key}{figure}"] for figure in figures)]
        for name, key in (("original's way", "reference_"), ("cellglot", ""), ("cellglot from the file", "file_"))
    ]
    limit = results["limit_seconds"]
    rows.append(["matrix products alone", limit, n_cells / limit, n_tokens / limit, ""])
    print_table([f"{n_cells} cells, {n_tokens:,} tokens", "seconds", "cells/s", "tokens/s", "peak MB"], rows)
    print(f"{results['ratio']:.1f} times the pace of the original's way; largest difference ", end="")
    print(f"{results['max_difference']:.1e}")
    save_results({**results, "repeats": options.repeats, "seed": options.seed, **machine()}, options.json)


if __name__ == "__main__":
    main()
