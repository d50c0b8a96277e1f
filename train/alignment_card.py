"""Model card of an aligned cross-species model, from the run's own figures."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult

from cellglot.publication import shown

from .model_card import front_matter, measured

NAMES = {
    "adversarial": "adversarial alignment (Pang & Tegnér 2020, section 2.2; Conneau, Lample et al. 2018)",
    "procrustes_orthologs": "Procrustes on cells that are each other's nearest in shared one-to-one orthologs",
    "procrustes_genes": "Procrustes on the orthologous genes' coefficients in either PCA",
    "optimal_transport": "the linear map nearest to an optimal transport of the cells",
}


def alignment_card(report: dict[str, Any], config: Any, figures: Sequence[str]) -> str:
    """README.md of a model directory: front matter with `model-index`, then what a reader needs to judge the model."""
    from .alignment_report import format_methods

    source, target = (report["methods"][0][key] for key in ("source", "target"))
    sections = [
        front_matter("cross-species", _results(report), pipeline_tag="feature-extraction", start=config.model),
        f"# Cross-species model that translates, {report['n_components']:,} components",
        f"Cells of one species as cells of another: {NAMES[report['method']]}, on the principal components that an "
        "encoder and a decoder shared by the species were trained on (Pang & Tegnér, ICML 2020 Workshop on "
        "Computational Biology). Trained with [cellglot](https://github.com/cellglot/cellglot), not by its authors.",
        *_limits_first(report),
        "## Loading\n\n" + _LOADING.format(source=source, target=target),
        "## Ways to align, on held-out cells\n\n" + _READING + "\n\n" + format_methods(report["methods"]),
        *[f"![{name.removesuffix('.png')}]({name})" for name in figures],
        "## Cells without counterpart\n\n" + _matchability(report),
        "## Fit\n\n" + _fit(report, config),
        _CLOSING,
    ]
    return "\n\n".join(sections) + "\n"


_LOADING = """\
```python
import cellglot  # registers the classes
from cellglot import CrossSpeciesForTranslation, PCAProjectionFeatureExtractor, translate_cells

model = CrossSpeciesForTranslation.from_pretrained("PATH_OR_REPO")
extractor = PCAProjectionFeatureExtractor.from_pretrained("PATH_OR_REPO")
translated = translate_cells("cells.h5ad", model, extractor, source="{source}", target="{target}")
```

Without cellglot, the code saved here loads both, `AutoModelForPreTraining` and `AutoFeatureExtractor` with
`trust_remote_code=True`, and translates principal components; `translate_cells` is cellglot's."""

_READING = (
    "Criterion: mean cosine of mapped cells to their CSLS neighbours, which needs no label. Wasserstein: order 2, of "
    "mapped cells to the target's, in units of their root mean square length, mean and standard deviation over ten "
    "resamples. Matchability: mean score of either side's cells. F1: macro F1 of classes carried over by the 15 "
    "nearest training cells of the other species, on classes that both have. `none` lays the k-th component on the "
    "k-th. The first three are no proof: cells of different types may lie on each other just as well."
)

_CLOSING = """\
## Licence and citation

Code: Apache-2.0. The weights carry whatever terms the training data carry.

Pang, M., Tegnér, J. Representation Learning and Translation between the Mouse and Human Brain using a Deep Transformer
Architecture. ICML 2020 Workshop on Computational Biology.

Conneau, A., Lample, G., Ranzato, M., Denoyer, L., Jégou, H. Word Translation Without Parallel Data. ICLR 2018."""


def _results(report: dict[str, Any]) -> list[EvalResult]:
    metrics = []
    for row in report["methods"]:
        if row["method"] != report["method"]:
            continue
        pair = f"{row['source']} -> {row['target']}"
        for key, name in (("f1_to_target", "source to target"), ("f1_to_source", "target to source")):
            if key in row:
                metrics.append(("f1", f"label transfer, macro F1, {pair}, {name}", round(row[key], 4)))
        metrics.append(("wasserstein", f"Wasserstein distance, {pair}", round(row["wasserstein"], 4)))
    task = ("feature-extraction", "translation between species")
    return measured(task, f"{' and '.join(report['n_cells'])} cells", "validation", metrics)


def _limits_first(report: dict[str, Any]) -> list[str]:
    """What speaks against the model, at the top."""
    lines = []
    for source, target in dict.fromkeys((row["source"], row["target"]) for row in report["methods"]):
        rows = [row for row in report["methods"] if (row["source"], row["target"]) == (source, target)]
        score = {row["method"]: row["f1_to_target"] + row["f1_to_source"] for row in rows if "f1_to_target" in row}
        best = max(score, key=score.__getitem__, default=None)
        if best is not None and score[best] > score[report["method"]]:
            lines.append(
                f"**`{best}` carries classes between {source} and {target} better than the method of this model "
                f"(mean macro F1 {score[best] / 2:.3f} against {score[report['method']] / 2:.3f}).**"
            )
        if not any(f1 == f1 for f1 in score.values()):
            lines.append(
                f"**No class of cells is known by one name in both {source} and {target}, so that nothing here says "
                "whether cells lie with their own type: align with `--cell_type`, and `--classes` to name alike what "
                "the sources name differently.**"
            )
    least = min(n["train"] for n in report["n_cells"].values())
    if least < 10_000:
        lines.append(
            f"Aligned on as few as {least:,} cells of a species: a demonstration that the method runs, not a model to "
            "draw biological conclusions from."
        )
    return ["\n\n".join(lines)] if lines else []


def _matchability(report: dict[str, Any]) -> str:
    lines = [
        f"| {row['source']} | {row['class']} | {row['n']:,} | {row['median']:.2f} | {row['lower_quartile']:.2f} |"
        for row in report["matchability"]
    ]
    return "\n".join(
        [
            "Share of its mass that unbalanced optimal transport sends to the other species, 0 to 1; every cell's is "
            "in `matchability.parquet` beside the model. Low scores say that nothing like the cell was found.",
            "",
            "| species | class | cells | median | lower quartile |",
            "|---|---|---|---|---|",
            *lines,
        ]
    )


def _fit(report: dict[str, Any], config: Any) -> str:
    cells = ", ".join(
        f"{name} {n['train']:,} cells, {n['held_out']:,} held out" for name, n in report["n_cells"].items()
    )
    return (
        f"{cells} (fingerprint `{report['data']}`), pre-trained model `{shown(config.model)}`, orthologs "
        f"{'of `' + shown(config.orthologs) + '`' if config.orthologs else 'not used'}, seed {config.seed}. All "
        "options and versions: `run.json`."
    )
