"""Model card of a multiome run, from the run's own figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .model_card import front_matter, measured

FIGURES = {"average_precision": "average precision", "f1": "F1", "precision": "precision", "recall": "recall"}
FIGURES["rmse"] = "RMSE"
DIRECTIONS = {"gex2atac": "expression to accessibility", "atac2gex": "accessibility to expression"}


def multiome_card(report: dict[str, Any], data: Any, config: Any, figures: Sequence[str]) -> str:
    """README.md of a model directory: front matter with `model-index`, then what a reader needs to judge the model."""
    sections = [
        front_matter("multiome", _results(report, data)),
        f"# Multiome T5, {report['n_parameters'] / 1e6:.1f}M parameters, trained on {data.description}",
        _METHOD[config.head],
        *_limits_first(report),
        "## Loading\n\n" + _LOADING[config.head].format(task=config.tasks[0]),
        *([_table(report, config)] if report["predictions"] else []),
        *[f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figures],
        "## Training\n\n" + _training(report, data, config),
        _CLOSING,
    ]
    return "\n\n".join(sections) + "\n"


_SOURCE = (
    'Method of Lee et al., "Translating the Code of Life"; trained with '
    "[cellglot](https://github.com/cellglot/cellglot), not by its authors."
)
_METHOD = {
    "t5": "A cell is read as the string of its expressed genes or of its open peaks, and a T5, trained from scratch, "
    f"writes the string of the other modality; a task token says which way. {_SOURCE}",
    "set": "A cell is read as its expressed genes or its open peaks, and all features of the other modality are scored "
    f"in one pass, where the published method writes them one by one; a task token says which way. {_SOURCE}",
}
_LOADING = {
    "set": """\
```python
import cellglot  # registers the classes
from transformers import AutoModelForSequenceClassification, AutoProcessor

model = AutoModelForSequenceClassification.from_pretrained("PATH_OR_REPO")
processor = AutoProcessor.from_pretrained("PATH_OR_REPO")
batch = processor(adata, task="{task}")
output = model(batch["input_ids"], batch["attention_mask"])  # .logits of being there, .values
```

Without cellglot, the code saved here does: `from_pretrained("PATH_OR_REPO", trust_remote_code=True)`.""",
    "t5": """\
```python
import cellglot  # registers the classes
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

model = AutoModelForSeq2SeqLM.from_pretrained("PATH_OR_REPO")
processor = AutoProcessor.from_pretrained("PATH_OR_REPO")
batch = processor(adata, task="{task}")
written = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"])
```

Without cellglot, the code saved here does: `from_pretrained("PATH_OR_REPO", trust_remote_code=True)`.""",
}
_CLOSING = """\
## Licence and citation

Code: Apache-2.0. The weights carry whatever terms the training data carry.

Lee et al., Translating the Code of Life. T5: Raffel et al., Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer, JMLR 21 (2020)."""


def _results(report: dict[str, Any], data: Any) -> list[EvalResult]:
    metrics = [("loss", "loss a label", round(report["validation_loss"], 4))]
    metrics += [
        (key, f"{FIGURES[key]}, {DIRECTIONS[row['task']]}", round(row[key], 4))
        for row in report["predictions"]
        if row["guess"] == "this model"
        for key in FIGURES
        if key in row
    ]
    task = ("other", "prediction of the other modality of a cell")
    return measured(task, data.description, "validation", metrics)


def _limits_first(report: dict[str, Any]) -> list[str]:
    """What speaks against the model, at the top."""
    lines = []
    for baseline, ours in _pairs(report):
        figure = "average_precision" if "average_precision" in ours else "f1"
        if ours[figure] <= baseline[figure]:
            lines.append(
                f"**From {DIRECTIONS[ours['task']]} it does not beat the frequency of each feature in the training "
                f"cells, the same answer for every cell: {FIGURES[figure]} {ours[figure]:.3f} against "
                f"{baseline[figure]:.3f}.**"
            )
    n_train = report["n_train_rows"] // report["n_tasks"]
    if n_train < 10_000:
        lines.append(
            f"Trained on {n_train:,} cells only: a demonstration that the method runs, not a model to draw biological "
            "conclusions from."
        )
    return ["\n\n".join(lines)] if lines else []


def _pairs(report: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(frequency baseline, this model) of each task."""
    rows = report["predictions"]
    return list(zip(rows[::2], rows[1::2], strict=True))


def _table(report: dict[str, Any], config: Any) -> str:
    names = {key: name for key, name in FIGURES.items() if key in report["predictions"][0]}
    lines = [
        f"| {DIRECTIONS[row['task']]} ({row['n_cells']:,}) | {row['guess']} | "
        + " | ".join(f"{row[key]:.3f}" for key in names)
        + " |"
        for row in report["predictions"]
    ]
    head = (
        "## Held-out cells\n\nAll (cell, feature) pairs pooled. Frequency: the share of the training cells that have a "
        "feature, the same for every cell. Thresholds are chosen on as many other held-out cells."
    )
    if config.head == "set":
        head += " RMSE: of log-normalized expression, or of open (1) and closed (0) peaks, against the training mean."
    if config.patience:
        head += " Training stopped where the loss of these cells was lowest, so figures of new cells may be lower."
    columns = ["direction (cells)", "guess", *names.values()]
    return "\n".join([head, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines])


def _split(config: Any) -> str:
    if config.split_by is not None:
        return f"held out by {config.split_by}"
    if Path(config.cells[0]).is_dir():
        return "held out as the corpus says, at random where it has no validation cells"
    return "cells held out at random, so that others of their batch are trained on"


def _training(report: dict[str, Any], data: Any, config: Any) -> str:
    return (
        f"{report['n_train_rows']:,} training and {report['n_validation_rows']:,} validation rows (cells x tasks) of "
        f"{data.description} (fingerprint `{data.fingerprint}`), {report['n_genes']:,} genes and "
        f"{report['n_peaks']:,} peaks; {_split(config)}; genes expressed from "
        f"{config.threshold:g} of log-normalized expression on, encoding {config.encoding}, vocabulary "
        f"{config.vocabulary}. {report['steps']:,} steps of {config.batch_size} rows, AdamW, maximum learning rate "
        f"{config.learning_rate:g} ({config.schedule}), weight decay {config.weight_decay:g}, seed {config.seed}, "
        f"{report['seconds']:.0f} s. Cells of a step are of like length, so that the training loss goes up and "
        "down. All options and versions: `run.json`."
    )
