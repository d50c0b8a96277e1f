"""Training steps of the gene-graph classifier: sparse attention in batches beside the dense graph, cell by cell.

    python benchmarks/gene_graph_speed.py --edges ../shared/data/graph/pin_string.tsv.gz \\
        --json benchmarks/results/gene_graph_speed.json

sparse        softmax over the neighbours in the network, 64 cells a step
dense         softmax over all genes, one cell a step: the source's model, which had memory for no more. Its 20,499 x
              20,499 weights are 1.7 GB in float32, and autograd holds several of them
dense_masked  the same over the neighbours only: what the sparse one computes; their losses must agree
flash         dense by torch's fused attention, which never holds the weights: no mask, one cell a step
fully         no smoothing at all, 64 cells a step: what the fully connected layers and Adam cost

All have the same weights, cells and edges, Adam, float32. Cells are random: a tenth of the genes, log-normalized.
Without --edges the network is random, of STRING's size and with hubs like its own.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import measure
import numpy as np

STRING_GENES, STRING_EDGES = 14_115, 156_186
CONTENDERS = ("sparse", "dense", "flash", "fully")


def network(path: str | None, n_genes: int, seed: int) -> np.ndarray:
    """(edges, 2) pairs of genes: a file's, on random genes, or a random network of STRING's size."""
    rng = np.random.default_rng(seed)
    if path is None:
        n = min(STRING_GENES, n_genes)
        # Log-normal propensities: a median of about 10 neighbours, the largest of some hundreds, as in STRING
        weights = rng.lognormal(sigma=1.4, size=n)
        ends = rng.choice(n, size=(4 * STRING_EDGES, 2), p=weights / weights.sum())
        ends = np.unique(np.sort(ends[ends[:, 0] != ends[:, 1]], axis=1), axis=0)
        pairs = rng.permutation(ends)[:STRING_EDGES]
    else:
        from cellglot.gene_graph import GeneNames, align_edges, read_edges

        table = read_edges(path)
        graph = align_edges(table, GeneNames(tuple(str(name) for name in table.genes)))
        n, pairs = len(graph.genes), graph.pairs
    if n > n_genes:
        raise SystemExit(f"The network has {n:,} genes: pass --genes {n} or more.")
    return rng.permutation(n_genes)[:n][pairs]


def expression(n_cells: int, n_genes: int, seed: int) -> np.ndarray:
    """(cells, genes) float32: a tenth of the genes, log-normalized. A cell is the same whatever their number."""

    def cell(i: int) -> np.ndarray:
        rng = np.random.default_rng((seed, i))
        return np.where(rng.random(n_genes) < 0.1, np.log1p(rng.gamma(1.0, 4.0, n_genes)), 0)

    return np.stack([cell(i) for i in range(n_cells)]).astype(np.float32)


def make_model(smoothing: Any, edges: str | None, n_genes: int, n_layers: int, seed: int) -> Any:
    import torch

    from cellglot.modeling.gene_graph import GeneGraphConfig, GeneGraphForSequenceClassification

    options: dict[str, Any] = {"n_genes": n_genes, "num_smoothing_layers": n_layers, "num_labels": 8}
    torch.manual_seed(seed)
    model = GeneGraphForSequenceClassification(GeneGraphConfig(smoothing=smoothing, **options))
    if smoothing != "none":
        model.set_graph(network(edges, n_genes, seed))
    return model


def dense_smooth(model: Any, attend: Callable[..., Any]) -> Callable[[Any], tuple[Any, tuple]]:
    """`GeneGraphModel.smooth` with every matrix of genes by genes dense: equations 1 to 4 as they stand."""

    def smooth(x: Any) -> tuple[Any, tuple]:
        features = model.lift(x.unsqueeze(-1))
        for layer in model.smoothing:
            smoothed = attend(layer.theta(features), layer.phi(features), features)
            features = layer.dense["individual"](smoothed).relu()
        return x + model.readout(features).squeeze(-1), ()

    return smooth


def steps(
    model: Any, n_cells: int, n_genes: int, n_steps: int, seed: int, device: str
) -> tuple[list[float], list[float]]:
    """(seconds of each, loss of each) optimizer step, one more than `n_steps`: the first is a warm-up."""
    import torch

    from cellglot.onednn import OneDNNLinear

    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.999), eps=1e-8, fused=True)
    cells = torch.from_numpy(expression(n_cells, n_genes, seed)).to(device)
    labels = torch.arange(n_cells, device=device) % 8
    seconds, losses = [], []
    for _ in range(n_steps + 1):
        started = time.perf_counter()
        # As the training loop does
        with OneDNNLinear():
            loss = model(cells, labels=labels).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
    return seconds[1:], losses


def contend(
    smoothing: str,
    attend: Callable[..., Any] | None,
    n_cells: int,
    *,
    edges: str | None,
    n_genes: int,
    n_layers: int,
    n_steps: int,
    seed: int,
    device: str,
    **_: Any,
) -> dict[str, Any]:
    import torch

    model = make_model(smoothing, edges, n_genes, n_layers, seed)
    first = None
    if attend is not None:
        model.gene_graph.smooth = dense_smooth(model.gene_graph, attend)
    else:
        with torch.no_grad():
            cell = torch.from_numpy(expression(n_cells, n_genes, seed)[:1])
            first = float(model(cell, labels=torch.tensor([0])).loss)
    seconds, losses = steps(model, n_cells, n_genes, n_steps, seed, device)
    return {
        "cells_per_second": n_cells / float(np.median(seconds)),
        "first_cell_loss": losses[0] if first is None else first,
        "gpu_memory_mb": torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0,
    }


def sparse(batch: int, **options: Any) -> dict[str, Any]:
    """cellglot: `GeneGraphForSequenceClassification` as it is."""
    return contend("individual", None, batch, **options)


def fully(batch: int, **options: Any) -> dict[str, Any]:
    return contend("none", None, batch, **options)


def dense(**options: Any) -> dict[str, Any]:
    def attend(theta: Any, phi: Any, features: Any) -> Any:
        return (theta @ phi.transpose(1, 2) * theta.shape[-1] ** -0.5).softmax(dim=-1) @ features

    return contend("individual", attend, 1, **options)


def dense_masked(**options: Any) -> dict[str, Any]:
    import torch

    n_genes = options["n_genes"]
    off = torch.ones(n_genes, n_genes, dtype=torch.bool)
    i, j = torch.from_numpy(network(options["edges"], n_genes, options["seed"])).long().unbind(1)
    off[i, j] = off[j, i] = False
    # A gene without neighbours: every weight is 0 then, not NaN.
    lonely = off.all(dim=1).view(1, -1, 1).to(options["device"])
    off = off.to(options["device"])

    def attend(theta: Any, phi: Any, features: Any) -> Any:
        scores = theta @ phi.transpose(1, 2) * theta.shape[-1] ** -0.5
        smoothed = scores.masked_fill(off, torch.finfo(scores.dtype).min).softmax(dim=-1) @ features
        return smoothed.masked_fill(lonely, 0.0)

    return contend("individual", attend, 1, **options)


def flash(**options: Any) -> dict[str, Any]:
    import torch

    def attend(*tensors: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(*(x.unsqueeze(1) for x in tensors)).squeeze(1)

    return contend("individual", attend, 1, **options)


def main() -> None:
    contenders = {"sparse": sparse, "dense": dense, "dense_masked": dense_masked, "flash": flash, "fully": fully}
    measure.answer_as_contender(contenders)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", help="edge table of gene symbols; a random network by default")
    parser.add_argument("--genes", type=int, default=20_499)
    parser.add_argument("--batch", type=int, default=64, help="cells of a step, sparse and fully connected")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="smoothing layers")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed steps of a process; 1 on a CPU, 10 on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    results: dict[str, Any] = {**measure.machine(), "device": args.device, "seed": args.seed}
    results |= {"genes": args.genes, "edges": len(network(args.edges, args.genes, args.seed)), "batch": args.batch}
    rows = []
    for n_layers in args.layers:
        arguments = {
            "edges": args.edges,
            "n_genes": args.genes,
            "batch": args.batch,
            "n_layers": n_layers,
            "n_steps": args.steps or (10 if args.device == "cuda" else 1),
            "seed": args.seed,
            "device": args.device,
        }
        answers = measure.interleaved(__file__, CONTENDERS, arguments, repeats=args.repeats)
        answers["dense_masked"] = [measure.run_contender(__file__, "dense_masked", arguments)]
        prefix = f"layers{n_layers}_"
        memory = "gpu_memory_mb" if args.device == "cuda" else "peak_rss_mb"
        figures = {
            name: {
                "cells_per_second": measure.median(answers[name], "cells_per_second"),
                "peak_mb": measure.worst(answers[name], memory),
            }
            for name in CONTENDERS
        }
        results |= {f"{prefix}{name}_{key}": value for name, row in figures.items() for key, value in row.items()}
        losses = [answers[name][0]["first_cell_loss"] for name in ("sparse", "dense_masked")]
        results[f"{prefix}loss_difference"] = abs(losses[0] - losses[1])
        for name, row in figures.items():
            ratio = figures["sparse"]["cells_per_second"] / row["cells_per_second"]
            results[f"{prefix}ratio_to_{name}"] = ratio
            rows.append([n_layers, name, row["cells_per_second"], ratio, row["peak_mb"]])
        print(f"{n_layers} layers: the loss of a cell differs from the dense masked one by {losses[0] - losses[1]:.1e}")
    print(results["machine"])
    measure.print_table(["layers", "contender", "cells/s", "sparse over it", "peak MB"], rows)
    measure.save_results(results, args.json)


if __name__ == "__main__":
    main()
