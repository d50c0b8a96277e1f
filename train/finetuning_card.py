"""Model card of a fine-tuned classifier, from the run's own figures; where a baseline wins, it says so first."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult

from cellglot.publication import shown

from .model_card import front_matter, measured

_LOADING = {
    "cell": """\
```python
import cellglot  # registers the classes
from transformers import pipeline

classify = pipeline("cell-classification", model="PATH_OR_REPO")
adata = classify(adata)  # raw counts in; labels and scores in adata.obs
```

Without cellglot, the code saved here does:
`AutoModelForSequenceClassification.from_pretrained("PATH_OR_REPO", trust_remote_code=True)`.""",
    "gene": """\
```python
import cellglot  # registers the classes
from transformers import AutoModelForTokenClassification, AutoTokenizer

model = AutoModelForTokenClassification.from_pretrained("PATH_OR_REPO")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
```

Without cellglot, the code saved here does, with `trust_remote_code=True`.""",
}

_CLOSING = """\
## Licence and citation

Code: Apache-2.0. The weights carry whatever terms the training data and the model that was fine-tuned carry.

Theodoris, C.V., Xiao, L., Chopra, A. et al. Transfer learning enables predictions in network biology.
Nature 618, 616-624 (2023). doi:10.1038/s41586-023-06139-9"""


def finetuning_card(task: Any, config: Any, result: Any, figures: Sequence[str]) -> str:
    """README.md of the model directory of one split.

    task    a `Task`; result  a `SplitResult`
    """
    kind = "gene" if task.per_gene else "cell"
    data = task.cells.description
    what = ", ".join(task.classes)
    sections = [
        front_matter(
            "geneformer",
            classification_results(task, result),
            start=None if config.untrained else config.model,
        ),
        f"# Geneformer that tells {what} of {kind}s, fine-tuned on {data}",
        *limits_first(result),
        "## Loading\n\n" + _LOADING[kind],
        figures_section(task, result),
        *[f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figures],
        "## Training\n\n" + _training(task, config, result, data),
        _CLOSING,
    ]
    return "\n\n".join(sections) + "\n"


def classification_results(task: Any, result: Any) -> list[EvalResult]:
    """Accuracy and macro F1 of each label on the tested items."""
    kind = "token-classification" if task.per_gene else "text-classification"
    return [
        figure
        for label, models in result.metrics.items()
        for figure in measured(
            (kind, label),
            task.cells.description,
            "test",
            [
                ("accuracy", f"accuracy, {label}", round(models["this model"]["accuracy"], 4)),
                ("f1", f"macro F1, {label}", round(models["this model"]["macro_f1"], 4)),
            ],
        )
    ]


def limits_first(result: Any) -> list[str]:
    """What speaks against the model, at the top."""
    lines = []
    for label, models in result.metrics.items():
        ours = models["this model"]
        better = [n for n, row in models.items() if n != "this model" and row["macro_f1"] > ours["macro_f1"]]
        if better:
            shown = ", ".join(f"{name} ({models[name]['macro_f1']:.3f})" for name in better)
            lines.append(f"**On {label}, this model (macro F1 {ours['macro_f1']:.3f}) is beaten by: {shown}.**")
    if result.facts["n_train"] < 10_000:
        lines.append(f"Trained on {result.facts['n_train']:,} items only.")
    return ["\n\n".join(lines)] if lines else []


def figures_section(task: Any, result: Any) -> str:
    """What was measured on the tested items: each label beside baselines, and class by class."""
    if not result.metrics:
        return "No part of the data was held out: nothing is measured."
    parts = [f"## Figures on held-out {'genes' if task.per_gene else 'cells'}"]
    for label, models in result.metrics.items():
        n = models["this model"]["n"]
        rows = [f"| {label} of {n:,} | accuracy | 95% interval | macro F1 | macro AUROC |", "|---|---|---|---|---|"]
        for name, row in models.items():
            rows.append(
                f"| {name} | {row['accuracy']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['macro_f1']:.3f} | "
                f"{_shown(row['macro_auroc'])} |"
            )
        of_class = ["| class | n | precision | recall | F1 | AUROC |", "|---|---|---|---|---|---|"]
        for name, row in models["this model"]["per_class"].items():
            of_class.append(
                f"| {name} | {row['n']:,} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} | "
                f"{_shown(row['auroc'])} |"
            )
        parts += ["\n".join(rows), "\n".join(of_class)]
    return "\n\n".join(parts)


def _shown(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def _training(task: Any, config: Any, result: Any, data: str) -> str:
    facts = result.facts
    if config.test_groups:
        split = f"{config.split_by} {', '.join(config.test_groups)} held out"
    elif config.split_by:
        split = f"whole groups of {config.split_by} held out"
    else:
        split = "split by gene" if task.per_gene else "split by cell"
    start = f"`{shown(config.model)}`"
    start = f"random weights in the sizes of {start}" if config.untrained else start
    parts = [
        f"Started from {start}; {facts['n_train']:,} training, {facts['n_validation']:,} validation and "
        f"{facts['n_test']:,} test items of {data}, {split}; {facts['steps']:,} steps of {config.batch_size} cells, "
        f"AdamW, maximum learning rate {config.learning_rate:g} ({config.schedule}), weight decay "
        f"{config.weight_decay:g}, seed {config.seed}, {facts['seconds']:.0f} s.",
    ]
    if config.freeze:
        parts.append(f"Embeddings and first {config.freeze} layers kept as they were.")
    if config.lora_rank:
        low = "" if config.quantize == "no" else f" over {config.quantize} weights"
        parts.append(f"Low-rank adapters of rank {config.lora_rank}{low}, merged into the weights.")
    if config.patience:
        parts.append(f"Stopped early on the validation loss; weights of step {facts['best_step']:,}.")
    if config.class_weights != "none":
        parts.append("Classes weighed inversely to their frequency.")
    return " ".join([*parts, "All options and versions: `run.json`."])
