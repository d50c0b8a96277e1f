"""Deleting every gene of a cell in silico: cellglot against the original's way, on one cell of V1-6L, float32.

    python benchmarks/perturbation.py --genes 256 --json benchmarks/results/perturbation.json
    python benchmarks/perturbation.py --genes 2048 --edits 64 --reference-edits 8

Contenders, each in a process of its own, with the same random weights and the same cell:

  original  the original's way, re-implemented from its published source: the edited cells are made with `datasets.map`;
            batches of 100 go through `BertForMaskedLM`, which returns all hidden states and the logits of the whole
            vocabulary; cosine similarities with copies of the unedited cell, one for each gene
  bare      the encoder in batches of 64, without logits, stopped at the layer needed, and nothing measured
  cellglot  `perturb_cells`
  gradient  `perturb_cells(method="gradient")`, first-order estimates of the same

The limit is that of the layers' matrix products (`matrix_products.py`) at the pace of the best float32 product here.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from matrix_products import operations, product_gflops
from measure import answer_as_contender, interleaved, machine, median, print_table, save_results, worst

CONTENDERS = ("original", "bare", "cellglot", "gradient", "product")
# The original's default
FORWARD_BATCH_SIZE = 100


def vocabulary() -> Any:
    """A tokenizer with the size of V1's vocabulary, of made-up genes."""
    import pandas as pd

    from cellglot import GeneformerConfig, RankValueTokenizer

    size: int = GeneformerConfig.from_preset("v1-6l").vocab_size
    tokens = ["<pad>", "<mask>", *(f"ENSG{i:011d}" for i in range(size - 2))]
    medians = [np.nan, np.nan, *[1.0] * (size - 2)]
    table = pd.DataFrame({"token": tokens, "token_id": np.arange(size), "nonzero_median": medians})
    return RankValueTokenizer.from_vocabulary(table, layout="v1")


def cellglot(model: str, cell: list[int], edits: list[int], method: str = "exact") -> dict[str, Any]:
    from cellglot import GeneformerModel, perturb_cells

    tokenizer, encoder = vocabulary(), GeneformerModel.from_pretrained(model).eval()
    genes = "all" if len(edits) == len(cell) else tokenizer.convert_ids_to_tokens([cell[i] for i in edits])
    options: dict[str, Any] = {"method": method, "progress": False}
    perturb_cells([cell[:5]], encoder, tokenizer, **options)
    start = time.perf_counter()
    effects = perturb_cells([cell], encoder, tokenizer, genes=genes, **options)
    return {"seconds": time.perf_counter() - start, "values": effects["cosine_similarity"].tolist()}


def gradient(model: str, cell: list[int], edits: list[int]) -> dict[str, Any]:
    return cellglot(model, cell, edits, method="gradient")


def original(model: str, cell: list[int], edits: list[int]) -> dict[str, Any]:
    import datasets
    import torch
    from transformers import BertForMaskedLM

    datasets.disable_progress_bars()
    bert: Any = BertForMaskedLM.from_pretrained(f"{model}/bert", output_hidden_states=True).eval()
    layer = bert.config.num_hidden_layers - 1

    def drop(example: dict[str, Any]) -> dict[str, Any]:
        del example["input_ids"][example["index"]]
        return example

    def run(cell: list[int], edits: list[int]) -> list[float]:
        rows = datasets.Dataset.from_dict({"input_ids": [cell] * len(edits), "index": edits})
        rows = rows.map(drop, load_from_cache_file=False).with_format("torch")
        with torch.no_grad():
            unedited = bert(torch.tensor([cell])).hidden_states[layer][0]
            compared = torch.stack([torch.cat([unedited[:i], unedited[i + 1 :]]) for i in edits])
            values = []
            for start in range(0, len(edits), FORWARD_BATCH_SIZE):
                ids = rows[start : start + FORWARD_BATCH_SIZE]["input_ids"]
                edited = bert(ids, attention_mask=torch.ones_like(ids)).hidden_states[layer]
                cosines = torch.nn.CosineSimilarity(dim=2)(edited, compared[start : start + FORWARD_BATCH_SIZE])
                values += cosines.mean(dim=1).tolist()
        return values

    run(cell[:5], [0, 1, 2, 3, 4])
    start = time.perf_counter()
    values = run(cell, edits)
    return {"seconds": time.perf_counter() - start, "values": values}


def bare(model: str, cell: list[int], edits: list[int]) -> dict[str, Any]:
    import torch

    from cellglot import GeneformerModel

    encoder = GeneformerModel.from_pretrained(model).eval()
    with torch.inference_mode():
        encoder(torch.tensor([cell[:5]]))
        start = time.perf_counter()
        for first in range(0, len(edits), 64):
            ids = torch.tensor([cell[:i] + cell[i + 1 :] for i in edits[first : first + 64]])
            encoder(ids, num_layers=encoder.config.num_hidden_layers - 1)
        return {"seconds": time.perf_counter() - start}


def product(model: str, cell: list[int], edits: list[int]) -> dict[str, Any]:
    from cellglot import GeneformerConfig

    config = GeneformerConfig.from_pretrained(model)
    return product_gflops(config.hidden_size, config.intermediate_size)


def main() -> None:
    answer_as_contender({name: globals()[name] for name in CONTENDERS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, default=256, help="genes of the cell, 2,048 at the most")
    parser.add_argument("--edits", type=int, help="delete this many, evenly spread; default: all")
    parser.add_argument("--reference-edits", type=int, help="of these, as many by the original's way; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()

    import torch

    from cellglot import GeneformerConfig, GeneformerForMaskedLM

    config = GeneformerConfig.from_preset("v1-6l")
    rng = np.random.default_rng(options.seed)
    cell = rng.choice(np.arange(2, config.vocab_size), options.genes, replace=False).tolist()
    n_edits = options.edits or options.genes
    n_reference = min(options.reference_edits or n_edits, n_edits)
    edits = np.linspace(0, options.genes - 1, n_edits).round().astype(int)
    of_reference = edits[np.linspace(0, n_edits - 1, n_reference).round().astype(int)].tolist()
    # An estimate of one deletion is an estimate of all.
    edits_of = {"original": of_reference, "gradient": list(range(options.genes))}
    edits = edits.tolist()
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = GeneformerForMaskedLM(config)
        model.save_pretrained(folder)
        model.export_to_bert(Path(folder) / "bert")
        del model
        # Interleaved by hand, as contenders get different edits.
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for _ in range(options.repeats):
            for name in CONTENDERS:
                shared = {"model": folder, "cell": cell, "edits": edits_of.get(name, edits)}
                answers[name] += interleaved(__file__, [name], shared, repeats=1)[name]

    exact = dict(zip(edits, answers["cellglot"][0]["values"], strict=True))
    reference = dict(zip(of_reference, answers["original"][0]["values"], strict=True))
    results: dict[str, Any] = {"genes": options.genes, "edits": n_edits, "reference_edits": n_reference}
    for name in ("original", "bare", "cellglot", "gradient"):
        scale = n_edits / n_reference if name == "original" else 1
        key = {"original": "reference_", "cellglot": ""}.get(name, f"{name}_")
        results[f"{key}seconds"] = median(answers[name], "seconds") * scale
        n = options.genes if name == "gradient" else n_edits
        results[f"{key}edits_per_second"] = n / results[f"{key}seconds"]
        results[f"{key}peak_rss_mb"] = worst(answers[name], "peak_rss_mb")
    results["ratio"] = results["reference_seconds"] / results["seconds"]
    results["ratio_to_bare"] = results["bare_seconds"] / results["seconds"]
    results["max_difference"] = max(abs(exact[i] - value) for i, value in reference.items())
    results["product_gflops"] = median(answers["product"], "onednn")
    results["product_gflops_of_torch_linear"] = median(answers["product"], "default")
    best = max(results["product_gflops"], results["product_gflops_of_torch_linear"])
    results["limit_seconds"] = (
        operations(config, [options.genes - 1] * n_edits, config.num_hidden_layers - 1) / best / 1e9
    )
    results["share_of_limit"] = results["limit_seconds"] / results["seconds"]
    if n_edits < options.genes:
        results["seconds_for_all_genes"] = results["seconds"] * options.genes / n_edits
    rows = [
        [name, results[f"{key}seconds"], results[f"{key}edits_per_second"], results[f"{key}peak_rss_mb"]]
        for name, key in (("original's way", "reference_"), ("bare loop", "bare_"), ("cellglot", ""))
    ]
    rows.append(
        [
            f"first-order estimates of all {options.genes}",
            *(results[f"gradient_{k}"] for k in ("seconds", "edits_per_second")),
        ]
    )
    rows[-1].append(results["gradient_peak_rss_mb"])
    rows.append(["matrix products alone", results["limit_seconds"], n_edits / results["limit_seconds"], ""])
    print_table([f"{n_edits} deletions, {options.genes} genes", "seconds", "edits/s", "peak MB"], rows)
    extrapolated = "" if n_reference == n_edits else f" (from {n_reference} of {n_edits} deletions)"
    print(f"{results['ratio']:.1f} times faster than the original's way{extrapolated}; ", end="")
    print(f"largest difference {results['max_difference']:.1e} over {n_reference} deletions")
    save_results({**results, "repeats": options.repeats, "seed": options.seed, **machine()}, options.json)


if __name__ == "__main__":
    main()
