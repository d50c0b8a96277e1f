"""One optimizer step of masked-gene pre-training: packed cells beside the padded `BertForMaskedLM` of the original.

    python benchmarks/training_step.py --json benchmarks/results/training_step.json
    python benchmarks/training_step.py --device cuda --sizes v1-6l v1-12l v2-104m v2-316m --json ...

CPU: float32, 8 cells of 838 to 2,048 tokens, 15% of the genes masked, AdamW; with the dropout that each size was
published with, and without any, where the losses of both must agree. GPU: bfloat16 autocast, `--tokens` a step, the
padded peer in batches of cells as the original has them, with the lengths of the size's context.

Model FLOPs of a step are those that its matrix products need without padding and with logits for masked genes only
(`cellglot.train.capacity.flops_of_cell`, which has the formula). Utilization is model FLOPs per second over the peak:
on a GPU the data sheet's (`--peak`, TFLOP/s), on a CPU the pace of the best float32 product in the same run. The packed
model computes less than that: its last layer is for masked genes only.
"""

import argparse
import time
from contextlib import nullcontext
from typing import Any

import measure
import numpy as np

PUBLISHED_BATCH = {"v1-6l": 12, "v1-12l": 12, "v2-104m": 18, "v2-316m": 18}


def lengths_of_step(size: str, n_cells: int, seed: int) -> np.ndarray:
    """(cells,) tokens of each, evenly from 41% of the context to all of it, in random order."""
    from cellglot import GeneformerConfig

    context = GeneformerConfig.from_preset(size).max_position_embeddings
    lengths = np.linspace(838 / 2048 * context, context, n_cells).astype(int)
    return np.random.default_rng(seed).permutation(lengths)


def masked_cells(lengths: np.ndarray, vocabulary: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random cells with 15% of their genes masked, and the labels."""
    from cellglot.tokenization.gene_masking import mask_genes

    genes = np.arange(4, vocabulary)
    rng = np.random.default_rng(seed)
    cells = [rng.choice(genes, n, replace=False) for n in lengths]
    masked = [mask_genes(cell, rng, gene_token_ids=genes, mask_token_id=1) for cell in cells]
    return [ids for ids, _ in masked], [labels for _, labels in masked]


def timed_steps(
    model: Any, batches: list[dict[str, Any]], device: str, n_steps: int, compiled: bool, onednn: bool
) -> tuple[list[float], list[float]]:
    """(seconds, losses) of `n_steps` optimizer steps, each over all micro-batches; a first step is not counted."""
    import torch

    from cellglot.onednn import OneDNNLinear

    model.to(device).train()
    forward = torch.compile(model, dynamic=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]
    n_items = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
    seconds, losses = [], []
    for _ in range(n_steps + 1):
        started = time.perf_counter()
        total = 0.0
        for batch in batches:
            with autocast, OneDNNLinear() if onednn else nullcontext():
                loss = forward(**batch).loss
            share = loss * (int((batch["labels"] != -100).sum()) / n_items) if len(batches) > 1 else loss
            share.backward()
            total += float(share.detach())
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(total)
    return seconds[1:], losses


def _answer(
    model: Any,
    batches: list[dict[str, Any]],
    lengths: np.ndarray,
    device: str,
    n_steps: int,
    *,
    compiled: bool = False,
    onednn: bool = False,
) -> dict[str, Any]:
    import torch

    seconds, losses = timed_steps(model, batches, device, n_steps, compiled, onednn)
    gpu_mb = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0
    return {
        "tokens_per_second": float(lengths.sum()) / float(np.median(seconds)),
        "loss": losses[0],
        "gpu_memory_mb": gpu_mb,
    }


def packed(
    size: str, n_cells: int, seed: int, device: str, n_steps: int, dropout: bool, compiled: bool
) -> dict[str, Any]:
    """cellglot: packed cells, as `train/pretrain.py` trains."""
    import torch

    from cellglot import GeneformerConfig, GeneformerForMaskedLM
    from cellglot.tokenization.packing import packed_cells

    config = GeneformerConfig.from_preset(size, **({} if dropout else _NO_DROPOUT))
    lengths = lengths_of_step(size, n_cells, seed)
    cells, labels = masked_cells(lengths, config.vocab_size, seed)
    torch.manual_seed(seed)
    batch = packed_cells(cells) | {"labels": torch.from_numpy(np.concatenate(labels)).unsqueeze(0)}
    # As the training loop does
    onednn = device == "cpu" and not compiled
    return _answer(GeneformerForMaskedLM(config), [batch], lengths, device, n_steps, compiled=compiled, onednn=onednn)


def padded(
    size: str, n_cells: int, seed: int, device: str, n_steps: int, dropout: bool, compiled: bool
) -> dict[str, Any]:
    """The original's way: `BertForMaskedLM` on padded cells of like lengths, logits for every token."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from cellglot import GeneformerConfig

    ours = GeneformerConfig.from_preset(size, **({} if dropout else _NO_DROPOUT))
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    names += ("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps")
    config = BertConfig(**{name: getattr(ours, name) for name in names}, pad_token_id=0)
    lengths = lengths_of_step(size, n_cells, seed)
    cells, labels = masked_cells(lengths, ours.vocab_size, seed)
    order = np.argsort(-lengths, kind="stable")
    batches: list[dict[str, Any]] = []
    for start in range(0, n_cells, PUBLISHED_BATCH[size]):
        chosen = order[start : start + PUBLISHED_BATCH[size]]
        shape = (len(chosen), int(lengths[chosen].max()))
        batch: dict[str, Any] = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100),
        }
        for row, i in enumerate(chosen):
            n = lengths[i]
            batch["input_ids"][row, :n] = torch.from_numpy(cells[i])
            batch["attention_mask"][row, :n] = 1
            batch["labels"][row, :n] = torch.from_numpy(labels[i])
        batches.append(batch)
    torch.manual_seed(seed)
    # The same weights, name by name
    from cellglot import GeneformerForMaskedLM

    weights = GeneformerForMaskedLM(ours).state_dict()
    model = BertForMaskedLM(config)
    model.load_state_dict(weights, strict=False)
    return _answer(model, batches, lengths, device, n_steps)


def product() -> dict[str, Any]:
    """Pace of the best float32 product on this CPU, FLOP/s."""
    from matrix_products import product_gflops

    return {"flops": product_gflops(256, 512)["onednn"] * 1e9}


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def main() -> None:
    measure.answer_as_contender({"packed": packed, "padded": padded, "product": product})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(PUBLISHED_BATCH), default=["v1-6l"])
    parser.add_argument("--cells", type=int, help="cells of a step; 8 on a CPU, the published batch on a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the packed model")
    parser.add_argument("--peak", type=float, help="peak of the GPU in bfloat16, TFLOP/s, for the utilization")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed steps of a process; 1 on a CPU, 10 on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    common = {"seed": args.seed, "device": args.device, "n_steps": args.steps or (10 if gpu else 1)}
    peak = args.peak and args.peak * 1e12
    if not gpu:
        found = [measure.run_contender(__file__, "product", {}) for _ in range(args.repeats)]
        peak = measure.median(found, "flops")
    results: dict[str, Any] = {**measure.machine(), "device": args.device, "seed": args.seed, "peak_flops": peak}
    rows = []
    for size in args.sizes:
        n_cells = args.cells or (PUBLISHED_BATCH[size] if gpu else 8)
        results[f"{size}_cells"] = n_cells
        for dropout in (True, False):
            arguments = {**common, "size": size, "n_cells": n_cells, "dropout": dropout, "compiled": args.compile}
            answers = measure.interleaved(__file__, ["packed", "padded"], arguments, repeats=args.repeats)
            name = f"{size}_{'dropout' if dropout else 'no_dropout'}"
            row = _figures(size, n_cells, args.seed, answers, peak)
            results |= {f"{name}_{key}": value for key, value in row.items()}
            rows.append(
                [
                    size,
                    "published" if dropout else "none",
                    *(row[k] for k in ("tokens_per_second", "reference_tokens_per_second", "ratio", "utilization")),
                    *(row[k] for k in ("peak_rss_mb", "reference_peak_rss_mb", "loss_difference")),
                ]
            )
    print(results["machine"])
    headers = ["size", "dropout", "packed tokens/s", "padded BERT tokens/s", "ratio", "utilization"]
    measure.print_table([*headers, "packed MB", "padded MB", "difference of the losses"], rows)
    measure.save_results(results, args.json)


def _figures(size: str, n_cells: int, seed: int, answers: dict[str, list], peak: float | None) -> dict[str, Any]:
    from cellglot import GeneformerConfig
    from cellglot.train.capacity import flops_of_cell

    config = GeneformerConfig.from_preset(size)
    lengths = lengths_of_step(size, n_cells, seed)
    flops = sum(flops_of_cell(config, float(n)) for n in lengths)
    ours, theirs = (measure.median(answers[name], "tokens_per_second") for name in ("packed", "padded"))
    memory = "gpu_memory_mb" if answers["packed"][0]["gpu_memory_mb"] else "peak_rss_mb"
    losses = [answers[name][0]["loss"] for name in ("packed", "padded")]
    return {
        "tokens_per_second": ours,
        "reference_tokens_per_second": theirs,
        "ratio": ours / theirs,
        "utilization": flops / float(lengths.sum()) * ours / peak if peak else float("nan"),
        "peak_rss_mb": measure.worst(answers["packed"], memory),
        "reference_peak_rss_mb": measure.worst(answers["padded"], memory),
        "loss": losses[0],
        "loss_difference": abs(losses[0] - losses[1]),
        "model_flops": flops,
    }


if __name__ == "__main__":
    main()
