"""Prints what pre-training will take, before any of it is done: memory of each GPU, FLOPs, days. Writes nothing.

    python train/capacity.py                                        # the published sizes on 1, 8, 12 and 64 H100s
    python train/capacity.py --gpu v100 --gpus 12 --sizes v1-6l     # the original's machine

Formulas, for P parameters, N GPUs, L layers of width d, feed-forward f and h heads, v genes, cells of t tokens:

FLOPs of a cell, forward and backward: 3 t (L (8 d^2 + 4 d f + 4 t d) + 0.15 (2 d^2 + 2 d v)), i.e. 2 for each weight a
token passes, 4 t d for its attention, the head for masked genes only, and twice as much backward. Recomputed
activations add a third forward pass of the layers.

Bytes of weights, gradients and optimizer on each GPU, in bf16 (weights 4 P, gradients 4 P, AdamW 8 P in float32):
  DDP                 16 P + 2 P bf16 copies of the weights + 4 P buckets (where N > 1)
  FSDP2               16 P / N + 8 bytes for each parameter in use: embeddings and two layers
  ZeRO-2              2 P + 2 P bucket + 14 P / N
  ZeRO-3, offload     2 P at the most (DeepSpeed keeps what it gathers up to 1e9 parameters) + 2 P bucket; 16 P / N in
                      the memory of the CPU for each GPU
Bytes of activations for each token: L (26 d + 2 f + 4 h + 16, and 2 d with dropout), of which with
--gradient_checkpointing 4 d a layer and all of one; and 10 bytes for each logit held at once.

What the GPU's libraries and the fragmentation of its memory take (1 to 3 GB) is not counted, nor is the time of
communication: days are FLOPs / (N x peak x utilization).
"""

from dataclasses import dataclass
from typing import Any

import torch

from cellglot.modeling.geneformer import PRESETS, GeneformerConfig, GeneformerForMaskedLM
from cellglot.modeling.geneformer.modeling_geneformer import LOGITS_AT_ONCE
from cellglot.train.config import option, parse_config

# Dense FLOP/s in bf16 (V100: fp16) of the SXM modules, and bytes of memory. Source: NVIDIA's data sheets
GPUS = {"h200": (989e12, 141e9), "h100": (989e12, 80e9), "a100": (312e12, 80e9), "v100": (125e12, 32e9)}
STRATEGIES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3 offload")
# Cells of the corpus and of an optimizer step (train/recipes). Genecorpus-30M after its quality filter: Theodoris et
# al. 2023, Methods; V2: the name of the published models.
CORPUS = {"v1": ("Genecorpus-30M", 27.4e6, 144), "v2": ("104M cells", 104e6, 1152)}
MASKED = 0.15


@dataclass
class CapacityConfig:
    """Options of the dry run."""

    sizes: list[str] = option(["v1-6l", "v1-12l", "v2-104m", "v2-316m"], f"sizes among {', '.join(PRESETS)}")
    gpus: list[int] = option([1, 8, 12, 64], "numbers of GPUs")
    gpu: str = option("h100", f"kind of GPU: {', '.join(GPUS)}")
    utilization: float = option(0.4, "share of the peak that is reached: model FLOP utilization, an assumption")
    max_tokens: int = option(65_536, "tokens of one forward pass on one GPU")
    mean_length: int | None = option(None, "mean tokens of a cell; absent: the context, an upper bound")
    epochs: float = option(3.0, "passes over the corpus")
    gradient_checkpointing: bool = option(False, "days with activations recomputed (memory is given for both)")

    def __post_init__(self) -> None:
        for name in self.sizes:
            if name not in PRESETS:
                raise ValueError(f"Expected sizes among {', '.join(PRESETS)}, found {name!r}.")
        if self.gpu not in GPUS:
            raise ValueError(f"Expected gpu among {', '.join(GPUS)}, found {self.gpu!r}.")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization is a share of the peak, between 0 and 1; found {self.utilization}.")
        if min([*self.gpus, self.max_tokens, self.epochs, self.mean_length or 1]) <= 0:
            raise ValueError("gpus, max_tokens, mean_length and epochs must be positive.")


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: all, of the tied embeddings, of one layer."""

    total: int
    embeddings: int
    layer: int


def count_parameters(config: GeneformerConfig) -> Parameters:
    """Those of the model itself, built without memory."""
    with torch.device("meta"):
        model = GeneformerForMaskedLM(config)
    return Parameters(
        model.num_parameters(),
        model.get_input_embeddings().weight.numel(),  # type: ignore[operator]
        sum(p.numel() for p in model.bert.encoder.layer[0].parameters()),
    )


def flops_of_cell(config: GeneformerConfig, tokens: float, *, recomputed: bool = False) -> float:
    """FLOPs of forward and backward pass for one cell. Utilization is by those without recomputation."""
    d, f = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers * (8 * d**2 + 4 * d * f + 4 * tokens * d)
    head = MASKED * (2 * d**2 + 2 * d * config.vocab_size)
    return tokens * ((4 if recomputed else 3) * layers + 3 * head)


def layer_activation_bytes(config: GeneformerConfig, *, bf16: bool = True) -> int:
    """Bytes that one layer keeps of each token for the backward pass.

    float32: input, q, k, v, attention twice (as it comes, and as one tensor), inputs of both norms, output of the first
    (9 d), feed-forward (f). bf16: the same at 2 bytes, but the norms' inputs at 4, and the input once for each of q, k
    and v. Besides, 4 bytes a head (attention) and 16 (norms).
    """
    d, f, h = config.hidden_size, config.intermediate_size, config.num_attention_heads
    dropout_masks = 2 * d if config.hidden_dropout_prob else 0
    return (26 * d + 2 * f if bf16 else 4 * (9 * d + f)) + 4 * h + 16 + dropout_masks


def activation_bytes(config: GeneformerConfig, tokens: int, *, recomputed: bool) -> float:
    """Bytes of activations and logits of one forward pass in bf16, the last layer counted like the others."""
    layer = layer_activation_bytes(config)
    kept = config.num_hidden_layers * 4 * config.hidden_size + layer if recomputed else config.num_hidden_layers * layer
    # In bf16, in float32, and the gradient
    logits = 10 * min(MASKED * tokens * config.vocab_size, LOGITS_AT_ONCE)
    return tokens * kept + logits


def state_bytes(parameters: Parameters, strategy: str, n_gpus: int) -> tuple[float, float]:
    """(on each GPU, in the CPU's memory for each GPU): weights, gradients, optimizer and what a strategy adds."""
    p = parameters.total
    if strategy == "DDP":
        return (18 + 4 * (n_gpus > 1)) * p, 0.0
    if strategy == "FSDP2":
        return 16 * p / n_gpus + 8 * (parameters.embeddings + 2 * parameters.layer), 0.0
    if strategy == "ZeRO-2":
        return 4 * p + 14 * p / n_gpus, 0.0
    return 4.0 * p, 16 * p / n_gpus


def capacity(size: str, config: CapacityConfig) -> dict[str, Any]:
    """Figures of one size: parameters, FLOPs, days of each number of GPUs, memory of each strategy and number."""
    model = GeneformerConfig.from_preset(size)
    parameters = count_parameters(model)
    corpus, n_cells, batch_size = CORPUS["v2" if size.startswith("v2") else "v1"]
    length = config.mean_length or model.max_position_embeddings
    flops = flops_of_cell(model, length)
    spent = flops_of_cell(model, length, recomputed=config.gradient_checkpointing)
    peak, _ = GPUS[config.gpu]
    total_seconds = n_cells * config.epochs * spent / (peak * config.utilization)
    activations = [activation_bytes(model, config.max_tokens, recomputed=recomputed) for recomputed in (False, True)]
    memory = []
    for strategy in STRATEGIES:
        for n in config.gpus:
            gpu, cpu = state_bytes(parameters, strategy, n)
            memory.append({"strategy": strategy, "gpus": n, "state": gpu, "cpu": cpu})
            memory[-1] |= {"total": gpu + activations[0], "total_checkpointed": gpu + activations[1]}
    return {
        "size": size,
        "parameters": parameters.total,
        "length": length,
        "corpus": corpus,
        "cells": n_cells,
        "batch_size": batch_size,
        "flops_per_cell": flops,
        "flops_per_step": flops * batch_size,
        "days": {n: total_seconds / n / 86_400 for n in config.gpus},
        "activations": activations,
        "memory": memory,
    }


def report(figures: dict[str, Any], config: CapacityConfig) -> str:
    """The figures of one size as text."""
    peak, room = GPUS[config.gpu]
    lines = [
        f"{figures['size']}: {figures['parameters'] / 1e6:.1f}M parameters; cells of {figures['length']:,} tokens; "
        f"{figures['flops_per_cell'] / 1e9:,.0f} GFLOP a cell, {figures['flops_per_step'] / 1e15:,.2f} PFLOP a step of "
        f"{figures['batch_size']:,} cells",
        f"  days for {config.epochs:g} epochs of {figures['corpus']} ({figures['cells'] / 1e6:.1f}M cells) at "
        f"{config.utilization:.0%} of {peak / 1e12:,.0f} TFLOP/s: "
        + ", ".join(f"{days:{'.2f' if days < 10 else ',.0f'}} on {n}" for n, days in figures["days"].items()),
        f"  GB on each {config.gpu} of {room / 1e9:.0f}, {config.max_tokens:,} tokens a forward pass "
        "(with activations recomputed; * too much)",
        " " * 18 + "".join(f"{f'{n} GPU':>20}" for n in config.gpus),
    ]
    for strategy in STRATEGIES:
        rows = [row for row in figures["memory"] if row["strategy"] == strategy]
        lines.append(f"  {strategy:<16}" + "".join(f"{_memory(row, room):>20}" for row in rows))
        if rows[0]["cpu"]:
            lines.append(f"  {'  CPU, for each':<16}" + "".join(f"{row['cpu'] / 1e9:>20.2f}" for row in rows))
    return "\n".join(lines)


def _memory(row: dict[str, Any], room: float) -> str:
    whole, recomputed = (
        f"{row[name] / 1e9:.1f}{'*' if row[name] > room else ''}" for name in ("total", "total_checkpointed")
    )
    return f"{whole} ({recomputed})"


def main(argv: list[str] | None = None) -> None:
    config = parse_config(CapacityConfig, argv, description=(__doc__ or "").partition("\n")[0])
    print(
        f"Assumed: {config.utilization:.0%} of the {config.gpu}'s peak, no time for communication, "
        f"{'activations recomputed, ' if config.gradient_checkpointing else ''}cells of "
        f"{f'{config.mean_length:,} tokens' if config.mean_length else 'full length (an upper bound)'}. "
        "The formulas stand at the head of train/capacity.py.\n"
    )
    for size in config.sizes:
        print(report(capacity(size, config), config) + "\n")


if __name__ == "__main__":
    main()
