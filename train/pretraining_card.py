"""Model card of a pre-training run, from the run's own figures."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult

from .model_card import front_matter, measured


def pretraining_card(report: dict[str, Any], data: Any, config: Any, figures: Sequence[str]) -> str:
    """README.md of a model directory: front matter with `model-index`, then what a reader needs to judge the model."""
    beaten = report["validation_loss"] < report["rank_binned_loss"]
    sections = [
        front_matter("geneformer", _results(report, data), pipeline_tag="fill-mask"),
        f"# Geneformer, {report['n_parameters'] / 1e6:.1f}M parameters, pre-trained on {data.description}",
        "A cell is read as its genes in order of rank value, and the model predicts genes that were masked. Method of "
        "Theodoris et al., Nature 2023; trained with [cellglot](https://github.com/cellglot/cellglot), not by its "
        "authors.",
        *_limits_first(report, beaten),
        "## Loading\n\n" + _LOADING,
        "## Figures on cells never seen in training\n\n" + _loss_table(report),
        *([_probe_table(report)] if report["probe"] else []),
        *[f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in figures],
        "## Training\n\n" + _training(report, data, config),
        _CLOSING,
    ]
    return "\n\n".join(sections) + "\n"


_LOADING = """\
```python
import cellglot  # registers the classes
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("PATH_OR_REPO")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
adata = cellglot.embed_cells(adata, model, tokenizer)  # adata.obsm["X_geneformer"]
```

Without cellglot, the code saved here does: `AutoModel.from_pretrained("PATH_OR_REPO", trust_remote_code=True)`."""

_CLOSING = """\
## Licence and citation

Code: Apache-2.0. The weights carry whatever terms the training data carry.

Theodoris, C.V., Xiao, L., Chopra, A. et al. Transfer learning enables predictions in network biology.
Nature 618, 616-624 (2023). doi:10.1038/s41586-023-06139-9"""


def _results(report: dict[str, Any], data: Any) -> list[EvalResult]:
    metrics = [("loss", "masked-gene loss (nats)", round(report["validation_loss"], 4))]
    metrics += [
        ("accuracy", "cell types, linear probe", round(row["accuracy"], 4))
        for row in report["probe"]
        if row["features"] == "embeddings"
    ]
    return measured(("fill-mask", "masked-gene prediction"), data.description, "validation", metrics)


def _limits_first(report: dict[str, Any], beaten: bool) -> list[str]:
    """What speaks against the model, at the top."""
    lines = []
    if not beaten:
        lines.append(
            f"**Its loss ({report['validation_loss']:.3f} nats) does not beat the frequency of genes at each rank "
            f"({report['rank_binned_loss']:.3f}): it has learned nothing about cells yet.**"
        )
    accuracy = {row["features"]: row["accuracy"] for row in report["probe"]}
    if accuracy and accuracy["embeddings"] < accuracy["log counts"]:
        lines.append(
            f"**A logistic regression on log counts tells these cell types apart better "
            f"({accuracy['log counts']:.3f}) than one on this model's embeddings ({accuracy['embeddings']:.3f}).**"
        )
    if report["n_train_cells"] < 10_000:
        lines.append(
            f"Trained on {report['n_train_cells']:,} cells and {report['vocabulary']:,} tokens only: a demonstration "
            "that the method runs, not a model to draw biological conclusions from."
        )
    return ["\n\n".join(lines)] if lines else []


def _loss_table(report: dict[str, Any]) -> str:
    rows = [
        ("uniform", "uniform_loss"),
        ("unigram", "unigram_loss"),
        ("rank-binned unigram", "rank_binned_loss"),
        ("this model", "validation_loss"),
    ]
    lines = [f"| {name} | {report[key]:.3f} |" for name, key in rows]
    return "\n".join(["| masked-gene loss | nats |", "|---|---|", *lines])


def _probe_table(report: dict[str, Any]) -> str:
    first = report["probe"][0]
    lines = [
        f"| {row['features']} | {row['accuracy']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['macro_f1']:.3f} |"
        for row in report["probe"]
    ]
    head = (
        f"Cell type of {first['n_test']:,} held-out cells by logistic regression, fitted on {first['n_train']:,} "
        "training cells, regularization chosen on them; 95% bootstrap interval over cells:"
    )
    return "\n".join([head, "", "| features | accuracy | interval | macro F1 |", "|---|---|---|---|", *lines])


def _training(report: dict[str, Any], data: Any, config: Any) -> str:
    return (
        f"{report['n_train_cells']:,} training and {report['n_validation_cells']:,} validation cells of "
        f"{data.description} (fingerprint `{data.fingerprint}`), split by {config.split_by or 'cell'}; gene medians "
        f"{'from the training cells' if config.vocabulary is None else 'of the given vocabulary'}; "
        f"{report['train_tokens'] / 1e6:.2f}M training tokens, {report['steps']:,} steps of {config.batch_size} cells, "
        f"AdamW, maximum learning rate {config.learning_rate:g} ({config.schedule}), weight decay "
        f"{config.weight_decay:g}, {config.mask_probability:.0%} of genes masked, seed {config.seed}, "
        f"{report['seconds']:.0f} s. The validation loss is the mean over five draws of masks. All options and "
        "versions: `run.json`."
    )
