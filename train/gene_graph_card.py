"""Model cards of a gene-graph autoencoder and of a classifier, from the runs' own figures."""

from collections.abc import Sequence
from typing import Any

from cellglot.publication import shown

from .finetuning_card import classification_results, figures_section, limits_first
from .model_card import front_matter, measured

_SOURCE = (
    'Method of "Single cell RNA Sequence Classification with Neural Networks"; trained with '
    "[cellglot](https://github.com/cellglot/cellglot), not by its authors."
)

_LOADING_AUTOENCODER = """\
```python
import cellglot  # registers the classes
from transformers import AutoModel, AutoModelForSequenceClassification

encoder = AutoModel.from_pretrained("PATH_OR_REPO")
expression, obs, report = cellglot.read_expression(adata, encoder)  # raw counts in
classifier = AutoModelForSequenceClassification.from_pretrained("PATH_OR_REPO", num_labels=8)  # to be trained
```

Without cellglot, the code saved here does: pass `trust_remote_code=True`; the input is log(1 + counts per 10,000) over
`config.gene_ids`."""

_LOADING_CLASSIFIER = """\
```python
import cellglot  # registers the classes
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("PATH_OR_REPO")
labels = cellglot.classify_expression(adata, model)  # raw counts in; a table by cell out
genes, edges = cellglot.gene_importance(adata, model)
```

Without cellglot, the code saved here does: pass `trust_remote_code=True`; the input is log(1 + counts per 10,000) over
`config.gene_ids`."""

_CLOSING = """\
## Licence and citation

Code: Apache-2.0. The weights carry whatever terms the training data and the gene network carry.

Single cell RNA Sequence Classification with Neural Networks: fully connected networks, autoencoder initialization and
graph convolution over genes."""


def autoencoder_card(report: dict[str, Any], model_config: Any, cells: Any, config: Any, figures: Sequence[str]) -> str:
    """README.md of the model directory of an autoencoder. Where a reference is better, it says so first."""
    loss = report["validation_loss"]
    metrics = [("mse", "squared error of a gene's log expression", float(f"{loss:.4g}"))]
    results = measured(("other", "reconstruction of expression"), cells.description, "validation", metrics)
    left_out = f", {config.split_by} {', '.join(config.leave_out)} left out" if config.leave_out else ""
    better = [f"{name} ({error:.4g})" for name, error in report["references"].items() if error <= loss]
    limits = []
    if better:
        limits.append(f"**Held-out cells are reconstructed no worse by: {', '.join(better)}; this model {loss:.4g}.**")
    if report["n_train_cells"] < 10_000:
        limits.append(f"Trained on {report['n_train_cells']:,} cells only.")
    rows = [f"| this model | {loss:.4g} |", *(f"| {name} | {e:.4g} |" for name, e in report["references"].items())]
    table = "\n".join(["| squared error of a gene's log expression | held-out cells |", "|---|---|", *rows])
    sections = [
        front_matter("gene-graph", results),
        f"# Autoencoder of expression for a gene-graph classifier, trained on {cells.description}",
        _SOURCE,
        *limits,
        "## Loading\n\n" + _LOADING_AUTOENCODER,
        "## Figures\n\n" + table,
        *[f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figures],
        "## Training\n\n"
        f"{network_in_words(model_config, report['graph'])} {report['n_train_cells']:,} training and "
        f"{report['n_validation_cells']:,} validation cells of {cells.description} (fingerprint "
        f"`{cells.fingerprint}`){left_out}, {report['steps']:,} steps of {config.batch_size} cells, "
        f"{optimizer_in_words(config)}, seed {config.seed}, {report['seconds']:.0f} s. All options and versions: "
        "`run.json`.",
        _CLOSING,
    ]
    return "\n\n".join(sections) + "\n"


def classifier_card(task: Any, config: Any, result: Any, figures: Sequence[str]) -> str:
    """README.md of the model directory of one split of a classifier; where a baseline wins, it says so first.

    task  a `GeneGraphTask`; result  a `SplitResult`
    """
    (label,) = task.classes
    data, facts = task.cells.description, result.facts
    graph = None if task.graph is None else str(task.graph.report)
    start = "random weights" if config.model is None else f"`{shown(config.model)}`"
    if config.test_groups:
        split = f"{config.split_by} {', '.join(config.test_groups)} held out"
    else:
        split = f"whole groups of {config.split_by} held out" if config.split_by else "split by cell"
    training = [
        f"{network_in_words(task.model_config, graph)} Started from {start}; {facts['n_train']:,} training, "
        f"{facts['n_validation']:,} validation and {facts['n_test']:,} test cells of {data}, {split}; "
        f"{facts['steps']:,} steps of {config.batch_size} cells, {optimizer_in_words(config)}, seed {config.seed}, "
        f"{facts['seconds']:.0f} s."
    ]
    if config.patience:
        training.append(f"Stopped early on the validation loss; weights of step {facts['best_step']:,}.")
    if config.class_weights != "none":
        training.append("Classes weighed inversely to their frequency.")
    training.append("All options and versions: `run.json`.")
    sections = [
        front_matter("gene-graph", classification_results(task, result), start=config.model),
        f"# Gene-graph classifier that tells {label} of cells, trained on {data}",
        _SOURCE,
        *limits_first(result),
        "## Loading\n\n" + _LOADING_CLASSIFIER,
        figures_section(task, result),
        *[f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figures],
        "## Training\n\n" + " ".join(training),
        _CLOSING,
    ]
    return "\n\n".join(sections) + "\n"


def network_in_words(config: Any, graph: str | None) -> str:
    """Genes, layers and smoothing of a model, and what became of its edge table where it was given one."""
    widths = ", ".join(map(str, config.hidden_sizes))
    text = f"{config.n_genes:,} genes, fully connected layers of {widths} units"
    if config.smoothing == "none":
        return f"{text}, no graph."
    graphs = "individual and global graphs" if config.smoothing == "both" else f"{config.smoothing} graph"
    layers = "" if config.num_smoothing_layers == 1 else f", {config.num_smoothing_layers} layers"
    diagonal = "with" if config.diagonal else "without"
    scaling = ", scores by degrees" if config.score_scaling == "degree" and config.smoothing != "individual" else ""
    residual = "" if config.residual else ", in place of the expression"
    matched = "" if graph is None else f" Network: {graph}."
    return f"{text}, smoothed along {graphs} {diagonal} diagonal{layers}{scaling}{residual}.{matched}"


def optimizer_in_words(config: Any) -> str:
    """Adam, or AdamW, with what it was told."""
    name = f"AdamW (weight decay {config.weight_decay:g})" if config.weight_decay else "Adam"
    return f"{name}, betas 0.9 and 0.999, epsilon 1e-8, learning rate {config.learning_rate:g} ({config.schedule})"
