"""Model card of a cross-species run, from the run's own figures."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult

from .model_card import front_matter, measured


def cross_species_card(report: dict[str, Any], data: Any, config: Any, figures: Sequence[str]) -> str:
    """README.md of a model directory: front matter with `model-index`, then what a reader needs to judge the model."""
    results = _results(report, data)
    sections = [
        front_matter("cross-species", results, pipeline_tag="feature-extraction"),
        f"# Cross-species model, {report['n_parameters'] / 1e6:.1f}M parameters, pre-trained on {data.description}",
        "A cell is read as the principal components of its own species' expression; an encoder and a decoder shared by "
        "all species, which a trainable embedding tells apart, reconstruct components that were hidden. Method of "
        "Pang & Tegnér, ICML 2020 Workshop on Computational Biology, section 2.1; trained with "
        "[cellglot](https://github.com/cellglot/cellglot), not by its authors. Species are not aligned yet: that is "
        "`train/align.py` (section 2.2).",
        *_limits_first(report),
        "## Loading\n\n" + _LOADING.format(source=data.extractor.sources[0]),
        *([_masked_table(report, config), _expression_table(report)] if report["masked"] else []),
        *[f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figures],
        "## What attention sees\n\n" + _AXES[report["token_axis"]].format(batch=_context(report, config)),
        "## Training\n\n" + _training(report, data, config),
        _CLOSING,
    ]
    return "\n\n".join(sections) + "\n"


_LOADING = """\
```python
import torch, cellglot  # registers the classes
from transformers import AutoFeatureExtractor, AutoModel

model = AutoModel.from_pretrained("PATH_OR_REPO")
extractor = AutoFeatureExtractor.from_pretrained("PATH_OR_REPO")
batch = extractor(adata, source="{source}", return_tensors="pt")
with torch.no_grad():
    embeddings = model(**batch).embeddings  # (cells, width)
```

Without cellglot, the code saved here does: pass `trust_remote_code=True` to both."""

_AXES = {
    "cells": '`token_axis="cells"`, the paper read literally: a cell is one token and attention runs across the cells '
    "of a forward pass, {batch} in training. **A cell's embedding depends on the cells it is embedded with**; embed "
    "cells in mixed batches of about that size.",
    "components": '`token_axis="components"`: a cell is cut into patches of components and one token of its species, '
    "and attention stays within the cell. A cell's embedding is its own, whatever the batch.",
}

_CLOSING = """\
## Licence and citation

Code: Apache-2.0. The weights carry whatever terms the training data carry.

Pang, M., Tegnér, J. Representation Learning and Translation between the Mouse and Human Brain using a Deep Transformer
Architecture. ICML 2020 Workshop on Computational Biology."""


def _context(report: dict[str, Any], config: Any) -> str:
    return f"up to {min(config.batch_size, config.max_tokens):,}"


def _results(report: dict[str, Any], data: Any) -> list[EvalResult]:
    metrics = [("mse", "squared error of an entry", float(f"{report['validation_loss']:.4g}"))]
    metrics += [
        ("r2", f"masked entries, {row['source']}", round(row["explained"], 4))
        for row in report["masked"]
        if row["guess"] == "this model"
    ]
    return measured(("feature-extraction", "masked principal components"), data.description, "validation", metrics)


def _limits_first(report: dict[str, Any]) -> list[str]:
    """What speaks against the model, at the top."""
    lines = []
    if report["masked"] and report["validation_loss"] >= report["copy_loss"]:
        lines.append(
            f"**As a reconstruction of whole cells it does not beat a copy of what it sees, hidden entries at their "
            f"mean: squared error {report['validation_loss']:.4g} against {report['copy_loss']:.4g}.**"
        )
    for source in dict.fromkeys(row["source"] for row in report["masked"]):
        explained = {row["guess"]: row["explained"] for row in report["masked"] if row["source"] == source}
        ours = explained.pop("this model")
        best = max(explained, key=explained.__getitem__)
        if ours <= explained[best]:
            guess = {"mean": "their mean"}.get(best, f"the {best}")
            lines.append(
                f"**Masked entries of {source} cells are guessed no worse by {guess} than by this model: of their "
                f"squared deviation from the mean {explained[best]:z.3f} is explained, and {ours:z.3f}.**"
            )
    n_train = sum(report["n_train_cells"].values())
    if n_train < 10_000:
        lines.append(
            f"Trained on {n_train:,} cells only: a demonstration that the method runs, not a model to draw biological "
            "conclusions from."
        )
    return ["\n\n".join(lines)] if lines else []


def _masked_table(report: dict[str, Any], config: Any) -> str:
    lines = [
        f"| {row['source']} ({row['n_cells']:,}) | {row['guess']} | {row['mse']:.4g} | {row['explained']:z.3f} | "
        f"{row['low']:z.3f} to {row['high']:z.3f} | {row['components']:.0%} |"
        for row in report["masked"]
    ]
    head = (
        f"## Masked entries of cells never seen in training\n\n{config.mask_probability:.0%} of the "
        f"{report['n_components']:,} components of each cell hidden. Explained: share of the hidden entries' squared "
        "deviation from the training mean; 95% bootstrap interval over cells. Better: share of the components that are "
        "guessed better than by their mean. Linear map: least squares on training cells with entries hidden likewise "
        "(within a species, principal components are uncorrelated there). Nearest cells: mean of the ten nearest "
        "training cells, by the entries that are not hidden."
    )
    table = ["| species (cells) | guess | squared error | explained | interval | better |", "|---|---|---|---|---|---|"]
    return "\n".join([head, "", *table, *lines])


def _expression_table(report: dict[str, Any]) -> str:
    lines = [
        f"| {row['source']} | {row['guess']} | {row['mse']:.4g} | {row['explained']:z.3f} |"
        for row in report["expression"]
    ]
    head = (
        "## Expression of these cells\n\nThrough the inverse projection: log-normalized expression of all genes, and "
        "the share of its squared deviation from the mean training cell that is explained. The first row is what the "
        "projection keeps of cells it was not fitted on, and the most that a reconstruction of it can reach."
    )
    return "\n".join([head, "", "| species | from | squared error | explained |", "|---|---|---|---|", *lines])


def _training(report: dict[str, Any], data: Any, config: Any) -> str:
    cells = ", ".join(
        f"{name} {n:,} training and {report['n_validation_cells'][name]:,} validation cells"
        for name, n in report["n_train_cells"].items()
    )
    split = ", ".join(config.split_by) or "cell"
    return (
        f"{cells} of {data.description} (fingerprint `{data.fingerprint}`), split by {split}; the projection is fitted "
        f"on the training cells. {report['steps']:,} steps of {config.batch_size} cells, AdamW, maximum learning rate "
        f"{config.learning_rate:g} ({config.schedule}), weight decay {config.weight_decay:g}, "
        f"{config.mask_probability:.0%} of entries masked, seed {config.seed}, {report['seconds']:.0f} s. The loss is "
        f"the mean squared error of all entries, masked or not (equation 6): {report['validation_loss']:.4g} on "
        "held-out cells, the mean over three draws of masks. All options and versions: `run.json`."
    )
