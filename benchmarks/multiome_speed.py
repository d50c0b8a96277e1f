"""One pass or one token at a time: the set head against greedy decoding, and a dry run at the size of real data.

`python benchmarks/multiome_speed.py --parts planted --json benchmarks/results/multiome_speed_planted.json`
`python benchmarks/multiome_speed.py --parts "real size" --json benchmarks/results/multiome_speed_real_size.json`
`python benchmarks/multiome_speed.py --parts "dry run" --presets small --json FILE`

planted   Peaks are open if and only if their gene is expressed (40 peaks a gene, 23 genes, 3 of them on in a cell).
          Both models, of one size, learn it in the same steps on the same cells; then both predict the same new cells,
          in turns in one process: median of the repeats, and F1 of each
real size Both with random weights (speed does not depend on them, F1 says nothing) at 13,431 genes and 116,490 peaks:
          403 genes read, 3,495 peaks written, as 3% of them are
dry run   20,000 cells of that size at 3%, from `.h5ad` files: encoded, one training step of each task on each size of
          model, predictions streamed as sparse matrices. Peak memory of the whole process
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import answer_as_contender, machine, print_table, run_contender, save_results
from simulated_multiome import generate_multiome

GENES, PEAKS, DENSITY = 13_431, 116_490, 0.03
GEX2ATAC, EOS, FIRST = 3, 1, 5


def planted_rows(n_cells: int, n_genes: int, peaks_per_gene: int, genes_a_cell: int, seed: int) -> list[dict[str, Any]]:
    """Encoded cells in which gene g opens peaks g * peaks_per_gene and following."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n_cells):
        genes = np.flatnonzero(rng.random(n_genes) < genes_a_cell / n_genes)
        peaks = (genes[:, None] * peaks_per_gene + np.arange(peaks_per_gene)).ravel()
        ids = np.array([GEX2ATAC, *(FIRST + genes), EOS])
        rows.append({"input_ids": ids, "labels": np.array([*(FIRST + n_genes + peaks), EOS])})
    return rows


def f1_score(predicted: list[set[int]], rows: list[dict[str, Any]]) -> float:
    """Of all predicted and true (cell, token) pairs."""
    true = [set(row["labels"][:-1].tolist()) for row in rows]
    hits = sum(len(p & t) for p, t in zip(predicted, true, strict=True))
    return 2 * hits / (sum(map(len, predicted)) + sum(map(len, true)))


def planted_contender(train_steps: int, cells: int, repeats: int, seed: int) -> dict[str, Any]:
    """Trains both models on the planted rule and times their predictions of the same cells, in turns."""
    import torch
    from tqdm.auto import tqdm

    from cellglot.modeling.multiome import (
        MultiomeT5Config,
        MultiomeT5ForConditionalGeneration,
        MultiomeT5ForFeaturePrediction,
    )
    from cellglot.tokenization.paired_batches import PairedCellCollator

    n_genes, peaks_per_gene, genes_a_cell = 23, 40, 3
    n_peaks = n_genes * peaks_per_gene
    train = planted_rows(4_000, n_genes, peaks_per_gene, genes_a_cell, seed)
    test = planted_rows(cells, n_genes, peaks_per_gene, genes_a_cell, seed + 1)
    collate = PairedCellCollator(0)
    config = MultiomeT5Config.from_preset(
        "small",
        vocab_size=FIRST + n_genes + n_peaks,
        first_gene_token_id=FIRST,
        num_genes=n_genes,
        num_peaks=n_peaks,
        d_model=64,
        num_layers=2,
        max_target_length=max(len(row["labels"]) for row in train),
    )
    models: dict[str, Any] = {}
    results: dict[str, Any] = {}
    kinds = {"set_head": MultiomeT5ForFeaturePrediction, "greedy": MultiomeT5ForConditionalGeneration}
    rates = {"set_head": 1e-2, "greedy": 3e-3}
    for name, kind in kinds.items():
        torch.manual_seed(seed)
        model = kind(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rates[name])
        rng, started = np.random.default_rng(seed), time.perf_counter()
        for step in tqdm(range(train_steps), desc=f"train {name}", unit="step"):
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * (1 - step / train_steps)
            model(**collate([train[i] for i in rng.integers(len(train), size=32)])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        models[name], results[f"{name}_train_seconds"] = model.eval(), time.perf_counter() - started
    batch = collate(test)
    inputs = (batch["input_ids"], batch["attention_mask"])

    def with_set_head() -> list[set[int]]:
        found = models["set_head"].predict(*inputs)
        parts = np.split(found.features.numpy() + FIRST + n_genes, found.offsets[1:-1].numpy())
        return [set(part.tolist()) for part in parts]

    def greedily() -> list[set[int]]:
        rows = models["greedy"].generate(inputs[0], attention_mask=inputs[1])
        return [{token for token in row if token >= FIRST} for row in rows.tolist()]

    seconds: dict[str, list[float]] = {"set_head": [], "greedy": []}
    for _ in tqdm(range(repeats), desc="predict"):
        for name, predict in (("set_head", with_set_head), ("greedy", greedily)):
            found, took = _timed(predict)
            seconds[name].append(took)
            results[f"{name}_f1"] = f1_score(found, test)
    for name, found in seconds.items():
        results[f"{name}_cells_per_second"] = cells / statistics.median(found)
    return results | {"ratio": results["set_head_cells_per_second"] / results["greedy_cells_per_second"]}


def real_size_contender(cells: int, repeats: int, seed: int) -> dict[str, Any]:
    """Times both on random cells of the size of real ones; greedy decoding once, for it takes minutes."""
    import torch

    from cellglot.modeling.multiome import (
        MultiomeT5Config,
        MultiomeT5ForConditionalGeneration,
        MultiomeT5ForFeaturePrediction,
    )

    n_read, n_written = round(GENES * DENSITY), round(PEAKS * DENSITY)
    config = MultiomeT5Config.from_preset(
        "small", vocab_size=FIRST + GENES + PEAKS, first_gene_token_id=FIRST, num_genes=GENES, num_peaks=PEAKS
    )
    torch.manual_seed(seed)
    genes = torch.stack([torch.randperm(GENES)[:n_read] for _ in range(cells)]) + FIRST
    ids = torch.cat([torch.full((cells, 1), GEX2ATAC), genes, torch.full((cells, 1), EOS)], dim=1)
    mask = torch.ones_like(ids)
    scorer, writer = MultiomeT5ForFeaturePrediction(config).eval(), MultiomeT5ForConditionalGeneration(config).eval()
    pass_seconds = [_timed(lambda: scorer.predict(ids, mask, top_k=n_written))[1] for _ in range(repeats + 1)][1:]
    length: dict[str, Any] = {"min_new_tokens": n_written, "max_new_tokens": n_written}
    written, greedy_seconds = _timed(lambda: writer.generate(ids, attention_mask=mask, **length))
    assert written.shape == (cells, n_written + 1)
    assert all(len(set(row)) == n_written for row in written[:, 1:].tolist())
    found = {
        "set_head_cells_per_second": cells / statistics.median(pass_seconds),
        "greedy_cells_per_second": cells / greedy_seconds,
    }
    return found | {"ratio": found["set_head_cells_per_second"] / found["greedy_cells_per_second"]}


def dry_run_contender(
    genes: str, peaks: str, preset: str, train_cells: int, predict_cells: int, seed: int
) -> dict[str, Any]:
    """Encodes files, makes a training step of both tasks and predicts cells."""
    import torch

    from cellglot.modeling.multiome import MultiomeT5Config, MultiomeT5ForFeaturePrediction, iter_predictions
    from cellglot.tokenization.binarized_string import BinarizedStringProcessor
    from cellglot.tokenization.paired_batches import PairedCellCollator

    processor, seconds = _timed(lambda: BinarizedStringProcessor.from_cells((genes, peaks)))
    results = {"processor_seconds": seconds}
    encoded, results["encoding_seconds"] = _timed(lambda: processor.encode((genes, peaks)))
    few = np.arange(len(encoded)) < train_cells // 2
    back = processor.encode((genes, peaks), "atac2gex", cells_mask=few)
    torch.manual_seed(seed)
    config = MultiomeT5Config.from_preset(preset, **processor.model_fields(), encoder_position_bias=False)
    model = MultiomeT5ForFeaturePrediction(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    collate = PairedCellCollator(0, max_source_length=1_024)

    def step() -> None:
        for rows in (encoded.select(range(train_cells - train_cells // 2)), back):
            model(**collate(list(rows))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _, results["training_step_seconds"] = _timed(step)
    features = 0

    def predict() -> None:
        nonlocal features
        for block in iter_predictions(model, encoded.select(range(predict_cells)), top_k=round(PEAKS * DENSITY)):
            features += block.nnz

    _, seconds = _timed(predict)
    assert features == predict_cells * round(PEAKS * DENSITY)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return results | {"predicted_cells_per_second": predict_cells / seconds, "parameters": parameters}


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = function()
    return found, time.perf_counter() - start


CONTENDERS = {"planted": planted_contender, "real size": real_size_contender, "dry run": dry_run_contender}


def main() -> None:
    answer_as_contender(CONTENDERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--train-steps", type=int, default=400, help="of each model on the planted rule")
    parser.add_argument("--planted-cells", type=int, default=64, help="cells that both predict")
    parser.add_argument("--real-cells", type=int, default=4, help="cells of real size that both predict")
    parser.add_argument("--cells", type=int, default=20_000, help="of the dry run")
    parser.add_argument("--train-cells", type=int, default=16, help="cells of its training step, half of each task")
    parser.add_argument("--predict-cells", type=int, default=512, help="cells that it predicts")
    parser.add_argument("--presets", nargs="+", default=["small", "t5-small"], help="of the dry run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cellglot-benchmarks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"repeats": args.repeats}
    rows: list[list[Any]] = []

    def keep(part: str, found: dict[str, Any]) -> None:
        results.update({f"{part.replace(' ', '_').replace('-', '_')}_{name}": value for name, value in found.items()})

    if "planted" in args.parts:
        arguments = {"train_steps": args.train_steps, "cells": args.planted_cells, "repeats": args.repeats}
        found = run_contender(__file__, "planted", {**arguments, "seed": args.seed})
        keep("planted", found)
        for name in ("set_head", "greedy"):
            rows.append([f"planted rule, {name}", found[f"{name}_cells_per_second"], f"{found[f'{name}_f1']:.3f}", ""])
        rows.append(["planted rule, ratio", found["ratio"], "", ""])
    if "real size" in args.parts:
        arguments = {"cells": args.real_cells, "repeats": args.repeats, "seed": args.seed}
        found = run_contender(__file__, "real size", arguments)
        keep("real_size", found)
        for name in ("set_head", "greedy"):
            rows.append([f"real size, {name}", found[f"{name}_cells_per_second"], "", ""])
        rows.append(["real size, ratio", found["ratio"], "", found["peak_rss_mb"]])
    if "dry run" in args.parts:
        shape = {"gene_density": DENSITY, "highest_count": 12, "peak_density": DENSITY}
        files = generate_multiome(args.work, args.cells, GENES, PEAKS, **shape, seed=args.seed)
        for preset in args.presets:
            arguments = dict(zip(("genes", "peaks"), map(str, files), strict=True))
            arguments |= {"preset": preset, "train_cells": args.train_cells, "predict_cells": args.predict_cells}
            found = run_contender(__file__, "dry run", {**arguments, "seed": args.seed})
            keep(f"dry run {preset}", found)
            rows.append([f"dry run, {preset}", found["predicted_cells_per_second"], "", found["peak_rss_mb"]])
    print_table(["", "cells/s", "F1", "peak memory, MB"], rows)
    print(machine()["machine"])
    save_results({**machine(), **results}, args.json)


if __name__ == "__main__":
    main()
