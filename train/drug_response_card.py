"""Model cards of drug response models, from the runs' own figures. What speaks against a model comes first."""

from collections.abc import Sequence
from typing import Any

from .model_card import front_matter, measured

_SOURCE = (
    "Method of Tan, Wang, Zhang, *A pre-trained model for cellular responses to drug perturbations*; trained with "
    "[cellglot](https://github.com/cellglot/cellglot), not by its authors."
)

_LOADING_PRETRAINED = """\
```python
import torch, cellglot  # registers the classes
from transformers import AutoFeatureExtractor, AutoModel

model = AutoModel.from_pretrained("PATH_OR_REPO").eval()
extractor = AutoFeatureExtractor.from_pretrained("PATH_OR_REPO")
with torch.no_grad():
    embeddings = model(**extractor(adata, return_tensors="pt")).embeddings  # (profiles, width)
```

Without cellglot, the code saved here does: pass `trust_remote_code=True` to both."""

_LOADING_GENERATION = """\
```python
import cellglot

model = cellglot.DrugResponseForConditionalGeneration.from_pretrained("PATH_OR_REPO")
extractor = cellglot.ExpressionFeatureExtractor.from_pretrained("PATH_OR_REPO")
predicted = cellglot.predict_response(
    control_cells, model, extractor, drug={drug!r}, dose=10, dose_unit="uM", cell_line={line!r}
)
```

Without cellglot, the code saved here loads both, `AutoModelForPreTraining` and `AutoFeatureExtractor` with
`trust_remote_code=True`, and predicts from a feature extractor's output; `predict_response` is cellglot's."""

_CLOSING = """\
## Licence and citation

Code: Apache-2.0. The weights carry whatever terms the training data carry (LINCS: NIH LINCS data release policy).

Tan, Wang, Zhang. A pre-trained model for cellular responses to drug perturbations."""


def pretraining_card(report: dict[str, Any], description: str, mark: str, config: Any, pictures: Sequence[str]) -> str:
    """README.md of the model directory of a pre-trained model."""
    limits = []
    for figure in dict.fromkeys(row["figure"] for row in report["figures"]):
        values = {row["guess"]: row["value"] for row in report["figures"] if row["figure"] == figure}
        ours = values.pop("this model")
        higher_is_better = "accuracy" in figure
        better = {g: v for g, v in values.items() if (v >= ours if higher_is_better else v <= ours)}
        limits += [f"**{figure}: {ours:.4f}, no better than the guess “{g}”, {v:.4f}.**" for g, v in better.items()]
    if report["n_train"] < 10_000:
        limits.append(f"Trained on {report['n_train']:,} profiles only: a demonstration that the method runs.")
    metrics = [("loss", "sum of the tasks' losses", round(report["validation_loss"], 4))]
    metrics += [
        ("accuracy" if "accuracy" in row["figure"] else "rmse", row["figure"], round(row["value"], 4))
        for row in report["figures"]
        if row["guess"] == "this model"
    ]
    results = measured(("feature-extraction", "masked expression"), description, "validation", metrics)
    sections = [
        front_matter(
            "drug-response", results, tags=["transcriptomics"], pipeline_tag="feature-extraction", start=config.model
        ),
        f"# Drug response model, {report['n_parameters'] / 1e6:.1f}M parameters, pre-trained on {description}",
        f"{report['n_genes']:,} genes of a profile, {config.mask_ratio:.0%} of them hidden and regressed"
        + (f"; also learnt: {', '.join(t for t in report['tasks'] if t != 'mask')}" if len(report["tasks"]) > 1 else "")
        + f". {_SOURCE}",
        *limits,
        "## Loading\n\n" + _LOADING_PRETRAINED,
        *_table(report),
        *[f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures],
        "## Training\n\n"
        f"{report['n_train']:,} training and {report['n_validation']:,} validation profiles of {description} "
        f"(fingerprint `{mark}`), split by {config.split_by or 'profile'}; scaling ({config.scaling}) fitted on the "
        f"training profiles. {_optimization(report, config)}",
        _CLOSING,
    ]
    return "\n\n".join(sections) + "\n"


def generation_card(
    report: dict[str, Any], description: str, config: Any, model_config: Any, pictures: Sequence[str]
) -> str:
    """README.md of the model directory of a model that predicts responses."""
    limits = []
    rows = {row["predictor"]: row for row in report["figures"]}
    ours = rows.pop("this model", None)
    if ours is not None:
        for figure, name in (("mean", "Pearson of means"), ("delta", "Pearson of the change from control")):
            best = max(rows.values(), key=lambda row: row[figure])
            if best[figure] >= ours[figure]:
                limits.append(
                    f"**{name} on what was held out: {ours[figure]:.4f}; the {best['predictor']} has "
                    f"{best[figure]:.4f}. The model adds nothing to it.**"
                )
    names = {
        "mean": ("pearsonr", "Pearson of means"),
        "delta": ("pearsonr", "Pearson of changes"),
        "mse": ("mse", "MSE"),
    }
    metrics = [] if ours is None else [(*names[key], round(ours[key], 4)) for key in names]
    results = measured(("other", "expression after a drug"), description, "test", metrics)
    drug = (
        "by an id: it knows the drugs it was trained on"
        if model_config.drug_encoder == "id"
        else ("by Morgan fingerprints: any drug whose SMILES is given")
    )
    sections = [
        front_matter("drug-response", results, tags=["perturbation", "transcriptomics"], start=config.model),
        f"# Responses to drugs, {report['n_parameters'] / 1e6:.1f}M parameters, trained on {description}",
        f"Control cells in, the cells after a drug at a dose out. Drugs enter {drug}. {_SOURCE}",
        *limits,
        "## Loading\n\n"
        + _LOADING_GENERATION.format(drug=str(report["example"]["drug"]), line=str(report["example"]["line"])),
        *_response_table(report),
        *[f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures],
        "## Variant\n\n"
        f'`token_axis="{model_config.token_axis}"`, `training_input="{model_config.training_input}"`, '
        f'`decoder="{model_config.decoder}"`, `predicts="{model_config.predicts}"`. In training '
        + (
            "a control of the same cell line enters, drawn anew each time."
            if model_config.training_input == "control"
            else "the treated profile itself enters (the authors' code): only tests on controls mean anything."
        )
        + " When predicting, always a control.",
        "## Training\n\n"
        f"{report['n_train']:,} treated profiles of {description}; held out: {report['held_out']}. "
        f"Started from {'random weights' if config.model is None else 'a pre-trained model'}. "
        f"{_optimization(report, config)}",
        _CLOSING,
    ]
    return "\n\n".join(sections) + "\n"


def _table(report: dict[str, Any]) -> list[str]:
    if not report["figures"]:
        return []
    lines = [f"| {row['figure']} | {row['guess']} | {row['value']:.4f} |" for row in report["figures"]]
    head = (
        f"## On {report['n_validation']:,} profiles held out\n\nHidden genes on the scale of the data. Linear: their "
        "expectation given the visible genes, under a normal distribution with the training profiles' mean and "
        "covariance."
    )
    return ["\n".join([head, "", "| figure | guess | value |", "|---|---|---|", *lines])]


def _response_table(report: dict[str, Any]) -> list[str]:
    if not report["figures"]:
        return []
    lines = [
        f"| {row['predictor']} | {row['mean']:.4f} | {row['delta']:.4f} | {row['mse']:.4f} |"
        for row in report["figures"]
    ]
    head = (
        f"## On {report['n_conditions']} conditions held out\n\nPearson's correlation of mean profiles; of their "
        "changes from the mean of all controls; squared error of mean profiles. This is one split; "
        "`benchmarks/drug_response.py` measures more, with all baselines and metrics."
    )
    return ["\n".join([head, "", "| predictor | Pearson | delta | MSE |", "|---|---|---|---|", *lines])]


def _optimization(report: dict[str, Any], config: Any) -> str:
    return (
        f"{report['steps']:,} steps of {config.batch_size} profiles, AdamW, maximum learning rate "
        f"{config.learning_rate:g} ({config.schedule}), weight decay {config.weight_decay:g}, seed {config.seed}, "
        f"{report['seconds']:.0f} s. All options and versions: `run.json`."
    )
