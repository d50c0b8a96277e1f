"""What a pre-training run is worth: reference losses, a probe of cell types, figures, the model directory with them.

Every figure has the simplest alternatives beside it: gene frequencies for the loss; the majority type, a logistic
regression on log counts and the untrained network for the embeddings.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cellglot.embedding import embed_tokens
from cellglot.figures import plot_umap, save_figure, umap_coordinates
from cellglot.metrics.masked_gene import rank_binned_cross_entropy, unigram_cross_entropy
from cellglot.metrics.probe import accuracy_with_interval, linear_probe, majority_prediction

from .config import write_atomically
from .expression_features import log_expression, variable_genes
from .figures import plot_loss_curve
from .loop import TrainingResult
from .metrics_log import read_metrics
from .model_directory import write_model_directory
from .pretraining_card import pretraining_card
from .pretraining_data import PretrainingData

# Cells of each split that the reference losses, the probe and the UMAP use at the most
MAX_CELLS = 5_000


def write_report(
    model: Any, data: PretrainingData, config: Any, result: TrainingResult, output: Path
) -> dict[str, Any]:
    """Measures, draws, prints, and writes `model/` and `report.json`; returns the report."""
    log = read_metrics(output / "metrics.jsonl")
    loss = reference_losses(data)
    figures: dict[str, Path] = {}
    probe = pd.DataFrame()
    report: dict[str, Any] = {
        "validation_loss": result.metrics["validation_loss"],
        **loss,
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "n_parameters": model.num_parameters(),
        "n_train_cells": len(data.train),
        "n_validation_cells": len(data.validation),
        "train_tokens": int(np.sum(data.train["length"])),
        "vocabulary": len(data.tokenizer),
    }
    report["probe"] = []
    # First without probe and pictures, which may fail on odd data: a trained model is never lost to its report.
    card = pretraining_card(report, data, config, [])
    write_model_directory(model, data.tokenizer, output / "model", card=card, report=report, files={})
    if config.report:
        figures["loss_curve.png"] = output / "loss_curve.png"
        references = {"unigram": loss["unigram_loss"], "rank-binned unigram": loss["rank_binned_loss"]}
        save_figure(plot_loss_curve(log, references), figures["loss_curve.png"])
        if data.sources:
            cells = labelled_cells(data, config.cell_type)
            embeddings = embed_tokens(cells.tokens, model, data.tokenizer, max_tokens=config.max_tokens, progress=True)
            labels = None if cells.labels is None else cells.labels.tolist()
            figures["umap.png"] = output / "umap.png"
            save_figure(plot_umap(umap_coordinates(embeddings), labels), figures["umap.png"])
            if cells.labels is not None:
                probe = probe_cell_types(model, embeddings, cells, data, config)
    report["probe"] = probe.to_dict("records")
    card = pretraining_card(report, data, config, [*figures])
    write_model_directory(model, data.tokenizer, output / "model", card=card, report=report, files=figures)
    write_atomically(output / "report.json", json.dumps(report, indent=2) + "\n")
    print(format_report(report, output))
    return report


def reference_losses(data: PretrainingData) -> dict[str, float]:
    """Unigram and rank-binned unigram cross-entropy of the validation cells, in nats a gene."""
    train, validation = (_subset(split)["input_ids"][:] for split in (data.train, data.validation))
    genes = data.tokenizer.gene_token_ids
    return {
        "unigram_loss": unigram_cross_entropy(train, validation, genes),
        "rank_binned_loss": rank_binned_cross_entropy(train, validation, genes),
        "uniform_loss": float(np.log(len(genes))),
    }


class LabelledCells:
    """Tokens, log-normalized expression (cells, genes), split and cell type of some cells; `labels` None if unknown."""

    def __init__(self, tokens: list[np.ndarray], expression: sp.csr_matrix, held_out: np.ndarray, labels: Any):
        self.tokens, self.expression, self.held_out, self.labels = tokens, expression, held_out, labels


def labelled_cells(data: PretrainingData, cell_type: str | None) -> LabelledCells:
    """Up to MAX_CELLS cells of each split, drawn with a fixed seed, a column of obs as label if all sources have it."""
    draws = {
        split: _draw([getattr(s, split) for s in data.sources], np.random.default_rng(i))
        for i, split in enumerate(("train", "validation"))
    }
    tokens, expression, held_out, labels = [], [], [], []
    for i, source in enumerate(data.sources):
        cells = draws["train"][i] | draws["validation"][i]
        if cells.any():
            ids = data.tokenizer.encode_anndata(source.source, cells=cells, **source.options)
            ids = list(ids.with_format("numpy")["input_ids"][:])
            counts, obs = log_expression(source.source, cells, data.tokenizer, **source.options)
            filled = np.array([len(x) > 0 for x in ids])
            tokens += [x for x in ids if len(x)]
            expression.append(counts[filled])
            held_out.append(draws["validation"][i][cells][filled])
            column = cell_type or "cell_type"
            labels.append(obs[column].astype(str).to_numpy()[filled] if column in obs else None)
    known = None if any(part is None for part in labels) else np.concatenate(labels)
    return LabelledCells(tokens, sp.csr_matrix(sp.vstack(expression)), np.concatenate(held_out), known)


def probe_cell_types(
    model: Any, embeddings: np.ndarray, cells: LabelledCells, data: PretrainingData, config: Any
) -> pd.DataFrame:
    """Accuracy on held-out cells of logistic regressions on several features; columns features, accuracy, low, ..."""
    torch.manual_seed(config.seed)
    untrained = type(model)(model.config).to(next(model.parameters()).device)
    expression = variable_genes(cells.expression, ~cells.held_out)
    features = {
        "log counts": expression,
        "embeddings, untrained network": embed_tokens(
            cells.tokens, untrained, data.tokenizer, max_tokens=config.max_tokens
        ),
        "embeddings": embeddings,
    }
    test = cells.held_out
    train_labels, test_labels = cells.labels[~test], cells.labels[test]
    rows = [
        {
            "features": "majority type",
            **accuracy_with_interval(test_labels, majority_prediction(train_labels, test.sum())),
        }
    ]
    for name, x in features.items():
        predicted = linear_probe(x[~test], train_labels, x[test])
        rows.append({"features": name, **accuracy_with_interval(test_labels, predicted)})
    return pd.DataFrame(rows).assign(n_train=int((~test).sum()), n_test=int(test.sum()))


def format_report(report: dict[str, Any], output: Path) -> str:
    """The report as people read it in a terminal."""
    lines = [
        "",
        f"{report['n_parameters'] / 1e6:.2f}M parameters, {report['steps']:,} steps, {report['seconds']:.0f} s",
        "",
        "masked-gene loss on held-out cells        nats",
        f"  uniform                                {report['uniform_loss']:.3f}",
        f"  unigram                                {report['unigram_loss']:.3f}",
        f"  rank-binned unigram                    {report['rank_binned_loss']:.3f}",
        f"  this model                             {report['validation_loss']:.3f}",
    ]
    if report["probe"]:
        first = report["probe"][0]
        head = f"cell type of {first['n_test']:,} held-out cells"
        lines += ["", f"{head:<54}accuracy  95% interval    macro F1"]
        for row in report["probe"]:
            name = row["features"] if row["features"] == "majority type" else f"logistic regression, {row['features']}"
            lines.append(
                f"  {name:<52}{row['accuracy']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]  {row['macro_f1']:.3f}"
            )
    figures = ", ".join(path.name for path in sorted(output.glob("*.png")))
    return "\n".join(
        [*lines, "", f"model: {output / 'model'}", *([f"figures: {figures} in {output}"] if figures else [])]
    )


def _subset(dataset: Any) -> Any:
    return dataset.select(np.sort(np.random.default_rng(0).permutation(len(dataset))[:MAX_CELLS]))


def _draw(masks: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """At most MAX_CELLS of the marked cells of all sources, as masks again."""
    joined = np.concatenate(masks)
    marked = np.flatnonzero(joined)
    chosen = np.zeros(len(joined), dtype=bool)
    chosen[rng.permutation(marked)[:MAX_CELLS]] = True
    return np.split(chosen, np.cumsum([len(mask) for mask in masks])[:-1])
